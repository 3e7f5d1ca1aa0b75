"""The coordinator's process: which run it carries out, how it stands, and its commands' faults."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from kitted import HEART, enrolled
from rich.console import Console

from fedaccord import accord as accords
from fedaccord.errors import RunError
from fedaccord.evidence import canonical_json
from fedaccord.kit import CoordinatorKit
from fedaccord.server import coordinator
from fedaccord.server.coordinator import STATE, STATUS, Ended, which
from fedaccord.standing import Standing

Called = Callable[..., tuple[int, str, str]]


@pytest.fixture
def kit(tmp_path: Path) -> CoordinatorKit:
    """A coordinator's kit before its first run."""
    folder = tmp_path / "kits" / "coordinator"
    folder.mkdir(parents=True)
    text = 'listen = "127.0.0.1:0"\naddresses = ["127.0.0.1:8443"]\n'
    (folder / "coordinator.toml").write_text(text)
    (folder / "members.json").write_text("{}")
    (folder / "accord.toml").write_bytes(accords.find("heart").read_bytes())
    return CoordinatorKit.read(folder)


def leave(folder: Path, *files: str) -> None:
    """Leave what a run of that folder would have left."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in files:
        (folder / name).write_text("{}\n")


def said(kit: CoordinatorKit, **changes: object) -> dict[str, object]:
    """What a coordinator that is up writes of itself."""
    about = {"state": "up", "pid": os.getpid(), "address": "127.0.0.1:8443", "time": time.time()}
    return about | {"run": str(kit.folder / "runs" / "x"), "sites": {}} | changes


def test_a_run_that_left_no_record_is_begun_anew(kit: CoordinatorKit) -> None:
    first = which(kit, HEART, new=False)
    assert not first.resume and json.loads((kit.folder / STATE).read_bytes()) == {
        "run": first.folder.name
    }
    assert which(kit, HEART, new=False).folder != first.folder


def test_a_run_that_was_cut_short_is_gone_on_with_and_no_other_begins(kit: CoordinatorKit) -> None:
    first = which(kit, HEART, new=False)
    leave(first.folder, "rounds.jsonl")
    again = which(kit, HEART, new=False)
    assert again.resume and again.folder == first.folder
    with pytest.raises(RunError, match="was cut short, and what its sites reserved stays reserved"):
        which(kit, HEART, new=True)


def test_a_run_that_has_ended_is_repeated_only_when_somebody_says_so(kit: CoordinatorKit) -> None:
    first = which(kit, HEART, new=False)
    leave(first.folder, "rounds.jsonl", "manifest.json")
    with pytest.raises(Ended, match=r"has come to its end\. Say `--new`"):
        which(kit, HEART, new=False)
    assert which(kit, HEART, new=True).folder != first.folder


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"run": 3', '{"ran": "x"}'])
def test_a_damaged_state_is_one_line(kit: CoordinatorKit, text: str) -> None:
    (kit.folder / STATE).write_text(text)
    with pytest.raises(RunError, match=r"run\.json: is damaged\. Write the run's name there"):
        which(kit, HEART, new=False)


def test_a_state_that_names_a_path_leads_nowhere_else(kit: CoordinatorKit, tmp_path: Path) -> None:
    leave(tmp_path / "elsewhere", "rounds.jsonl")
    (kit.folder / STATE).write_text(canonical_json({"run": "../../../elsewhere"}))
    assert which(kit, HEART, new=False).folder.parent == kit.folder / "runs"
    assert not which(kit, HEART, new=False).resume


def test_an_accord_without_every_sites_key_does_not_open_the_link(kit: CoordinatorKit) -> None:
    with (
        pytest.raises(RunError, match="pins no key for cleveland, hungary, switzerland, va"),
        coordinator.opened(kit, HEART, coordinator.Which(kit.folder / "runs" / "x", False)),
    ):
        raise AssertionError("it opened")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "up (process"),
        ({"state": "down"}, "down (process"),
        ({"time": time.time() - 60}, "silent for"),
        ({"pid": 2**22 + 1}, "gone without a word (killed?)"),
    ],
)
def test_the_state_tells_a_killed_coordinator_from_one_that_was_stopped(
    kit: CoordinatorKit, changes: dict[str, object], words: str
) -> None:
    (kit.folder / STATUS).write_text(json.dumps(said(kit, **changes)))
    standing = Standing(kit, HEART)
    assert standing.state(standing.said()).startswith(words)


def test_the_table_shows_each_site_and_who_was_revoked(tmp_path: Path) -> None:
    kits = enrolled(tmp_path / "kits")
    own = CoordinatorKit.read(kits.coordinator)
    members = own.members()
    revoked = members["va"].model_copy(update={"revoked": "2026-11-22: left"})
    own.write_members(members | {"va": revoked})
    here = {site: {"here": True, "heard": 1.0, "asked": ["train"]} for site in HEART.roster}
    (own.folder / STATUS).write_text(json.dumps(said(own, sites=here)))
    console = Console(width=100)
    with console.capture() as caught:
        console.print(Standing(own, HEART))
    rows = {line.split()[0]: line for line in caught.get().splitlines() if line.strip()}
    assert "yes" in rows["cleveland"] and "train" in rows["cleveland"]
    assert "revoked" in rows["va"] and "yes" not in rows["va"]


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("coordinator", "down"), "is never started. Nothing to stop."),
        (("coordinator", "audit"), "audit.jsonl: no such file. It is begun when the coordinator"),
        (("coordinator", "up"), "pins no key for cleveland, hungary, switzerland, va"),
        (("site", "join"), "there is no site.toml in it"),
    ],
)
def test_a_command_that_cannot_be_is_one_line_and_exit_code_2(
    kit: CoordinatorKit, called: Called, words: tuple[str, ...], fault: str
) -> None:
    code, _, told = called(*words, kit.folder)
    assert code == 2 and fault in told and len(told.splitlines()) == 1


def test_the_status_of_a_coordinator_that_never_ran_says_so_with_exit_code_1(
    kit: CoordinatorKit, called: Called
) -> None:
    code, out, _ = called("coordinator", "status", kit.folder, "--once")
    assert code == 1 and "never started" in out and "cleveland" in out
