"""The journal: one JSON object a line, bounded, private to its owner, without values of records."""

from __future__ import annotations

import json
import logging
import os
import string
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import tomlkit
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st
from wards import small_accord

from fedaccord import journal
from fedaccord.accord import load
from fedaccord.client.app import answer
from fedaccord.client.site import Site
from fedaccord.errors import PolicyError, TaskError
from fedaccord.simulations.engine import InProcessGrid
from fedaccord.simulations.heart import Heart

log = logging.getLogger("fedaccord.site")
PLANTED = ("Mrs Ada Byron", "1815-12-10", "37.251937")  # as a record might hold them


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A journal in a folder that is not there yet."""
    where = tmp_path / "logs" / "site.jsonl"
    handler = journal.to_file(where, "cleveland", most_bytes=4000, kept=2)
    yield where
    journal.close(handler)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


def test_an_event_is_one_line_with_time_level_component_event_and_fields(path: Path) -> None:
    before = datetime.now(UTC)
    journal.event(log, "round.begun", round=3, run="heart-1")
    (line,) = read(path)
    when = datetime.fromisoformat(line.pop("time"))
    assert -0.001 <= (when - before).total_seconds() < 60 and when.utcoffset().total_seconds() == 0
    assert line == {
        "level": "info",
        "component": "cleveland",
        "event": "round.begun",
        "fields": {"round": 3, "run": "heart-1"},
    }


def test_the_three_loggers_are_heard_and_others_are_not(path: Path) -> None:
    for name in (*journal.LOGGERS, "fedaccord.private", "fedaccord.other", "root"):
        logging.getLogger(name).warning("said by %s", name)
    assert [line["event"] for line in read(path)] == list(journal.LOGGERS)


def test_less_than_the_level_is_not_written(tmp_path: Path) -> None:
    handler = journal.to_file(tmp_path / "j", "x", level=logging.WARNING)
    journal.event(log, "small")
    journal.event(log, "large", level=logging.WARNING)
    journal.close(handler)
    journal.event(log, "after", level=logging.ERROR)
    assert [line["event"] for line in read(tmp_path / "j")] == ["large"]


def test_only_the_owner_may_read_it_whatever_umask_and_an_older_mode_say(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.touch(mode=0o644)
    old = os.umask(0)
    try:
        handler = journal.to_file(path, "x", most_bytes=300, kept=1)
        for number in range(9):
            journal.event(log, "filler", number=number)
    finally:
        os.umask(old)
        journal.close(handler)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}
    assert len(list(tmp_path.iterdir())) == 2


def test_the_files_stay_within_their_size_and_number(path: Path) -> None:
    for number in range(200):
        journal.event(log, "filler", number=number, text="x" * 50)
    files = sorted(path.parent.iterdir())
    assert [file.name for file in files] == ["site.jsonl", "site.jsonl.1", "site.jsonl.2"]
    assert all(2000 < file.stat().st_size <= 4000 for file in files[1:])
    assert read(path)[-1]["fields"]["number"] == 199  # the newest is what is kept
    assert files[0].stat().st_size <= 4000


@given(
    fields=st.dictionaries(
        st.sampled_from(string.ascii_lowercase),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=20,
        ),
    ),
    words=st.text(),
)
@settings(max_examples=25, deadline=None)
def test_whatever_is_logged_makes_one_line_of_plain_ascii(tmp_path_factory, fields, words) -> None:
    path = tmp_path_factory.mktemp("journal") / "j"
    handler = journal.to_file(path, "x", most_bytes=10**9)
    journal.event(log, "event", **{f"{key}_": value for key, value in fields.items()})
    for said, args in (("%s and " + words, (words,)), (words, ())):  # a fault of the caller's too
        handler.handle(logging.LogRecord("x", logging.INFO, "", 0, said, args, None))
    journal.close(handler)
    raw = path.read_bytes()
    assert raw.count(b"\n") == len(read(path)) == 3
    assert all(32 <= byte < 127 or byte == 10 for byte in raw)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("x" * 2000, "x" * 1000 + " ..."),
        (np.array([37.251937]), "ndarray"),
        (b"37.251937", "bytes"),
        (np.float32(0.5), 0.5),
        (np.int64(7), 7),
        (2**65, "int"),
        (float("nan"), "nan"),
        ([[[[["deep"]]]]], [[[["list"]]]]),
        (list(range(60)), list(range(50))),
        (Path("a/b"), "a/b"),
        (ValueError(*PLANTED), "ValueError; see the diary"),
        (TaskError("age = 37.251937 is above 37"), "TaskError; see the diary"),
        (PolicyError("hours", "It is 09:00."), "It is 09:00."),
        ("half \ud800 of a character", "half \\ud800 of a character"),
    ],
)  # fmt: skip
def test_a_value_is_bounded_and_what_is_not_known_is_named_by_its_type(value, written) -> None:
    assert journal.plain(value) == written


def test_no_value_of_a_record_comes_in_when_a_task_raises_with_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = ClientApp()

    @app.train()
    @answer
    def train(site: Site, message: Message) -> RecordDict:
        site.task.site(site.name)
        raise AssertionError("the records were read")

    def planted(self: Heart, name: str) -> None:
        raise ValueError(f"cannot convert {PLANTED}")

    monkeypatch.setattr(Heart, "site", planted)
    accord = path.parent / "small.toml"
    accord.write_text(tomlkit.dumps(small_accord()))
    grid = InProcessGrid(app, 1, {"accord": str(accord), "sites": str(path.parent)})
    content = RecordDict({"config": ConfigRecord({"accord": load(accord).digest, "run": "r"})})
    (reply,) = grid.send_and_receive([Message(content, next(iter(grid.get_node_ids())), "train")])
    assert reply.has_error()
    try:
        raise ValueError(PLANTED[0])
    except ValueError as fault:
        log.exception("it failed: %s", fault)
        log.error(fault)
        journal.event(log, "failed", fault=fault, also=[fault])
    written = path.read_text()
    assert "internal error" in written and written.count("ValueError") >= 4
    assert [planted for planted in (*PLANTED, "Traceback", "File ") if planted in written] == []
    diary = next(path.parent.glob("*/private.log")).read_text()
    assert PLANTED[0] in diary and "Traceback" in diary  # they were there to be found


def test_a_disk_that_is_full_stops_nobody_and_what_was_lost_is_counted(
    path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    handler = next(h for h in log.handlers if isinstance(h, journal._File))
    journal.event(log, "before")
    full = open("/dev/full", "w")  # noqa: SIM115  (closed by the handler)
    handler.stream.close()
    handler.stream = full
    monkeypatch.setattr(handler, "shouldRollover", lambda record: False)
    monkeypatch.setattr(handler, "_open", lambda: open("/dev/full", "w"))  # noqa: SIM115
    for _ in range(5):
        journal.event(log, "lost", value=PLANTED[0])
    monkeypatch.undo()
    journal.event(log, "after")
    found = [(line["event"], line["fields"]) for line in read(path)]
    assert found == [("before", {}), ("journal.lost", {"lines": 5}), ("after", {})]
    assert capfd.readouterr() == ("", "")


def test_a_line_that_a_killed_process_left_unfinished_does_not_swallow_the_next(tmp_path) -> None:
    path = tmp_path / "j"
    path.write_text('{"event": "whole"}\n{"event": "unfin')
    handler = journal.to_file(path, "x")
    journal.event(log, "next")
    journal.close(handler)
    *_, broken, last = path.read_text().splitlines()
    assert broken == '{"event": "unfin' and json.loads(last)["event"] == "next"


def test_a_console_shows_an_event_with_its_fields(path: Path, caplog) -> None:
    with caplog.at_level(logging.INFO, "fedaccord.site"):
        journal.event(log, "link.joined", site="va", why="a\nb")
    assert caplog.messages == ['link.joined site="va" why="a\\nb"']
