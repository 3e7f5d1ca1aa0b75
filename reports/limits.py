"""What left the sites and what covers it; and what is not protected, in plain lines."""

from __future__ import annotations

from typing import Any

from fedaccord.reports import link
from fedaccord.reports.reading import RESERVATIONS, Evidence

Row = dict[str, Any]

NOT_COVERED = "not covered"

# ledger kind -> (name, what is in it)
KINDS = {
    "RELEASE": ("weights", "what the site's training added to the model's weights in a round"),
    "COUNTS": (
        "group counts",
        "evaluation subjects by group, label and prediction, for each model, after a round",
    ),
    "PERSONAL": (
        "personal model",
        "trained at the site without noise, and taken out of its folder by its operator",
    ),
}
ABOUT_LEDGER = (
    "the whole ledger, for this evidence: plans, rounds, hashes and times of this and of all "
    "earlier runs at the site; no record, no count"
)
ABOUT_ANSWER = (
    "that the site joins, and what it reserves: from accord, policy and ledger alone. Each reply "
    "also carries the signed end of the site's ledger"
)
ABOUT_LINK = (
    ". Over the link each reply is signed: by whom, to which request, at what time; and it has the "
    "hash of what it sends, which is as covered as that, and of the model that the site was sent"
)
NO_RECORDS = "nothing in it is computed from records; the times in it are not covered"


def releases(evidence: Evidence) -> list[Row]:
    """List every kind of thing that left a site in this run, and what covers it.

    Returns:
        Rows {"what", "detail", "covered", "sites": [{"site", "count", "size", "unit", "record"}]}.
    """
    answer = ABOUT_ANSWER + (ABOUT_LINK if link.over_link(evidence.records) else "")
    found: dict[tuple[str, str], Row] = {}
    for site, entries in evidence.ledgers.items():
        mine = [entry for entry in entries if entry["run"] == evidence.run]
        for kind, (name, detail) in KINDS.items():
            for covers in sorted({e["covers"] for e in mine if e["kind"] == kind}):
                same = [e for e in mine if e["kind"] == kind and e["covers"] == covers]
                row = found.setdefault((kind, covers), _kind(name, detail, covers))
                unit = "cells" if kind == "COUNTS" else "bytes"
                size = sum(int(entry[unit]) for entry in same)
                row["sites"].append(_sent(site, len(same), size, unit, f"ledger/{site}"))
        if any(entry["kind"] in RESERVATIONS for entry in mine):
            row = found.setdefault(("", "answer"), _kind("answers", answer, NO_RECORDS))
            row["sites"].append(_sent(site, 2, None, "", f"plan/{site}"))
        row = found.setdefault(("", "ledger"), _kind("ledger", ABOUT_LEDGER, NO_RECORDS))
        size = (evidence.path / "ledgers" / f"{site}.jsonl").stat().st_size
        row["sites"].append(_sent(site, 1, size, "bytes", f"ledger/{site}"))
    order = {name: place for place, (name, _) in enumerate(KINDS.values())}
    return sorted(found.values(), key=lambda row: order.get(row["what"], len(order)))


def _kind(what: str, detail: str, covered: str) -> Row:
    return {"what": what, "detail": detail, "covered": covered, "sites": []}


def _sent(site: str, count: int, size: int | None, unit: str, record: str) -> Row:
    return {"site": site, "count": count, "size": size, "unit": unit, "record": record}


def not_protected(evidence: Evidence, sent: list[Row]) -> list[str]:
    """Say what the run does not protect or cannot show, the gravest first.

    Args:
        evidence: the run's evidence.
        sent: what `releases` returned.
    """
    private = evidence.accord.privacy.enabled
    end = evidence.end
    if end and end.get("stop") == "refused":
        return [_REFUSED]
    covers = {row["covered"] for row in sent if row["what"] == "group counts"}
    exact = not sent or NOT_COVERED in covers
    engine, linked = str(evidence.start.get("engine", "")), link.over_link(evidence.records)
    return [
        *([] if private else [_NO_NOISE]),
        *([_PERSONAL] if evidence.accord.training.personal else []),
        *([_LOCAL] if evidence.accord.model.local else []),
        *([_COUNTS] if exact else []),
        _DECISIONS,
        f"Tuning of the settings, in the accord's own words: {evidence.accord.tuning}.",
        *(_ABOUT[evidence.accord.privacy.unit] if private else []),
        _SOFTWARE,
        _PINNED if linked else _UNPINNED,
        *([_CARRIED] if linked else []),
        *_ALWAYS,
        *([_SMALL] if exact else []),
        *([] if linked else [_ENGINES.get(engine, _ENGINES[""])]),
    ]


