"""The link's evidence checked: pinned keys, handovers, and the replies that the sites signed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from fedaccord.accord import Accord
from fedaccord.envelope import COORDINATOR, REPLY, Envelope, Refused, keys_led_to, opened
from fedaccord.reports.checks import Check
from fedaccord.runs import Record

ENGINE = "LinkGrid"
ITS_OWN = ("link", "envelopes", "handovers")  # keys that only records of the link have
INCIDENT = {"site": str, "what": str, "count": int}

Books = Mapping[str, list[Record]]
Handovers = dict[str, list[dict[str, Any]]]


def over_link(records: list[Record]) -> bool:
    """Tell whether the link carried a run."""
    return any(r.get("engine") == ENGINE for r in records if r.get("kind") == "start")


def concerned(records: list[Record]) -> bool:
    """Tell whether a run's records have anything of the link's."""
    return over_link(records) or any(key in record for record in records for key in ITS_OWN)


def told(records: list[Record]) -> Iterator[tuple[str, Handovers]]:
    """List the handovers of the sites' keys with the path where they are on record.

    A key may change while a run goes on, so every round tells of them.
    """
    for record in records:
        if record.get("kind") == "start":
            yield "start: link.handovers", record.get("link", {}).get("handovers", {})
        elif "handovers" in record:
            yield f"{record['id']}: handovers", record["handovers"]


def handovers_of(records: list[Record]) -> Handovers:
    """Return the handovers of each site's keys, as the last record that tells of them has them."""
    found: Handovers = {}
    for _, said in told(records):
        found |= said
    return found


def check_link(check: Check, run: str, records: list[Record], accord: Accord, books: Books) -> None:
    """Hold every accepted reply to the signature of its site, by the key that the accord pins.

    Guarantee: with no fault, whoever holds a site's pinned key, or one that it handed over to,
    signed in each round in which an update of the site was accepted that it answered this run, this
    round and this accord, and which global model it was given; no two sites of a round signed for
    different models; and the site's ledger is of the same keys. What was in the reply is not on
    record, so its hash in the envelope is not recomputed; the ledger's RELEASE has the update's.

    | case | outcome |
    |---|---|
    | an engine other than the link | keys of the link's in a record are a fault |
    | a site without a pinned key, or with a ledger that does not have that key | a fault |
    | an accepted update without an envelope | a fault |
    | an invited site that sent none | no fault: the report lists it as silent |
    | an envelope of a reply that the gates dropped | is checked as well |
    | a site that did not hand its ledger over | its keys follow from the handovers alone |

    Args:
        check: gets the faults.
        run: the run's id at its sites.
        records: the run's records.
        accord: what was agreed.
        books: the entries of each site's ledger that was handed over.
    """
    if not over_link(records):
        for record, key in ((r, key) for r in records for key in ITS_OWN if key in r):
            where = f"rounds.jsonl: {record['id']}: {key}"
            check.holds(False, f"{where} has no place in a run that the link did not carry")
        return
    handovers = handovers_of(records)
    _check_coordinator(check, records)
    keys = {}
    for site in accord.roster:
        pin = accord.pins.get(site)
        if check.holds(pin is not None, f"accord.toml: sites[{site}] has no key for the link"):
            steps, book = handovers.get(site, []), books.get(site, [])
            keys[site] = _check_keys(check, site, str(pin), steps, run, book)
    for where, said in told(records):
        for site, steps in said.items():
            _check_handovers(check, f"rounds.jsonl: {where}.{site}", accord, site, steps, handovers)
    _check_witnesses(check, run, books, accord, handovers)
    last: dict[str, int] = {}
    for record in (r for r in records if r["kind"] == "round"):
        _check_incidents(check, record)
        _check_round(check, run, record, accord, books, keys, last)


def _check_coordinator(check: Check, records: list[Record]) -> None:
    """Check the form of the coordinator's key; the sites' kits say whether it is the right one."""
    said = records[0].get("link", {}).get("coordinator_key")
    check.holds(_hex(said), "rounds.jsonl: start: link.coordinator_key is no ed25519 key")


def _check_handovers(
    check: Check,
    where: str,
    accord: Accord,
    site: str,
    steps: list[dict[str, Any]],
    handovers: Handovers,
) -> None:
    """Check the handovers in one record: each signed, and none taken back later."""
    if not check.holds(site in accord.roster, f"{where}: {site} is not in the accord"):
        return
    led = keys_led_to(accord.pins.get(site, ""), site, steps)
    words = f"{where}[{len(led) - 1}] is not signed by the key before it"
    check.holds(len(led) == len(steps) + 1, words)
    check.holds(steps == handovers[site][: len(steps)], f"{where} is not in a later record")


def _check_keys(
    check: Check, site: str, pin: str, steps: list[dict[str, Any]], run: str, book: list[Record]
) -> list[str]:
    """Follow a site's keys from the pinned one, by handovers and its ledger; both must agree."""
    led = keys_led_to(pin, site, steps)
    if not book:
        return led
    held = [entry["public_key"] for entry in book if entry.get("kind") == "KEY"]
    words = f"ledgers/{site}.jsonl: the accord pins the key {pin[:12]} for {site}, and this ledger "
    if not check.holds(pin in held, f"{words}has another ({', '.join(k[:12] for k in held)})"):
        return led
    held = held[held.index(pin) :]
    words = f"rounds.jsonl: a handover of {site} leads to a key that its ledger does not hold"
    check.holds(led == held[: len(led)], words)
    for entry, signer in _signers(book):
        if entry.get("run") == run and signer not in held:
            words = f"ledgers/{site}.jsonl: entry {entry['seq']} is not signed by the pinned key"
            check.holds(False, f"{words} or one that it handed over to")
    for entry in (e for e in book if e.get("run") == run):
        check.holds(entry.get("site") == site, f"ledgers/{site}.jsonl is of {entry.get('site')}")
    return held


