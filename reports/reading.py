"""Reading a run's evidence: its records by kind, its ledgers, and the id of each record."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedaccord import accord as accords
from fedaccord.accord import Accord
from fedaccord.errors import EvidenceError, LedgerError
from fedaccord.privacy.chain import Chain, Row
from fedaccord.privacy.ledger import RESERVATIONS
from fedaccord.runs import Record, RunFolder

__all__ = ["ACCORD", "RESERVATIONS", "Evidence", "read", "read_ledger", "text"]

ACCORD = "accord.toml"


@dataclass(frozen=True)
class Evidence:
    """What a run left, as it stands in the files; only `verify` checks it.

    A ledger is a site's own text. One that cannot be used is in `damaged` with the reason, so that
    no site can keep a report from being written.

    A figure of the report names the record that it came from:

    | id | record |
    |---|---|
    | `start`, `plan/va`, `out/va`, `round-7`, `decision-7`, `end` | a line of rounds.jsonl |
    | `ledger/va/3` | the third entry of ledgers/va.jsonl |
    | `ledger/va` | that whole file |
    | `accord.toml` | the accord |
    """

    path: Path
    accord: Accord
    records: list[Record]
    ledgers: dict[str, list[Record]]
    damaged: dict[str, str]

    def kind(self, kind: str) -> list[Record]:
        """List the records of a kind, in order."""
        return [record for record in self.records if record.get("kind") == kind]

    @property
    def start(self) -> Record:
        """The first record: what was run, by which code.

        Raises:
            EvidenceError: there is none.
        """
        found = self.kind("start")
        if not found:
            raise EvidenceError(f"run {self.path}: no start record. Restore rounds.jsonl.")
        return found[0]

    @property
    def end(self) -> Record | None:
        """The last record of a run that came to its end."""
        return next(iter(self.kind("end")), None)

    @property
    def run(self) -> str:
        """The id under which the sites' ledgers know the run (a moved folder keeps it)."""
        said = [self.start.get("run"), *(plan["entry"]["run"] for plan in self.kind("plan"))]
        return next((str(run) for run in said if run), self.path.resolve().name)

    @property
    def ids(self) -> set[str]:
        """Every id that a figure of the report may name."""
        entries = {
            f"ledger/{site}/{entry['seq']}" for site, book in self.ledgers.items() for entry in book
        }
        whole = {f"ledger/{site}" for site in self.ledgers}
        return {ACCORD, *(str(record["id"]) for record in self.records)} | whole | entries


NEEDED: dict[str, dict[str, type]] = {
    "RESERVE": {"event": dict, "plan": dict, "epsilon": float, "dataset": str, "disjoint": list},
    "NONPRIVATE": {"event": dict, "dataset": str, "disjoint": list},
    "LOST": {"event": dict, "dataset": str},
    "RELEASE": {"covers": str, "bytes": int},
    "COUNTS": {"covers": str, "cells": int},
    "PERSONAL": {"covers": str, "bytes": int},
}


def read_ledger(path: Path) -> list[Record]:
    """Read a ledger that a site handed over.

    Raises:
        LedgerError: a line that is no entry, a chain that is broken, or a signature that is not
            the site's.
    """
    out: list[Record] = []
    for number, line in enumerate(path.read_bytes().rstrip(b"\n").split(b"\n"), start=1):
        try:
            entry = json.loads(line)
            wanted = {"kind": str, "run": str, "seq": int} | NEEDED.get(entry["kind"], {})
            good = all(type(entry[key]) is kind for key, kind in wanted.items())
        except (ValueError, TypeError, KeyError, RecursionError):
            good = False
        if not good:
            raise LedgerError(f"line {number} of ledgers/{path.name} is no entry of a ledger")
        out.append(entry)
    Chain(f"ledgers/{path.name}").extend([Row.of(entry) for entry in out], every=True)
    return out


def read(run: Path) -> Evidence:
    """Read a run's folder.

    Raises:
        EvidenceError: not a run's folder, or a file in it that cannot be read.
        AccordError: an accord.toml that does not hold together.
    """
    folder = RunFolder.open(run)
    ledgers, damaged = {}, {}
    for path in sorted(run.glob("ledgers/*.jsonl")):
        try:
            ledgers[path.stem] = read_ledger(path)
        except (LedgerError, ValueError) as fault:
            damaged[path.stem] = str(fault)
    return Evidence(
        path=run,
        accord=accords.load(run / ACCORD),
        records=folder.records(),
        ledgers=ledgers,
        damaged=damaged,
    )


def text(value: Any) -> str:
    """Return a value of a record as text, "" where there is none."""
    return "" if value is None else str(value)
