"""The noised mean of client-level privacy: its clipping norm and noise, recomputed by round."""

from __future__ import annotations

from typing import Any

from fedaccord.accord import Accord
from fedaccord.privacy.client_level import ClientPlan
from fedaccord.privacy.plan import plan_for
from fedaccord.reports.checks import EXACT, Check
from fedaccord.runs import Record


def equal_weights(accord: Accord) -> bool:
    """Whether every site counts the same, as client-level privacy has it."""
    return accord.privacy.enabled and accord.privacy.unit == "client"


def check_mechanisms(check: Check, records: list[Record], accord: Accord) -> None:
    """Follow the clipping norm from round to round, and the noise that goes with it.

    | round | its record has |
    |---|---|
    | under another unit, or without privacy | no "mechanism" |
    | that failed | null; the norm stays |
    | with a fixed norm | the accord's norm, the noise of it, the sites asked |
    | with adaptive clipping | the same of the norm that the last round gave, and the next norm |

    Args:
        check: gets the faults.
        records: the run's records.
        accord: what was agreed.
    """
    plan = plan_for(accord, next(iter(accord.roster)))
    rounds = [record for record in records if record["kind"] == "round"]
    if not isinstance(plan, ClientPlan):
        for record in rounds:
            words = f"rounds.jsonl: {record['id']}: mechanism has no place under this accord"
            check.holds("mechanism" not in record, words)
        return
    norm = plan.clipping_norm
    for record in rounds:
        where, said = f"rounds.jsonl: {record['id']}: mechanism", record["mechanism"]
        if not record["aggregated"]:
            check.equal(where, said, None, "the round failed, so it is")
            continue
        right = _right(plan, norm, len(record["invited"]), said)
        check.equal(where, said, right, "the accord gives", EXACT * max(1.0, norm))
        norm = float(said["next_clipping_norm"])


def _right(plan: ClientPlan, norm: float, asked: int, said: Record) -> dict[str, Any]:
    """Say what a round's record should have; the noised share is taken as it is written."""
    right: dict[str, Any] = {
        "asked": asked,
        "clipping_norm": norm,
        "noise_stddev": plan.stddev(norm),
        "next_clipping_norm": norm,
    }
    if plan.target_quantile is not None:
        unclipped = float(said["unclipped"])
        right |= {"unclipped": unclipped, "next_clipping_norm": plan.next_norm(norm, unclipped)}
    return right
