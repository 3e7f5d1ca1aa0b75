"""A run as the link leaves it, of real keys and signatures, made from a run of the engine."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedaccord import accord as accords
from fedaccord import keys
from fedaccord.envelope import Envelope, handover, seal
from fedaccord.keys import SigningKey
from fedaccord.privacy.ledger import Ledger
from fedaccord.reports.verify import verify
from fedaccord.runs import RunFolder
from fedaccord.simulations import engine

SITES = ("cleveland", "hungary", "switzerland", "va")
MODEL, OTHER = "a" * 64, "b" * 64  # digests
Row = dict[str, Any]
Signers = dict[str, SigningKey]


@dataclass(frozen=True)
class Linked:
    """A run with the link's records, the same before they were added, and the sites' keys.

    va has changed its key since the accord pinned it: "va before" is the pinned one.
    """

    run: Path
    bare: Path
    signers: Signers


def make(folder: Path) -> Linked:
    """Make a plain run of two rounds under an accord with pins, and sign its replies."""
    text = accords.bundled()["heart"].read_text(encoding="utf-8")
    text = re.sub(r"(?m)^enabled = true.*$", "enabled = false", text)
    text = re.sub(r"(?m)^rounds = 20", "rounds = 2", text)
    sites = folder / "sites"
    for site in SITES:
        pinned = keys.create(sites / site / "ledger.key").public
        text = text.replace(f'name = "{site}"', f'name = "{site}"\nkey = "{pinned}"')
    (folder / "linked.toml").write_text(text, encoding="utf-8")
    before = keys.load(sites / "va" / "ledger.key")
    book = Ledger(sites / "va" / "ledger.sqlite", "va", sites / "heads" / "va.json")
    step = handover("va", str(book.rotate()["public_key"]), before)
    book.close()
    run = folder / "run"
    engine.simulate(str(folder / "linked.toml"), run, sites, 4)
    bare = shutil.copytree(run, folder / "bare" / "run")
    signers = {site: keys.load(sites / site / "ledger.key") for site in SITES}
    rewrite(run, lambda records: sign(records, run.name, step, signers))
    verify(run)  # so that its epsilons are known
    return Linked(run, bare, signers | {"va before": before})


def sign(records: list[Row], run: str, step: Row, signers: Signers) -> None:
    """Add what the link adds to a run's records."""
    about = {"coordinator_key": signers["cleveland"].public, "handovers": {"va": [step]}}
    records[0] |= {"engine": "LinkGrid", "link": about}
    for record in rounds_of(records):
        ask = functools.partial(envelope, record, run, records[0]["accord"])
        record |= {"link": [], "handovers": {"va": [step]}}
        record["envelopes"] = {s: seal(ask(s), signers[s]).to_json() for s in SITES}


def envelope(record: Row, run: str, accord: str, site: str) -> Envelope:
    """What a site signs of its reply in a round."""
    return Envelope(
        run=run,
        round=record["round"],
        sender=site,
        recipient="coordinator",
        direction="reply",
        kind="train",
        message=f"request-{record['round']}",
        nonce=10 * record["round"],
        expires=1.9e9,
        body="c" * 64,
        accord=accord,
        model=MODEL,
        shown="",
    )


def sealed_with(key: str, site: str = "hungary", **other: Any) -> Callable[..., None]:
    """Put another envelope into the second round, truly signed with a key."""

    def change(records: list[Row], signers: Signers) -> None:
        record = rounds_of(records)[1]
        right = json.loads(record["envelopes"][site]["text"])
        said = seal(Envelope(**(right | other)), signers[key])
        record["envelopes"][site] = said.to_json()

    return change


def rewrite(run: Path, change: Callable[[list[Row]], Any]) -> None:
    """Change a run's records and mend chain and seal, as somebody who holds the folder can."""
    records = RunFolder.open(run).records()
    change(records)
    (run / "rounds.jsonl").unlink()
    folder = RunFolder(run)
    for record in records:
        folder.append({key: value for key, value in record.items() if key != "hash"})
    folder.seal()


def rounds_of(records: list[Row]) -> list[Row]:
    """List the rounds among a run's records."""
    return [record for record in records if record["kind"] == "round"]
