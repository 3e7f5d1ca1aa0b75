"""Verifying a run over the link: signed replies, pins and handovers; one edited digit is found."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from linked_run import MODEL, OTHER, SITES, Linked, Row, Signers, rounds_of, sealed_with

from fedaccord import accord as accords
from fedaccord.envelope import handover
from fedaccord.privacy.chain import GENESIS
from fedaccord.privacy.chain import seal as chained
from fedaccord.reports import link
from fedaccord.reports.checks import Check
from fedaccord.reports.reading import read
from fedaccord.reports.verify import verify


@pytest.fixture
def run(linked: Path, tmp_path: Path) -> Path:
    return shutil.copytree(linked, tmp_path / linked.name)


def checked(run: Path, change: Callable[[list[Row]], Any] = bool) -> list[str]:
    """What the check of signed replies finds once the records were changed."""
    evidence = read(run)
    records = json.loads(json.dumps(evidence.records))
    change(records)
    check = Check("signed replies")
    link.check_link(check, evidence.run, records, evidence.accord, evidence.ledgers)
    assert check.checked > 0
    return check.faults


def test_a_run_over_the_link_has_no_fault_and_its_replies_were_checked(linked: Path) -> None:
    checks = {check.name: check for check in verify(linked)}
    assert [fault for check in checks.values() for fault in check.faults] == []
    assert checks["signed replies"].checked > 2 * len(SITES) * 8


def first_again(records: list[Row], _: Any) -> None:
    first, second = rounds_of(records)
    second["envelopes"]["hungary"] = first["envelopes"]["hungary"]


def swapped(records: list[Row], _: Any) -> None:
    held = rounds_of(records)[0]["envelopes"]
    held["hungary"], held["va"] = held["va"], held["hungary"]


def gone(records: list[Row], _: Any) -> None:
    del rounds_of(records)[1]["envelopes"]["hungary"]


def uninvited(records: list[Row], _: Any) -> None:
    rounds_of(records)[1]["invited"].remove("hungary")


def sets(place: int, **what: Any) -> Callable[..., None]:
    def change(records: list[Row], _: Any) -> None:
        (records[0] if place < 0 else rounds_of(records)[place]).update(what)

    return change


def no_handover(records: list[Row], _: Any) -> None:
    records[0]["link"]["handovers"] = {}


def to_a_stranger(records: list[Row], signers: Signers) -> None:
    new = signers["cleveland"].public
    records[0]["link"]["handovers"]["hungary"] = [handover("hungary", new, signers["hungary"])]


def by_a_stranger(records: list[Row], signers: Signers) -> None:
    step = handover("va", signers["va"].public, signers["cleveland"])
    records[0]["link"]["handovers"]["va"] = [step]


def by_a_stranger_later(records: list[Row], signers: Signers) -> None:
    step = handover("va", signers["va"].public, signers["cleveland"])
    rounds_of(records)[1]["handovers"] = {"va": [step]}


NOT_ITS_KEY = "is not signed by the key that the accord pins, or one that it handed over to"
EDITS: dict[str, tuple[Callable[..., None], str]] = {
    "an accepted update without a signature": (gone, "hungary is missing: an update was accepted"),
    "signed by another site": (sealed_with("cleveland"), f"envelopes.hungary {NOT_ITS_KEY}"),
    "signed by a key that was handed on": (sealed_with("va before", "va"), NOT_ITS_KEY),
    "two sites swapped": (swapped, f"round-1: envelopes.hungary {NOT_ITS_KEY}"),
    "the round before once more": (first_again, "envelopes.hungary: round says 1, the record is"),
    "another run": (sealed_with("hungary", run="x"), 'run says "x", the record is of "run"'),
    "another accord": (sealed_with("hungary", accord=OTHER), "hungary: accord says"),
    "another sender": (sealed_with("hungary", sender="va"), 'hungary: sender says "va"'),
    "to somebody else": (sealed_with("hungary", recipient="va"), "hungary: recipient says"),
    "a request": (sealed_with("hungary", direction="request"), "hungary: direction says"),
    "an answer to something else": (sealed_with("hungary", kind="evaluate"), "hungary: kind says"),
    "an answer to nothing": (sealed_with("hungary", message=""), "names no request"),
    "no body": (sealed_with("hungary", body=""), "hungary: body is no SHA-256"),
    "no model": (sealed_with("hungary", model=""), "hungary: model is no SHA-256"),
    "a number used before": (sealed_with("hungary", nonce=10), "nonce 10 is not above 10"),
    "another model": (
        sealed_with("hungary", model=OTHER),
        "round-2: envelopes: sites signed that they were given different global models: "
        "cleveland, switzerland, va: aaaaaaaaaaaa; hungary: bbbbbbbbbbbb",
    ),
    "other replies shown": (sealed_with("hungary", shown=OTHER), "hungary: shown says"),
    "not asked": (uninvited, "envelopes.hungary: hungary was not invited"),
    "no envelopes": (sets(0, envelopes=None), "round-1: envelopes is missing"),
    "no text": (sets(0, envelopes={"va": {"text": 1}}), "envelopes.va is no signed envelope"),
    "no incidents": (sets(1, link=None), "round-2: link is no list of incidents"),
    "an incident of nothing": (
        sets(1, link=[{"site": "va", "what": "refused", "count": 0}]),
        "link[0] is no incident",
    ),
    "no handover": (no_handover, ""),  # the rounds and the ledger's KEY entry show it as well
    "a handover taken back": (
        sets(1, handovers={"va": []}),
        "round-1: handovers.va is not in a later record",
    ),
    "a handover in a round that another key signed": (by_a_stranger_later, "round-2: handovers.va"),
    "a handover that another key signed": (by_a_stranger, "handovers.va[0] is not signed by the"),
    "a handover that the ledger does not know": (
        to_a_stranger,
        "a handover of hungary leads to",
    ),
    "no key of the coordinator": (
        sets(-1, link={"coordinator_key": "x", "handovers": {}}),
        "start: link.coordinator_key is no ed25519 key",
    ),
    "handovers of a stranger": (
        sets(-1, link={"coordinator_key": MODEL, "handovers": {"x": []}}),
        "handovers.x: x is not in the accord",
    ),
    "another engine": (
        sets(-1, engine="InProcessGrid"),
        "round-1: envelopes has no place in a run that the link did not carry",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_records_that_were_mended_do_not_pass_without_the_sites_keys(
    linked: Path, signers: Signers, edit: str
) -> None:
    change, words = EDITS[edit]
    found = checked(linked, lambda records: change(records, signers))
    assert any(words in fault for fault in found) if words else not found, found


def test_a_reply_may_be_signed_with_any_key_since_its_release(
    linked: Path, signers: Signers
) -> None:
    """Without the ledger the handovers lead to both keys of va; with it only the later one may."""
    evidence = read(linked)
    records = json.loads(json.dumps(evidence.records))
    sealed_with("va before", "va")(records, signers)
    check = Check("signed replies")
    books = {site: book for site, book in evidence.ledgers.items() if site != "va"}
    link.check_link(check, evidence.run, records, evidence.accord, books)
    assert check.faults == []


def test_one_digit_changed_in_what_was_signed_is_found_although_the_chain_was_mended(
    linked: Path,
) -> None:
    rng = random.Random("signed")
    for _ in range(30):
        seen = []

        def change(records: list[Row], seen: list[str] = seen) -> None:
            holders = [(r["envelopes"][s], k) for r in rounds_of(records) for s in SITES
                       for k in ("text", "signature")]  # fmt: skip
            steps = [record["handovers"]["va"][0] for record in rounds_of(records)]
            steps.append(records[0]["link"]["handovers"]["va"][0])
            holders += [(step, key) for step in steps for key in ("key", "signature")]
            holder, key = rng.choice(holders)
            places = [match.start() for match in re.finditer(r"\d", holder[key])]
            at = rng.choice(places)
            other = rng.choice("0123456789".replace(holder[key][at], ""))
            holder[key] = holder[key][:at] + other + holder[key][at + 1 :]
            seen.append(f"{key} {at}")

        assert checked(linked, change), seen


def test_one_digit_changed_anywhere_in_the_file_is_found_and_its_record_named(run: Path) -> None:
    rng, path = random.Random("file"), run / "rounds.jsonl"
    text = path.read_text(encoding="utf-8")
    places = [match.start() for match in re.finditer(r"\d", text)]
    for place in rng.sample(places, 12):
        other = rng.choice("0123456789".replace(text[place], ""))
        path.write_text(text[:place] + other + text[place + 1 :], encoding="utf-8")
        name = json.loads(text.splitlines()[text.count("\n", 0, place)])["id"]
        found = [fault for check in verify(run) for fault in check.faults]
        assert any(name in fault for fault in found), (place, found)


def test_a_ledger_begun_anew_with_another_key_is_not_the_pinned_sites(
    run: Path, signers: Signers
) -> None:
    path, key = run / "ledgers" / "hungary.jsonl", signers["cleveland"]
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    entries[0]["public_key"], previous = key.public, GENESIS
    lines = []
    for entry in entries:
        body = {k: v for k, v in entry.items() if k not in ("hash", "signature")}
        row = chained(previous, body, key)
        lines.append(row.line + "\n")
        previous = row.hash
    path.write_text("".join(lines), encoding="utf-8")
    found = {check.name: check.faults for check in verify(run)}["signed replies"]
    pin = signers["hungary"].public[:12]
    assert f"ledgers/hungary.jsonl: the accord pins the key {pin} for hungary, and this" in found[0]


def test_a_head_of_a_peer_that_no_key_of_its_own_signed_is_a_fault(linked: Path) -> None:
    evidence = read(linked)
    book = evidence.ledgers["cleveland"]
    reserved = next(entry for entry in book if entry.get("seen"))
    forged = [head | {"key": OTHER} for head in reserved["seen"] if head["site"] == "hungary"]
    books = evidence.ledgers | {"cleveland": [*book[:1], reserved | {"seen": forged}, *book[2:]]}
    check = Check("signed replies")
    link.check_link(check, evidence.run, evidence.records, evidence.accord, books)
    assert any("seen: a head of hungary is not signed by a key of" in f for f in check.faults)


def test_an_accord_without_pins_does_not_make_a_run_over_the_link(linked: Path) -> None:
    evidence = read(linked)
    said = evidence.accord.model_dump()
    for site in said["sites"]:
        site["key"] = None
    check = Check("signed replies")
    link.check_link(check, evidence.run, evidence.records, accords.parse(said), evidence.ledgers)
    assert "accord.toml: sites[va] has no key for the link" in check.faults


def test_a_run_of_another_engine_is_not_asked_for_signed_replies(linked_run: Linked) -> None:
    checks = verify(linked_run.bare)
    assert "signed replies" not in {check.name for check in checks}
    assert [fault for check in checks for fault in check.faults] == []
