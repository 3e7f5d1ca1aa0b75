"""A site as one message finds it: what was agreed, its folder, its policy, its ledger."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context
from torch import nn

from fedaccord import accord as accords
from fedaccord import devices, runs
from fedaccord.accord import Accord
from fedaccord.client import policy, train
from fedaccord.client.passes import How
from fedaccord.errors import AccordError, LedgerError, PolicyError, TaskError
from fedaccord.models.build import agreed, build, parameter_count, put
from fedaccord.privacy import engines
from fedaccord.privacy.ledger import Ledger, Terms
from fedaccord.privacy.plan import Plan, PrivacyPlan, plan_for
from fedaccord.privacy.probe import probe, synthetic
from fedaccord.privacy.views import Views
from fedaccord.strategies.client_level import refuse_state
from fedaccord.tasks import Task, refuse_missing, task_of


@dataclass(frozen=True)
class Site:
    """A site as one message finds it."""

    name: str
    accord: Accord
    task: Task
    folder: Path
    policy: policy.SitePolicy
    ledger: Ledger

    @property
    def plan(self) -> Plan | None:
        """The site's privacy plan, from the accord alone; None where privacy is off."""
        return plan_for(self.accord, self.name)

    @property
    def terms(self) -> Terms:
        """What a reservation is held to."""
        return Terms(
            cap=self.policy.cap,
            accord=self.accord.digest,
            dataset=self.accord.task.name,
            disjoint=self.policy.disjoint,
            accord_cap=self.policy.cap_for(self.accord),
        )

    def model(self, section: str, weights: ArrayRecord) -> nn.Module:
        """Build the global model or the student and load the weights that came with a message."""
        if section == "model":
            model = _fresh(self)
        else:
            student = self.accord.distillation
            model = build(student.model, self.task.spec, student.options, self.accord.seed)
        put(model, weights.to_torch_state_dict())
        devices.settle(parameter_count(model))
        return model

    @property
    def how(self) -> How:
        """How this site's records pass through a model."""
        asked = self.accord.privacy
        return How(
            engine=self.engine,
            precision=asked.precision,
            page_rows=asked.page_rows,
            measured=asked.kernels == "measured",
            device=str(self.device),
        )

    @property
    def device(self) -> torch.device:
        """Where this site's records pass through a model."""
        return devices.device(self.name, self.accord.privacy.precision)

    @property
    def engine(self) -> str:
        """The engine that clips here: the accord's, or what its "auto" is for the model."""
        digest = self.accord.digest
        if digest not in _engines:
            records = synthetic(self.task, self.accord.seed)
            asked = self.accord.privacy.engine
            model, loss = _viewed(self)
            _engines[digest] = engines.resolve(asked, model, loss, *records)[0]
        return _engines[digest]

    def admit(self, kind: str) -> None:
        """Hold a request to the site's policy, and the model to what a plan needs.

        No private record is read: it looks at accord, policy and clock, and probes the model on
        inputs made up from the task's public bounds.

        Args:
            kind: "join", "reserve", "train" or "evaluate".

        Raises:
            PolicyError: the policy rules it out, or the task's data was not fetched; the sentence
                names the rule.
        """
        digest, now = self.accord.digest, datetime.now(UTC)

        def parameters() -> int:  # asked for only once the accord is approved
            if digest not in _parameters:
                _parameters[digest] = parameter_count(_fresh(self))
            return _parameters[digest]

        self.policy.check(self.accord, self.name, kind=kind, parameters=parameters, now=now)
        try:
            refuse_missing(self.task, [self.name])
        except TaskError as fault:  # else every round would be noise alone
            raise PolicyError("task", str(fault)) from None
        if digest not in _faults:
            _faults[digest] = _unfit(self)
        if _faults[digest]:
            raise PolicyError("model", _faults[digest])


# What was found of an accord's model, once in a process, by the accord's digest.
_parameters: dict[str, int] = {}
_engines: dict[str, str] = {}
_faults: dict[str, str] = {}


def _fresh(site: Site) -> nn.Module:
    return agreed(site.accord.model, site.task.spec, site.accord.seed)


def _viewed(site: Site) -> tuple[nn.Module, engines.Loss]:
    """Return a fresh model and the loss as training has them, with the accord's views."""
    agreed = site.accord.training
    views = Views(agreed.views, agreed.augmentation)
    return views.model(_fresh(site)), views.loss(engines.cross_entropy)


