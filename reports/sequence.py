"""The order of a run's records, and what each has to say of those before it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

from fedaccord.accord import Accord
from fedaccord.privacy.plan import plan_for
from fedaccord.reports.attendance import absent, check_attendance
from fedaccord.reports.checks import Check
from fedaccord.reports.mechanism import check_mechanisms, equal_weights
from fedaccord.reports.recompute import check_epsilon
from fedaccord.runs import Record

# Plans of late sites, returns and resumptions stand among the rounds; a decision ends a round.
KINDS = ("start", "plan", "out", "back", "resume", "round", "decision", "end")


def check_order(check: Check, records: list[Record], roster: Iterable[str], closed: bool) -> None:
    """Check that no record is missing, doubled or out of place.

    Args:
        check: gets the faults.
        records: the run's records, as they stand.
        roster: the accord's sites.
        closed: whether the run has a manifest, which is written after the end record.
    """
    ids = [str(record["id"]) for record in records]
    for name in sorted({name for name in ids if ids.count(name) > 1}):
        check.holds(False, f"rounds.jsonl: {name} stands there more than once")
    check.holds(ids[:1] == ["start"], "rounds.jsonl: the first record is not start")
    kinds = [record["kind"] for record in records]
    ordered = "end" not in kinds[:-1] and "start" not in kinds[1:]
    played = [kind for kind in kinds if kind in ("out", "round")]
    ordered &= "out" not in played[played.index("round") :] if "round" in played else True
    ordered &= set(kinds) <= set(KINDS)
    check.holds(ordered, "rounds.jsonl: the records are out of order")
    end = next((record for record in records if record["kind"] == "end"), None)
    check.holds(end is not None or not closed, "rounds.jsonl: the run was closed, but has no end")
    known = {str(record["site"]) for record in records if record["kind"] in ("plan", "out")}
    if len(records) > 1:
        for site in roster:
            missing = f"rounds.jsonl: site {site} has neither a plan nor a reason to be out"
            check.holds(site in known, missing)
    _check_played(check, [r for r in records if r["kind"] in ("round", "decision")], end is None)
    decisions = [record for record in records if record["kind"] == "decision"]
    stops = bool(decisions) and bool(decisions[-1]["stop"])
    if end is None and stops:
        words = f"rounds.jsonl: {decisions[-1]['id']} stops the run, but there is no end"
        check.holds(False, words)
    if end is not None:
        check.equal("rounds.jsonl: end: id", end["id"], "end")
        known_ends = ("finished", "refused")
        words = f"rounds.jsonl: end: stop says {end['stop']!r}, it should be one of {known_ends}"
        check.holds(end["stop"] in known_ends, words)
    if end is not None and end["stop"] != "refused":
        check.holds(stops, "rounds.jsonl: end: no decision to stop before it")
        reason = decisions[-1]["reason"] if decisions else None
        check.equal("rounds.jsonl: end: reason", end["reason"], reason, "the last decision says")


def check_start(check: Check, start: Record, accord: Accord) -> None:
    """Check that the start record names what the accord names."""
    wants = accord.distillation
    for path, said, right in (
        ("private", start["private"], accord.privacy.enabled),
        ("task.name", start["task"]["name"], accord.task.name),
        ("model.name", start["model"]["name"], accord.model.name),
        (
            "student.name",
            (start["student"] or {}).get("name"),
            wants.model if wants.enabled else None,
        ),
    ):
        check.equal(f"rounds.jsonl: start: {path}", said, right, "the accord gives")


def _check_played(check: Check, played: list[Record], going_on: bool) -> None:
    """Check that every round stands there with its decision, in order."""
    count = min(max([record["round"] for record in played], default=0), len(played) + 1)
    expected = [f"{kind}-{k + 1}" for k in range(count) for kind in ("round", "decision")]
    if going_on and played and played[-1]["kind"] == "round":
        expected = expected[:-1]
    ids = [str(record["id"]) for record in played]
    gone = [name for name in expected if name not in ids]
    for name in gone:
        check.holds(False, f"rounds.jsonl: {name} is missing")
    for said, right in zip(ids, expected, strict=False):
        words = f"rounds.jsonl: {said} stands where {right} should"
        if not gone and not check.holds(said == right, words):
            break
    for record in played:
        right = f"{record['kind']}-{record['round']}"
        check.equal(f"rounds.jsonl: {record['id']}: id", record["id"], right)


def check_rounds(check: Check, records: list[Record], accord: Accord) -> None:
    """Check what one round's record says against the accord and the rounds before it."""
    plans: dict[str, Record] = {}
    start = records[0]
    used: dict[str, int] = {}
    begun: set[int] = set()  # rounds that were begun by a process that was cut short
    model, finished = start["model"]["weights"], 0
    for record in records:
        if record["kind"] == "plan":
            plans[record["site"]] = record["entry"]
            used[record["site"]] = 0
        if record["kind"] == "resume":
            begun.add(int(record["round"]) + 1)
        if record["kind"] != "round":
            continue
        where = f"rounds.jsonl: {record['id']}: "
        for site in record["invited"]:
            check.holds(site in plans, f"{where}invited {site}, which has no plan")
        for site in plans:  # whom a process asked before it was cut short is not on record
            if site in record["invited"] or record["round"] in begun:
                used[site] = min(used[site] + 1, plans[site]["rounds"])
        check.equal(f"{where}replies", sorted(record["replies"]), sorted(record["invited"]))
        accepted = sorted(s for s, said in record["replies"].items() if said["accepted"])
        for site, said in record["replies"].items():
            words = f"{where}replies.{site}: a reason where the reply was accepted, or none else"
            check.holds(bool(said["reason"]) != said["accepted"], words)
        count = bool(record["aggregated"])
        if count:
            check.equal(f"{where}aggregated", record["aggregated"], accepted, "the replies give")
        declared = dict.fromkeys(accord.roster, 1) if equal_weights(accord) else accord.roster
        weights = {site: declared.get(site) for site in record["aggregated"]}
        check.equal(f"{where}weights", record["weights"], weights, "the accord gives")
        if not count:
            check.equal(f"{where}model", record["model"], model, "no update was used, so it stays")
        model, finished = record["model"], finished + count
        _check_cost(check, where, record, plans, used, accord)
    end = next((record for record in records if record["kind"] == "end"), None)
    if end is not None and end["stop"] != "refused":
        check.equal("rounds.jsonl: end: rounds", end["rounds"], finished, "the rounds give")
        check.equal("rounds.jsonl: end: model", end["model"], model, "the last round has")
        last = [r["student"] for r in records if r["kind"] == "round"][-1:]
        check.equal("rounds.jsonl: end: student", [end["student"]], last, "the last round has")
    check_attendance(check, records, accord)
    check_mechanisms(check, records, accord)
    for record in (r for r in records if r["kind"] == "decision"):
        _check_decision(check, record, records, accord)


