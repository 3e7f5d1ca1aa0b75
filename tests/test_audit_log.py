"""The audit log: whole after a kill, every edit found, bounded under a flood of refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedaccord import keys
from fedaccord.envelope import handover
from fedaccord.errors import EvidenceError
from fedaccord.server import audit_log
from fedaccord.server.audit_log import AuditLog, End, audit, verify_audit


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> keys.SigningKey:
    return keys.create(tmp_path_factory.mktemp("keys") / "a.key")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> keys.SigningKey:
    return keys.create(tmp_path_factory.mktemp("keys") / "b.key")


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2026, 11, 22, 14, 0, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def written(path: Path, key: keys.SigningKey, count: int = 6) -> Path:
    log = AuditLog(path, key)
    for number in range(count):
        log.append("request", site="va", round=number)
    log.close()
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_entries_are_chained_signed_in_order_and_private_to_their_owner(tmp_path, key) -> None:
    path = written(tmp_path / "logs" / "audit.jsonl", key)
    assert verify_audit(path, key.public) == []
    assert [entry["seq"] for entry in read(path)] == [1, 2, 3, 4, 5, 6]
    assert [entry["round"] for entry in read(path)] == [0, 1, 2, 3, 4, 5]
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_entry_outlives_a_kill_right_after_append_and_the_log_goes_on(tmp_path, key) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom fedaccord import keys\n"
        "from fedaccord.server.audit_log import AuditLog\n"
        "log = AuditLog(Path(sys.argv[1]), keys.load(Path(sys.argv[2])))\n"
        "log.append('up')\nlog.append('join', site='va')\nos.kill(os.getpid(), 9)\n"
    )
    keyfile, path = tmp_path / "k", tmp_path / "a"
    made = keys.create(keyfile)
    done = subprocess.run([sys.executable, "-c", code, str(path), str(keyfile)])
    assert done.returncode == -9
    assert [entry["kind"] for entry in read(path)] == ["up", "join"]
    log = AuditLog(path, made)  # the lock went with its process
    log.append("up")
    log.close()
    assert verify_audit(path, made.public) == [] and len(read(path)) == 3


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_edit_removal_repetition_or_exchange_of_entries_is_found(
    data, key, tmp_path_factory
) -> None:
    lines = _LINES.setdefault(key.public, [])
    if not lines:
        path = written(tmp_path_factory.mktemp("audit") / "a", key)
        lines += path.read_bytes().splitlines(keepends=True)
    new, last = list(lines), len(lines) - 1
    how = data.draw(st.sampled_from(["byte", "drop", "repeat", "swap", "join"]))
    at = data.draw(st.integers(0, last - 1))
    if how == "byte":
        line = bytearray(new[at])
        place = data.draw(st.integers(0, len(line) - 2))
        line[place] ^= 1 << data.draw(st.integers(0, 6))
        new[at] = bytes(line)
    elif how == "drop":
        del new[at]
    elif how == "repeat":
        new.insert(data.draw(st.integers(0, last)), new[at])
    elif how == "swap":
        new[at], new[at + 1] = new[at + 1], new[at]
    else:
        new[at] = new[at][:-1]
    path = tmp_path_factory.mktemp("edited") / "a"
    path.write_bytes(b"".join(new))
    assert verify_audit(path, key.public) != []


_LINES: dict[str, list[bytes]] = {}


def test_an_entry_forged_with_a_right_hash_and_another_key_is_found(tmp_path, key, other) -> None:
    path = written(tmp_path / "a", key)
    body = json.loads(path.read_text().splitlines()[-1]) | {"seq": 7}
    body["previous"] = body.pop("hash")
    del body["signature"]
    mark = audit_log.sha256(audit_log.canonical_json(body))
    signature = other.sign(audit_log.stamp(7, mark))
    line = audit_log.canonical_json(body | {"hash": mark, "signature": signature})
    path.write_text(path.read_text() + line + "\n")
    assert verify_audit(path, key.public) == ["entry 7 is not signed by the coordinator's key"]
    with pytest.raises(EvidenceError, match="is not signed by this coordinator's key"):
        AuditLog(path, key)


def test_a_cut_end_is_found_by_an_end_that_was_kept_elsewhere_and_by_that_alone(
    tmp_path, key
) -> None:
    log = AuditLog(tmp_path / "a", key)
    ends = [log.end]
    for _ in range(5):
        log.append("reply")
        ends.append(log.end)
    log.close()
    assert verify_audit(tmp_path / "a", key.public, ends=ends) == []
    lines = (tmp_path / "a").read_bytes().splitlines(keepends=True)
    (tmp_path / "a").write_bytes(b"".join(lines[:3]))
    assert verify_audit(tmp_path / "a", key.public) == []
    faults = verify_audit(tmp_path / "a", key.public, ends=ends)
    assert faults == [f"entry {n} that was kept elsewhere is gone (3 here)" for n in (4, 5)]
    fork = End(2, "0" * 64)
    faults = verify_audit(tmp_path / "a", key.public, ends=[*ends[:3], fork])
    assert faults == ["entry 2 is not the one that was kept elsewhere"]


@pytest.mark.parametrize("left", [1, 40, -1])
def test_an_unfinished_last_line_is_cut_and_an_entry_says_so(tmp_path, key, left) -> None:
    path = written(tmp_path / "a", key, 3)
    whole = path.read_bytes()
    torn = whole.splitlines()[0][:left]
    path.write_bytes(whole + torn)
    assert verify_audit(path, key.public) != []
    AuditLog(path, key).close()
    assert path.read_bytes().startswith(whole)
    assert verify_audit(path, key.public) == []
    *_, last = read(path)
    assert (last["kind"], last["bytes"], last["seq"]) == ("cut", len(torn), 4)
    assert last["sha256"] == audit_log.sha256(torn)
    AuditLog(path, key).close()
    assert len(read(path)) == 4  # once


@pytest.mark.parametrize("edit", [b'"round":2', b'"seq":3', b'"previous":"'])
def test_a_log_whose_last_entry_was_edited_is_not_gone_on_with(tmp_path, key, edit) -> None:
    path = written(tmp_path / "a", key, 3)
    head, tail = path.read_bytes().rsplit(edit, 1)
    path.write_bytes(head + edit[:-1] + b"7" + tail)
    before = path.read_bytes()
    with pytest.raises(EvidenceError, match="Keep the file, and move it away"):
        AuditLog(path, key)
    assert path.read_bytes() == before


def test_a_second_coordinator_cannot_write_the_same_log(tmp_path, key) -> None:
    log = AuditLog(tmp_path / "a", key)
    with pytest.raises(EvidenceError, match="another coordinator writes it"):
        AuditLog(tmp_path / "a", key)
    log.close()
    AuditLog(tmp_path / "a", key).close()


def test_the_next_key_goes_on_with_a_log_and_the_earlier_one_may_not_return(
    tmp_path, key, other
) -> None:
    steps = [handover("coordinator", other.public, key)]
    path = written(tmp_path / "a", key, 2)
    with pytest.raises(EvidenceError):
        AuditLog(path, other)
    forged = [{"key": other.public, "signature": other.sign("anything")}]
    with pytest.raises(EvidenceError):
        AuditLog(path, other, forged)
    log = AuditLog(path, other, steps)
    log.append("up")
    log.close()
    assert verify_audit(path, key.public, steps) == verify_audit(path, other.public, steps) == []
    assert verify_audit(path, key.public) == ["entry 3 is not signed by the coordinator's key"]
    assert verify_audit(path, other.public)[0] == "entry 1 is not signed by the coordinator's key"
    assert verify_audit(path, other.public, forged) == verify_audit(path, other.public)
    log = AuditLog(path, key, steps)
    log.append("up")
    log.close()
    wrong = ["entry 4 is not signed by the coordinator's key"]
    assert verify_audit(path, other.public, steps) == wrong


def test_a_log_that_was_begun_after_a_handover_is_found_whole(tmp_path, key, other) -> None:
    third = keys.create(tmp_path / "c.key")
    steps = [
        handover("coordinator", new.public, old) for old, new in ((key, other), (other, third))
    ]
    for holder in (other, third):
        log = AuditLog(tmp_path / "a", holder, steps)
        log.append("up")
        log.close()
    for one in (key, other, third):  # the first is what older kits pin
        assert verify_audit(tmp_path / "a", one.public, steps) == []
    stranger = keys.create(tmp_path / "d.key")
    assert verify_audit(tmp_path / "a", stranger.public, steps) != []


def test_repeated_refusals_of_a_minute_are_two_entries_with_their_count(tmp_path, key) -> None:
    clock = Clock()
    log = AuditLog(tmp_path / "a", key, clock=clock)
    written = [
        log.append("refused", reason="no certificate", peer="203.0.113.9") for _ in range(10_000)
    ]
    assert written == [True] + [False] * 9_999
    clock.pass_by(59)
    log.append("refused", reason="nonce", site="va")
    assert len(read(tmp_path / "a")) == 2
    clock.pass_by(2)
    log.append("join", site="va")
    first, nonce, counted, join = read(tmp_path / "a")
    assert (first["reason"], first["peer"]) == ("no certificate", "203.0.113.9")
    assert (nonce["reason"], nonce["site"], join["kind"]) == ("nonce", "va", "join")
    assert (counted["kind"], counted["reason"], counted["count"]) == (
        "refused",
        "no certificate",
        9_999,
    )
    assert counted["since"] == first["time"]
    log.append("refused", reason="no certificate")  # a new minute begins
    log.append("refused", reason="no certificate")
    log.close()
    assert [e.get("count") for e in read(tmp_path / "a")[4:]] == [None, 1]
    assert verify_audit(tmp_path / "a", key.public) == []


def test_a_flood_of_ever_new_reasons_cannot_fill_the_disk(tmp_path, key) -> None:
    clock = Clock()
    log = AuditLog(tmp_path / "a", key, clock=clock)
    for number in range(5_000):
        log.append("refused", reason=f"{number} " * 1000, site=f"s{number}")
    assert len(read(tmp_path / "a")) == audit_log.MOST_WINDOWS
    log.close()
    *_, last = read(tmp_path / "a")
    assert (last["reason"], last["count"]) == ("others", 5_000 - audit_log.MOST_WINDOWS)
    assert (tmp_path / "a").stat().st_size < 100_000


def test_an_entry_that_is_too_long_says_that_it_was_left_out(tmp_path, key) -> None:
    log = AuditLog(tmp_path / "a", key)
    log.append("join", hello=[["x" * 1000] * 50] * 50)
    log.close()
    (entry,) = read(tmp_path / "a")
    assert entry["kind"] == "join" and "bytes" in entry["left_out"]
    assert verify_audit(tmp_path / "a", key.public) == []


def test_threads_append_whole_entries_one_after_another(tmp_path, key) -> None:
    log = AuditLog(tmp_path / "a", key)

    def many(site: str) -> None:
        for _ in range(20):
            log.append("reply", site=site)

    threads = [threading.Thread(target=many, args=(f"s{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert verify_audit(tmp_path / "a", key.public) == [] and len(read(tmp_path / "a")) == 80


def test_what_a_full_disk_took_by_half_is_taken_back(tmp_path, key, monkeypatch) -> None:
    log = AuditLog(tmp_path / "a", key)
    log.append("up")
    real, calls = os.write, []

    def half(handle: int, data: memoryview) -> int:
        calls.append(handle)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real(handle, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space left"):
        log.append("join", site="va")
    monkeypatch.undo()
    log.append("join", site="va")
    log.close()
    assert verify_audit(tmp_path / "a", key.public) == [] and len(read(tmp_path / "a")) == 2


def test_a_field_cannot_take_the_place_of_one_of_the_logs_own(tmp_path, key) -> None:
    log = AuditLog(tmp_path / "a", key)
    with pytest.raises(ValueError, match="hash cannot be a field"):
        log.append("up", hash="0" * 64)
    log.close()


def test_the_command_lays_entries_out_and_says_what_is_wrong(tmp_path, key) -> None:
    log = AuditLog(tmp_path / "a", key)
    log.append("join", site="va")
    log.append("refused", reason="sender", peer="\x1b[2J\u202eevil")
    log.close()
    first, second, whole = audit(tmp_path / "a", key.public)
    assert first.split()[0] == "1" and first.endswith('join      site="va"')
    assert second.endswith('peer="\\u001b[2J\\u202eevil" reason="sender"')
    assert whole.endswith("2 entries, each chained to the one before it and signed")
    text = (tmp_path / "a").read_text()
    (tmp_path / "a").write_text(text.replace('"va"', '"ny"'))
    *_, fault = audit(tmp_path / "a", key.public)
    assert fault == "FAULT  entry 1 does not match its hash"
    with pytest.raises(EvidenceError, match="cannot be read"):
        audit(tmp_path / "none", key.public)
