"""Privacy by site: what was claimed, what was used, and what the site's whole ledger adds up to."""

from __future__ import annotations

import math
from typing import Any

from fedaccord.privacy import accounting
from fedaccord.reports.reading import RESERVATIONS, Evidence, text

Row = dict[str, Any]

INFINITE = "infinite"
# Beyond this RDP epsilon the exact one takes gigabytes, and no plan that protects is near it.
LARGEST = 300.0
FALSE_ALARM = 0.01  # at which the report says what a membership test can find


def cost(event: accounting.Event, delta: float, **how: str) -> float | str:
    """Recompute the epsilon of an event that a site wrote, or "infinite".

    Raises:
        ValueError: an event that FedAccord does not write, or too large to recompute.
    """
    try:
        bound = accounting.epsilon(event, delta, accountant="RDP")
        if math.isinf(bound):
            return INFINITE
        if bound > LARGEST:
            raise ValueError(f"its epsilon is about {bound:.3g}, too large to recompute")
        return accounting.epsilon(event, delta, **how)
    except (KeyError, TypeError, AttributeError, ArithmeticError) as fault:
        raise ValueError(f"{type(fault).__name__}: {fault}") from None


def costs(evidence: Evidence) -> Row:
    """Gather what the evidence says on privacy.

    Returns:
        "headline" (the highest claim of a site, or null), "sites" (a row each), "rounds" (the
        epsilon that a plan of as many rounds as were used would have had).
    """
    agreed = evidence.accord.privacy
    sites = [_site(evidence, plan) for plan in evidence.kind("plan")]
    return {
        "private": agreed.enabled,
        "neighboring_relation": agreed.neighboring_relation,
        "headline": _headline(evidence, sites) if agreed.enabled and sites else None,
        "sites": sites,
        "rounds": [_round(record) for record in evidence.kind("round")],
    }


def statement(evidence: Evidence, privacy: Row) -> str:
    """Say the run's privacy in one line: the highest claim of a site, in full."""
    end = evidence.end
    if end and end.get("stop") == "refused":
        return "No claim: the run was refused before any record was read, and nothing was released."
    if not evidence.accord.privacy.enabled:
        return "NOT PRIVATE: epsilon infinite. The accord sets privacy.enabled = false."
    headline = privacy["headline"]
    if headline is None:
        return "No claim: no site reserved a plan."
    words = "At each of these sites" if headline["alike"] else "The highest claim of these sites"
    return f"{headline['statement']}. {words}: {', '.join(headline['sites'])}."


def _headline(evidence: Evidence, sites: list[Row]) -> Row:
    """Pick the highest claim of a site, and say at which sites it holds."""
    highest = max(sites, key=lambda row: row["epsilon"])
    shared = ("epsilon", "delta", "noise_multiplier", "sampling_prob", "steps", "rounds_reserved")
    kept = {key: highest[key] for key in (*shared, "statement", "record")}
    epsilon, delta = highest["epsilon"], highest["delta"]
    return kept | {
        "alike": all(row["epsilon"] == epsilon for row in sites),
        "sites": [row["site"] for row in sites],
        "rounds_planned": {"value": evidence.accord.rounds.rounds, "record": "accord.toml"},
        "rounds_spare": {"value": evidence.accord.rounds.spare_rounds, "record": "accord.toml"},
        "membership": {
            "false_alarm": FALSE_ALARM,
            "found_at_most": min(
                1.0,
                math.exp(epsilon) * FALSE_ALARM + delta,
                1 - math.exp(-epsilon) * (1 - delta - FALSE_ALARM),
            ),
            "record": highest["record"],
        },
    }


def _site(evidence: Evidence, record: Row) -> Row:
    """Say what one site reserved, used and has spent."""
    site, entry = record["site"], record["entry"]
    plan = entry["plan"] or {}
    epsilon = record.get("epsilon") or {}
    last = [r for r in evidence.kind("round") if site in r["epsilon"]][-1:]
    used = last[0]["epsilon"][site] if last else None
    return {
        "site": site,
        "record": record["id"],
        "statement": record["statement"],
        "epsilon": epsilon.get("PLD", INFINITE),
        "epsilon_rdp": epsilon.get("RDP", INFINITE),
        "epsilon_replace_one": epsilon.get("replace-one", INFINITE),
        "delta": plan.get("delta"),
        "noise_multiplier": plan.get("noise_multiplier"),
        "noise_stddev": record.get("noise_stddev"),
        "sampling_prob": plan.get("sampling_prob"),
        "max_grad_norm": plan.get("max_grad_norm"),
        "slack": plan.get("slack"),
        "steps": plan.get("steps"),
        "subjects": plan.get("subjects"),
        "expected_batch": record.get("expected_batch"),
        "rounds_reserved": entry["rounds"],
        "plan_digest": text(entry["plan_digest"]),
        "reservation": f"ledger/{site}/{entry['seq']}",
        "used": None
        if used is None
        else {"rounds": used["rounds_used"], "epsilon": used["curve"], "record": last[0]["id"]},
        "ledger": _ledger(evidence, site, entry["cap"]),
    }


def _ledger(evidence: Evidence, site: str, cap: Row) -> Row:
    """Add up everything that a site's ledger reserves, this run's plan and all others."""
    entries = evidence.ledgers.get(site)
    row = {"epsilon": None, "reservations": None, "missing": None, "record": f"ledger/{site}"}
    row |= {"cap": cap["epsilon"], "delta": cap["delta"]}
    if entries is None:
        words = evidence.damaged.get(site, "the site's ledger was not handed over to the run")
        return row | {"missing": words, "record": f"plan/{site}"}
    events = [entry["event"] for entry in entries if entry["kind"] in RESERVATIONS]
    try:
        total = cost(accounting.compose(events), cap["delta"])
    except ValueError as fault:
        return row | {"missing": f"the ledger cannot be added up: {fault}"}
    if not isinstance(total, str):
        total = accounting.round_up(total, 6)
    return row | {"epsilon": total, "reservations": len(events)}


def _round(record: Row) -> Row:
    """List each site's used rounds and epsilon after a round."""
    return {
        "round": record["round"],
        "record": record["id"],
        "sites": [
            {
                "site": site,
                "rounds_used": row["rounds_used"],
                "epsilon": row["curve"],
                "reserved": row["reserved"],
            }
            for site, row in sorted(record["epsilon"].items())
        ],
    }
