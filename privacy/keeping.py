"""What an operator does with a ledger: put a copy back, go on without a head, never in silence."""

from __future__ import annotations

import json
import os
from pathlib import Path

from fedaccord import keys
from fedaccord.errors import LedgerError
from fedaccord.evidence import sync_folder
from fedaccord.privacy import accounting
from fedaccord.privacy.chain import Chain, Entry, Head, Row, faults
from fedaccord.privacy.log import SignedLog
from fedaccord.privacy.second import SecondPlace
from fedaccord.privacy.store import Store


def read_export(path: Path) -> Chain:
    """Read an exported ledger and check every hash and signature in it.

    Raises:
        LedgerError: a file that is no ledger, or the first entry that does not hold.
    """
    chain = Chain(f"ledger {path}")
    try:
        rows = read_lines(path.read_bytes())
    except (OSError, ValueError) as fault:
        raise LedgerError(f"ledger {path}: {fault}. Give a file that was exported.") from None
    chain.extend(rows, every=True)
    return chain


def read_lines(data: bytes) -> list[Row]:
    """Take the lines of an exported ledger apart; the chain is not looked at.

    Raises:
        ValueError: a line that is not byte for byte as it was exported.
    """
    rows = []
    *lines, rest = data.decode("utf-8").split("\n")
    for number, line in enumerate([*lines, rest] if rest or not lines else lines, start=1):
        try:
            row = Row.of(json.loads(line))
            whole = row.line == line and number <= len(lines)
        except (ValueError, TypeError, AttributeError, RecursionError):
            whole = False
        if not whole:
            raise ValueError(f"line {number} is not in the form in which it was written")
        rows.append(row)
    return rows


def restore(path: Path, second: Path | None, source: Path) -> int:
    """Put an exported ledger (a run's evidence holds one) in the place of one that was lost.

    The copy must be at least as long as what is there and as the head in the second place, so a
    restored ledger never says less than was spent. What was there is kept beside it.

    Args:
        path: the ledger's SQLite file; the key of the same ledger must be beside it.
        second: the file that keeps its head, or None.
        source: the exported ledger.

    Returns:
        How many entries the ledger has now.

    Raises:
        LedgerError: a copy that does not hold, is another ledger's, or is shorter.
    """
    copy = read_export(source)
    if keys.load(path.with_name("ledger.key")).public != copy.key:
        raise LedgerError(
            f"ledger {source}: is signed by another key than {path.with_name('ledger.key')}. "
            "Restore the key that belongs to it."
        )
    heads = [head for head in (_kept(second), _end(path)) if head]
    if lost := copy.missing(heads):
        raise LedgerError(
            f"ledger {source}: has {len(copy)} entries and does not hold entry {lost[0].seq} that "
            "is known to have been written. Look for a later copy; the coordinator's runs hold one "
            "each. If there is none: `fedaccord ledger accept`."
        )
    fresh = path.with_name("ledger.restored")
    fresh.unlink(missing_ok=True)
    store = Store(fresh)
    with store.transaction():
        for seq, row in enumerate(copy.rows, start=1):
            store.insert(seq, row)
    store.close()
    for part in ("", "-wal", "-shm"):  # SQLite finds them under these names
        if (old := path.with_name(path.name + part)).exists():
            os.replace(old, path.with_name(f"{path.name}.before-restore{part}"))
    os.replace(fresh, path)
    sync_folder(path.parent)
    if second:
        SecondPlace(second).advance(copy.head())
    return len(copy)


def accept(path: Path, site: str, second: Path, heads: list[Head]) -> Entry:
    """Go on with the ledger that is there, although a head says otherwise or is gone.

    Where a head proves that entries are missing, what they spent is unknown: the entry that is
    written is LOST, with epsilon infinite, and no finite cap lets a plan pass from then on. The
    head in the second place is such proof under any key: where ledger and key were both lost, a
    new key has signed none of the old entries. Where the second place was merely empty or
    unreadable the entry is ACCEPT, for reviewers to see.

    Args:
        path: the ledger's SQLite file.
        site: whose it is.
        second: the file that keeps its head.
        heads: heads of this ledger that others have.

    Returns:
        The entry that was written.
    """
    log = SignedLog(path, site)
    try:
        kept = _kept(second)
        chain = log.read()
        lost = chain.missing(heads)
        if kept and kept.site == site and not chain.holds(kept):
            lost.append(kept)
        with log.transaction():
            if lost:
                worst = max(lost, key=lambda head: head.seq)
                entry = log.append(
                    "LOST",
                    "",
                    accord="",
                    dataset="",
                    plan_digest=None,
                    event=accounting.NON_PRIVATE,
                    epsilon="infinite",
                    head=worst.to_json(),
                )
            else:
                entry = log.append("ACCEPT", "", second=str(second))
        SecondPlace(second).replace(log.read().head())
    finally:
        log.close()
    return entry


def _kept(second: Path | None) -> Head | None:
    """Read the head in the second place; one that cannot be read is none."""
    try:
        return SecondPlace(second).read() if second else None
    except LedgerError:
        return None


def _end(path: Path) -> Head | None:
    """Find the end of the ledger that is there, as far as its chain holds."""
    if not path.exists():
        return None
    try:
        store = Store(path)
        rows = store.rows()
        store.close()
    except LedgerError:  # the file itself is damaged: nothing of it can be held against the copy
        return None
    bad = next(faults(rows), (len(rows) + 1, ""))[0]  # what follows the first fault is lost anyway
    chain = Chain(f"ledger {path}")
    chain.extend(rows[: bad - 1])
    return chain.head() if len(chain) else None


def site_of(path: Path) -> str:
    """Read whose a ledger is from its first entry; "" where there is none or it cannot be read."""
    store = Store(path)
    rows = store.rows()
    store.close()
    try:
        return str(json.loads(rows[0].body)["site"])
    except (IndexError, ValueError, KeyError, TypeError):
        return ""
