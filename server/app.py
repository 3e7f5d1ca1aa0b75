"""The ServerApp: admit the sites, run the rounds, leave the evidence."""

from __future__ import annotations

import math
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

from fedaccord import accord as accords
from fedaccord import devices, registry, runs
from fedaccord.accord import Accord, ModelSection
from fedaccord.errors import AccordError, BudgetError
from fedaccord.evidence import build_hash
from fedaccord.models.build import agreed, parameter_count
from fedaccord.privacy import accounting, engines, tradeoff
from fedaccord.privacy.client_level import ClientPlan
from fedaccord.privacy.plan import Plan, plan_for
from fedaccord.privacy.probe import synthetic
from fedaccord.privacy.views import Views
from fedaccord.runs import RunFolder
from fedaccord.server import admission, checkpoint, distillation
from fedaccord.server.admission import Place
from fedaccord.server.heads import Heads
from fedaccord.server.rounds import Coordinator
from fedaccord.strategies.client_level import ClientLevelMean, refuse_state
from fedaccord.tasks import Task, check_fits, task_of

PACKAGES = ("flwr", "torch", "opacus", "dp-accounting", "fairlearn", "numpy")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one accord over whatever carries the grid.

    Run config: `accord` (a TOML file, or the name of a bundled accord), `run` (the folder to
    leave, or "" for a new one under $FEDACCORD_HOME).

    Raises:
        AccordError: an accord that does not hold together.
        BudgetError: too few sites let it in; nothing was read and nothing reserved.
    """
    where = str(context.run_config["accord"])
    accord = accords.load(where)
    task = task_of(accord, accords.find(where).parent.resolve())
    check_fits(accord, task)
    model, student = initial(accord, task)
    devices.settle(parameter_count(model))
    folder = open_folder(str(context.run_config.get("run", "")), where, accord)
    about = {"run": folder.id, "engine": type(grid).__name__}
    folder.append(about | start_record(accord, task, model, student))
    heads = Heads(accord.roster)
    places, out = admission.admit(grid, accord, folder.id, heads)
    for site, reason in sorted(out.items()):
        folder.append({"id": f"out/{site}", "kind": "out", "site": site, "reason": reason})
    if len(places) < accord.rounds.min_sites:
        words = admission.refusal(out)
        folder.append({"id": "end", "kind": "end", "stop": "refused", "reason": words})
        folder.seal()
        raise BudgetError(words)
    plans = {place.site: plan_for(accord, place.site) for place in places}
    for place in places:
        folder.append(plan_record(place, plans[place.site]))
    coordinator = Coordinator(
        accord=accord,
        task=task,
        grid=grid,
        strategy=strategy_for(accord, plans[places[0].site]),
        folder=folder,
        places=places,
        plans=plans,
        heads=heads,
        model=checkpoint.weights_of(model),
        student=student,
    )
    finish(coordinator, coordinator.run())


def strategy_for(accord: Accord, plan: Plan | None) -> Strategy:
    """Build the accord's strategy, or the noised mean where the sites' plans are client-level."""
    if isinstance(plan, ClientPlan):
        return ClientLevelMean(plan)
    made: Strategy = registry.load("strategy", accord.strategy.name)()
    return made


def open_folder(run: str, where: str, accord: Accord) -> RunFolder:
    """Start the run's folder with the accord's text."""
    folder = Path(run) if run else runs.home() / "runs" / runs.new_id(accord.name)
    return RunFolder.create(folder, accords.find(where).read_text(encoding="utf-8"))


def initial(accord: Accord, task: Task) -> tuple[torch.nn.Module, torch.nn.Module | None]:
    """Build the global model and, where the accord wants one, the student.

    Raises:
        AccordError: options that a model does not have, or a model that does not fit the task.
    """
    wants = accord.distillation
    model = fitting(accord.model, task, accord.seed)
    if accord.privacy.enabled and accord.privacy.unit == "client":
        refuse_state(model)
    if not wants.enabled:
        return model, None
    student = ModelSection(name=wants.model, options=wants.options)
    return model, fitting(student, task, accord.seed)


def fitting(wanted: ModelSection, task: Task, seed: int) -> torch.nn.Module:
    """Build a model and have it answer made-up inputs, before any site uses a slot on it.

    Under a plan a model that raises on every record would train on noise alone, and say nothing.

    Raises:
        AccordError: it cannot be built, cannot read the task's inputs, or gives other classes.
    """
    spec, name = task.spec, wanted.name
    try:
        model = agreed(wanted, spec, seed)
        with torch.no_grad():
            logits = model.eval()(torch.from_numpy(spec.blank(2)))
        model.train()
    except AccordError:
        raise
    except Exception as fault:  # whatever the model's code raises for such options
        first = (str(fault) or type(fault).__name__).splitlines()[0]
        raise AccordError(
            f'model "{name}" with options {wanted.options} does not take inputs of shape '
            f"{list(spec.shape)} of task {spec.name}: {first}. Change its options."
        ) from None
    if tuple(logits.shape) != (2, len(spec.classes)):
        raise AccordError(
            f'model "{name}" gives shape {list(logits.shape)} for 2 records, not '
            f"{[2, len(spec.classes)]}. Change its options or choose another model."
        )
    return model


def start_record(
    accord: Accord, task: Task, model: torch.nn.Module, student: torch.nn.Module | None
) -> dict[str, Any]:
    """Say what is run, by which code, on which task, from which weights."""
    return {
        "id": "start",
        "kind": "start",
        "accord": accord.digest,
        "private": accord.privacy.enabled,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "build": build_hash(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "task": {
            "name": task.spec.name,
            "source": task.spec.source,
            "inputs": math.prod(task.spec.shape),
            "classes": list(task.spec.classes),
            "groups": {k: list(v) for k, v in task.spec.attributes.items()},
        },
        "model": {
            "name": accord.model.name,
            "parameters": parameter_count(model),
            "weights": checkpoint.weights_digest(checkpoint.weights_of(model)),
        },
        "gradients": gradients(accord, task, model),
        "student": None
        if student is None
        else {"name": accord.distillation.model, "parameters": parameter_count(student)},
    }


def gradients(accord: Accord, task: Task, model: torch.nn.Module) -> dict[str, str] | None:
    """Say how each subject's gradient is made and cut; None where none is.

    Every site works it out by itself, from the accord, and finds the same.
    """
    how = accord.privacy
    if not how.enabled or how.unit != "subject":
        return None
    views = Views(accord.training.views, accord.training.augmentation)
    records = synthetic(task, accord.seed)
    loss = views.loss(engines.cross_entropy)
    engine, why = engines.resolve(how.engine, views.model(model), loss, *records)
    return {"asked": how.engine, "engine": engine, "why": why, "precision": how.precision}


def plan_record(place: Place, plan: Plan | None) -> dict[str, Any]:
    """Say what a site reserved and what it costs, by every measure that the report gives."""
    record: dict[str, Any] = {
        "id": f"plan/{place.site}",
        "kind": "plan",
        "site": place.site,
        "entry": place.entry,
    }
    if plan is None:
        return record | {"statement": "no privacy guarantee: privacy.enabled = false"}
    return record | {
        "statement": plan.statement(),
        "noise_stddev": plan.noise_stddev,
        "expected_batch": plan.normaliser,
        "epsilon": {
            "PLD": plan.epsilon(),
            "RDP": plan.epsilon(accountant="RDP"),
            "replace-one": accounting.epsilon(plan.event(), plan.delta, "replace-one"),
        },
        "membership": tradeoff.membership(plan.event()),
    }


def finish(coordinator: Coordinator, reason: str) -> None:
    """Write the models, collect the ledgers, close the run's evidence."""
    folder, student = coordinator.folder, coordinator.student
    folder.write("model.safetensors", checkpoint.weights_bytes(coordinator.shown))
    if student is not None:
        weights = checkpoint.weights_of(student)
        folder.write("student.safetensors", checkpoint.weights_bytes(weights))
        blank = torch.from_numpy(coordinator.task.spec.blank(2))
        folder.write("student.onnx", distillation.to_onnx(student, blank))
    ledgers = admission.collect_ledgers(
        coordinator.grid, coordinator.places, coordinator.accord, folder.id
    )
    for site, text in ledgers.items():
        folder.write(f"ledgers/{site}.jsonl", text)
    folder.append(
        {
            "id": "end",
            "kind": "end",
            "stop": "finished",
            "reason": reason,
            "rounds": coordinator.finished,
            "model": checkpoint.weights_digest(coordinator.shown),
            "student": checkpoint.weights_digest(checkpoint.weights_of(student))
            if student
            else None,
            "ledgers": sorted(ledgers),
        }
    )
    folder.seal()
