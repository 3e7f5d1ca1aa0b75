"""Recomputing a run: epsilons from events, figures from counts, and what has to agree."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from fedaccord.accord import Accord
from fedaccord.evidence import digest
from fedaccord.fairness.federation import audit_sites
from fedaccord.privacy import accounting, tradeoff
from fedaccord.privacy.chain import Row, faults
from fedaccord.privacy.client_level import COVERS, ClientPlan
from fedaccord.privacy.ledger import reserved
from fedaccord.privacy.plan import Plan, PrivacyPlan, plan_for
from fedaccord.reports.checks import EPSILON, EXACT, Check
from fedaccord.reports.costs import INFINITE, cost, gate
from fedaccord.reports.reading import RESERVATIONS
from fedaccord.runs import Record


def check_epsilon(
    check: Check, where: str, said: Any, event: accounting.Event, delta: float, **how: str
) -> None:
    """Compare a written epsilon with that of its event."""
    try:
        right = cost(event, delta, **how)
    except ValueError as fault:
        check.holds(False, f"{where} cannot be recomputed from its event: {fault}")
        return
    slack = 0.0 if isinstance(right, str) else EPSILON * right
    check.equal(where, said, right, "its event gives", slack)


def check_plan(check: Check, record: Record, accord: Accord) -> None:
    """Compare a plan record with the plan that the accord alone gives its site."""
    site, where = record["site"], f"rounds.jsonl: {record['id']}: "
    if not check.holds(site in accord.roster, f"{where}site {site} is not in the accord"):
        return
    entry, plan = record["entry"], plan_for(accord, site)
    check.equal(f"{where}id", record["id"], f"plan/{site}")
    for key, right in _reservation(accord, site, plan).items():
        check.equal(f"{where}entry.{key}", entry.get(key), right, "the accord gives")
    if plan is None:
        check_epsilon(check, f"{where}entry.epsilon", entry["epsilon"], entry["event"], 0.5)
        return
    for key, right in {
        "statement": plan.statement(),
        "noise_stddev": plan.noise_stddev,
        "expected_batch": plan.normaliser,
    }.items():
        check.equal(f"{where}{key}", record.get(key), right, "the accord gives", EXACT)
    event, delta, said = plan.event(), plan.delta, record["epsilon"]
    check_epsilon(check, f"{where}entry.epsilon", entry["epsilon"], event, delta)
    check_epsilon(check, f"{where}epsilon.PLD", said["PLD"], event, delta)
    check_epsilon(check, f"{where}epsilon.RDP", said["RDP"], event, delta, accountant="RDP")
    path = f"{where}epsilon.replace-one"
    check_epsilon(check, path, said["replace-one"], event, delta, relation="replace-one")
    right = tradeoff.membership(event)
    check.equal(f"{where}membership", record["membership"], right, "its event gives", EPSILON)


def _reservation(accord: Accord, site: str, plan: Plan | None) -> dict[str, Any]:
    """Say what the accord alone gives for a site's reservation."""
    return {
        "accord": accord.digest,
        "site": site,
        "kind": "RESERVE" if plan else "NONPRIVATE",
        "rounds": accord.reserved_rounds,
        "plan": plan.to_json() if plan else None,
        "plan_digest": plan.digest if plan else None,
        "event": plan.event() if plan else accounting.NON_PRIVATE,
    }


def check_ledger(check: Check, site: str, lines: list[tuple[int, Record]]) -> None:
    """Check a ledger by itself: chain, order of entries, every epsilon, and every cap."""
    rows = [Row.of(entry) for _, entry in lines]
    wrong = dict(reversed(list(faults(rows))))  # the first fault of each entry
    good = []
    for number, (_, entry) in enumerate(lines, start=1):
        where = f"ledgers/{site}.jsonl: entry {number} ({entry.get('kind', '?')})"
        if check.holds(number not in wrong, f"{where} {wrong.get(number)}"):
            good.append((where, entry))
        check.equal(f"{where}: site", entry.get("site"), site)
    past: list[Record] = []
    for where, entry in good:
        if entry["kind"] in RESERVATIONS:
            _check_reservation(check, where, entry, past)
        elif entry["kind"] in ("INTENT", "RELEASE", "COUNTS"):
            _check_use(check, where, entry, [e for e in past if e["run"] == entry["run"]])
        elif entry["kind"] == "PERSONAL":
            check.equal(f"{where}: covers", entry["covers"], "not covered")
        past.append(entry)


