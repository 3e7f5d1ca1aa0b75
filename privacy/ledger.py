"""A site's ledger: append-only, hash-chained, signed, durable; the only source of epsilon.

Order of writing (reserve, then write ahead):

KEY       first: the public half of the key that signs; later: the key that takes over
RESERVE   the whole plan, against the site's cap, before round 1
INTENT    a round's slot is used, before any record is read
RELEASE   what left the site in that round, after it is stored and before it is sent
COUNTS    evaluation counts that left the site, with what covers them
PERSONAL  a site's own un-noised model is taken out of its folder by its operator
NONPRIVATE  stands for RESERVE where privacy is off: epsilon infinite from then on
REFUSAL   a plan that did not fit, or what the site's policy ruled out
ACCEPT    an operator went on although the head in the second place was missing
LOST      entries are known to be missing: what they spent is unknown, so epsilon is infinite

After a crash the file says at least as much as was spent: an INTENT without RELEASE has used its
slot. An edit or a gap shows in the chain, a forged entry in its signature, a cut end or an older
copy in the head kept in a second place and in those that other sites were shown. Who holds the
site's key can forge all but what others were shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fedaccord.errors import BudgetError, LedgerError
from fedaccord.evidence import canonical_json
from fedaccord.privacy import accounting, budget
from fedaccord.privacy.budget import Cap
from fedaccord.privacy.chain import Entry, Head, latest
from fedaccord.privacy.log import SignedLog, now
from fedaccord.privacy.plan import Plan

RESERVATIONS = ("RESERVE", "NONPRIVATE", "LOST")
RESULTS = ("INTENT", "RELEASE", "COUNTS")  # from an INTENT on, words may leave that a result chose
Groups = Sequence[Sequence[str]]


def _finite(value: float) -> float | str:
    """Write the infinite as a word: JSON has no number for it."""
    return "infinite" if math.isinf(value) else value


def _event(plan: Plan | None) -> accounting.Event:
    return plan.event() if plan else accounting.NON_PRIVATE


def overlap(one: str, other: str, disjoint: Groups) -> bool:
    """Tell whether two data sets may hold the same subject.

    They may, unless the site declared them in two different groups. An entry about no data set in
    particular ("") concerns all.
    """
    places = [{n for n, group in enumerate(disjoint) if name in group} for name in (one, other)]
    return not (all(places) and places[0].isdisjoint(places[1]))


def reserved(
    entries: Iterable[Entry], dataset: str = "", disjoint: Groups = ()
) -> tuple[list[accounting.Event], list[accounting.Event], bool]:
    """List what a ledger has reserved for the subjects of a data set.

    Returns:
        The events reserved before any result can have left the site (before the first INTENT),
        those reserved later, and whether a result may have left it by now.
    """
    first: list[accounting.Event] = []
    later: list[accounting.Event] = []
    seen = False
    for entry in entries:
        if entry["kind"] in RESULTS:
            seen = True
        elif entry["kind"] in RESERVATIONS and overlap(dataset, entry["dataset"], disjoint):
            (later if seen else first).append(entry["event"])
    return first, later, seen


def spent(
    entries: Iterable[Entry],
    cap: Cap,
    further: accounting.Event | None = None,
    dataset: str = "",
    disjoint: Groups = (),
) -> float:
    """Add up what a ledger reserves for a data set's subjects, and one event more."""
    first, later, seen = reserved(entries, dataset, disjoint)
    if further:
        (later if seen else first).append(further)
    return budget.spent(first, later, cap)


def of_accord(entries: Iterable[Entry], accord: str) -> list[Entry]:
    """Leave out what other accords reserved; that results have left the site stays to be seen."""
    others = ("RESERVE", "NONPRIVATE")
    return [e for e in entries if e["kind"] not in others or e["accord"] == accord]


@dataclass(frozen=True)
class Terms:
    """What a reservation is held to.

    Attributes:
        cap: of the site, over everything that its ledger holds of the same subjects.
        accord: the accord's digest.
        dataset: the data set whose subjects the plan concerns; "" concerns all.
        disjoint: groups of data sets that share no subject, as the site declares.
        accord_cap: the site's cap on all runs of this accord, or None.
    """

    cap: Cap
    accord: str
    dataset: str = ""
    disjoint: Groups = ()
    accord_cap: Cap | None = None


