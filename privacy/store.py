"""The ledger's SQLite file: rows that are appended and read, one durable transaction at a time."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedaccord.errors import LedgerError
from fedaccord.privacy.chain import Row

WAIT = 120.0  # seconds to wait for other processes that use the file

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, hash TEXT NOT NULL, signature TEXT NOT NULL,
  body TEXT NOT NULL);
CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON entries
  BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON entries
  BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
"""


class Store:
    """Rows in one SQLite file (WAL, synchronous FULL); several processes may use it.

    What a transaction wrote is on the disk when it ends, or none of it is. Any fault of SQLite's
    (disk full, read-only, torn or foreign file) is a LedgerError: nothing goes on without a ledger.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file.

        Raises:
            LedgerError: it cannot be used.
        """
        self.path = path
        with self._guarded():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = _connect(path)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def rows(self, after: int = 0) -> list[Row]:
        """Return all rows from a number on, in order.

        By number alone: an index over what the rows say would be a second copy that no hash covers.
        """
        with self._guarded():
            found = self._db.execute(
                "SELECT body, hash, signature FROM entries WHERE seq > ? ORDER BY seq", [after]
            )
            return [Row(*row) for row in found]

    def written(self) -> int:
        """Return how many rows SQLite itself has counted; a row cut off its end stays counted."""
        with self._guarded():
            (count,) = self._db.execute("SELECT max(seq) FROM sqlite_sequence").fetchone()
        if count is not None and type(count) is not int:
            raise LedgerError(f"ledger {self.path}: its count of entries is damaged. Restore it.")
        return count or 0

    def insert(self, seq: int, row: Row) -> None:
        """Append a row inside a transaction."""
        self._db.execute(
            "INSERT INTO entries (seq, hash, signature, body) VALUES (?, ?, ?, ?)",
            [seq, row.hash, row.signature, row.body],
        )

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Hold the file alone; commit durably, or nothing at all."""
        with self._guarded():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, UnicodeDecodeError) as fault:
            raise LedgerError(
                f"ledger {self.path}: {fault}. Nothing was released; free or mend the disk, or "
                "restore the file."
            ) from None


def _connect(path: Path) -> sqlite3.Connection:
    """Open or create the file, also where other processes create it at the same moment.

    SQLite waits by itself for a transaction, but not for the switch to WAL.
    """
    db = sqlite3.connect(path, timeout=WAIT, isolation_level=None)
    end = time.monotonic() + WAIT
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            db.executescript(_SCHEMA)
            return db
        except sqlite3.OperationalError as fault:
            if "locked" not in str(fault) or time.monotonic() > end:
                raise
            time.sleep(0.01)