def plan_of(said: Record) -> Plan:
    """Rebuild the plan that a ledger's reservation holds; one without a unit is a subject's."""
    return ClientPlan(**said) if said.get("unit") == "client" else PrivacyPlan(**said)


def _check_reservation(check: Check, where: str, entry: Record, past: list[Record]) -> None:
    """Check one reservation: its event is its plan's, its epsilon its event's, and it fits."""
    mine = [e for e in past if e["run"] == entry["run"] and entry["kind"] != "LOST"]
    again = any(e["kind"] in RESERVATIONS for e in mine)
    check.holds(not again, f"{where} reserves a second time for run {entry['run']}")
    if entry["kind"] != "RESERVE":
        check.equal(f"{where}: event", entry["event"], accounting.NON_PRIVATE)
        check.equal(f"{where}: epsilon", entry["epsilon"], INFINITE)
        return
    plan = plan_of(entry["plan"])
    check.equal(f"{where}: plan_digest", entry["plan_digest"], digest(entry["plan"]))
    check.equal(f"{where}: event", entry["event"], plan.event(), "its plan gives")
    check.equal(f"{where}: rounds", entry["rounds"], plan.rounds, "its plan gives")
    check_epsilon(check, f"{where}: epsilon", entry["epsilon"], entry["event"], plan.delta)
    cap = entry["cap"]
    if cap["epsilon"] == INFINITE:
        return
    first, later, seen = reserved(past, entry["dataset"], entry["disjoint"])
    (later if seen else first).append(entry["event"])
    try:
        total = gate(first, later, cap["epsilon"], cap["delta"])
    except ValueError as fault:
        check.holds(False, f"{where}: the ledger up to here cannot be added up: {fault}")
        return
    fits = not isinstance(total, str) and total <= cap["epsilon"] * (1 + EPSILON)
    above = f"{where}: cap.epsilon says {cap['epsilon']}, the ledger up to here adds up to {total}"
    check.holds(fits, above)


def _check_use(check: Check, where: str, entry: Record, mine: list[Record]) -> None:
    """Check an INTENT, RELEASE or COUNTS against what its run wrote before it."""
    reserved = [e for e in mine if e["kind"] in RESERVATIONS]
    if not check.holds(bool(reserved), f"{where}: run {entry['run']} has reserved nothing"):
        return
    plan, used = reserved[0], [e["round"] for e in mine if e["kind"] == "INTENT"]
    done = [e["round"] for e in mine if e["kind"] == "RELEASE"]
    if entry["kind"] == "INTENT":
        check.holds(entry["round"] not in used, f"{where}: round {entry['round']} has two INTENTs")
        check.equal(f"{where}: slot", entry["slot"], len(used) + 1)
        check.equal(f"{where}: slots", entry["slots"], plan["rounds"], "the reservation gives")
        check.holds(len(used) < plan["rounds"], f"{where}: all {plan['rounds']} slots were used")
    elif entry["kind"] == "RELEASE":
        missing = f"{where}: round {entry['round']} has no INTENT before it"
        check.holds(entry["round"] in used, missing)
        check.holds(entry["round"] not in done, f"{where}: a second RELEASE of one round")
        digest_of = plan["plan_digest"]
        check.equal(f"{where}: plan_digest", entry["plan_digest"], digest_of, "it reserved")
        covers = "the reserved plan" if plan["kind"] == "RESERVE" else "not covered"
        covers = COVERS if (plan["plan"] or {}).get("unit") == "client" else covers
        check.equal(f"{where}: covers", entry["covers"], covers)


