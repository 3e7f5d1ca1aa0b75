"""A signed log: a site's entries in one file, its key beside it, its head in a second place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedaccord import keys
from fedaccord.errors import LedgerError
from fedaccord.evidence import sync_folder
from fedaccord.privacy import chain
from fedaccord.privacy.chain import Chain, Entry
from fedaccord.privacy.second import SecondPlace
from fedaccord.privacy.store import Store

_REMEDY = "Stop, and see `fedaccord ledger restore` and `fedaccord ledger accept`."


def now() -> datetime:
    """Tell the time."""
    return datetime.now(UTC)


class SignedLog:
    """Entries that can only be appended, each chained and signed; what they mean is the ledger's.

    Every transaction is on the disk when it ends. Several processes may use one file. A log whose
    chain, signatures or heads do not hold is not opened and not added to.
    """

    def __init__(
        self,
        path: Path,
        site: str,
        second: Path | None = None,
        clock: Callable[[], datetime] = now,
    ) -> None:
        """Open or create a site's log; check its chain, its end and its head in a second place.

        Args:
            path: the SQLite file; `ledger.key` beside it is the site's signing key.
            site: whose it is.
            second: file away from the ledger that keeps its head, or None.
            clock: tells the time of an entry.

        Raises:
            LedgerError: a log that is damaged, altered, cut, another site's, or older than its
                head; a key that is missing or not the log's.
        """
        self.path, self.site, self._clock = path, site, clock
        self._second = SecondPlace(second) if second else None
        self._store = Store(path)
        self._chain = Chain(f"ledger {path}")
        try:
            # What others keep of it is read before it: another process may append in between, and
            # that only makes the log longer.
            written = self._store.written()
            self._chain.extend(self._store.rows())
            if len(self._chain) < written:
                raise LedgerError(
                    f"ledger {path}: entry {len(self._chain) + 1} of {written} was removed from "
                    "its end. Stop, and restore the ledger from a trusted copy."
                )
            self._check_site()
            self._check_second()
            self._key = self._open_key()
        except BaseException:
            self._store.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._store.close()

    def read(self) -> Chain:
        """Return everything that is written by now, also by other processes."""
        rows = self._store.rows(after=len(self._chain))
        if rows:
            self._chain.extend(rows)
        return self._chain

    @contextmanager
    def transaction(self) -> Iterator[list[Entry]]:
        """Hold the file alone, show what it holds, commit durably or not at all.

        The head goes to the second place once the entries are on the disk. Killed in between, the
        second place is behind by what this transaction wrote, and no more.

        Raises:
            LedgerError: the file or the second place cannot be written, or no longer agree.
        """
        known = len(self._chain)
        try:
            with self._store.transaction():
                entries = self.read().entries
                known = len(entries)
                self._check_second()
                yield entries
        except BaseException:
            self._chain.cut(known)
            raise
        if len(self._chain) > known:
            self._keep_head()

    def today(self) -> str:
        """Tell the day as entries have it."""
        return self._clock().isoformat()[:10]

    def append(self, kind: str, run: str, **what: Any) -> Entry:
        """Chain, sign and insert one entry inside a transaction."""
        if len(self._chain) and self._chain.key != self._key.public:
            self._key = self._current_key()  # another process has handed over to a new key
        entry = what | {
            "seq": len(self._chain) + 1,
            "site": self.site,
            "kind": kind,
            "run": run,
            "time": self._clock().isoformat(timespec="seconds"),
        }
        row = chain.seal(self._chain.last, entry, self._key)
        self._store.insert(len(self._chain) + 1, row)
        self._chain.extend([row])
        return row.entry

    def rotate(self) -> Entry:
        """Hand over to a new signing key; both sign that, and the old one is then gone.

        A process that is killed in between leaves the old key in force, or the new one: the next
        to open the log puts the file in place.
        """
        with self.transaction():
            self._key = self._current_key()  # the one in force may still be waiting as the next
            self._next.unlink(missing_ok=True)
            key = keys.create(self._next)
            agreed = key.sign(chain.handover(key.public, self._chain.last))
            entry = self.append("KEY", "", public_key=key.public, possession=agreed)
        self._key = self._open_key()
        return entry

    def _keep_head(self) -> None:
        """Bring the second place up to the end of the log."""
        if not self._second or not len(self._chain):
            return
        try:
            self._second.advance(self._chain.head())
        except OSError as fault:
            raise LedgerError(
                f"second place {self._second.path}: {fault.strerror}. What the ledger holds "
                "counts; nothing was released. Free or mend that disk."
            ) from None

    def _check_site(self) -> None:
        entries = self._chain.entries
        if entries and entries[0].get("site") != self.site:
            raise LedgerError(
                f'ledger {self.path} is of site "{entries[0].get("site")}", not "{self.site}". '
                "Use its own."
            )

    def _check_second(self) -> None:
        """Hold the log to its head in the second place, which is read before the log is."""
        if not self._second:
            return
        head, where = self._second.read(), self._second.path
        length = len(self.read())
        if head is None:
            fault = f"its head is not in the second place {where}, although it has {length} entries"
            if length <= 1:  # after the first entry there may have been no time to keep it
                self._keep_head()
                return
        elif not length:
            fault = f"it is empty, but {where} keeps its entry {head.seq}"
        elif head.site != self.site or head.key not in {*self._chain.signers, self._chain.key}:
            fault = f"{where} keeps the head of another ledger"
        elif self._chain.missing([head]):
            fault = (
                f"it does not hold entry {head.seq} that {where} keeps ({length} entries here), so "
                "it was cut or replaced by an older copy"
            )
        else:
            return
        raise LedgerError(f"ledger {self.path}: {fault}. {_REMEDY}")

    @property
    def _key_path(self) -> Path:
        return self.path.with_name("ledger.key")

    @property
    def _next(self) -> Path:
        """Where a new key waits until the log has handed over to it."""
        return self.path.with_name("ledger.key.next")

    def _open_key(self) -> keys.SigningKey:
        """Load the key that signs; make one, and the first entry, where the log is new."""
        if not len(self._chain):
            with self.transaction() as entries:
                if not entries:
                    path = self._key_path
                    self._key = keys.load(path) if path.exists() else keys.create(path)
                    self.append("KEY", "", public_key=self._key.public)
        if not self._next.exists():
            key = keys.load(self._key_path)
            if key.public == self._chain.key:
                return key
        with self._store.transaction():  # alone: another process may be handing over just now
            self.read()
            return self._current_key()

    def _current_key(self) -> keys.SigningKey:
        """Load the key in force, inside a transaction; put it in its place if it still waits."""
        path = self._key_path
        if self._next.exists() and keys.load(self._next).public == self._chain.key:
            os.replace(self._next, path)
            sync_folder(path.parent)
        key = keys.load(path)
        if key.public != self._chain.key:
            raise LedgerError(
                f"key {path}: is not the key of the ledger beside it. Restore the key, or the "
                "ledger and its key together."
            )
        return key
