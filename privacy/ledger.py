"""A site's ledger: append-only, hash-chained, durable; the only source of epsilon.

Order of writing (reserve, then write ahead):

RESERVE   the whole plan, against the site's cap, before round 1
INTENT    a round's slot is used, before any record is read
RELEASE   what left the site in that round, after it is stored and before it is sent
COUNTS    evaluation counts that left the site, with what covers them
NONPRIVATE  stands for RESERVE where privacy is off: epsilon infinite from then on
REFUSAL   a plan that did not fit

After a crash the file says at least as much as was spent: an INTENT without RELEASE has used its
slot. The chain shows an edit or a gap, SQLite's own counter a shortened end; that nobody rewrote
the whole file, or put an older one in its place, is for signatures and outside copies of the head
to show, which this file does not have yet.
"""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedaccord.errors import BudgetError, LedgerError
from fedaccord.evidence import canonical_json, sha256
from fedaccord.privacy import accounting
from fedaccord.privacy.plan import PrivacyPlan

GENESIS = "0" * 64
WAIT = 120.0  # seconds to wait for other processes that use the file
RESERVATIONS = ("RESERVE", "NONPRIVATE")
Entry = dict[str, Any]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, hash TEXT NOT NULL, body TEXT NOT NULL);
CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON entries
  BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON entries
  BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
