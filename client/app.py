"""The ClientApp: what a site answers to each message, and what it never says.

| message | the site |
|---|---|
| query.join | says its name and whether its policy and ledger would let the accord in |
| query.reserve | reserves the whole plan in its ledger |
| train | writes its INTENT, trains under its plan, writes its RELEASE, sends the weights |
| evaluate | counts its evaluation subjects by group, label and prediction |
| query.ledger | hands over its ledger, which holds no record and no count |
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from flwr.app import (
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from torch import nn

from fedaccord import accord as accords
from fedaccord import evidence
from fedaccord.client import client_level, diary, local, personal, train
from fedaccord.client import evaluate as evaluation
from fedaccord.client.pull import NOTHING, Pull, pull_of
from fedaccord.client.site import Site, accord_of, open_site, who, without_paths
from fedaccord.errors import AccordError, BudgetError, LedgerError, PolicyError
from fedaccord.fairness.counts import Counts
from fedaccord.models.build import trained
from fedaccord.privacy.chain import Head, read_heads
from fedaccord.privacy.client_level import COVERS, ClientPlan
from fedaccord.privacy.noise import OsSource, Source
from fedaccord.privacy.pins import of_pinned
from fedaccord.privacy.plan import PrivacyPlan
from fedaccord.strategies import encoding
from fedaccord.strategies.updates import arrays_of, config_of
from fedaccord.tasks import Records

log = logging.getLogger("fedaccord.site")
Handler = Callable[[Message, Context], Message]

NOT_COVERED = "not covered"
MOST_HEADS = 64  # of other sites in one entry: anybody can sign heads with keys of their own
# What these say depends on accord, policy, ledger and disk alone, so it may travel.
REFUSALS = (AccordError, BudgetError, LedgerError, PolicyError)


def answer(handler: Callable[[Site, Message], RecordDict]) -> Handler:
    """Turn a site's function into a Flower handler whose errors say nothing of the data.

    Flower sends an exception's text and traceback to the server, values and all. Here a refusal
    travels as its sentence, which depends on accord, policy, ledger and disk alone; any other
    fault stays in the site's own log and travels as one fixed line.
    """

    @functools.wraps(handler)
    def handle(message: Message, context: Context) -> Message:
        name = ""
        try:
            accord = accords.load(accord_of(context))
            name = who(accord, context)
            site = open_site(accord, name, context)
            asked = config_of(message.content)
            try:
                if asked["accord"] != site.accord.digest:
                    raise AccordError(
                        f"site {site.name} holds another accord: its digest is "
                        f"{site.accord.digest[:12]}, the request's {str(asked['accord'])[:12]}. "
                        "Give both sides the same file."
                    )
                with diary.privacy_diary(site.folder):
                    content = _kept(handler, site, message)
            finally:
                site.ledger.close()
        except REFUSALS as refusal:
            words = without_paths(str(refusal), context)
            said = ConfigRecord({"refused": words})
            if name:
                said["site"] = name
            content = RecordDict({"config": said})
        except Exception as fault:
            words = f"internal error; see {diary.NAME} in the site's folder"
            log.error("message %s failed: %s", message.metadata.message_type, words)
            if not name:  # before any record was near
                log.error("%s: %s", type(fault).__name__, fault)
            error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, words)
            return Message(error, reply_to=message)
        return Message(content, reply_to=message)

    return handle


def _kept(
    handler: Callable[[Site, Message], RecordDict], site: Site, message: Message
) -> RecordDict:
    """Answer; a refusal by policy goes into the ledger, a fault into the site's own diary alone."""
    try:
        return handler(site, message)
    except PolicyError as refusal:
        site.ledger.refuse(_run(message), site.accord.digest, refusal.rule, str(refusal))
        raise
    except REFUSALS:
        raise
    except Exception:
        diary.log.exception("message %s failed", message.metadata.message_type)
        raise


app = ClientApp()


@app.query("join")
@answer
def join(site: Site, message: Message) -> RecordDict:
    """Say who this is, once policy and ledger would let the accord in; else it is a refusal."""
    site.admit("join")
    site.ledger.consider(_run(message), site.plan, site.terms)
    seen = evidence.canonical_json([head.to_json() for head in site.ledger.seen()])
    return _reply(site, seen=seen)


@app.query("reserve")
@answer
def reserve(site: Site, message: Message) -> RecordDict:
    """Reserve the whole plan; the reply holds the ledger's entry."""
    site.admit("reserve")
    peers = site.ledger.witness(_heads(site, message))[:MOST_HEADS]
    rounds = site.accord.reserved_rounds
    entry = site.ledger.reserve(_run(message), site.plan, rounds, site.terms, peers)
    return _reply(site, entry=evidence.canonical_json(entry))