_REFUSED = (
    "Nothing was read or released, so nothing in this run needs protection. A site that had "
    "already reserved its plan keeps that reservation in its ledger."
)
_NO_NOISE = (
    "Training subjects: privacy was switched off. What each site sent in each round was computed "
    "from its records without any noise, and may reveal them."
)
_PERSONAL = (
    "Training subjects, where a site's personal model is used: each site also trains one of its "
    "own, without noise. It stays there, is not audited, and no figure here reads it; no epsilon "
    "covers it, nor what is read off it. The list of what left the sites has it where an operator "
    "took it out before this run's end."
)
_LOCAL = (
    "The audited model is each site's own: layers named in model.local stay at their site. The "
    "figures of a site are those of its own layers, the model file of this run lacks them, and the "
    "student was taught by models with the layers that the seed gives."
)
_COUNTS = (
    "Evaluation subjects: after each round every site sent exact counts of them by group, label "
    "and prediction. No noise was added; no epsilon covers them."
)
_SMALL = (
    "This report and the evidence hold those exact counts, also of groups of one or two people. "
    "Hand them only to those who may see such counts."
)
_DECISIONS = (
    "Decisions read from those counts (to stop, to go on, to pick this run or this model among "
    "several) rest on evaluation subjects without protection. They also make the figures shown "
    "here look better than new subjects would."
)
_NOISED = [
    "The coordinator sees each site's noised updates one by one. The stated epsilon holds against "
    "it; there is no secure aggregation on top.",
    "A person with records at two sites is protected at each of them separately; the losses at "
    "the two add up.",
]
_BARE = [
    "The coordinator, whoever runs it and whoever can read its memory, sees every site's update "
    "without noise, and such updates may reveal records. The stated epsilon does not hold against "
    "them: it holds against those who see the noised mean of each round, the models and the "
    "student made from it, and this evidence.",
    "That a site takes part, is asked and answers is on record for everybody. What epsilon hides "
    "is what its records did to its update.",
    "A person with records at two sites changes two updates of one mean. The stated epsilon is for "
    "one; for two it is more than twice as high.",
]
_BOTH = [
    "Epsilon bounds what is learned from one person's taking part. What the model says of people "
    "in general, and so of a person whose findings are known, is its purpose and is not hidden.",
    "Floating-point arithmetic: noise is drawn in 64 bits, with a slack for rounding in gradients, "
    "and the result is rounded to a public grid. Known attacks get harder; this is no proof.",
]
_ABOUT = {"subject": [*_NOISED, *_BOTH], "client": [*_BARE, *_BOTH]}
_SOFTWARE = (
    "That a site ran the mechanism it declared rests on the site's software and on who runs it: "
    "its administrator can change it. Each release names the build by its hash; the hash does not "
    "prove what ran."
)
_LEDGER = (
    "and the other sites keep its last hash as they were shown it: up to there not even the site "
    "can take an entry back unseen. The coordinator can keep such a hash from them. Its own "
    "records are chained but not signed: keep the last hash elsewhere."
)
_UNPINNED = (
    f"A site's ledger is signed with the site's own key, {_LEDGER} Which key is whose was not "
    "checked against the accord: a site that starts anew with another key is not told from one "
    "that was never here."
)
_PINNED = (
    "A site's ledger and its replies are signed with the key that the accord pins for it, or with "
    f"one that this key handed over to, {_LEDGER} That a pinned key is the site's is what the "
    "sites agreed on with the accord: compare the accord's digest with theirs."
)
_CARRIED = (
    "The coordinator draws the sites and makes the next model. Each site signed which model it "
    "was sent, and is shown what the others signed, so one that was sent another model is noticed "
    "among the replies that are shown. Replies that were kept back are listed as silence. Nothing "
    "shows that a model was made of the signed updates alone, or that counts are as a site sent "
    "them."
)
_ALWAYS = [
    "Timing and sizes: when a site answers, how long it takes, how much it sends and that it "
    "falls silent are not covered.",
    "A site that sends a wrong update or wrong counts on purpose: only their form is checked, and "
    "the length of an update is held to a bound. A robust strategy limits what such an update "
    "does to the model, and does not rule it out.",
    "Intervals cover chance in who was evaluated. They do not cover wrong labels, other hospitals, "
    "or that the same subjects were looked at after every round.",
]
_ENGINES = {
    "": "If the sites were simulated, they shared one machine and its operator could read all "
    "records.",
    "InProcessGrid": "The sites were simulated in one process on one machine: its operator could "
    "read all records.",
}