class Ledger:
    """One site's ledger in one SQLite file, signed with the key beside it (see `SignedLog`).

    Every method that writes is one transaction that is on the disk when it returns. Several
    processes may use one file: a reservation is exclusive.
    """

    def __init__(
        self,
        path: Path,
        site: str,
        second: Path | None = None,
        clock: Callable[[], datetime] = now,
    ) -> None:
        """Open or create a site's ledger and check it.

        Args and errors: as `SignedLog`.
        """
        self.path, self.site = path, site
        self._log = SignedLog(path, site, second, clock)

    def close(self) -> None:
        """Close the file."""
        self._log.close()

    def entries(self) -> list[Entry]:
        """Return all entries in order, each with its hash and signature."""
        return list(self._log.read().entries)

    def find(self, run: str, *kinds: str) -> list[Entry]:
        """Return a run's entries of some kinds, in order."""
        return [e for e in self.entries() if e["run"] == run and e["kind"] in kinds]

    def export(self) -> str:
        """Return the whole ledger as JSON lines, each entry with its hash and signature."""
        return "".join(canonical_json(entry) + "\n" for entry in self.entries())

    def head(self) -> Head:
        """Return the ledger's end, for others to keep."""
        return self._log.read().head()

    def witness(self, heads: list[Head]) -> list[Head]:
        """Hold the ledger to the heads that others were shown of it; return theirs.

        Returns:
            The heads of other sites, the longest of each, to be written into the next INTENT.

        Raises:
            LedgerError: a head that this site signed and this ledger does not extend.
        """
        chain = self._log.read()
        if lost := chain.missing(head for head in heads if head.site == self.site):
            raise LedgerError(
                f"ledger {self.path}: another site was shown entry {lost[0].seq} of it "
                f"({lost[0].hash[:12]}), which it does not hold ({len(chain)} entries). It was "
                "cut, restored or cloned. Stop, and see `fedaccord ledger restore`."
            )
        return latest(head for head in heads if head.site != self.site)

    def seen(self) -> list[Head]:
        """Return the longest head of each other site that this ledger holds."""
        return latest(Head(**said) for e in self.entries() for said in e.get("seen", ()))

    def reserve(
        self,
        run: str,
        plan: Plan | None,
        rounds: int,
        terms: Terms,
        seen: Iterable[Head] = (),
    ) -> Entry:
        """Reserve a whole plan, or refuse it, in one exclusive transaction.

        Asking again for the same run and plan returns the reservation that is there.

        Args:
            run: the run's id.
            plan: the plan, or None where privacy is off.
            rounds: rounds with spares where privacy is off; else the plan says how many slots.
            terms: the accord, whose subjects it concerns, and the caps that it is held to.
            seen: heads of other sites.

        Raises:
            BudgetError: plan and past together would pass a cap, and a REFUSAL is on record; or
                the run has reserved another plan.
        """
        with self._admission(run, plan, terms) as held:
            return held or self._log.append(
                "RESERVE" if plan else "NONPRIVATE",
                run,
                accord=terms.accord,
                dataset=terms.dataset,
                disjoint=[list(group) for group in terms.disjoint],
                rounds=plan.rounds if plan else rounds,
                plan=plan.to_json() if plan else None,
                plan_digest=plan.digest if plan else None,
                event=_event(plan),
                epsilon=_finite(plan.epsilon() if plan else math.inf),
                cap={"epsilon": _finite(terms.cap.epsilon), "delta": terms.cap.delta},
                seen=[head.to_json() for head in seen],
            )

    def consider(self, run: str, plan: Plan | None, terms: Terms) -> None:
        """Refuse a plan that does not fit, before anybody reserves; else write nothing.

        Raises:
            BudgetError: as `reserve`.
        """
        with self._admission(run, plan, terms):
            pass

    def refuse(self, run: str, accord: str, rule: str, reason: str) -> None:
        """Record that the site refused.

        The same refusal of an accord is written once a day, so that nobody fills a ledger by asking
        under ever new names of runs.
        """
        said = {"accord": accord, "rule": rule, "reason": reason}
        with self._log.transaction() as entries:
            today = self._log.today()
            if not any(
                e["kind"] == "REFUSAL" and e["time"][:10] == today and said.items() <= e.items()
                for e in entries
            ):
                self._log.append("REFUSAL", run, **said)

    def intend(
        self, run: str, number: int, plan: Plan | None, accord: str, seen: Iterable[Head] = ()
    ) -> Entry:
        """Use one slot for a round under the reserved plan, before any record is read.

        Without privacy a round that was cut short may be run again in its slot: it costs nothing,
        and the run then gives the model that it would have given. Under a plan it may not.

        Raises:
            BudgetError: no reservation, another plan or accord than the reserved one, no slot
                left, or this round has used its slot already.
        """
        with self._log.transaction() as entries:
            mine = [entry for entry in entries if entry["run"] == run]
            held = self._held(mine, run, plan, accord)
            slots = held["rounds"] if held else 0
            used = [entry["round"] for entry in mine if entry["kind"] == "INTENT"]
            if number in used and plan is None and self._unreleased(mine, number):
                return next(e for e in mine if e["kind"] == "INTENT" and e["round"] == number)
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
            heads = [head.to_json() for head in seen]
            return self._log.append(
                "INTENT", run, round=number, slot=len(used) + 1, slots=slots, seen=heads
            )

    @staticmethod
    def _unreleased(mine: list[Entry], number: int) -> bool:
        return not any(e["kind"] == "RELEASE" and e["round"] == number for e in mine)

    def release(self, run: str, number: int, **what: Any) -> Entry:
        """Record what a round released; call it once the bytes are stored and before they go.

        Raises:
            LedgerError: no INTENT for the round, or a RELEASE already.
        """
        with self._log.transaction() as entries:
            kinds = [e["kind"] for e in entries if e["run"] == run and e.get("round") == number]
            if "INTENT" not in kinds or "RELEASE" in kinds:
                raise LedgerError(
                    f"ledger {self.path}: round {number} of run {run} has "
                    f"{'a RELEASE already' if 'RELEASE' in kinds else 'no INTENT'}. "
                    "Nothing was sent; look at who else writes this ledger."
                )
            return self._log.append("RELEASE", run, round=number, **what)

    def counts(self, run: str, number: int, **what: Any) -> Entry:
        """Record that evaluation counts leave the site, and what covers them."""
        with self._log.transaction():
            return self._log.append("COUNTS", run, round=number, **what)

    def personal(self, run: str, **what: Any) -> Entry:
        """Record that the site's personal model of a run is taken out, before it is.

        Raises:
            LedgerError: no round of the run has begun here, so there can be no such model.
        """
        with self._log.transaction() as entries:
            if not any(e["kind"] == "INTENT" and e["run"] == run for e in entries):
                raise LedgerError(
                    f"ledger {self.path}: has no round of run {run}. Nothing was taken out; give "
                    "a run of this ledger."
                )
            return self._log.append("PERSONAL", run, **what)

    def rotate(self) -> Entry:
        """Hand over to a new signing key (see `SignedLog.rotate`)."""
        return self._log.rotate()

    @contextmanager
    def _admission(self, run: str, plan: Plan | None, terms: Terms) -> Iterator[Entry | None]:
        """Hold the file alone and show the run's reservation; refuse a plan that does not fit."""
        self._over(self.entries(), plan, terms)  # the slow sum, cached, before others have to wait
        with self._log.transaction() as entries:
            mine = [e for e in entries if e["run"] == run]
            held = self._held(mine, run, plan, terms.accord)
            refusal = "" if held else self._over(entries, plan, terms)
            if not refusal:
                yield held
        if refusal:
            self.refuse(run, terms.accord, "budget", refusal)
            raise BudgetError(refusal)

    def _held(self, mine: list[Entry], run: str, plan: Plan | None, accord: str) -> Entry | None:
        """Find a run's reservation; it covers the plan and accord that it was made for, no other.

        Equal plans of two accords are two reservations: an accord may have a cap of its own, and
        its records may be other people's.
        """
        found = [e for e in mine if e["kind"] in RESERVATIONS]
        digest = plan.digest if plan else None
        if found and found[0]["plan_digest"] != digest:
            raise BudgetError(
                f"Site {self.site} has reserved plan {str(found[0]['plan_digest'])[:12]} for run "
                f"{run}, not {str(digest)[:12]}. Start a new run for another plan."
            )
        if found and found[0]["accord"] != accord:
            raise BudgetError(
                f"Site {self.site} has reserved run {run} for accord "
                f"{found[0]['accord'][:12]}, not {accord[:12]}. Start a new run for another accord."
            )
        return found[0] if found else None

    def _over(self, entries: list[Entry], plan: Plan | None, terms: Terms) -> str:
        """Say why a plan does not fit under the site's caps, or return ""."""
        for cap, held, of in (
            (terms.cap, entries, ""),
            (terms.accord_cap, of_accord(entries, terms.accord), " for this accord"),
        ):
            if cap is None or math.isinf(cap.epsilon):
                continue
            event, about = _event(plan), (terms.dataset, terms.disjoint)
            if spent(held, cap, event, *about) <= cap.epsilon:
                continue
            first, later, seen = reserved(held, *about)
            left = budget.left(first, later, cap)
            needs = budget.needs(event, cap)
            if needs <= left:  # by itself it would fit: what counts is what it adds to the others
                needs = budget.needs(event, cap, first, later, seen=seen)
            return (
                f"This plan needs epsilon {accounting.show(needs)}; site {self.site} has "
                f"{budget.show_left(left)} of {cap.epsilon:.2f} left at "
                f"delta {cap.delta:g}{of}. Plan fewer rounds, raise privacy.noise_multiplier, or "
                "ask the site to raise its cap."
            )
        return ""
