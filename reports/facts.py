"""What the report says: every figure of a run, from the evidence alone, with its record's id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedaccord.reports import agreed, carried, costs, limits, trust
from fedaccord.reports.reading import ACCORD, Evidence, read, text
from fedaccord.runs import MANIFEST, RunFolder

Row = dict[str, Any]

FORMAT = "fedaccord-report-1"
JSON, HTML = "report.json", "report.html"
MODELS = ("model", "student")
DISPARITIES = (
    "demographic_parity_difference",
    "demographic_parity_ratio",
    "equalized_odds_difference",
)
RATES = ("selection_rate", "true_positive_rate", "false_positive_rate", "accuracy")


def facts(run: Path) -> Row:
    """Build the content of report.json.

    Guarantee: every number stands in an object that carries `record`, the id of the record that
    it came from, or inside such an object. No figure is made here but the epsilon of a site's
    whole ledger; the others are the records' own.

    Raises:
        EvidenceError: not a run's folder, or a file in it that cannot be read.
        AccordError: an accord.toml that does not hold together.
    """
    evidence = read(run)
    privacy = costs.costs(evidence)
    sent = limits.releases(evidence)
    return {
        "format": FORMAT,
        "headline": costs.statement(evidence, privacy),
        "stamps": _stamps(evidence),
        "run": _run(evidence),
        "carried": carried.carried(evidence),
        "agreed": agreed.rows(evidence.accord),
        "task": _task(evidence.start),
        "accuracy": _accuracy(evidence),
        "privacy": privacy,
        "fairness": _fairness(evidence),
        "releases": sent,
        "not_protected": limits.not_protected(evidence, sent),
        "trust": {"heads": list(trust.HEADS), "modes": trust.table(evidence)},
        "incidents": _incidents(evidence),
    }


def to_json(content: Row) -> str:
    """Serialise a report's content; equal contents give equal text."""
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _stamps(evidence: Evidence) -> list[str]:
    """Say what a reader must know before any figure."""
    end, out = evidence.end, []
    if not evidence.accord.privacy.enabled:
        out.append("NOT PRIVATE: epsilon infinite")
    if end is None:
        out.append("UNFINISHED: the run did not come to its end")
    elif end["stop"] == "refused":
        out.append("REFUSED: the run did not start, and nothing was released")
    whole = RunFolder.open(evidence.path).faults()
    if any(MANIFEST not in fault for fault in whole) or (whole and end is not None):
        out.append("ALTERED: the evidence is not as it was written; run fedaccord verify")
    return out


def _run(evidence: Evidence) -> Row:
    """Say what was run, by which code, and how it ended."""
    start, end, accord = evidence.start, evidence.end, evidence.accord
    last = [record for record in evidence.kind("round") if record["model"]][-1:]
    state = "unfinished" if end is None else text(end["stop"])
    return {
        "id": evidence.run,
        "record": start["id"],
        "name": accord.name,
        "purpose": accord.purpose,
        "accord": start["accord"],
        "started": start["time"],
        "build": start["build"],
        "python": start["python"],
        "packages": [{"name": k, "version": v} for k, v in sorted(start["packages"].items())],
        "sites": list(accord.roster),
        "state": state,
        "stop": {
            "reason": text(end["reason"]) if end else "no end record",
            "rounds": end.get("rounds", 0) if end else len(evidence.kind("round")),
            "record": end["id"] if end else (last[0]["id"] if last else start["id"]),
        },
        "planned": {"rounds": accord.rounds.rounds, "record": ACCORD},
        "model": start["model"] | {"final": text(last[0]["model"]) if last else ""},
        "gradients": start.get("gradients"),
        "student": start["student"]
        and start["student"] | {"final": text(last[0]["student"]) if last else ""},
    }


def _task(start: Row) -> Row:
    """Say where the records come from and what they mean."""
    task = start["task"]
    return {
        "name": task["name"],
        "source": task["source"],
        "inputs": task["inputs"],
        "classes": task["classes"],
        "attributes": [{"attribute": k, "groups": v} for k, v in task["groups"].items()],
        "record": start["id"],
    }


def _audited(evidence: Evidence) -> list[Row]:
    """List the rounds that have an audit."""
    return [record for record in evidence.kind("round") if record["audit"]]


def _accuracy(evidence: Evidence) -> Row:
    """List accuracy by round and model: the mean over sites, pooled with its interval, by site."""
    first = evidence.accord.fairness.attributes[0]
    return {
        "confidence": {"value": evidence.accord.fairness.confidence, "record": ACCORD},
        "rounds": [
            {"round": record["round"], "record": record["id"]}
            | {which: _scores(record["audit"].get(which), first) for which in MODELS}
            for record in _audited(evidence)
        ],
    }


def _scores(section: Row | None, attribute: str) -> Row | None:
    """Take one model's accuracy in one round."""
    if section is None:
        return None
    accuracy = section["figures"]["accuracy"]
    pooled = section["figures"]["attributes"][attribute]["all"]["accuracy"]
    return {
        "mean": accuracy["mean"],
        "pooled": pooled,
        "n": section["figures"]["attributes"][attribute]["all"]["n"],
        "sites": [{"site": site, "value": v} for site, v in sorted(accuracy["sites"].items())],
    }


