"""The commands that provision: from nothing to a running start, and what they refuse."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from kitted import HEART, contents

from fedaccord import accord as accords
from fedaccord import cli, keys
from fedaccord.client.policy import SitePolicy
from fedaccord.kit import CoordinatorKit, SiteKit

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command in this process; its exit code and what it wrote."""

    def call(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["fedaccord", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return call


def test_the_commands_take_a_site_from_nothing_to_a_certificate(
    tmp_path: Path, called: Call
) -> None:
    out = tmp_path / "kits"
    address = ("--address", "fed.example.org:8443")
    code, said, err = called("provision", "heart", "--out", out, *address)
    assert (code, err) == (0, "")
    assert "Waits for the requests of: cleveland, hungary, switzerland, va." in said
    code, said, err = called("site", "init", out / "va")
    assert (code, err) == (0, "")
    mine, theirs = (
        line for line in said.splitlines() if "telephone" in line or "site.toml" in line
    )
    assert mine.split(": ")[1] in called("site", "init", out / "va")[1]
    assert theirs.split(": ")[1] in (out / "va" / "README.md").read_text()
    (out / "requests").mkdir()
    shutil.move(out / "va" / "request.json", out / "requests" / "va.json")
    code, said, err = called("provision", "heart", "--out", out)
    assert (code, err) == (0, "")
    assert mine in said and "requests of: cleveland, hungary, switzerland." in said
    assert SitePolicy.read(out / "va" / "va" / "policy.toml").approved == []
    members = (out / "coordinator" / "members.json").read_bytes()
    shutil.copytree(out / "va", tmp_path / "va")
    shutil.rmtree(out / "va")  # it was sent away
    assert called("provision", "heart", "--out", out)[0] == 0
    assert (out / "coordinator" / "members.json").read_bytes() == members
    shutil.rmtree(out / "va")
    shutil.copytree(tmp_path / "va", out / "va")
    code, said, err = called("site", "rotate", out / "va", "--key")
    assert (code, err) == (0, "") and mine not in said
    request = ("--request", out / "va" / "request.json")
    code, said, err = called("provision", "heart", "--out", out, *request)
    assert (code, err) == (0, "") and "va: certificate until" in said
    assert called("provision", "heart", "--out", out)[0] == 0  # the older request is passed over
    code, said, err = called("coordinator", "revoke", out, "va", "--reason", "left the accord")
    assert (code, err) == (0, "") and "left the accord" in said
    assert "left the accord" in CoordinatorKit.read(out).members()["va"].revoked
    assert called("provision", "heart", "--out", out)[0] == 0  # so is that of a revoked site
    code, said, err = called("coordinator", "rotate", out, "--key")
    assert (code, err) == (0, "") and theirs.split(": ")[1] not in said


def test_a_demo_is_ready_to_run_and_says_that_it_is_one(tmp_path: Path, called: Call) -> None:
    out = tmp_path / "kits"
    code, said, err = called("provision", "heart", "--out", out, "--demo")
    assert (code, err) == (0, "") and "For trying out only" in said
    final = accords.load(out / "coordinator" / "accord.toml")
    assert final.pins.keys() == HEART.roster.keys() and final.digest in said
    for name in HEART.roster:
        kit = SiteKit.read(out / name)
        own = SitePolicy.read(kit.site / "policy.toml")
        at = {"kind": "train", "parameters": 314, "now": datetime.now(UTC)}
        assert own.broken(accords.load(kit.accord_file), name, **at) == {}
        assert keys.load(kit.identity_key).public == final.pins[name]
        assert kit.tls_key.exists()
    before = contents(out)
    assert called("provision", "heart", "--out", out, "--demo")[0] == 0
    assert contents(out) == before
    code, _, err = called("provision", "heart", "--out", out)
    assert code == 2 and "was made with --demo. Give --demo, or another --out" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("provision", "heart", "--out", "kits"), "--address is missing"),
        (("provision", "heart", "--out", "kits", "--address", "a"), "is no address"),
        (("provision", "no.toml", "--out", "kits"), "no such file"),
        (("site", "init", "nowhere"), "there is no site.toml in it"),
        (("site", "rotate", "nowhere"), "there is no site.toml in it"),
        (("coordinator", "revoke", "x", "va", "--reason", "r"), "there is no coordinator.toml"),
        (("coordinator", "rotate", "x"), "there is no coordinator.toml"),
    ],
)
def test_a_command_that_cannot_go_on_says_so_in_one_line_and_writes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    called: Call,
    words: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = called(*words)
    assert (code, out) == (2, "")
    assert said in err and err.count("\n") == 1 and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
