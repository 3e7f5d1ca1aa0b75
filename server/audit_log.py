"""The coordinator's audit log: who joined, was refused, was asked and answered; signed, in order.

Each entry is a line of canonical JSON. It names the hash of the entry before it, has a hash of its
own, and a signature by the coordinator's key over its number and hash; the first one names that
key. Nothing in it comes from records.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from fedaccord.envelope import COORDINATOR, keys_led_to
from fedaccord.errors import EvidenceError
from fedaccord.evidence import canonical_json, sha256, sync_folder
from fedaccord.journal import plain
from fedaccord.keys import SigningKey, signed

GENESIS = "0" * 64
REPEATED = "refused"  # the kind whose repetitions share an entry
WINDOW = 60.0  # seconds that they share one for
MOST_WINDOWS = 32  # reasons and sites that have an entry of their own at the same time
OTHERS = "others"
RESERVED = ("seq", "time", "kind", "key", "previous", "hash", "signature")
MOST_LINE = 100_000  # bytes; an entry has some hundreds
Entry = dict[str, Any]
Handovers = Sequence[Mapping[str, Any]]


class End(NamedTuple):
    """The end of an audit log at some moment: number and hash of its last entry."""

    seq: int
    hash: str


def stamp(seq: int, mark: str) -> str:
    """What is signed of an entry; no other kind of signed words begins like this."""
    return f"audit\n{seq}\n{mark}"


@dataclass
class _Window:
    """Repetitions of one refusal that are counted and not yet written."""

    since: datetime
    count: int = 0


class AuditLog:
    """A log that only grows; several threads of one process may append to it.

    | | |
    |---|---|
    | a last line that a killed process left unfinished | is cut; an entry "cut" says so |
    | an entry is written by half, since the disk is full | is taken back; OSError |
    | refusals of one reason and site within a minute | the first is an entry, the others are one |
    | more than 32 such pairs within a minute | the rest share the reason "others" |
    | a count of refusals | is written with the first entry after its minute, or at `close`; a |
    | | coordinator that is killed loses what it had not written |
    | fields of more than 100 kB | are left out, and the entry says so |
    """

    def __init__(
        self,
        path: Path,
        key: SigningKey,
        handovers: Handovers = (),
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Open a log, or start one; the last entry is checked, and the log goes on from it.

        Args:
            path: the file, which gets mode 0600.
            key: signs each entry.
            handovers: of the coordinator's keys, in order, from the first to this one.
            clock: tells the time of an entry.

        Raises:
            EvidenceError: the last entry is altered, or is of a key that did not lead to this one;
                or another process has the log open.
        """
        self.path, self._key, self._clock = path, key, clock
        self._lock = threading.Lock()
        self._windows: dict[tuple[str, str], _Window] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        how = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
        self._file = os.open(path, how, 0o600)
        try:
            _alone(self._file, path)
            sync_folder(path.parent)
            cut = self._cut_unfinished()
            self._end = self._check_last(handovers)
            if cut:
                self._write("cut", {"bytes": len(cut), "sha256": sha256(cut)})
        except BaseException:
            os.close(self._file)
            raise

    @property
    def end(self) -> End:
        """Number and hash of the last entry; kept elsewhere, it shows whether entries are gone."""
        with self._lock:
            return self._end

    def append(self, kind: str, **fields: Any) -> bool:
        """Write an entry, on the disk when this returns; a repeated refusal is counted instead.

        Args:
            kind: "up", "join", "refused", "left", "request", "reply", "down" ...
            fields: figures and names of the system, each bounded by `journal.plain`; of a refusal,
                `reason` and `site` tell which others it repeats.

        Returns:
            Whether an entry was written, and not only counted.

        Raises:
            OSError: a disk that is full or gone; nothing of the entry is left in the file.
            ValueError: a field named like one of the log's own.
        """
        if taken := sorted(set(fields) & set(RESERVED)):
            raise ValueError(f"audit log: {', '.join(taken)} cannot be a field. Rename it.")
        with self._lock:
            self._write_counts()
            if kind == REPEATED and not self._is_first(fields):
                return False
            self._write(kind, fields)
            return True

    def close(self) -> None:
        """Write the counts that wait, and close the file."""
        with self._lock:
            try:
                self._write_counts(every=True)
            finally:
                os.close(self._file)

    def _is_first(self, fields: Entry) -> bool:
        """Tell whether a refusal gets its own entry; if not, count it."""
        which = (str(plain(fields.get("reason", ""))), str(plain(fields.get("site", ""))))
        if which not in self._windows and len(self._windows) >= MOST_WINDOWS:
            which = (OTHERS, "")
            self._windows.setdefault(which, _Window(self._clock()))
        if which in self._windows:
            self._windows[which].count += 1
            return False
        self._windows[which] = _Window(self._clock())
        return True

    def _write_counts(self, every: bool = False) -> None:
        """Write what was counted in windows that have ended."""
        now = self._clock()
        for which, window in list(self._windows.items()):
            if not every and 0 <= (now - window.since).total_seconds() < WINDOW:
                continue
            if window.count:
                reason, site = which
                said = {"reason": reason, "count": window.count, "since": _time(window.since)}
                self._write(REPEATED, said | ({"site": site} if site else {}))
            del self._windows[which]

    def _write(self, kind: str, fields: Entry) -> None:
        entry = {key: plain(value) for key, value in fields.items()} | {
            "seq": self._end.seq + 1,
            "time": _time(self._clock()),
            "kind": kind,
            "previous": self._end.hash,
        }
        if not self._end.seq:
            entry["key"] = self._key.public
        mark = sha256(canonical_json(entry))
        entry |= {"hash": mark, "signature": self._key.sign(stamp(entry["seq"], mark))}
        line = f"{canonical_json(entry)}\n".encode()
        if len(line) > MOST_LINE:
            self._write(kind, {"left_out": f"fields of {len(line)} bytes"})
            return
        size, rest = os.fstat(self._file).st_size, memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, size)
            raise
        self._end = End(entry["seq"], mark)

    def _cut_unfinished(self) -> bytes:
        """Take off and return what stands after the last line's end."""
        size = os.fstat(self._file).st_size
        tail = os.pread(self._file, MOST_LINE, max(0, size - MOST_LINE))
        cut = tail[tail.rfind(b"\n") + 1 :]
        if len(cut) == MOST_LINE:
            raise EvidenceError(self._altered("has no end"))
        os.ftruncate(self._file, size - len(cut))
        return cut

    def _check_last(self, handovers: Handovers) -> End:
        """Check the last entry by itself; `verify_audit` checks all."""
        size = os.fstat(self._file).st_size
        if not size:
            return End(0, GENESIS)
        tail = os.pread(self._file, MOST_LINE, max(0, size - MOST_LINE))
        entry, words = _read(tail[:-1].rsplit(b"\n", 1)[-1])
        first, _ = _read(os.pread(self._file, MOST_LINE, 0).split(b"\n", 1)[0])
        keys = _led_to(str(first.get("key")), self._key.public, handovers)
        if words or not any(_signed_by(key, entry) for key in keys):
            raise EvidenceError(self._altered(words or "is not signed by this coordinator's key"))
        return End(entry["seq"], entry["hash"])

    def _altered(self, words: str) -> str:
        return (
            f"audit log {self.path}: its last entry {words}. Keep the file, and move it away: a "
            "new log starts then."
        )


