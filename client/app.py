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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from safetensors import torch as safetensors
from torch import nn

from fedaccord import accord as accords
from fedaccord import evidence, runs
from fedaccord.accord import Accord
from fedaccord.client import evaluate as evaluation
from fedaccord.client import policy, train
from fedaccord.errors import AccordError, BudgetError, LedgerError
from fedaccord.models.build import build
from fedaccord.privacy.ledger import Ledger
from fedaccord.privacy.noise import OsSource, Source
from fedaccord.privacy.plan import PrivacyPlan, plan_for
from fedaccord.tasks import Records, Task, load_task

log = logging.getLogger("fedaccord.site")
Handler = Callable[[Message, Context], Message]

NOT_COVERED = "not covered"
# Small models are faster on one thread, and results do not depend on how many cores there are.
THREADS = 1


@dataclass(frozen=True)
class Site:
    """A site as one message finds it: what was agreed, its folder, its policy, its ledger."""

    name: str
    accord: Accord
    task: Task
    folder: Path
    policy: policy.SitePolicy
    ledger: Ledger

    @property
    def plan(self) -> PrivacyPlan | None:
        """The site's privacy plan, from the accord alone; None where privacy is off."""
        return plan_for(self.accord, self.name)

    def model(self, section: str, weights: ArrayRecord) -> nn.Module:
        """Build the global model or the student and load the weights that came with a message."""
        which = self.accord.model if section == "model" else self.accord.distillation
        name = which.name if section == "model" else which.model  # type: ignore[union-attr]
        model = build(name, self.task.spec, which.options, self.accord.seed)
        model.load_state_dict(weights.to_torch_state_dict(), strict=True)
        return model


def who(accord: Accord, context: Context) -> str:
    """Find out which site this node is.

    It is the site that `site` in its node config names, else the one whose place in the roster is
    `partition-id` (Flower's simulation).

    Raises:
        AccordError: a node that is not in the roster.
    """
    names = list(accord.roster)
    place = int(context.node_config.get("partition-id", -1))
    name = str(context.node_config.get("site", names[place] if 0 <= place < len(names) else ""))
    if name not in names:
        raise AccordError(
            f'site "{name}" (partition-id {place}) is not among the {len(names)} sites of accord '
            f'"{accord.name}". Start as many nodes as it has sites.'
        )
    return name


def open_site(accord: Accord, name: str, context: Context) -> Site:
    """Open a site's folder, with its policy and its ledger.

    Raises:
        AccordError: a policy that is not valid.
        LedgerError: a ledger that is damaged, altered or another site's, or a folder that cannot
            be used.
    """
    torch.set_num_threads(THREADS)
    base = str(context.run_config.get("sites", ""))
    folder = (Path(base) if base else runs.home() / f"sites-of-run-{context.run_id}") / name
    try:
        return Site(
            name=name,
            accord=accord,
            task=load_task(accord.task.name, accord.task.options),
            folder=folder,
            policy=policy.of_site(folder, accord),
            ledger=Ledger(folder / "ledger.sqlite", name),
        )
    except OSError as fault:
        raise LedgerError(
            f"site {name} cannot use its folder {folder}: {fault.strerror}. Nothing was released; "
            "mend it or name another."
        ) from None


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
            accord = accords.load(str(context.run_config["accord"]))
            name = who(accord, context)
            site = open_site(accord, name, context)
            asked = message.content.config_records["config"]
            try:
                if asked["accord"] != site.accord.digest:
                    raise AccordError(
                        f"site {site.name} holds another accord: its digest is "
                        f"{site.accord.digest[:12]}, the request's {str(asked['accord'])[:12]}. "
                        "Give both sides the same file."
                    )
                content = handler(site, message)
            finally:
                site.ledger.close()
        except (BudgetError, AccordError, LedgerError) as refusal:
            content = RecordDict({"config": ConfigRecord({"refused": str(refusal)})})
            if name:
                content.config_records["config"]["site"] = name
        except Exception:
            log.exception("message %s failed", message.metadata.message_type)
            fault = Error(
                ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "internal error; see the site's log"
            )
            return Message(fault, reply_to=message)
        return Message(content, reply_to=message)

    return handle


app = ClientApp()


@app.query("join")
@answer
def join(site: Site, message: Message) -> RecordDict:
    """Say who this is and whether policy and ledger would let the accord in."""
    agreed = site.accord
    reason = ""
    try:
        site.policy.check(agreed, site.name)
        train.refuse_unsafe(build(agreed.model.name, site.task.spec, agreed.model.options, 0))
        site.ledger.consider(_run(message), site.plan, site.policy.cap, agreed.digest)
    except (BudgetError, AccordError) as refusal:
        reason = str(refusal)
    return RecordDict({"config": ConfigRecord({"site": site.name, "reason": reason})})


