"""Who was asked, silent, away or back, and which rounds count: recomputed from the records."""

from __future__ import annotations

from fedaccord.accord import Accord
from fedaccord.reports.checks import Check
from fedaccord.runs import Record


def check_attendance(check: Check, records: list[Record], accord: Accord) -> None:
    """Hold every round's list of absent sites, and whether it counts, to the replies before it."""
    misses: dict[str, int] = {}
    rounds = resumed = 0
    for record in records:
        where = f"rounds.jsonl: {record['id']}: "
        if record["kind"] == "plan":
            misses.setdefault(record["site"], 0)
        elif record["kind"] == "back":
            was = misses.get(record["site"], 0) >= accord.rounds.max_misses
            check.holds(was, f"{where}site {record['site']} had not been away")
            misses[record["site"]] = 0
        elif record["kind"] == "resume":
            resumed += 1
            check.equal(f"{where}id", record["id"], f"resume-{resumed}")
            check.equal(f"{where}round", record["round"], rounds, "the rounds before it give")
            misses |= dict.fromkeys(record["absent"], accord.rounds.max_misses)
        elif record["kind"] == "round":
            rounds = record["round"]
            _check_round(check, where, record, accord, misses)


def _check_round(
    check: Check, where: str, record: Record, accord: Accord, misses: dict[str, int]
) -> None:
    fewest, most = accord.rounds.min_sites, accord.rounds.max_misses
    for site in record["invited"]:
        here = misses.get(site, 0) < most
        check.holds(here, f"{where}invited {site}, which had been silent {most} times")
    for site, said in record["replies"].items():
        misses[site] = misses.get(site, 0) + 1 if said["reason"] == "no answer" else 0
    away = sorted(site for site, count in misses.items() if count >= most)
    check.equal(f"{where}away", record["away"], away, "the replies give")
    counts = bool(record["aggregated"])
    words = f"{where}failed: a reason where the round counts, or none where it does not"
    check.holds(counts != bool(record["failed"]), words)
    enough = not counts or len(record["aggregated"]) >= fewest
    check.holds(enough, f"{where}counts with fewer than {fewest} updates")


def absent(records: list[Record], accord: Accord) -> bool:
    """Whether the last rounds had nobody to ask, for as long as the accord waits."""
    last = [r for r in records if r["kind"] == "round"][-accord.rounds.max_misses :]
    return len(last) == accord.rounds.max_misses and not any(r["invited"] for r in last)