def _fairness(evidence: Evidence) -> Row:
    """List the audit of each attribute: by round, and in full for the last one."""
    rules = evidence.accord.fairness
    return {
        "min_group": rules.min_group,
        "confidence": rules.confidence,
        "max_parity_difference": rules.max_parity_difference,
        "stop_on_breach": rules.stop_on_breach,
        "record": ACCORD,
        "attributes": [_attribute(evidence, name) for name in rules.attributes],
    }


def _attribute(evidence: Evidence, name: str) -> Row:
    """Take one attribute's audit."""
    audited = _audited(evidence)
    rounds = []
    for record in audited:
        row = {"round": record["round"], "record": record["id"]}
        for which in MODELS:
            section = record["audit"].get(which)
            whole = section["figures"]["attributes"][name]["all"] if section else None
            row[which] = whole and whole["demographic_parity_difference"]
        rounds.append(row)
    last = None
    if audited:
        record = audited[-1]
        sections = [(which, record["audit"].get(which)) for which in MODELS]
        models = [
            _model(evidence, which, section["figures"]["attributes"][name])
            for which, section in sections
            if section
        ]
        last = {"round": record["round"], "record": record["id"], "models": models}
    return {"attribute": name, "rounds": rounds, "last": last}


def _model(evidence: Evidence, which: str, figures: Row) -> Row:
    """Take one model's figures in the last round, and hold them to the accord's rule."""
    whole, bound = figures["all"], evidence.accord.fairness.max_parity_difference
    parity = whole["demographic_parity_difference"]
    return {
        "which": which,
        "n": whole["n"],
        "positives": whole["positives"],
        "rule": _rule(parity, bound),
        "groups": [
            {"group": group, "n": row["n"], "positives": row["positives"]}
            | {"negatives": row["negatives"]}
            | {rate: row[rate] for rate in RATES}
            for group, row in whole["by_group"].items()
        ],
        "sites": [
            {"site": site, "n": row["n"]} | row["demographic_parity_difference"]
            for site, row in sorted(figures["sites"].items())
        ],
    } | {name: whole[name] for name in DISPARITIES}


def _rule(parity: Row, bound: float | None) -> str:
    """Say in words how a parity difference and its interval stand to the accord's bound."""
    if bound is None:
        return "the accord sets no bound"
    if parity["value"] is None:
        return "not assessable"
    if parity["value"] > bound:
        return "above the bound"
    if parity["high"] > bound:
        return "within the bound, but its interval reaches beyond"
    return "within the bound, with its whole interval"


def _incidents(evidence: Evidence) -> Row:
    """List what did not go as planned."""
    rounds = evidence.kind("round")
    return {
        "out": [
            {"site": record["site"], "reason": record["reason"], "record": record["id"]}
            for record in evidence.kind("out")
        ],
        "joined": [
            {"round": _rounds_before(evidence, plan), "site": plan["site"], "record": plan["id"]}
            for plan in evidence.kind("plan")
            if plan["site"] in {out["site"] for out in evidence.kind("out")}
        ],
        "dropped": [
            {"round": r["round"], "site": site, "reason": reason, "record": r["id"]}
            for r in rounds
            for site, said in sorted(r["replies"].items())
            for reason in ([] if said["accepted"] else [said["reason"]]) + said.get("further", [])
        ],
        "failed": [
            {"round": r["round"], "reason": r["failed"], "record": r["id"]}
            for r in rounds
            if not r["aggregated"]
        ],
        "late": [
            {"round": r["round"], "site": late["site"], "answers": late["answers"]}
            | {"record": r["id"]}
            for r in rounds
            for late in r["late"]
        ],
        "away": [
            {"round": r["round"], "site": site, "record": r["id"]}
            for before, r in zip([[], *(r["away"] for r in rounds)], rounds, strict=False)
            for site in r["away"]
            if site not in before
        ],
        "back": [
            {"round": r["round"], "site": r["site"], "record": r["id"]}
            for r in evidence.kind("back")
        ],
        "resumed": [
            {"round": r["round"], "time": r["time"], "absent": r["absent"], "record": r["id"]}
            for r in evidence.kind("resume")
        ],
        "strangers": [
            {"round": r["round"], "node": node, "record": r["id"]}
            for r in rounds
            for node in r["strangers"]
        ],
        "not_counted": [
            {"round": r["round"], "site": site, "reason": reason, "record": r["id"]}
            for r in rounds
            for site, reason in sorted((r["audit"] or {}).get("not_counted", {}).items())
        ],
        "link": carried.incidents(evidence),
        "differing": carried.differing(evidence),
        "silent": carried.silent(evidence),
    }


def _rounds_before(evidence: Evidence, record: Row) -> int:
    """Count the rounds that stand before a record."""
    place = evidence.records.index(record)
    return sum(before["kind"] == "round" for before in evidence.records[:place])