@app.query("reserve")
@answer
def reserve(site: Site, message: Message) -> RecordDict:
    """Reserve the whole plan; the reply holds the ledger's entry."""
    site.policy.check(site.accord, site.name)
    entry = site.ledger.reserve(
        _run(message), site.plan, site.accord.reserved_rounds, site.policy.cap, site.accord.digest
    )
    said = ConfigRecord({"site": site.name, "entry": evidence.canonical_json(entry)})
    return RecordDict({"config": said})


@app.train()
@answer
def train_round(site: Site, message: Message) -> RecordDict:
    """Train one round and release the weights; asked again, send the same bytes again."""
    run, number = _run(message), _round(message)
    site.policy.check(site.accord, site.name)
    payload = stored_release(site, run, number)
    if payload is None:
        model = site.model("model", message.content.array_records["arrays"])
        train.refuse_unsafe(model)
        if site.plan:
            train.refuse_weights(model)
        payload = train_and_record(site, model, run, number)
    arrays = ArrayRecord(torch_state_dict=safetensors.load(payload))
    said = ConfigRecord({"site": site.name, "run": run, "round": number})
    return RecordDict({"arrays": arrays, "config": said})


def _release_path(site: Site, run: str, number: int) -> Path:
    return site.folder / "releases" / f"{run}-{number:05d}.safetensors"


def stored_release(site: Site, run: str, number: int) -> bytes | None:
    """Return the bytes that a round has already released, or None if it has not.

    Raises:
        BudgetError: the ledger has a RELEASE whose bytes are gone; others are never made.
    """
    done = [e for e in site.ledger.find(run, "RELEASE") if e["round"] == number]
    if not done:
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
    entropy: Callable[[], Source] = OsSource,
) -> bytes:
    """Use a slot, train, store the result, and only then record its release.

    Args:
        site: the site.
        model: the global model, trained in place.
        run: the run's id.
        number: the round.
        entropy: makes the mechanism's randomness; tests pass their own, no accord can.

    Returns:
        The weights that may be sent, as safetensors bytes.
    """
    plan, training, accord = site.plan, site.accord.training, site.accord
    site.ledger.intend(run, number, plan)
    records = _read(site)
    if plan:
        train.train_private(model, records, plan, training, entropy)
    elif records is not None:
        q = accord.privacy.sampling_prob
        place = list(accord.roster).index(site.name)
        source = train.SeededSource(accord.seed, number, place)
        normaliser = q * accord.roster[site.name]
        train.train_plain(model, records, q, normaliser, training, source)
    payload = safetensors.save({k: v.contiguous() for k, v in model.state_dict().items()})
    evidence.write_atomic(_release_path(site, run, number), payload)
    site.ledger.release(
        run,
        number,
        what="weights",
        sha256=evidence.sha256(payload),
        bytes=len(payload),
        plan_digest=plan.digest if plan else None,
        build=evidence.build_hash(),
        covers="the reserved plan" if plan else NOT_COVERED,
    )
    return payload


def _read(site: Site) -> Records | None:
    """Read the training records; a fault becomes None, a round of noise alone under a plan."""
    try:
        return site.task.site(site.name).train
    except Exception:
        log.exception("the training records of %s cannot be read", site.name)
        return None


@app.evaluate()
@answer
def evaluate(site: Site, message: Message) -> RecordDict:
    """Count evaluation subjects for each model that came; the counts are a release."""
    run, number = _run(message), _round(message)
    if not site.ledger.find(run, "RESERVE", "NONPRIVATE"):
        raise BudgetError(f"Site {site.name} has no reservation for run {run}. Reserve first.")
    records = site.task.site(site.name).test
    content = RecordDict()
    cells = 0
    for section, weights in message.content.array_records.items():
        model = site.model(section, weights)
        tables = evaluation.group_counts(
            model, records, site.task.spec, site.accord.fairness.attributes
        )
        flat = {name: [int(cell) for cell in table.ravel()] for name, table in tables.items()}
        cells += sum(len(row) for row in flat.values())
        content[section] = MetricRecord(flat)  # type: ignore[arg-type]
    site.ledger.counts(
        run,
        number,
        what="group counts",
        models=sorted(message.content.array_records),
        cells=cells,
        covers=NOT_COVERED,
    )
    content["config"] = ConfigRecord({"site": site.name, "run": run, "round": number})
    return content


@app.query("ledger")
@answer
def ledger(site: Site, message: Message) -> RecordDict:
    """Hand over the whole ledger, for the run's evidence."""
    return RecordDict({"config": ConfigRecord({"site": site.name, "ledger": site.ledger.export()})})


def _run(message: Message) -> str:
    """Read the run's id; releases are stored under it, so it may not lead out of their folder."""
    run = str(message.content.config_records["config"]["run"])
    if run != Path(run).name or "\\" in run or not 1 <= len(run) <= 150:
        raise AccordError(f"run {run[:150]!r} is no name of a folder. Give the run another name.")
    return run


def _round(message: Message) -> int:
    return int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]