"""


@dataclass(frozen=True)
class Cap:
    """The most that a site lets its subjects lose: epsilon at a delta, over all accords."""

    epsilon: float
    delta: float


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


def chain(previous: str, body: str) -> str:
    """Hash an entry together with the hash of the entry before it."""
    return sha256(f"{previous}\n{body}")


def check_chain(entries: list[Entry], where: str) -> None:
    """Recompute the chain of exported entries.

    Raises:
        LedgerError: the first entry that is edited, missing or out of order, by number.
    """
    previous = GENESIS
    for number, entry in enumerate(entries, start=1):
        body = {key: value for key, value in entry.items() if key != "hash"}
        previous = chain(previous, canonical_json(body))
        if body.get("seq") != number or entry.get("hash") != previous:
            raise LedgerError(
                f"{where}: entry {number} ({body.get('kind', '?')}) does not match its hash, or "
                "one before it was removed. Stop, and restore the ledger from a trusted copy."
            )


def _finite(value: float) -> float | str:
    """Write the infinite as a word: JSON has no number for it."""
    return "infinite" if math.isinf(value) else value


def spent(entries: list[Entry], delta: float, further: accounting.Event | None = None) -> float:
    """Compose every plan that a ledger reserves, and one more, into one epsilon at a delta."""
    events = [entry["event"] for entry in entries if entry["kind"] in RESERVATIONS]
    events += [further] if further else []
    return accounting.epsilon(accounting.compose(events), delta) if events else 0.0


class Ledger:
    """One site's ledger in one SQLite file.

    Every method is one transaction that is on the disk when it returns (WAL, synchronous FULL).
    Several processes may use one file: a reservation is exclusive.
    """

    def __init__(self, path: Path, site: str) -> None:
        """Open or create a site's ledger and check its chain.

        Raises:
            LedgerError: a file that is damaged, altered, or another site's.
        """
        self.path, self.site = path, site
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = _connect(path)
            # Read first: what another process appends meanwhile only makes the ledger longer.
            (written,) = self._db.execute("SELECT max(seq) FROM sqlite_sequence").fetchone()
            entries = self.entries()
            check_chain(entries, f"ledger {path}")
        except (sqlite3.Error, OSError, ValueError, TypeError) as fault:
            raise LedgerError(
                f"ledger {path}: {fault}. Nothing was released; restore the file or its disk."
            ) from None
        if len(entries) < (written or 0):
            raise LedgerError(
                f"ledger {path}: entry {len(entries) + 1} of {written} was removed from its end. "
                "Stop, and restore the ledger from a trusted copy."
            )
        if entries and entries[0]["site"] != site:
            raise LedgerError(
                f'ledger {path} is of site "{entries[0]["site"]}", not "{site}". Use its own.'
            )

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def entries(self) -> list[Entry]:
        """Return all entries in order, each with its hash."""
        rows = self._db.execute("SELECT hash, body FROM entries ORDER BY seq").fetchall()
        return [json.loads(body) | {"hash": mark} for mark, body in rows]

    def find(self, run: str, *kinds: str) -> list[Entry]:
        """Return a run's entries of some kinds, in order."""
        return [e for e in self.entries() if e["run"] == run and e["kind"] in kinds]

    def reserve(
        self, run: str, plan: PrivacyPlan | None, rounds: int, cap: Cap, accord: str
    ) -> Entry:
        """Reserve a whole plan, or refuse it, in one exclusive transaction.

        Asking again for the same run and plan returns the reservation that is there.

        Args:
            run: the run's id.
            plan: the plan, or None where privacy is off.
            rounds: rounds with spares where privacy is off; else the plan says how many slots.
            cap: the site's cap over everything that its ledger holds.
            accord: the accord's digest.

        Raises:
            BudgetError: plan and past together would pass the cap, and a REFUSAL is on record; or
                the run has reserved another plan.
        """
        event = plan.event() if plan else accounting.NON_PRIVATE
        with self._transaction() as entries:
            if held := self._held(entries, run, plan):
                return held
            refusal = self._over(entries, event, cap)
            if refusal:
                self._append("REFUSAL", run, accord=accord, reason=refusal)
            else:
                entry = self._append(
                    "RESERVE" if plan else "NONPRIVATE",
                    run,
                    accord=accord,
                    rounds=plan.rounds if plan else rounds,
                    plan=plan.to_json() if plan else None,
                    plan_digest=plan.digest if plan else None,
                    event=event,
                    epsilon=_finite(plan.epsilon() if plan else math.inf),
                    cap={"epsilon": _finite(cap.epsilon), "delta": cap.delta},
                )
        if refusal:
            raise BudgetError(refusal)
        return entry

    def consider(self, run: str, plan: PrivacyPlan | None, cap: Cap, accord: str) -> None:
        """Refuse a plan that does not fit, before anybody reserves; else write nothing.

        Raises:
            BudgetError: as `reserve`.
        """
        event = plan.event() if plan else accounting.NON_PRIVATE
        with self._transaction() as entries:
            if self._held(entries, run, plan):
                return
            refusal = self._over(entries, event, cap)
            if refusal:
                self._append("REFUSAL", run, accord=accord, reason=refusal)
        if refusal:
            raise BudgetError(refusal)

    def intend(self, run: str, number: int, plan: PrivacyPlan | None) -> Entry:
        """Use one slot for a round under the reserved plan, before any record is read.

        Raises:
            BudgetError: no reservation, another plan than the reserved one, no slot left, or this
                round already has its slot.
        """
        with self._transaction() as entries:
            mine = [entry for entry in entries if entry["run"] == run]
            held = self._held(mine, run, plan)
            slots = held["rounds"] if held else 0
            used = [entry["round"] for entry in mine if entry["kind"] == "INTENT"]
            if number in used:
                raise BudgetError(
                    f"Site {self.site} has already used its slot for round {number} of run {run}. "
                    "Ask for a later round."
                )
            if len(used) >= slots:
                raise BudgetError(
                    f"Site {self.site} has no slot left of {slots} reserved for run {run}. "
                    "Raise rounds.spare_rounds in a new accord."
                )
            return self._append("INTENT", run, round=number, slot=len(used) + 1, slots=slots)

    def release(self, run: str, number: int, **what: Any) -> Entry:
        """Record what a round released; call it once the bytes are stored and before they go.

        Raises:
            LedgerError: no INTENT for the round, or a RELEASE already.
        """
        with self._transaction() as entries:
            kinds = [e["kind"] for e in entries if e["run"] == run and e.get("round") == number]
            if "INTENT" not in kinds or "RELEASE" in kinds:
                raise LedgerError(
                    f"ledger {self.path}: round {number} of run {run} has "
                    f"{'a RELEASE already' if 'RELEASE' in kinds else 'no INTENT'}. "
                    "Nothing was sent; look at who else writes this ledger."
                )
            return self._append("RELEASE", run, round=number, **what)

    def counts(self, run: str, number: int, **what: Any) -> Entry:
        """Record that evaluation counts leave the site, and what covers them."""
        with self._transaction():
            return self._append("COUNTS", run, round=number, **what)

    def export(self) -> str:
        """Return the whole ledger as JSON lines, each entry with its hash."""
        return "".join(canonical_json(entry) + "\n" for entry in self.entries())

    def _held(self, entries: list[Entry], run: str, plan: PrivacyPlan | None) -> Entry | None:
        """Find a run's reservation; it covers the plan that it was made for and no other."""
        found = [e for e in entries if e["run"] == run and e["kind"] in RESERVATIONS]
        digest = plan.digest if plan else None
        if found and found[0]["plan_digest"] != digest:
            raise BudgetError(
                f"Site {self.site} has reserved plan {str(found[0]['plan_digest'])[:12]} for run "
                f"{run}, not {str(digest)[:12]}. Start a new run for another plan."
            )
        return found[0] if found else None

    def _over(self, entries: list[Entry], event: accounting.Event, cap: Cap) -> str:
        """Say why a plan does not fit under the cap, or return ""."""
        if math.isinf(cap.epsilon) or spent(entries, cap.delta, event) <= cap.epsilon:
            return ""
        needs = accounting.show(accounting.epsilon(event, cap.delta))
        left = max(0.0, cap.epsilon - spent(entries, cap.delta))
        return (
            f"This plan needs epsilon {needs}; site {self.site} has "
            f"{math.floor(left * 100) / 100:.2f} of {cap.epsilon:.2f} left at delta {cap.delta:g}. "
            "Plan fewer rounds, raise privacy.noise_multiplier, or ask the site to raise its cap."
        )

    @contextmanager
    def _transaction(self) -> Iterator[list[Entry]]:
        """Hold the file alone, show what it holds, commit durably or not at all."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self.entries()
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
        except sqlite3.Error as fault:
            raise LedgerError(
                f"ledger {self.path}: {fault}. Nothing was released; free or mend the disk."
            ) from None

    def _append(self, kind: str, run: str, **what: Any) -> Entry:
        last = self._db.execute(
            "SELECT seq, hash FROM entries ORDER BY seq DESC LIMIT 1"
        ).fetchone()
        seq, previous = last or (0, GENESIS)
        entry = what | {
            "seq": seq + 1,
            "site": self.site,
            "kind": kind,
            "run": run,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        body = canonical_json(entry)
        mark = chain(previous, body)
        self._db.execute("INSERT INTO entries VALUES (?, ?, ?)", (seq + 1, mark, body))
        return json.loads(body) | {"hash": mark}
