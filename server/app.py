"""The ServerApp: admit the sites, run the rounds, leave the evidence; or go on with a run."""

from __future__ import annotations

from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedaccord import accord as accords
from fedaccord import devices, runs
from fedaccord.accord import Accord, ModelSection
from fedaccord.errors import AccordError, BudgetError
from fedaccord.models.build import agreed, parameter_count
from fedaccord.privacy.client_level import ClientPlan
from fedaccord.privacy.plan import Plan, plan_for
from fedaccord.runs import RunFolder
from fedaccord.server import admission, checkpoint, distillation, records, resume
from fedaccord.server.door import Door
from fedaccord.server.drowned import refuse_drowned
from fedaccord.server.heads import heads_over
from fedaccord.server.mail import Mail
from fedaccord.server.rounds import Coordinator
from fedaccord.strategies.client_level import ClientLevelMean, refuse_state
from fedaccord.strategies.driver import Driver
from fedaccord.strategies.seam import driver_for
from fedaccord.tasks import Task, check_fits, task_of

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one accord over whatever carries the grid, or go on with a run that was cut short.

    Run config: `accord` (a TOML file, or the name of a bundled accord), `run` (the folder to
    leave, or "" for a new one under $FEDACCORD_HOME), `resume` (true: `run` is a folder that a run
    of this accord left before its end).

    Raises:
        AccordError: an accord that does not hold together.
        BudgetError: too few sites let it in; nothing was read and nothing reserved.
        EvidenceError: a run that cannot be resumed.
    """
    where = str(context.run_config["accord"])
    accord = accords.load(where)
    task = task_of(accord, accords.find(where).parent.resolve())
    check_fits(accord, task)
    model, student = initial(accord, task)
    refuse_drowned(accord, sum(p.numel() for p in model.parameters() if p.requires_grad))
    driver_for(accord)  # a strategy that cannot be made is refused before anybody reserves
    devices.settle(parameter_count(model))
    mail, past, run = Mail(grid), None, str(context.run_config.get("run", ""))
    if context.run_config.get("resume", False):
        past = resume.reopen(Path(run), accord)
        folder = past.folder
        if past.of_kind("end"):  # all but the seal was done
            folder.seal()
            return
    else:
        folder = open_folder(run, where, accord)
        about = {"run": folder.id, "engine": type(grid).__name__} | mail.about()
        folder.append(about | records.start(accord, task, model, student))
    coordinator = seated(mail, accord, task, folder, model, student, past)
    reason = resume.take_up(coordinator, past) if past else ""
    finish(coordinator, reason or coordinator.run())


def seated(
    mail: Mail,
    accord: Accord,
    task: Task,
    folder: RunFolder,
    model: torch.nn.Module,
    student: torch.nn.Module | None,
    past: resume.Past | None,
) -> Coordinator:
    """Let the sites in and give each its place; those that are out are on record with the reason.

    Raises:
        BudgetError: too few let the accord in, or a site shows another reservation than before.
    """
    heads = heads_over(mail.grid, accord)
    if past is not None and past.state is not None:
        heads.restore(past.state.heads)
    places, out, closed = admission.admit(mail, accord, folder.id, heads)
    known = {record["id"] for record in past.records} if past else set()
    for site, reason in sorted(out.items()):
        record = {"id": f"out/{site}", "kind": "out", "site": site, "reason": reason}
        if not known & {record["id"], f"plan/{site}"}:
            folder.append(record)
    if len(places) < accord.rounds.min_sites:
        words = admission.refusal(out)
        if past is None:
            folder.append({"id": "end", "kind": "end", "stop": "refused", "reason": words})
            folder.seal()
        raise BudgetError(words)
    if past is not None:
        places = past.seat(places, accord.rounds.max_misses)
        folder.append(past.resumed(places))
    plans = {place.site: plan_for(accord, place.site) for place in places}
    for place in places:
        if f"plan/{place.site}" not in known:
            folder.append(records.plan(place, plans[place.site]))
    door = Door(mail, accord, folder.id, heads, places)
    door.close(closed)
    return Coordinator(
        accord=accord,
        task=task,
        mail=mail,
        driver=driver_of(accord, next(iter(plans.values()))),
        folder=folder,
        places=places,
        plans=plans,
        heads=heads,
        door=door,
        model=checkpoint.weights_of(model),
        student=student,
    )


def driver_of(accord: Accord, plan: Plan | None) -> Driver:
    """Make the accord's strategy, or the noised mean where the sites' plans are client-level."""
    if isinstance(plan, ClientPlan):
        return Driver(ClientLevelMean(plan), "updates")
    return driver_for(accord)


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


def finish(coordinator: Coordinator, reason: str) -> None:
    """Write the models, collect the ledgers, close the run's evidence."""
    folder, student = coordinator.folder, coordinator.student
    folder.write("model.safetensors", checkpoint.weights_bytes(coordinator.shown))
    if student is not None:
        weights = checkpoint.weights_of(student)
        folder.write("student.safetensors", checkpoint.weights_bytes(weights))
        blank = torch.from_numpy(coordinator.task.spec.blank(2))
        folder.write("student.onnx", distillation.to_onnx(student, blank))
    here = [place for place in coordinator.places if not coordinator.door.away(place)]
    ledgers = admission.collect_ledgers(coordinator.mail, here, coordinator.accord, folder.id)
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
