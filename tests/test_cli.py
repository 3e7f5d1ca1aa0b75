"""The command line: light to start, one line and exit code 2 for what a user can mend."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from wards import Call

from fedaccord import accord as accords
from fedaccord.privacy import accounting
from fedaccord.privacy.ledger import Ledger
from fedaccord.privacy.plan import plan_for
from fedaccord.runs import RunFolder

HEART = accords.bundled()["heart"].read_text(encoding="utf-8")
HEAVY = {"torch", "flwr", "opacus", "fairlearn", "dp_accounting", "matplotlib", "ray"}

# A test runner in the background ignores SIGINT, and its children would as well.
INTERRUPTIBLE = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from fedaccord.cli import main; main()"
)

TINY = """
name = "tiny"
purpose = "Test."
task = { name = "heart" }
sites = [{ name = "hungary", subjects = 200 }, { name = "va", subjects = 130 }]
model = { name = "mlp", options = { hidden = 4 } }
rounds = { rounds = 2, min_sites = 2 }
training = { steps = 2, learning_rate = 0.1 }
privacy = { target_epsilon = 2.0, max_epsilon = 2.4, delta = 1e-4, sampling_prob = 0.1 }
fairness = { attributes = ["sex"] }
distillation = { enabled = false }
"""


def command(*words: str | Path) -> tuple[int, str, str]:
    """Run `fedaccord` as a user does, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "fedaccord.cli", *map(str, words)], capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


# --- light to start -----------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["check", "heart"]])
def test_help_and_check_import_nothing_heavy(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "fedaccord.cli", *words],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "fedaccord" in imported  # the list is one
    assert {name for name in imported if name.split(".")[0] in HEAVY} == set()


def test_check_prints_every_key_and_the_digest(called: Call) -> None:
    code, out, err = called("check", "heart")
    assert (code, err) == (0, "")
    agreed = accords.load("heart")
    assert f"digest {agreed.digest}" in out
    for key in ("tuning", "privacy.target_epsilon", "rounds.sites_per_round", "0.0001"):
        assert key in out


@pytest.mark.parametrize("words", ["[draft] of a purpose", "see [/1] for more"])
def test_check_prints_brackets_as_they_are(words: str, tmp_path: Path, called: Call) -> None:
    (tmp_path / "tiny.toml").write_text(TINY.replace("Test.", words))
    code, out, _ = called("check", tmp_path / "tiny.toml")
    assert code == 0
    assert words in out
    assert "sites[va].subjects" in out


def test_a_bundled_accord_is_found_by_its_name_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert accords.load("heart").digest == accords.parse(accords.tomllib.loads(HEART)).digest


# --- what a user can mend -----------------------------------------------------------------------


def one_line(code: int, out: str, err: str) -> str:
    assert code == 2
    assert out == ""
    assert err.startswith("fedaccord: ") and err.endswith("\n")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def broken(folder: Path, old: str, new: str) -> Path:
    assert HEART.count(old) == 1
    path = folder / "mine.toml"
    path.write_text(HEART.replace(old, new))
    return path


def test_a_misspelt_key_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    path = broken(tmp_path, "sampling_prob =", "samplng_prob =")
    said = one_line(*command("simulate", path, "--out", tmp_path / "runs"))
    assert 'key "privacy.samplng_prob" is not known. Did you mean "sampling_prob"?' in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("option", ["--sites", "--out"])