def _signers(book: list[Record]) -> Iterator[tuple[Record, str]]:
    """List a ledger's entries with the key that signed each."""
    key = ""
    for entry in book:
        new = str(entry["public_key"]) if entry.get("kind") == "KEY" else key
        yield entry, key or new
        key = new


def _check_incidents(check: Check, record: Record) -> None:
    """Check the form of a round's incidents; there is nothing to recompute them from."""
    where = f"rounds.jsonl: {record['id']}: link"
    said = record.get("link")
    if not check.holds(isinstance(said, list), f"{where} is no list of incidents"):
        return
    for place, row in enumerate(said or []):
        typed = isinstance(row, dict) and {k: type(v) for k, v in row.items()} == INCIDENT
        words = f"{where}[{place}] is no incident: a site, what happened, and how often"
        check.holds(typed and row["count"] > 0, words)


def _check_round(
    check: Check,
    run: str,
    record: Record,
    accord: Accord,
    books: Books,
    keys: dict[str, list[str]],
    last: dict[str, int],
) -> None:
    """Open the envelopes of a round; `last` keeps each site's nonce from round to round."""
    where, envelopes = f"rounds.jsonl: {record['id']}: envelopes", record.get("envelopes")
    if not check.holds(isinstance(envelopes, dict), f"{where} is missing"):
        return
    assert isinstance(envelopes, dict)
    for site, said in record["replies"].items():
        words = f"{where}.{site} is missing: an update was accepted that its site has not signed"
        check.holds(site in envelopes or not said["accepted"], words)
    models: dict[str, list[str]] = {}
    for site, said in sorted(envelopes.items()):
        path = f"{where}.{site}"
        if not check.holds(site in record["invited"], f"{path}: {site} was not invited"):
            continue
        envelope = _open(check, path, said, _in_force(keys.get(site, []), books, site, run, record))
        if envelope is None:
            continue
        _check_envelope(check, path, envelope, run, record, site, accord)
        words = f"{path}: nonce {envelope.nonce} is not above {last.get(site)}, of a round before"
        check.holds(envelope.nonce > last.get(site, -1), words)
        last[site] = max(envelope.nonce, last.get(site, -1))
        models.setdefault(envelope.model, []).append(site)
    given = "; ".join(f"{', '.join(sites)}: {key[:12]}" for key, sites in models.items())
    words = f"{where}: sites signed that they were given different global models: {given}"
    check.holds(len(models) <= 1, words)


def _in_force(keys: list[str], books: Books, site: str, run: str, record: Record) -> list[str]:
    """List the keys that may sign a reply: that of the round's RELEASE, and those after it."""
    for entry, signer in _signers(books.get(site, [])):
        mine = entry.get("kind") == "RELEASE" and entry.get("run") == run
        if mine and entry.get("round") == record["round"] and signer in keys:
            return keys[keys.index(signer) :]
    return keys


def _open(check: Check, path: str, said: Any, keys: list[str]) -> Envelope | None:
    """Open an envelope with one of the keys that may have signed it."""
    fault = "is not signed by the key that the accord pins, or one that it handed over to"
    typed = isinstance(said, dict) and {k: type(v) for k, v in said.items()} == {
        "text": str,
        "signature": str,
    }
    if not typed:
        check.holds(False, f"{path} is no signed envelope")
        return None
    for key in keys:
        try:
            envelope = opened(said["text"], said["signature"], key)
        except Refused as refusal:
            fault = fault if refusal.reason == "signature" else f"is no envelope: {refusal}"
        else:
            check.holds(True, "")
            return envelope
    check.holds(False, f"{path} {fault}")
    return None


def _check_envelope(
    check: Check,
    path: str,
    envelope: Envelope,
    run: str,
    record: Record,
    site: str,
    accord: Accord,
) -> None:
    """Hold what a site signed to the record that it is kept in."""
    for name, right in {
        "run": run,
        "round": record["round"],
        "sender": site,
        "recipient": COORDINATOR,
        "direction": REPLY,
        "accord": accord.digest,
        "shown": "",  # only a request shows replies
    }.items():
        check.equal(f"{path}: {name}", getattr(envelope, name), right, "the record is of")
    check.equal(f"{path}: kind", envelope.kind, "train", "an update answers")
    for name in ("body", "model"):
        words = f"{path}: {name} is no SHA-256"
        check.holds(_hex(getattr(envelope, name)), words)
    check.holds(bool(envelope.message), f"{path}: names no request that it answers")


def _check_witnesses(
    check: Check, run: str, books: Books, accord: Accord, handovers: Handovers
) -> None:
    """Find every head of a peer that a site took in during a run to be of the peer's own key.

    Of a peer that handed no ledger over it is not known whether it has changed its key since.
    """
    for site, book in books.items():
        for entry in (e for e in book if e.get("run") == run):
            for head in (h for h in entry.get("seen", ()) if h["site"] in books):
                peer = head["site"]
                own = [e["public_key"] for e in books[peer] if e.get("kind") == "KEY"]
                led = {*keys_led_to(accord.pins.get(peer, ""), peer, handovers.get(peer, [])), *own}
                words = f"ledgers/{site}.jsonl: entry {entry['seq']}: seen: a head of {peer} "
                check.holds(head["key"] in led, f"{words}is not signed by a key of {peer}'s own")


def _hex(said: Any) -> bool:
    return isinstance(said, str) and bool(re.fullmatch("[0-9a-f]{64}", said))