def check_site(
    check: Check, site: str, run: str, book: list[Record], records: list[Record]
) -> None:
    """Hold a site's ledger to the run's records: one reservation, each round in both, each head.

    Args:
        check: gets the faults.
        site: the site.
        run: the run's id.
        book: all entries of the site's ledger.
        records: the run's records.
    """
    mine = [entry for entry in book if entry.get("run") == run]
    where = f"ledgers/{site}.jsonl"
    reserved = [entry for entry in mine if entry["kind"] in RESERVATIONS]
    plans = [r["entry"] for r in records if r["kind"] == "plan" and r["site"] == site]
    check.holds(len(reserved) == 1, f"{where}: {len(reserved)} reservations for this run, not one")
    if reserved and plans:
        check.equal(f"rounds.jsonl: plan/{site}: entry", plans[0], reserved[0], "the ledger has")
    bare = any((entry["plan"] or {}).get("unit") == "client" for entry in reserved)
    rounds = [r for r in records if r["kind"] == "round"]
    entries = {(e["kind"], e.get("round")): e for e in mine}
    begun = {r["round"] + 1 for r in records if r["kind"] == "resume"}  # with nobody knows whom
    for record in rounds:
        about = f"{where}: round {record['round']}: "
        _check_head(check, f"rounds.jsonl: {record['id']}: heads.{site}", record, site, book)
        intent, release, counts = (
            (kind, record["round"]) in entries for kind in ("INTENT", "RELEASE", "COUNTS")
        )
        invited = site in record["invited"] or record["round"] in begun
        check.holds(invited or not intent, f"{about}INTENT, but the site was not invited")
        reply = record["replies"].get(site, {})
        accepted = reply.get("accepted", False)
        words = f"{about}an update was accepted, but no RELEASE"
        if check.holds(release or not accepted, words) and bare:
            # Its bytes carry no noise: the ledger's hash is salted, the record has none.
            path = f"rounds.jsonl: {record['id']}: replies.{site}"
            plain = reply.keys() <= {"accepted", "reason", "further"}
            check.holds(plain, f"{path} tells of an update")
        elif accepted and release:
            stored = entries["RELEASE", record["round"]].get("sha256")
            path = f"rounds.jsonl: {record['id']}: replies.{site}.sha256"
            check.equal(path, reply.get("sha256"), stored, "the site's RELEASE has")
        tables = {w: c["counts"].get(site) for w, c in _sections(record)}
        sent = {which: table for which, table in tables.items() if table is not None}
        if check.holds(counts or not sent, f"{about}counts were audited, but no COUNTS") and sent:
            entry = entries["COUNTS", record["round"]]
            cells = sum(_cells(table) for table in sent.values())
            check.equal(f"{about}cells", entry["cells"], cells, "the round's counts have")
            check.equal(f"{about}models", entry["models"], sorted(sent), "the round's counts have")


def _check_head(check: Check, where: str, record: Record, site: str, book: list[Record]) -> None:
    """Find the head that a site showed in a round in the ledger that it handed over in the end."""
    said = record["heads"].get(site)
    if said is not None:
        held = next((e["hash"] for e in book if e.get("seq") == said["seq"]), None)
        check.equal(f"{where}.hash", said["hash"], held, "the site's ledger has")


def check_seen(check: Check, books: dict[str, list[Record]]) -> None:
    """Find every head that a site was shown of a peer in the ledger that the peer handed over.

    Args:
        check: gets the faults.
        books: the entries of each site's ledger.
    """
    for site, book in books.items():
        for entry in book:
            for head in entry.get("seen", ()):
                peer = books.get(head["site"], [])
                keys = [e["public_key"] for e in peer if e.get("kind") == "KEY"]
                if head["key"] not in keys:
                    continue  # of another ledger, or of a site that handed none over
                held = next((e["hash"] for e in peer if e.get("seq") == head["seq"]), None)
                words = (
                    f"ledgers/{head['site']}.jsonl: entry {head['seq']} is not the one that "
                    f"{site} was shown (ledgers/{site}.jsonl: entry {entry['seq']})"
                )
                check.holds(held == head["hash"], words)


def _sections(record: Record) -> Iterable[tuple[str, Record]]:
    """List the audited models of a round."""
    audit = record["audit"] or {}
    return [(which, audit[which]) for which in ("model", "student") if which in audit]


def _cells(table: Any) -> int:
    if isinstance(table, dict):
        return sum(_cells(inner) for inner in table.values())
    return sum(_cells(inner) for inner in table) if isinstance(table, list) else 1


@lru_cache(maxsize=4096)
def _audit(tables: str, groups: str, min_group: int, confidence: float) -> dict[str, Any]:
    """Audit counts, both given as JSON, so that equal counts are worked out once."""
    return audit_sites(json.loads(tables), json.loads(groups), min_group, confidence)


def check_figures(check: Check, record: Record, start: Record, accord: Accord) -> None:
    """Recompute every accuracy, disparity and interval of a round from its counts."""
    rules, where = accord.fairness, f"rounds.jsonl: {record['id']}: audit"
    groups = {name: start["task"]["groups"][name] for name in rules.attributes}
    for which, section in _sections(record):
        counts = json.dumps(section["counts"])
        try:
            right = _audit(counts, json.dumps(groups), rules.min_group, rules.confidence)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as fault:
            check.holds(False, f"{where}.{which}.counts are no counts: {fault}")
            continue
        said = section["figures"]
        check.equal(f"{where}.{which}.figures", said, right, "the counts give", EXACT)