def test_a_file_where_a_folder_belongs_is_one_line_before_anything_starts(
    tmp_path: Path, option: str
) -> None:
    (tmp_path / "file").touch()
    said = one_line(*command("simulate", "heart", option, tmp_path / "file"))
    assert said == f"fedaccord: {option} {tmp_path / 'file'}: is a file. Name a folder.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_is_not_a_run_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    said = one_line(*command("verify", tmp_path))
    assert f"run {tmp_path}: not a run folder" in said


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("target_epsilon = 3.0", "target_epsilon = -3.0", "must be greater than 0. Raise it."),
        ('name = "cnn1d"', 'name = "cnn1e"', 'Did you mean "cnn1d"?'),
        ('name = "va"', 'name = "mars"', 'task heart has no site "mars".'),
        ('attributes = ["sex"]', 'attributes = ["age"]', 'task heart has no attribute "age".'),
        ("kernel = ", "kernal = ", "unexpected keyword argument 'kernal'"),
        ("groups = 2", "groups = 0", "groups = 0 must be a whole number from 1"),
        ("[training]", "[training", "is not TOML: "),
    ],
)
def test_a_wrong_accord_is_one_line_and_exit_code_2(
    old: str, new: str, said: str, tmp_path: Path, called: Call
) -> None:
    path = broken(tmp_path, old, new)
    assert said in one_line(*called("simulate", path, "--out", tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("verb", ["check", "simulate"])
def test_a_missing_accord_is_one_line_and_exit_code_2(verb: str, called: Call) -> None:
    assert 'accord "nowhere.toml": no such file.' in one_line(*called(verb, "nowhere.toml"))


@pytest.mark.parametrize("verb", ["report", "verify"])
@pytest.mark.parametrize("where", ["empty", "absent", "file"])
def test_what_is_not_a_run_is_one_line_and_exit_code_2(
    verb: str, where: str, tmp_path: Path, called: Call
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    said = one_line(*called(verb, tmp_path / where))
    assert f"run {tmp_path / where}: not a run folder" in said


@pytest.mark.parametrize("line", ["", "{", "3", '{"id": NaN}', "\xff"])
def test_a_report_of_a_damaged_run_is_one_line_and_exit_code_2(
    line: str, tmp_path: Path, called: Call
) -> None:
    (tmp_path / "accord.toml").write_text(HEART)
    (tmp_path / "rounds.jsonl").write_bytes(line.encode("latin-1") + b"\n")
    assert "line 1 of rounds.jsonl is not a record" in one_line(*called("report", tmp_path))


def test_a_folder_that_cannot_be_written_is_one_line_and_exit_code_2(
    tmp_path: Path, called: Call
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "tiny.toml").write_text(TINY)
    out = tmp_path / "file" / "inside"
    said = one_line(*called("simulate", tmp_path / "tiny.toml", "--out", out))
    assert "cannot be written: Not a directory. Name another folder." in said


def test_a_command_that_is_not_known_leaves_exit_code_2(called: Call) -> None:
    code, _, err = called("simulat", "heart")
    assert code == 2
    assert "No such command 'simulat'" in err


# --- the budget of a site outlives a run --------------------------------------------------------


def test_a_site_that_was_left_out_is_named_with_its_reason(tmp_path: Path, called: Call) -> None:
    (tmp_path / "tiny.toml").write_text(TINY.replace("min_sites = 2", "min_sites = 1"))
    words = ["simulate", tmp_path / "tiny.toml", "--sites", tmp_path / "sites", "--out"]
    (tmp_path / "sites" / "va").mkdir(parents=True)
    (tmp_path / "sites" / "va" / "policy.toml").write_text("max_epsilon = 2.4\ndelta = 1e-4\n")
    code, out, _ = called(*words, tmp_path / "runs")
    assert code == 0
    said = " ".join(out.split())
    assert "Left out va: Site va refuses by its rule approved" in said
    assert "Left out hungary" not in said


def test_a_second_run_on_the_same_sites_that_does_not_fit_is_refused_before_round_1(
    tmp_path: Path, called: Call
) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    words = ["simulate", tmp_path / "tiny.toml", "--sites", tmp_path / "sites"]
    code, out, _ = called(*words, "--out", tmp_path / "first")
    assert code == 0
    (first,) = (tmp_path / "first").iterdir()
    report = json.loads((first / "report.json").read_text())
    assert report["headline"] in " ".join(out.split())
    assert "Not protected" in out
    assert str(first / "report.html") in out
    ledgers = {s: (tmp_path / "sites" / s / "ledger.sqlite") for s in ("hungary", "va")}

    said = one_line(*called(*words, "--out", tmp_path / "second"))
    plan = plan_for(accords.load(tmp_path / "tiny.toml"), "hungary")
    assert plan is not None
    needs, left = accounting.show(plan.epsilon()), 2.4 - plan.epsilon()
    assert said.startswith(
        f"fedaccord: This plan needs epsilon {needs}; site hungary has {int(left * 100) / 100:.2f} "
        "of 2.40 left at delta 0.0001. Plan fewer rounds, raise privacy.noise_multiplier, or ask "
        "the site to raise its cap."
    )
    # Two such plans compose to more than the cap, as dp-accounting has it.
    both = accounting.compose([plan.event(), plan.event()])
    assert accounting.epsilon(both, plan.delta) > 2.4
    (second,) = (tmp_path / "second").iterdir()
    kinds = [json.loads(line)["kind"] for line in (second / "rounds.jsonl").open()]
    assert kinds == ["start", "out", "out", "end"]
    for site, path in ledgers.items():
        book = Ledger(path, site)
        rounds = [(e["kind"], e["run"] == second.name) for e in book.entries()]
        assert [kind for kind, of_second in rounds if of_second] == ["REFUSAL"]
        book.close()


def test_ctrl_c_says_where_the_finished_rounds_are(tmp_path: Path) -> None:
    command = [sys.executable, "-c", INTERRUPTIBLE, "simulate", "heart", "--out", str(tmp_path)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while running.poll() is None and not list(tmp_path.glob("*/checkpoints/*")):
        assert time.monotonic() < end
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    (run,) = tmp_path.iterdir()
    assert running.returncode == 130
    assert err.splitlines()[-1].startswith(
        f"fedaccord: interrupted. What was finished is in {run};"
    )
    assert RunFolder.open(run).records()[0]["kind"] == "start"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name = "va"', 'name = "vaa"', 'no site "vaa". Did you mean "va"?'),
        ('["sex"]', '["gender"]', 'no attribute "gender". Known: sex.'),
        ('["sex"] }', '["sex"] }\nstrategy = { name = "krum" }', "Set rounds.min_sites to 5"),
        ('["sex"] }', '["sex"] }\nstrategy = { options = { et = 1 } }', "Known: none"),
    ],
)
def test_check_holds_an_accord_to_its_task_and_its_strategy(
    old: str, new: str, words: str, tmp_path: Path, called: Call
) -> None:
    (tmp_path / "tiny.toml").write_text(TINY.replace(old, new))
    assert words in one_line(*called("check", tmp_path / "tiny.toml"))


def test_a_run_that_is_not_on_a_terminal_says_a_line_a_round(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    command = [sys.executable, "-m", "fedaccord.cli", "simulate", str(tmp_path / "tiny.toml")]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "runs")], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["round 1", "round 2"]
    assert "Stopped  rounds done: 2 of 2" in lines
    assert done.stderr == ""


def test_a_mistyped_option_is_one_line_that_names_the_nearest() -> None:
    said = one_line(*command("simulate", "heart", "--sitez", "x"))
    assert "No such option '--sitez'. Did you mean '--sites'?" in said