def _time(when: datetime) -> str:
    return when.astimezone(UTC).isoformat(timespec="milliseconds")


def _alone(file: int, path: Path) -> None:
    """Hold the file for this process; the lock goes when it ends, however it ends."""
    if os.name != "posix":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise EvidenceError(
            f"audit log {path}: another coordinator writes it. Stop that one first: "
            "fedaccord coordinator down ACCORD."
        ) from None


def _read(line: bytes) -> tuple[Entry, str]:
    """Read an entry, and say what is wrong with it by itself: its form, its number, its hash."""
    try:
        entry = json.loads(line)
        text = canonical_json(entry) if isinstance(entry, dict) else ""
    except (ValueError, RecursionError):
        return {}, "is no JSON"
    if text.encode("utf-8", "surrogatepass") != line:
        return {}, "is not as it was written"
    body = {k: v for k, v in entry.items() if k not in ("hash", "signature")}
    mark = sha256(canonical_json(body).encode("utf-8", "surrogatepass"))
    if type(entry.get("seq")) is not int or entry.get("hash") != mark:
        return entry, "does not match its hash"
    return entry, ""


def _signed_by(public: str, entry: Entry) -> bool:
    words = stamp(entry["seq"], entry["hash"])
    return signed(public, str(entry.get("signature")), words)


