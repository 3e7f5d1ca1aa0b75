"""The run folder: every edit shows, writes are whole, and what was appended is on the disk."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedaccord import evidence, runs
from fedaccord.errors import EvidenceError
from fedaccord.runs import MANIFEST, ROUNDS, RunFolder

Record = dict[str, Any]

FILES = {"model.safetensors": b"\x00weights", "ledgers/va.jsonl": b"{}\n", "student.onnx": b"onnx"}
# Every record is forced to the disk: in memory that takes no time.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
RECORDS = st.lists(
    st.fixed_dictionaries({"id": TEXT, "kind": TEXT, "value": VALUES, "figure": NUMBERS}),
    min_size=2,
    max_size=6,
    unique_by=lambda record: evidence.canonical_json(record),
)


@contextmanager
def sealed(records: list[Record]) -> Iterator[RunFolder]:
    """A finished run with these records, in a folder of its own."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as top:
        folder = RunFolder.create(Path(top) / "run", 'name = "x"\n')
        for record in records:
            folder.append(record)
        for name, data in FILES.items():
            folder.write(name, data)
        folder.seal()
        yield folder


def found(folder: RunFolder) -> list[str]:
    """The faults of a run, also where it can no longer be read at all."""
    try:
        return RunFolder.open(folder.path).faults()
    except EvidenceError as fault:
        return [str(fault)]


def rewrite(folder: RunFolder, change: Callable[[list[str]], list[str]]) -> None:
    path = folder.path / ROUNDS
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    path.write_text("".join(line + "\n" for line in change(lines)), encoding="utf-8")


def reseal(folder: RunFolder) -> None:
    """What somebody who edits the records would do next."""
    RunFolder(folder.path).seal()


# --- the chain ----------------------------------------------------------------------------------


@given(RECORDS)
@settings(deadline=None, max_examples=50)
def test_a_run_is_whole_as_it_was_written(records: list[Record]) -> None:
    with sealed(records) as folder:
        assert found(folder) == []
        read = [{k: v for k, v in r.items() if k != "hash"} for r in folder.records()]
        assert evidence.canonical_json(read) == evidence.canonical_json(records)


@given(st.data(), RECORDS)
@settings(deadline=None, max_examples=50)
def test_an_edited_value_is_found_though_the_run_is_sealed_again(
    data: st.DataObject, records: list[Record]
) -> None:
    place = data.draw(st.integers(0, len(records) - 1))
    key = data.draw(st.sampled_from(["id", "kind", "value", "figure", "hash", "added"]))
    new = data.draw(VALUES)
    with sealed(records) as folder:
        record = folder.records()[place]
        assume(evidence.canonical_json(record.get(key)) != evidence.canonical_json(new))
        line = evidence.canonical_json(record | {key: new})
        rewrite(folder, lambda lines: [*lines[:place], line, *lines[place + 1 :]])
        reseal(folder)
        assert found(folder) != []


@given(st.data(), RECORDS)
@settings(deadline=None, max_examples=50)
def test_a_removed_swapped_or_repeated_record_is_found_though_the_run_is_sealed_again(
    data: st.DataObject, records: list[Record]
) -> None:
    one = data.draw(st.integers(0, len(records) - 2))
    two = data.draw(st.integers(one + 1, len(records) - 1))
    how = data.draw(st.sampled_from(["remove", "swap", "repeat", "move"]))

    def change(lines: list[str]) -> list[str]:
        if how == "remove":  # any but the last, see below
            return lines[:one] + lines[one + 1 :]
        if how == "repeat":
            return [*lines[:two], lines[one], *lines[two:]]
        if how == "move":
            return lines[:one] + lines[one + 1 :] + [lines[one]]
        lines[one], lines[two] = lines[two], lines[one]
        return lines

    with sealed(records) as folder:
        rewrite(folder, change)
        reseal(folder)
        assert found(folder) != []


@given(st.data(), RECORDS)
@settings(deadline=None, max_examples=50)
def test_records_cut_off_at_the_end_are_found_by_the_seal(
    data: st.DataObject, records: list[Record]
) -> None:
    with sealed(records) as folder:
        path = folder.path / ROUNDS
        size = path.stat().st_size
        os.truncate(path, data.draw(st.integers(0, size - 1)))
        assert found(folder) != []


@given(st.data(), RECORDS)
@settings(deadline=None, max_examples=50)
def test_any_changed_byte_of_any_file_is_found(data: st.DataObject, records: list[Record]) -> None:
    name = data.draw(st.sampled_from([ROUNDS, "accord.toml", *FILES]))
    with sealed(records) as folder:
        path = folder.path / name
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(bytes(content))
        assert found(folder) != []


@pytest.mark.parametrize("name", ["accord.toml", *FILES])
def test_a_removed_file_is_found_and_named(name: str) -> None:
    with sealed([{"id": "a"}, {"id": "b"}]) as folder:
        (folder.path / name).unlink()
        assert any(name in fault for fault in found(folder))


def test_an_added_file_is_found_and_named() -> None:
    with sealed([{"id": "a"}]) as folder:
        folder.write("ledgers/mars.jsonl", "")
        assert found(folder) == ["ledgers/mars.jsonl was added"]


def test_the_report_and_the_simulated_sites_are_no_part_of_the_evidence() -> None:
    with sealed([{"id": "a"}]) as folder:
        folder.write("report.html", "<p>")
        folder.write("report.json", "{}")
        folder.write("sites/va/ledger.sqlite", "")
        assert found(folder) == []


def test_an_edited_record_is_named() -> None:
    with sealed([{"id": "round-1", "n": 1}, {"id": "round-2", "n": 2}]) as folder:
        rewrite(folder, lambda lines: [lines[0], lines[1].replace('"n":2', '"n":3')])
        first, *rest = found(folder)
        assert 'record "round-2" was edited after it was written' in first
        assert rest == [f"{ROUNDS} differs"]