@app.train()
@answer
def train_round(site: Site, message: Message) -> RecordDict:
    """Train one round and release the weights; asked again, send the same bytes again."""
    run, number = _run(message), _round(message)
    site.admit("train")
    peers = site.ledger.witness(_heads(site, message))[:MOST_HEADS]
    payload = stored_release(site, run, number)
    wants_loss = config_of(message.content).get("wants") == "train-loss"
    if wants_loss and (site.plan is not None or "training loss" not in site.policy.releases):
        raise PolicyError(
            "releases",
            f"Site {site.name} does not send its training loss: no noise covers it, and under "
            "privacy, or where its policy does not name it, it stays. Choose another strategy.",
        )
    if payload is None:
        model = site.model("model", arrays_of(message.content)["arrays"])
        if isinstance(site.plan, PrivacyPlan):
            local.put_back(model, site.folder, run, number)
            train.refuse_weights(model)
        pull = pull_of(message.content, model, site.accord.training)
        what = "weights and training loss" if wants_loss else "weights"
        payload = train_and_record(site, model, run, number, peers, pull=pull, what=what)
    # Over the link others see a hash of the reply; nobody may test a guess of a bare update on it.
    salt = client_level.salt() if isinstance(site.plan, ClientPlan) else {}
    content = _reply(site, run=run, round=number, **salt)
    named = [e["what"] for e in site.ledger.find(run, "RELEASE") if e["round"] == number]
    if wants_loss and "training loss" in named[0]:  # what a retry asks for is not on record
        content["metrics"] = MetricRecord({"train_loss": asked_loss(site, message, run, number)})
    for name, arrays in encoding.records_of(payload).items():
        content[name] = arrays
    personal.advance(site, run, number, arrays_of(message.content)["arrays"])
    return content


def asked_loss(site: Site, message: Message, run: str, number: int) -> float:
    """Work out the mean loss of the model that came, for a strategy that weighs sites by it.

    No noise covers it; the round's RELEASE names it.
    """
    model = site.model("model", arrays_of(message.content)["arrays"])
    local.put_back(model, site.folder, run, number)
    records = _read(site, "train")
    return 0.0 if records is None else evaluation.mean_loss(model.to(site.device), records)


def _reply(site: Site, **said: str | int) -> RecordDict:
    """Make a reply that shows whose it is and how far the site's ledger has come."""
    config = ConfigRecord({"site": site.name})
    config["head"] = evidence.canonical_json(site.ledger.head().to_json())
    for name, value in said.items():
        config[name] = value
    return RecordDict({"config": config})


def _heads(site: Site, message: Message) -> list[Head]:
    """Read the heads that a request shows of the ledgers of the accord's sites."""
    asked = config_of(message.content)
    shown = read_heads(str(asked.get("heads", "[]")))
    known = [head for head in shown if head.site in site.accord.roster]
    return of_pinned(known, site.ledger, site.accord.pins, str(asked.get("handovers", "{}")))


def _release_path(site: Site, run: str, number: int) -> Path:
    return site.folder / "releases" / f"{run}-{number:05d}.safetensors"


def reserved(site: Site, run: str) -> bool:
    """Tell whether a run has a reservation, and one of this accord."""
    held = site.ledger.find(run, "RESERVE", "NONPRIVATE")
    return bool(held) and held[0]["accord"] == site.accord.digest


def stored_release(site: Site, run: str, number: int) -> bytes | None:
    """Return the bytes that a round has already released under this accord, or None.

    Raises:
        BudgetError: the ledger has a RELEASE whose bytes are gone; others are never made.
    """
    done = [e for e in site.ledger.find(run, "RELEASE") if e["round"] == number]
    if not done or not reserved(site, run):
        return None
    path = _release_path(site, run, number)
    payload = path.read_bytes() if path.exists() else b""
    if evidence.sha256(payload) != done[0]["sha256"]:
        raise BudgetError(
            f"Site {site.name} released round {number} of run {run} and its stored bytes are lost. "
            "Ask for a later round."
        )
    return payload