def _led_to(first: str, public: str, handovers: Handovers) -> list[str]:
    """List a coordinator's keys from a log's first one on, in order.

    None, unless the first leads to the one that is given, or that one to the first.
    """

    def led(key: str) -> list[str]:  # a key may come in after some of the handovers
        starts = range(max(1, len(handovers)))
        return max((keys_led_to(key, COORDINATOR, handovers[at:]) for at in starts), key=len)

    if first in (after := led(public)):
        return after[after.index(first) :]
    return found if public in (found := led(first)) else []


def entries(path: Path) -> Iterator[Entry]:
    """Read the entries of a log without checking them; a line that is none is left out.

    Raises:
        EvidenceError: no such file, or one that cannot be read.
    """
    for line in _lines(path):
        entry, _ = _read(line)
        if entry:
            yield entry


def verify_audit(
    path: Path, public: str, handovers: Handovers = (), ends: Iterable[End] = ()
) -> list[str]:
    """List what is wrong with a coordinator's audit log, a sentence a fault.

    Guarantee: with no fault, every entry is as the holder of the key (or of the one that it took
    over from, or handed over to) wrote it, in that order, with none missing before the last. That
    the last entries were not cut off is shown by `ends` alone.

    Args:
        path: the file.
        public: a public key of the coordinator, hex: the one in force, or one that a kit pins.
        handovers: of its keys, in order.
        ends: of this log, kept elsewhere.

    Raises:
        EvidenceError: no such file, or one that cannot be read.
    """
    kept: dict[int, set[str]] = {}
    for end in ends:
        kept.setdefault(end.seq, set()).add(end.hash)
    kept.pop(0, None)  # the end of a log without an entry
    found, previous, number = [], GENESIS, 0
    keys: list[str] = []
    for number, line in enumerate(_lines(path), start=1):
        entry, words = _read(line)
        keys = keys if number > 1 else _led_to(str(entry.get("key")), public, handovers)
        if not words and entry["seq"] != number:
            words = f"has the number {entry['seq']}: one before it was removed or added"
        if not words and entry.get("previous") != previous:
            words = "does not go on from the one before it"
        if not words:
            by = next((n for n, key in enumerate(keys) if _signed_by(key, entry)), None)
            if by is None:
                words = "is not signed by the coordinator's key"
            else:
                del keys[:by]  # handed over: what an earlier key signs from here on is refused
        if words:
            found.append(f"entry {number} {words}")
        previous = str(entry.get("hash"))
        if number in kept and kept.pop(number) != {previous}:
            found.append(f"entry {number} is not the one that was kept elsewhere")
    found += [f"entry {seq} that was kept elsewhere is gone ({number} here)" for seq in kept]
    return found


def _lines(path: Path) -> Iterator[bytes]:
    """Read lines, also one that was left unfinished."""
    try:
        with open(path, "rb") as file:
            while line := file.readline(MOST_LINE):
                yield line.removesuffix(b"\n")
    except OSError as fault:
        raise EvidenceError(
            f"audit log {path}: cannot be read: {fault.strerror}. Name the log that the "
            "coordinator wrote."
        ) from None


def audit(
    path: Path, public: str, handovers: Handovers = (), ends: Iterable[End] = ()
) -> list[str]:
    """Lay out an audit log for a terminal: a line an entry, then what is wrong, or that nothing is.

    Each fault is a line that begins with "FAULT".

    Raises:
        EvidenceError: as `verify_audit`.
    """
    said = []
    for entry in entries(path):
        rest = {k: v for k, v in entry.items() if k not in RESERVED}
        words = " ".join(f"{key}={json.dumps(rest[key])}" for key in sorted(rest))
        kind = json.dumps(str(entry.get("kind")))[1:-1]
        said.append(f"{entry.get('seq')!s:>6}  {str(entry.get('time'))[:23]}  {kind:<9} {words}")
    faults = verify_audit(path, public, handovers, ends)
    if not faults:
        return [*said, f"{path}: {len(said)} entries, each chained to the one before it and signed"]
    return [*said, *(f"FAULT  {fault}" for fault in faults)]
