"""Resuming a run: where it stood is read from its records and its checkpoint, and checked."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedaccord.accord import Accord
from fedaccord.errors import BudgetError, EvidenceError
from fedaccord.models.build import put
from fedaccord.runs import Record, RunFolder
from fedaccord.server import checkpoint, records
from fedaccord.server.admission import Place
from fedaccord.server.checkpoint import Checkpoint
from fedaccord.server.rounds import Coordinator

NOWHERE = 0  # no node has this id


@dataclass(frozen=True)
class Past:
    """What a run left before it was cut short.

    Attributes:
        folder: of the run, open for more.
        records: as they stand.
        state: of the last finished round; None: none had finished.
        cut: bytes of an unfinished last line that were removed.
    """

    folder: RunFolder
    records: list[Record]
    state: Checkpoint | None
    cut: int

    def of_kind(self, kind: str) -> list[Record]:
        """List the records of a kind."""
        return [record for record in self.records if record["kind"] == kind]

    @property
    def number(self) -> int:
        """The last round on record, 0 if there is none."""
        return max((record["round"] for record in self.of_kind("round")), default=0)

    @property
    def finished(self) -> int:
        """How many rounds count."""
        return sum(bool(record["aggregated"]) for record in self.of_kind("round"))

    @property
    def missing(self) -> int:
        """Rounds in a row, up to now, in which too few sites were there to be asked."""
        count = 0
        for record in reversed(self.of_kind("round")):
            if record["invited"]:
                break
            count += 1
        return count

    @property
    def stopped(self) -> str:
        """Why the run had decided to stop, or ""."""
        last = self.of_kind("decision")[-1:]
        return str(last[0]["reason"]) if last and last[0]["stop"] else ""

    @property
    def undecided(self) -> Record | None:
        """The last round, where no decision followed it."""
        rounds, decisions = self.of_kind("round"), self.of_kind("decision")
        return rounds[-1] if len(rounds) > len(decisions) else None

    def misses(self, away: int) -> dict[str, int]:
        """Count for each site the rounds in a row, up to now, that it did not answer.

        Args:
            away: what counts for a site that did not answer when the run was resumed.
        """
        out: Counter[str] = Counter()
        for record in self.records:
            if record["kind"] == "back":
                out[record["site"]] = 0
            for site in record.get("absent", ()):
                out[site] = away
            for site, said in record.get("replies", {}).items():
                out[site] = out[site] + 1 if said["reason"] == "no answer" else 0
        return dict(out)

    def asked(self) -> Counter[str]:
        """Count for each site the rounds whose slot it may have used, up to now.

        Whom a process asked before it was cut short is not on record, so every site that had
        reserved counts as asked for the round that was begun again.
        """
        out: Counter[str] = Counter()
        reserved, begun = set[str](), set[int]()
        for record in self.records:
            if record["kind"] == "plan":
                reserved.add(record["site"])
            elif record["kind"] == "resume":
                begun.add(record["round"] + 1)
            elif record["kind"] == "round":
                out.update(reserved if record["round"] in begun else record["invited"])
        return out

    def seat(self, places: list[Place], away: int) -> list[Place]:
        """Give each place the slots and misses that the records say.

        Args:
            places: of the sites that answered, in order of site.
            away: misses after which a site is away, as one that does not answer now is.

        Returns:
            The places of all sites that have a plan on record or answered, in order of site.

        Raises:
            BudgetError: a site whose reservation is not the one of this run: its ledger was
                replaced, and what it has spent cannot be known.
        """
        reserved = {record["site"]: record["entry"] for record in self.of_kind("plan")}
        asked = self.asked()
        misses = self.misses(away)
        for place in places:
            before = reserved.get(place.site)
            if before is not None and before != place.entry:
                raise BudgetError(
                    f"Site {place.site} shows another reservation for run {self.folder.id} than "
                    "the one on record. Name the folder of sites that the run began with (--sites)."
                )
            place.slots = max(0, place.slots - asked[place.site])
            place.misses = misses.get(place.site, 0)
        here = {place.site for place in places}
        gone = [
            Place(site, NOWHERE, max(0, int(entry["rounds"]) - asked[site]), entry, away)
            for site, entry in reserved.items()
            if site not in here
        ]
        return sorted([*places, *gone], key=lambda place: place.site)

    def resumed(self, places: list[Place]) -> dict[str, Any]:
        """Write the record of this resumption, from the places that were seated."""
        absent = [place.site for place in places if place.node == NOWHERE]
        return records.resumed(len(self.of_kind("resume")) + 1, self.number, self.cut, absent)


def reopen(path: Path, accord: Accord) -> Past:
    """Read what a run left, and finish the record that was being written.

    A round's record goes into the checkpoint before it goes into the run's records. So whatever the
    moment, a round whose checkpoint is on the disk is on record or is put there now; of a round
    without one nothing is left but what the sites have in their ledgers, and it is run again.

    Raises:
        EvidenceError: no run there, one that has ended or was altered, of another accord, or whose
            checkpoint is missing or of another round than the records.
    """
    folder, cut = RunFolder.reopen(path)
    rows = folder.records()
    agreed = rows[0].get("accord")
    if agreed != accord.digest:
        raise EvidenceError(
            f"run {path}: is of another accord ({str(agreed)[:12]}) than the one given "
            f"({accord.digest[:12]}). Give the accord that it began with."
        )
    last = max((row["round"] for row in rows if row["kind"] == "round"), default=0)
    if not last and not (path / checkpoint.LATEST).exists():
        return Past(folder, rows, None, cut)
    state = checkpoint.load(path)
    if state.number == last + 1:
        folder.append(state.record)
        rows = folder.records()
    elif state.number != last or state.record != _bare(rows, last):
        raise EvidenceError(
            f"run {path}: its checkpoint is of round {state.number} and its records end at round "
            f"{last}. Restore {checkpoint.LATEST}, or start a new run."
        )
    return Past(folder, rows, state, cut)


def _bare(rows: list[Record], number: int) -> Record:
    """Return a round's record without the hash that it got in the run."""
    found = next(r for r in rows if r["kind"] == "round" and r["round"] == number)
    return {key: value for key, value in found.items() if key != "hash"}


def take_up(coordinator: Coordinator, past: Past) -> str:
    """Bring a coordinator to where a run stood, and take the decision that is missing.

    Returns:
        Why the run is to stop, or "" if it goes on.
    """
    coordinator.number, coordinator.finished = past.number, past.finished
    coordinator.missing, state = past.missing, past.state
    coordinator.begun = past.number + 1
    if state is None:
        return ""
    # In the order of the model's own weights, by which strategies number and sum them.
    order = list(coordinator.model)
    coordinator.model = {name: state.model[name] for name in order}
    averaged = state.averaged
    coordinator.averaged = {name: averaged[name] for name in order} if averaged else None
    if coordinator.student is not None and state.student:
        put(coordinator.student, {k: torch.from_numpy(v) for k, v in state.student.items()})
    coordinator.driver.restore(state.strategy)
    undecided = past.undecided
    return coordinator.decide(undecided["audit"]) if undecided else past.stopped
