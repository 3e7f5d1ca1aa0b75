"""The commands of a site: what an approval shows, asks, writes and leaves alone."""

from __future__ import annotations

import io
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import tomlkit

from fedaccord import accord as accords
from fedaccord import cli
from fedaccord.client import policy, policy_file
from fedaccord.client.policy import SitePolicy
from fedaccord.privacy.ledger import Ledger, Terms
from fedaccord.privacy.plan import plan_for

HEART = accords.load("heart")
HEAVY = {"torch", "flwr", "opacus", "fairlearn", "dp_accounting", "matplotlib", "ray"}
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run `fedaccord site` in this process; its exit code and what it wrote, on one line each."""

    def call(*words: str | Path, answer: str | None = None) -> tuple[int, str, str]:
        stdin = io.StringIO(answer or "")
        stdin.isatty = lambda: answer is not None  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(sys, "argv", ["fedaccord", "site", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "500")
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


def lines(out: str) -> list[str]:
    """The lines of a table without the space around them."""
    return [line.strip().removeprefix("- ") for line in out.splitlines()]


def simulated(folder: Path, accord: accords.Accord = HEART) -> Path:
    """A site that takes part in an accord."""
    policy.of_site(folder, accord)
    return folder


def test_an_approval_shows_what_a_site_agrees_to(tmp_path: Path, called: Call) -> None:
    site = simulated(tmp_path / "va")
    policy_file.revoke(site / "policy.toml", HEART.digest)
    code, out, err = called("approve", "heart", "--site", site, "--yes")
    plan = plan_for(HEART, "va")
    assert plan is not None
    assert (code, err) == (0, "")
    for said in (
        HEART.purpose,
        "UCI Heart Disease",
        "va (this site)",
        "130 training subjects, 130 records",
        "20 and 2 spare, of 10 steps each",
        plan.statement(),
        "cnn1d, 314 parameters",
        "epsilon 3.6 at delta 0.0001; used so far 0.00, with one run of this plan 3.00, left then",
        "weights, in at most 22 rounds: covered by the plan above",
        "by sex, label and prediction of the model and the student, in every round: exact, not",
        "the coordinator: all that leaves, the weights with the noise added here",
        "would let it in",
        HEART.digest,
    ):
        assert said in out
    for other in ("cleveland", "hungary", "switzerland"):
        assert any(line.endswith(other) for line in lines(out))
    assert "would still refuse" not in out
    assert SitePolicy.read(site / "policy.toml").approved == [HEART.digest]


def test_a_plan_and_what_is_spent_are_held_against_each_cap(tmp_path: Path, called: Call) -> None:
    site = simulated(tmp_path / "va")
    path = site / "policy.toml"
    path.write_text(path.read_text() + f"\n[accords.{HEART.digest}]\nmax_epsilon = 2.5\n")
    own = SitePolicy.read(path)
    book = Ledger(site / "ledger.sqlite", "va")
    terms = Terms(cap=own.cap, accord="e" * 64, dataset="heart")
    book.reserve("earlier", plan_for(HEART, "va"), HEART.reserved_rounds, terms)
    before = book.entries()
    book.close()
    code, out, _ = called("approve", "heart", "--site", site)
    assert code == 0
    assert (
        "cap over all accords: epsilon 3.6 at delta 0.0001; used so far 3.00, with one run" in out
    )
    assert "cap over the runs of this accord: epsilon 2.5 at delta 0.0001; used so far 0.00" in out
    refused = [line for line in lines(out) if "would still refuse by max_epsilon" in line]
    assert len(refused) == 2
    assert " over all accords, above 3.6." in refused[0]
    assert " over the runs of this accord, above 2.5." in refused[1]
    again = Ledger(site / "ledger.sqlite", "va")
    assert again.entries() == before  # looking costs nothing
    again.close()


def test_a_first_approval_says_every_rule_that_still_refuses_and_writes_the_digest_alone(
    tmp_path: Path, called: Call
) -> None:
    site = tmp_path / "va"
    code, out, _ = called("approve", "heart", "--site", site, "--yes")
    assert code == 0
    said = [line.partition("would still refuse by ")[2] for line in lines(out)]
    refusing = [words.split(":")[0] for words in said if words]
    assert refusing == ["delta", "models", "releases", "max_epsilon"]
    own = SitePolicy.read(site / "policy.toml")
    assert own == policy_file.strict_policy(site).model_copy(update={"approved": [HEART.digest]})
    assert sorted(path.name for path in site.iterdir()) == ["policy.toml"]  # no ledger was made


def test_an_approval_again_changes_nothing_and_a_revocation_takes_it_back(
    tmp_path: Path, called: Call
) -> None:
    site = tmp_path / "va"
    called("approve", "heart", "--site", site, "--yes")
    text = (site / "policy.toml").read_text()
    assert "# heart, approved 20" in text
    code, out, _ = called("approve", "heart", "--site", site)
    assert (code, "approved already; nothing was changed" in out) == (0, True)
    assert (site / "policy.toml").read_text() == text
    code, out, _ = called("revoke", "heart", "--site", site)
    assert (code, "heart is approved no longer." in out) == (0, True)
    assert SitePolicy.read(site / "policy.toml").approved == []
    code, out, _ = called("revoke", "heart", "--site", site)
    assert (code, "nothing was changed." in out) == (0, True)
    called("approve", "heart", "--site", site, "--yes")
    called("revoke", HEART.digest, "--site", site)  # its file may be gone
    assert SitePolicy.read(site / "policy.toml").approved == []


@pytest.mark.parametrize(
    ("answer", "code", "written"),
    [("y\n", 0, True), ("n\n", 1, False), ("\n", 1, False), ("", 1, False), (None, 2, False)],
)
def test_nothing_is_written_without_a_yes(
    answer: str | None, code: int, written: bool, tmp_path: Path, called: Call
) -> None:
    ended, out, err = called("approve", "heart", "--site", tmp_path / "va", answer=answer)
    assert ended == code
    assert (tmp_path / "va" / "policy.toml").exists() == written
    assert HEART.digest in out  # it was shown
    if answer is None:
        assert err.startswith("fedaccord: site approve asks for a yes, and there is no terminal")
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["approve", "heart", "--site", "SITE/ward", "--yes"],
            'site "ward" is not among the sites',
        ),
        (["approve", "hart", "--site", "SITE/va", "--yes"], 'accord "hart": no such file'),
        (["approve", "heart", "--site", "SITE/bad", "--yes"], 'key "delta" is missing'),
        (["revoke", "heart", "--site", "SITE/va"], "is missing, and a site without a policy takes"),
        (["policy", "--site", "SITE/va"], "is missing, and a site without a policy takes part in"),
    ],
)
def test_a_mistake_is_one_line_with_exit_code_2_and_writes_nothing(
    words: list[str], says: str, tmp_path: Path, called: Call
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "policy.toml").write_text("max_epsilon = 3.0\n")
    code, _, err = called(*(word.replace("SITE", str(tmp_path)) for word in words))
    assert (code, err.count("\n")) == (2, 1)
    assert says in err
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]
    assert (tmp_path / "bad" / "policy.toml").read_text() == "max_epsilon = 3.0\n"


def test_a_folder_of_another_name_takes_the_sites_name_from_an_option(
    tmp_path: Path, called: Call
) -> None:
    code, out, _ = called("approve", "heart", "--site", tmp_path / "x", "--name", "va", "--yes")
    assert (code, "va (this site)" in out) == (0, True)


def test_words_of_an_accord_cannot_move_the_cursor_or_mark_up_the_page(
    tmp_path: Path, called: Call
) -> None:
    text = accords.bundled()["heart"].read_text(encoding="utf-8")
    evil = text.replace('purpose = "Detect', 'purpose = "\\u001b[2J\\u202e[red]Detect')
    (tmp_path / "evil.toml").write_text(evil, encoding="utf-8")
    _, out, _ = called("approve", tmp_path / "evil.toml", "--site", tmp_path / "va", "--yes")
    assert "?[2J?[red]Detect coronary disease" in out
    assert "\x1b" not in out and "\u202e" not in out


def test_an_accord_without_privacy_or_with_its_noise_at_the_coordinator_says_so(
    tmp_path: Path, called: Call
) -> None:
    text = accords.bundled()["heart"].read_text(encoding="utf-8")
    plain = text.replace("enabled = true       # false", "enabled = false # ")
    assert plain != text
    (tmp_path / "plain.toml").write_text(plain, encoding="utf-8")
    agreed = accords.load(tmp_path / "plain.toml")
    site = simulated(tmp_path / "va", agreed)
    _, out, _ = called("approve", tmp_path / "plain.toml", "--site", site)
    for said in (
        "none: privacy is off, epsilon infinite",
        "no cap over all accords (max_epsilon = inf)",
        "rounds: not covered: privacy is off",
        "the weights without noise",
        "would let it in",
    ):
        assert said in out
    client = tomllib.loads(text)
    client["privacy"] = {
        "unit": "client",
        "clipping_norm": 1.0,
        "noise_multiplier": 3.0,
        "sampling_prob": 0.1,
    }
    (tmp_path / "client.toml").write_text(tomlkit.dumps(client), encoding="utf-8")
    agreed = accords.load(tmp_path / "client.toml")
    _, out, _ = called("approve", tmp_path / "client.toml", "--site", tmp_path / "va", "--yes")
    plan = plan_for(agreed, "va")
    assert plan is not None
    assert plan.statement() in out
    assert "weights, in at most 22 rounds: not covered against the coordinator" in out
    assert "the weights without noise" in out


def test_the_policy_in_force_is_printed_with_every_key(tmp_path: Path, called: Call) -> None:
    site = simulated(tmp_path / "va")
    code, out, _ = called("policy", "--site", site)
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if "│" in line}
    assert code == 0
    assert list(rows) == list(SitePolicy.model_fields)
    assert "2.0108" in rows["min_noise_multiplier"]
    assert "(default)" in rows["expires"] and "(default)" not in rows["hours"]
    assert f"approved {HEART.digest}" in out.splitlines()


@pytest.mark.parametrize("words", [["--help"], ["policy", "--site", "SITE"]])
def test_looking_at_a_policy_imports_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    site = simulated(tmp_path / "va")
    words = [str(site) if word == "SITE" else word for word in words]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "fedaccord.cli", "site", *words],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "typer" in loaded
    assert loaded & HEAVY == set()