def test_a_run_that_did_not_come_to_its_end_says_so(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "")
    folder.append({"id": "start"})
    assert found(folder) == [f"{MANIFEST} is missing: the run did not come to its end"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"files": 3}', '{"files": [1]}', "3"])
def test_a_manifest_that_is_none_is_a_fault_and_no_crash(content: str) -> None:
    with sealed([{"id": "a"}]) as folder:
        (folder.path / MANIFEST).write_text(content)
        assert found(folder) == [f"{MANIFEST} is not a list of files with their hashes"]


@pytest.mark.parametrize(
    "line", ["", "{", "3", "null", "[]", '{"id": NaN}', '{"id": Infinity}', '{"id": 1e999}']
)
def test_a_line_that_is_no_record_is_refused_with_its_number(line: str) -> None:
    with sealed([{"id": "a"}, {"id": "b"}]) as folder:
        rewrite(folder, lambda lines: [lines[0], line, lines[1]])
        with pytest.raises(EvidenceError, match=f"line 2 of {ROUNDS} is not a record"):
            folder.records()


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0b", "\x1e", "\r", "é\n"])
def test_no_character_of_a_sites_words_breaks_the_record(mark: str) -> None:
    with sealed([{"id": "out", "reason": f"one{mark}two"}, {"id": "end"}]) as folder:
        assert found(folder) == []
        assert folder.records()[0]["reason"] == f"one{mark}two"


def test_a_run_that_is_opened_again_goes_on_where_its_chain_ended(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "")
    folder.append({"id": "a"})
    again = RunFolder.open(tmp_path / "run")
    again.append({"id": "b"})
    again.seal()
    assert found(folder) == []


def test_a_folder_that_holds_a_run_is_not_written_over(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", "first").append({"id": "a"})
    with pytest.raises(EvidenceError, match=r"already holds a run\. Name another folder\."):
        RunFolder.create(tmp_path / "run", "second")
    assert (tmp_path / "run" / "accord.toml").read_text() == "first"


def test_what_is_appended_is_not_changed_by_appending(tmp_path: Path) -> None:
    record = {"id": "a", "nested": {"list": [1]}}
    before = copy.deepcopy(record)
    RunFolder.create(tmp_path / "run", "").append(record)
    assert record == before


def test_ids_are_folder_names_that_do_not_repeat() -> None:
    made = {runs.new_id("heart") for _ in range(100)}
    assert len(made) == 100
    for one in made:
        assert re.fullmatch(r"heart-\d{8}-\d{6}-[0-9a-f]{8}", one)


def test_runs_go_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDACCORD_HOME", "/somewhere")
    assert runs.home() == Path("/somewhere")
    monkeypatch.setenv("FEDACCORD_HOME", "")
    assert runs.home() == Path.home() / ".fedaccord"


# --- canonical JSON -----------------------------------------------------------------------------


@given(st.data(), st.dictionaries(TEXT, VALUES, max_size=5))
def test_canonical_json_is_one_line_read_back_equal_and_blind_to_order(
    data: st.DataObject, value: Record
) -> None:
    text = evidence.canonical_json(value)
    assert "\n" not in text
    assert evidence.canonical_json(json.loads(text)) == text
    keys = data.draw(st.permutations(list(value)))
    assert evidence.canonical_json({key: value[key] for key in keys}) == text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [float("-inf")]])
def test_canonical_json_has_no_nan_and_no_infinity(value: object) -> None:
    with pytest.raises(ValueError):
        evidence.canonical_json(value)


# --- writes are whole, and on the disk ----------------------------------------------------------

WRITER = """
import itertools, sys
from pathlib import Path
from fedaccord.evidence import write_atomic
path, size = Path(sys.argv[1]), int(sys.argv[2])
for letter in itertools.cycle(b"ab"):
    write_atomic(path, bytes([letter]) * size)
    print(flush=True)
"""
SIZE = 2_000_000


def test_a_writer_that_is_killed_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for turn in range(6):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, path, str(SIZE)], stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()  # one whole file is there
        time.sleep(0.003 * turn)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        content = path.read_bytes()
        assert content in (b"a" * SIZE, b"b" * SIZE)


def test_a_writer_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence.write_atomic(tmp_path / "file", "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        evidence.write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """What is forced to the disk and what is renamed, in order: (what, file, its size then)."""
    seen: list[tuple[str, str, int]] = []
    sync, replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        sync(handle)
        name = os.readlink(f"/proc/self/fd/{handle}")
        seen.append(("sync", Path(name).name, os.fstat(handle).st_size))

    def rename(old: str, new: str) -> None:
        replace(old, new)
        seen.append(("rename", Path(new).name, 0))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    return seen


linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="/proc names open files")


@linux
def test_a_whole_file_is_on_the_disk_before_it_takes_its_name_and_its_name_after(
    tmp_path: Path, disk: list[tuple[str, str, int]]
) -> None:
    evidence.write_atomic(tmp_path / "deep" / "file", b"x" * 5000)
    (written, renamed, named) = disk
    assert (written[0], written[2]) == ("sync", 5000)
    assert renamed[:2] == ("rename", "file")
    assert named[:2] == ("sync", "deep")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file"]


@linux
def test_a_line_is_on_the_disk_when_append_returns(
    tmp_path: Path, disk: list[tuple[str, str, int]]
) -> None:
    path = tmp_path / "lines"
    for number in (1, 2, 3):
        evidence.append_line(path, "é" * 100)
        assert disk[-1] == ("sync", "lines", number * 201)
        assert path.stat().st_size == number * 201