def _check_cost(
    check: Check,
    where: str,
    record: Record,
    plans: dict[str, Record],
    used: dict[str, int],
    accord: Accord,
) -> None:
    """Recompute what each site has spent by the odometer: its used rounds at delta / rounds."""
    check.equal(f"{where}epsilon", sorted(record["epsilon"]), sorted(plans), "the plans are of")
    for site, said in record["epsilon"].items():
        path = f"{where}epsilon.{site}."
        plan = plan_for(accord, site) if site in accord.roster else None
        rounds = used.get(site, 0)
        check.equal(f"{path}rounds_used", said["rounds_used"], rounds, "the invitations give")
        right = plans[site]["epsilon"] if site in plans else None
        check.equal(f"{path}reserved", said["reserved"], right, "its plan says")
        if plan is None or not rounds:
            free: Any = 0.0 if plan else "infinite"
            check.equal(f"{path}odometer", said["odometer"], free)
        else:
            event, delta = plan.event(rounds), plan.delta / plan.rounds
            check_epsilon(check, f"{path}odometer", said["odometer"], event, delta)


def _check_decision(check: Check, record: Record, records: list[Record], accord: Accord) -> None:
    """Work out whether a round had to stop the run: fairness rule, target, or all rounds done."""
    rounds = [r for r in records if r["kind"] == "round" and r["round"] <= record["round"]]
    rules, audit = accord.fairness, rounds[-1]["audit"] if rounds else None
    target, must = accord.rounds.target_accuracy, False
    if audit and rules.stop_on_breach and rules.max_parity_difference is not None:
        sections = [audit[which] for which in ("model", "student") if which in audit]
        for section, name in product(sections, rules.attributes):
            whole = section["figures"]["attributes"][name]["all"]
            value = whole["demographic_parity_difference"]["value"]
            must |= value is not None and value > rules.max_parity_difference
    if audit and target is not None:
        mean = audit["model"]["figures"]["accuracy"]["mean"]
        must |= mean is not None and mean >= target
    must |= sum(bool(r["aggregated"]) for r in rounds) >= accord.rounds.rounds
    where = f"rounds.jsonl: {record['id']}: stop"
    if not record["stop"]:
        check.equal(f"rounds.jsonl: {record['id']}: reason", record["reason"], "go on")
    if must:
        check.equal(where, record["stop"], True, "the rules of the accord give")
    elif record["stop"]:
        upto = records[: records.index(record)]
        allowed = record["reason"].startswith("budget") or absent(upto, accord)
        check.holds(allowed, f"{where} says true, the rules of the accord give no reason to stop")