def _unfit(site: Site) -> str:
    """Say why the accord's model cannot be trained under its plan, or return ""."""
    plan, how, model = site.plan, site.accord.privacy, _fresh(site)
    try:
        if isinstance(plan, PrivacyPlan):
            train.refuse_unsafe(model)
            records = synthetic(site.task, site.accord.seed)
            viewed, loss = _viewed(site)
            if site.device.type != "mps":  # which has no float64, in which most is compared
                viewed = viewed.to(site.device)
            probe(viewed, site.engine, how.precision, loss, *records, plan, how.page_rows)
        elif plan:
            refuse_state(model)
        devices.settle(parameter_count(model))
    except AccordError as fault:
        return str(fault)
    return ""


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


def _told(context: Context) -> bool:
    """Tell whether this node's owner has said which site it is, as in every deployment."""
    return "site" in context.node_config


def _named(context: Context, key: str, what: str) -> str:
    """Return what a site's own node config names.

    Raises:
        AccordError: the key is left out; the run config is the other side's, and is not asked.
    """
    named = str(context.node_config.get(key, ""))
    if not named:
        raise AccordError(
            f"site {context.node_config['site']} has no `{key}` in its node config, and what the "
            f'run config says is not asked there. Start it with {key}="{what}".'
        )
    return named


def accord_of(context: Context) -> str:
    """Find the accord that this node takes part in: a file's path, or the name of a bundled one.

    Who submits a run chooses its run config, so it decides nothing at a site of a deployment.

    | node config | the accord is |
    |---|---|
    | names no `site`, as in a simulation | `accord` of the run config |
    | names a `site` | `accord` of the same node config, else it is refused |

    Raises:
        AccordError: the node config names a site and no accord.
    """
    if _told(context):
        return _named(context, "accord", "/path/of/its/own/accord.toml")
    return str(context.run_config["accord"])


def home_of(context: Context) -> Path:
    """Find the folder that holds the sites' folders on this machine.

    It is `folder` in a node config that names the site; in a simulation `sites` in the run config.

    Raises:
        AccordError: the node config names a site and no folder.
    """
    if _told(context):
        return Path(_named(context, "folder", "/the/folder/that/holds/its/own"))
    base = str(context.run_config.get("sites", ""))
    return Path(base) if base else runs.home() / f"sites-of-run-{context.run_id}"


def without_paths(words: str, context: Context) -> str:
    """Take the folders of this machine out of a sentence that travels to the other side."""
    if _told(context):
        own = {key: str(context.node_config.get(key, "")) for key in ("folder", "data", "accord")}
        places = [own["folder"], own["data"], str(Path(own["accord"]).parent)]
    else:
        places = [str(home_of(context))]
    for place in sorted(set(places) - {"", "."}, key=len, reverse=True):
        words = words.replace(f"{place.rstrip('/')}/", "")
    return words


def data_of(folder: Path, context: Context) -> Path | None:
    """Find the folder of a site's own data sets, which no accord and no coordinator can name.

    It is `data` in the site's node config, else `data` in its folder. None: a simulated site
    without such a folder, whose records lie beside the accord.
    """
    named = str(context.node_config.get("data", ""))
    own = Path(named) if named else folder / "data"
    return own if named or _told(context) or own.is_dir() else None


def open_site(accord: Accord, name: str, context: Context) -> Site:
    """Open a site's folder, with its policy and its ledger.

    Raises:
        AccordError: a node config that names the site and leaves out its accord or folder.
        PolicyError: a policy that is not valid, or none at a site that its node config names.
        LedgerError: a ledger that is damaged, altered or another site's, or a folder that cannot
            be used.
    """
    folder = home_of(context) / name
    home = accords.find(accord_of(context)).parent
    try:
        # Only a simulated site, which nobody told who it is, gets a policy that suits the accord.
        path = folder / policy.FILE
        told = _told(context)
        own = policy.SitePolicy.read(path) if told else policy.of_site(folder, accord)
        return Site(
            name=name,
            accord=accord,
            task=task_of(accord, home.resolve(), data_of(folder, context)),
            folder=folder,
            policy=own,
            ledger=Ledger(folder / "ledger.sqlite", name, folder / own.second_head),
        )
    except OSError as fault:
        raise LedgerError(
            f"site {name} cannot use its folder {folder}: {fault.strerror}. Nothing was released; "
            "mend it or name another."
        ) from None
