"""The trust table: per mode of running, who sees what without noise, and what a cheat could do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedaccord.reports import link
from fedaccord.reports.reading import Evidence


@dataclass(frozen=True)
class Mode:
    """One way to run an accord, and whom it makes its sites and subjects trust.

    Attributes:
        key: its name in the code.
        name: what it is called.
        curious: what a coordinator that keeps to the protocol can see without noise.
        malicious: what a coordinator that does not keep to it can do besides.
        colluding: what changes if other sites help it.
        others: what other sites and readers of the evidence see.
    """

    key: str
    name: str
    curious: str
    malicious: str
    colluding: str
    others: str


_COUNTS = "the exact counts of evaluation subjects"
MODES = (
    Mode(
        "link",
        "Noise at the site, site runs its own installed software (the link)",
        f"Of training, nothing without noise. Besides: {_COUNTS}, when a site is there and when it "
        "answers, how much it sends, the other runs in its ledger. What travels is encrypted up to "
        "the coordinator's process, and not inside it.",
        "The same. It may choose the weights that it sends within the bound on weights, and the "
        "stated epsilon holds for any. It draws the sites, makes the next model, "
        "and can leave replies out and keep heads of ledgers back. It cannot lower noise, raise "
        "the clip, repeat a round, or speak for a site whose key the accord pins. Sites that were "
        "sent different models are noticed among the signed replies that it shows; one that it "
        "does not show is an absence on record, and no proof.",
        "The same: each site adds all of its noise itself, so no guarantee rests on another site. "
        "A site that helps can sign for a model that it was not sent, but not in another's name.",
        "Each site's weights never; the global models and the student, which are as private as "
        "what they were made from; the counts, where they read the evidence. The other sites are "
        "also shown the hash and the time of each signed reply.",
    ),
    Mode(
        "stock",
        "Noise at the site, Flower's own engine",
        f"Of training, nothing without noise. Besides: {_COUNTS}, when a site answers, the other "
        "runs in its ledger.",
        "Everything: the code that a site runs comes in the bundle that the coordinator's side "
        "submits, so a changed bundle can leave out noise, policy and ledger.",
        "As the coordinator that cheats.",
        "As over the link, but for the signed replies, as long as the bundle is the reviewed one.",
    ),
    Mode(
        "simulated",
        "Simulated on one machine",
        "Everything: whoever runs the machine can read the records of all sites.",
        "Everything.",
        "Everything.",
        "Readers of the evidence see what they would see of a run over the link: noised weights' "
        "digests, the models, the counts.",
    ),
    Mode(
        "client",
        "Client-level: noise at the coordinator",
        f"Every site's update of every round, un-noised, and {_COUNTS}. An update can reveal "
        "records.",
        "The same, and it can leave the noise out without any site noticing.",
        "Whatever the coordinator saw.",
        "The noised mean of the updates alone; per-site norms and un-noised updates stay out of "
        "the evidence.",
    ),
    Mode(
        "plain",
        "No privacy (privacy.enabled = false)",
        f"Every site's update of every round, un-noised, and {_COUNTS}.",
        "The same, and it can choose weights that make updates reveal records exactly.",
        "Whatever the coordinator saw.",
        "The mean of un-noised updates, from which a site's own update may follow; with two sites "
        "each knows the other's.",
    ),
)
HEADS = (
    "seen by a coordinator that keeps to the protocol",
    "a coordinator that cheats",
    "a coordinator that other sites help",
    "other sites, readers of the evidence",
)


def mode(evidence: Evidence) -> str:
    """Tell in which mode a run was made, from its accord and the engine that carried it."""
    privacy = evidence.accord.privacy
    if evidence.start.get("engine") == "InProcessGrid":
        return "simulated"
    if not privacy.enabled:
        return "plain"
    if privacy.unit == "client":
        return "client"
    return "link" if link.over_link(evidence.records) else "stock"


def table(evidence: Evidence) -> list[dict[str, Any]]:
    """List the modes for the report; `here` marks those that the run was made in.

    A simulation of client-level or plain training has that mode's limits besides its own.
    """
    here = {mode(evidence)}
    if not evidence.accord.privacy.enabled:
        here.add("plain")
    elif evidence.accord.privacy.unit == "client":
        here.add("client")
    return [
        {
            "mode": row.name,
            "here": row.key in here,
            "cells": [row.curious, row.malicious, row.colluding, row.others],
        }
        for row in MODES
    ]


def markdown() -> str:
    """Write the table as the documentation has it."""
    lines = [f"| mode | {' | '.join(HEADS)} |", "|---|---|---|---|---|"]
    for row in MODES:
        cells = (f"**{row.name}**", row.curious, row.malicious, row.colluding, row.others)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
