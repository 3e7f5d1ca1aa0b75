"""Privacy by site: what was claimed, what was used, and what the site's whole ledger adds up to."""

from __future__ import annotations

import math
from typing import Any

from fedaccord.privacy import accounting, budget
from fedaccord.privacy.budget import Cap
from fedaccord.privacy.ledger import reserved
from fedaccord.privacy.tradeoff import FALSE_POSITIVES
from fedaccord.reports.reading import Evidence, text

Row = dict[str, Any]

INFINITE = "infinite"
# Beyond this RDP epsilon the exact one takes gigabytes, and no plan that protects is near it.
LARGEST = 300.0


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


def gate(
    first: list[accounting.Event], later: list[accounting.Event], cap: float | str, delta: float
) -> float | str:
    """Recompute what reservations come to as a site's cap counts them (see `budget.spent`).

    Args:
        first: events reserved before any result had left the site.
        later: events reserved afterwards.
        cap: the site's largest epsilon, or "infinite".
        delta: at which the cap is stated.

    Raises:
        ValueError: as `cost`.
    """
    whole = cost(accounting.compose([*first, *later]), delta)
    if isinstance(whole, str) or isinstance(cap, str):
        return whole
    return budget.spent(first, later, Cap(cap, delta))


def costs(evidence: Evidence) -> Row:
    """Gather what the evidence says on privacy.

    Returns:
        "unit", "headline" (the highest claim of a site, or null), "sites" (a row each), "rounds"
        (what each site had spent by then, by the odometer), "mechanism" (under client-level
        privacy the clipping norm and the noise of each round that counted).
    """
    agreed = evidence.accord.privacy
    sites = [_site(evidence, plan) for plan in evidence.kind("plan")]
    return {
        "private": agreed.enabled,
        "unit": agreed.unit,
        "neighboring_relation": agreed.neighboring_relation,
        "headline": _headline(evidence, sites) if agreed.enabled and sites else None,
        "sites": sites,
        "rounds": [_round(record) for record in evidence.kind("round")],
        "mechanism": [
            {"round": record["round"], "record": record["id"]} | {"unclipped": None} | said
            for record in evidence.kind("round")
            if (said := record.get("mechanism"))
        ],
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
    kept = {key: highest[key] for key in (*shared, "clipping_norm", "statement", "record")}
    epsilon = highest["epsilon"]
    return kept | {
        "alike": all(row["epsilon"] == epsilon for row in sites),
        "sites": [row["site"] for row in sites],
        "rounds_planned": {"value": evidence.accord.rounds.rounds, "record": "accord.toml"},
        "rounds_spare": {"value": evidence.accord.rounds.spare_rounds, "record": "accord.toml"},
        "membership": {
            "false_alarm": FALSE_POSITIVES["tpr_at_1_in_100"],
            "found_at_most": highest["membership"]["tpr_at_1_in_100"],
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
        "membership": record.get("membership"),
        "delta": plan.get("delta"),
        "noise_multiplier": plan.get("noise_multiplier"),
        "noise_stddev": record.get("noise_stddev"),
        "sampling_prob": plan.get("sampling_prob"),
        "max_grad_norm": plan.get("max_grad_norm"),
        "clipping_norm": plan.get("clipping_norm"),
        "slack": plan.get("slack"),
        "steps": plan.get("steps"),
        "subjects": plan.get("subjects"),
        "expected_batch": record.get("expected_batch"),
        "rounds_reserved": entry["rounds"],
        "plan_digest": text(entry["plan_digest"]),
        "reservation": f"ledger/{site}/{entry['seq']}",
        "used": None
        if used is None
        else {"rounds": used["rounds_used"], "epsilon": used["odometer"], "record": last[0]["id"]},
        "ledger": _ledger(evidence, site, entry),
    }


def _ledger(evidence: Evidence, site: str, own: Row) -> Row:
    """Add up what a site's ledger reserves for the same subjects, in this run and all others."""
    cap, entries = own["cap"], evidence.ledgers.get(site)
    row = {"epsilon": None, "reservations": None, "missing": None, "record": f"ledger/{site}"}
    row |= {"cap": cap["epsilon"], "delta": cap["delta"]}
    if entries is None:
        words = evidence.damaged.get(site, "the site's ledger was not handed over to the run")
        return row | {"missing": words, "record": f"plan/{site}"}
    mine = next((e for e in entries if e["seq"] == own["seq"]), own)
    first, later, _ = reserved(entries, mine["dataset"], mine["disjoint"])
    try:
        total = gate(first, later, cap["epsilon"], cap["delta"])
    except ValueError as fault:
        return row | {"missing": f"the ledger cannot be added up: {fault}"}
    if not isinstance(total, str):
        total = accounting.round_up(total, 6)
    return row | {"epsilon": total, "reservations": len(first) + len(later)}


def _round(record: Row) -> Row:
    """List each site's used rounds and what they had spent after a round, by the odometer."""
    return {
        "round": record["round"],
        "record": record["id"],
        "sites": [
            {
                "site": site,
                "rounds_used": row["rounds_used"],
                "epsilon": row["odometer"],
                "reserved": row["reserved"],
            }
            for site, row in sorted(record["epsilon"].items())
        ],
    }