def train_and_record(
    site: Site,
    model: nn.Module,
    run: str,
    number: int,
    peers: Iterable[Head] = (),
    entropy: Callable[[], Source] = OsSource,
    pull: Pull = NOTHING,
    what: str = "weights",
) -> bytes:
    """Use a slot, train, store the update, and only then record its release.

    The update is what training added to the weights, taken before they are rounded to float32
    where training is in float64.

    Args:
        site: the site.
        model: the global model, trained in place.
        run: the run's id.
        number: the round.
        peers: heads of other sites' ledgers, to be kept in the INTENT.
        entropy: makes the mechanism's randomness; tests pass their own, no accord can.
        pull: what the strategy adds to each step.
        what: leaves the site in this round, as the RELEASE says it.

    Returns:
        The update that may be sent, encoded, as safetensors bytes.
    """
    plan, training, accord = site.plan, site.accord.training, site.accord
    site.ledger.intend(run, number, plan, accord.digest, peers)
    local.put_back(model, site.folder, run, number)
    like = {k: v.numpy().copy() for k, v in trained(model).items()}
    records = _read(site, "train")
    if isinstance(plan, PrivacyPlan):
        model.double()
        train.train_private(model, records, plan, training, entropy, site.how, pull)
    elif plan:
        client_level.train_or_stay(model.to(site.device), records, accord, site.name, number)
    elif records is not None:
        client_level.train_plainly(model.to(site.device), records, accord, site.name, number, pull)
    salt = client_level.salt() if isinstance(plan, ClientPlan) else None
    after = {name: value.cpu().numpy() for name, value in trained(model).items()}
    change = {name: np.asarray(after[name] - old, old.dtype) for name, old in like.items()}
    payload = encoding.wire_bytes(encoding.pack(change, accord.strategy.encoding), salt)
    local.keep(model, site.folder, run, number)
    evidence.write_atomic(_release_path(site, run, number), payload)
    site.ledger.release(
        run,
        number,
        what=what,
        sha256=evidence.sha256(payload),
        bytes=len(payload),
        plan_digest=plan.digest if plan else None,
        build=evidence.build_hash(),
        covers=COVERS if salt else "the reserved plan" if plan else NOT_COVERED,
    )
    return payload


def _read(site: Site, which: str) -> Records | None:
    """Read the records to "train" or "test" on; a fault is None, and only the diary says more."""
    try:
        records: Records = getattr(site.task.site(site.name), which)
        return records
    except Exception:
        diary.log.exception("the records of %s cannot be read", site.name)
        return None


@app.evaluate()
@answer
def evaluate(site: Site, message: Message) -> RecordDict:
    """Count evaluation subjects for each model that came; the counts are a release.

    A site whose records cannot be read counts nobody: an error would say something of them.
    """
    site.admit("evaluate")
    run, number = _run(message), _round(message)
    if not reserved(site, run):
        raise BudgetError(f"Site {site.name} has no reservation for run {run}. Reserve first.")
    records = _read(site, "test")
    content, cells = RecordDict(), 0
    for section, weights in arrays_of(message.content).items():
        model = site.model(section, weights)
        local.put_back(model, site.folder, run, number + 1)
        tables = _counted(site, model, records)
        flat = {name: [int(cell) for cell in table.ravel()] for name, table in tables.items()}
        cells += sum(len(row) for row in flat.values())
        content[section] = MetricRecord(flat)  # type: ignore[arg-type]
    site.ledger.counts(
        run,
        number,
        what="group counts",
        models=sorted(arrays_of(message.content)),
        cells=cells,
        covers=NOT_COVERED,
    )
    content["config"] = _reply(site, run=run, round=number)["config"]
    return content


def _counted(site: Site, model: nn.Module, records: Records | None) -> Mapping[str, Counts]:
    """Count predictions by group; records that cannot be counted are as none."""
    spec, attributes = site.task.spec, site.accord.fairness.attributes
    try:
        return evaluation.group_counts(model.to(site.device), records, spec, attributes)
    except Exception:
        diary.log.exception("the records of %s cannot be counted", site.name)
        return evaluation.group_counts(model, None, spec, attributes)


@app.query("ledger")
@answer
def ledger(site: Site, message: Message) -> RecordDict:
    """Hand over the whole ledger, for the run's evidence; as an accord may that could join."""
    site.admit("join")
    return RecordDict({"config": ConfigRecord({"site": site.name, "ledger": site.ledger.export()})})


def _run(message: Message) -> str:
    """Read the run's id; releases are stored under it, so it may not lead out of their folder."""
    run = str(config_of(message.content)["run"])
    if run != Path(run).name or "\\" in run or not 1 <= len(run) <= 150:
        raise AccordError(f"run {run[:150]!r} is no name of a folder. Give the run another name.")
    return run


def _round(message: Message) -> int:
    return int(config_of(message.content)["server-round"])
