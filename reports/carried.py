"""How a run was carried: the engine, the keys, the link's incidents, who signed for which model."""

from __future__ import annotations

from typing import Any

from fedaccord.envelope import Refused, read
from fedaccord.reports.link import handovers_of, over_link
from fedaccord.reports.reading import Evidence

Row = dict[str, Any]

LINK = (
    "over FedAccord's link: sites dial in by gRPC with mutual TLS and run their own installed "
    "software"
)
ENGINES = {
    "InProcessGrid": "in one process on one machine, with no network",
    "LinkGrid": LINK,
}
OTHER = "by Flower's own engine, whose sites run the code that was submitted to it"
NOBODY = "no site that is known"


def carried(evidence: Evidence) -> Row:
    """Say what carried the run's messages; over the link, with whose keys."""
    engine = str(evidence.start.get("engine", ""))
    row: Row = {"engine": engine, "words": ENGINES.get(engine, OTHER), "record": "start"}
    if not over_link(evidence.records):
        return row | {"link": None}
    handed = handovers_of(evidence.records)
    signed = [record for record in evidence.kind("round") if record.get("envelopes")]
    return row | {
        "link": {
            "coordinator_key": evidence.start["link"]["coordinator_key"],
            "pinned": {"sites": len(evidence.accord.pins), "record": "accord.toml"},
            "sites": {"count": len(evidence.accord.roster), "record": "accord.toml"},
            "rotated": sorted(name for name, steps in handed.items() if steps),
            "signed": {
                "replies": sum(len(record["envelopes"]) for record in signed),
                "record": signed[-1]["id"] if signed else "start",
            },
        }
    }


def incidents(evidence: Evidence) -> list[Row]:
    """List what the link noted, alike together: what, of which sites, how often, in which rounds.

    Returns:
        Rows {"what", "sites", "count", "record", "rounds": [{"round", "count", "record"}]}, in
        order of the first round; `record` is the last round's, up to which `count` counts.
    """
    found: dict[str, Row] = {}
    for record in evidence.kind("round"):
        for said in record.get("link") or []:
            row = found.setdefault(
                said["what"], {"what": said["what"], "sites": [], "count": 0, "rounds": []}
            )
            row["sites"] = sorted({*row["sites"], said["site"] or NOBODY})
            row |= {"count": row["count"] + said["count"], "record": record["id"]}
            if not row["rounds"] or row["rounds"][-1]["round"] != record["round"]:
                about = {"round": record["round"], "count": 0, "record": record["id"]}
                row["rounds"].append(about)
            row["rounds"][-1]["count"] += said["count"]
    return list(found.values())


def _models(record: Row) -> dict[str, list[str]]:
    """List the sites that signed in a round, by the model that each says it was sent."""
    out: dict[str, list[str]] = {}
    for site, said in sorted((record.get("envelopes") or {}).items()):
        try:
            out.setdefault(read(said["text"]).model, []).append(site)
        except Refused:
            continue  # `verify` names it
    return out


def differing(evidence: Evidence) -> list[Row]:
    """List the rounds whose sites signed for different models."""
    return [
        {
            "round": record["round"],
            "record": record["id"],
            "models": [{"model": key, "sites": sites} for key, sites in found.items()],
        }
        for record in evidence.kind("round")
        if len(found := _models(record)) > 1
    ]


def silent(evidence: Evidence) -> list[Row]:
    """List the rounds in which a site was asked and no signed reply of it is on record.

    Of such a site it is not known which model it was sent. `model` is the one that the others
    signed for, "" where nobody signed or they differ.
    """
    if not over_link(evidence.records):
        return []
    out = []
    for record in evidence.kind("round"):
        found = _models(record)
        signed = {site for sites in found.values() for site in sites}
        if absent := sorted(set(record["invited"]) - signed):
            model = next(iter(found)) if len(found) == 1 else ""
            row = {"round": record["round"], "sites": absent, "model": model}
            out.append(row | {"record": record["id"]})
    return out
