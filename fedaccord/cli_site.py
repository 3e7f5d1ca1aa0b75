"""The commands of a site: what it takes part in (approve, revoke, policy), its personal model."""

from __future__ import annotations

import math
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedaccord.errors import AccordError, LedgerError, PolicyError, RunError

if TYPE_CHECKING:
    from rich.table import Table

    from fedaccord.accord import Accord
    from fedaccord.client.personal import Personal
    from fedaccord.client.policy import SitePolicy
    from fedaccord.privacy.chain import Entry
    from fedaccord.privacy.ledger import Ledger
    from fedaccord.privacy.plan import Plan

app = typer.Typer(no_args_is_help=True, help="What a site takes part in: its policy.toml.")

AccordFile = Annotated[
    str, typer.Argument(help="A TOML file, or the name of a bundled accord (heart).")
]
SiteFolder = Annotated[
    Path, typer.Option("--site", help="The site's folder, with its policy.toml and ledger.")
]
SiteName = Annotated[
    str, typer.Option("--name", help="The site's name in the accord (default: the folder's).")
]


@app.command()
def approve(
    accord: AccordFile,
    site: SiteFolder,
    name: SiteName = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask; it was read before.")] = False,
) -> None:
    """Show what a site agrees to with an accord; on a yes, add the accord to its policy.toml."""
    from rich.console import Console

    from fedaccord import accord as accords
    from fedaccord.client import policy, policy_file

    agreed = accords.load(accord)
    path, name = site / policy.FILE, name or site.resolve().name
    held = path.exists()
    own = policy.SitePolicy.read(path) if held else policy_file.strict_policy(site)
    console = Console()
    home = accords.find(accord).parent
    table, refusals = _agreement(agreed, home, name, site, own, held)
    console.print(table)
    print(f"Digest     {agreed.digest}")
    if agreed.digest in own.approved:
        print(f"{path}: it is approved already; nothing was changed.")
        return
    if not yes:
        if not sys.stdin.isatty():
            raise PolicyError(
                "approved",
                "site approve asks for a yes, and there is no terminal to ask on; nothing was "
                "changed. Read what it printed, then give --yes.",
            )
        if not typer.confirm(f"Shall site {name} take part?"):
            print("Nothing was changed.")
            raise typer.Exit(1)
    today = datetime.now(UTC).date()
    policy_file.approve(path, agreed.digest, f"{agreed.name}, approved {today}")
    besides = "; what would still refuse it stands above, under Policy" if refusals else ""
    print(f"{path}: {agreed.name} is approved{besides}.")


@app.command()
def revoke(
    accord: Annotated[str, typer.Argument(help="The accord, or its digest as policy.toml has it.")],
    site: SiteFolder,
) -> None:
    """Take an accord off a site's policy.toml: from its next message on it is refused."""
    from fedaccord import accord as accords
    from fedaccord.client import policy, policy_file

    known = re.fullmatch("[0-9a-f]{64}", accord)  # an accord whose task is gone does not load
    digest, name = (accord, accord[:12]) if known else _named(accords.load(accord))
    path = site / policy.FILE
    was = policy_file.revoke(path, digest)
    print(
        f"{path}: {name} is "
        + ("approved no longer." if was else "not among the approved; nothing was changed.")
    )


def _named(agreed: Accord) -> tuple[str, str]:
    return agreed.digest, agreed.name


@app.command(name="policy")
def show(site: SiteFolder) -> None:
    """Print the policy that is in force at a site."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fedaccord.client import policy

    path = site / policy.FILE
    own = policy.SitePolicy.read(path)
    table = Table("key", "value", "what it is", title=f"policy {path}", title_justify="left")
    for key, field in policy.SitePolicy.model_fields.items():
        value = getattr(own, key)
        if key == "approved":
            words = _count(len(value), "accord")
        elif key == "accords":
            words = ", ".join(f"{d[:12]}: {c.max_epsilon:g}" for d, c in value.items())
        else:
            words = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        default = "" if key in own.model_fields_set else " (default)"
        words = "-" if value in (None, [], {}) else words
        table.add_row(Text(key), Text(words + default), Text(str(field.description)))
    Console().print(table)
    for digest in own.approved:
        print(f"approved {digest}")


@app.command()
def personal(
    folder: Annotated[Path, typer.Argument(help="The site's folder, with its ledger.")],
    run: Annotated[str, typer.Argument(help="The run's id, as `fedaccord ledger show` has it.")],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    accord: Annotated[
        str, typer.Option(help="The run's accord: frozen weights are written as well.")
    ] = "",
) -> None:
    """Take a site's personal model out of its folder; the ledger says so first."""
    from fedaccord.client import personal as models
    from fedaccord.evidence import write_atomic

    if out.exists():
        raise RunError(f"--out {out}: is there already. Name a file that is not.")
    found = models.find(folder, run)
    if accord:
        found = _whole(found, accord)
    ledger = _ledger(folder)
    try:
        payload = models.release(ledger, found)
        seq = ledger.head().seq
    finally:
        ledger.close()
    write_atomic(out, payload, mode=0o600)
    print(
        f"{out}: the personal model of site {ledger.site}, run {found.run}, as of round "
        f"{found.round}; entry {seq} of the ledger says that it was taken out, not covered.\n"
        "It was trained on the site's records without noise and may reveal them. No epsilon covers "
        "this file, nor predictions or figures that are made with it and shown to others: hand it "
        "only to those who may see the records."
    )


def _whole(found: Personal, accord: str) -> Personal:
    """Add the weights that an accord freezes, so that the model can be loaded as it is."""
    from dataclasses import replace

    from fedaccord import accord as accords
    from fedaccord import tasks
    from fedaccord.models.build import agreed

    said = accords.load(accord)
    if said.digest != found.accord:
        raise AccordError(
            f"--accord {accord}: has digest {said.digest[:12]}, and run {found.run} was of accord "
            f"{found.accord[:12]}. Give that one, or leave it out."
        )
    task = tasks.task_of(said, accords.find(accord).parent)
    model = agreed(said.model, task.spec, said.seed)
    found.put(model)
    return replace(
        found, weights={k: v.clone().contiguous() for k, v in model.state_dict().items()}
    )


def _ledger(folder: Path) -> Ledger:
    """Open the ledger of a site that has one, with its second place."""
    from fedaccord.client import policy
    from fedaccord.privacy.keeping import site_of
    from fedaccord.privacy.ledger import Ledger

    path = folder / "ledger.sqlite"
    if not path.is_file():
        raise LedgerError(f"site {folder}: has no ledger.sqlite. Give a site's own folder.")
    second = folder / policy.SitePolicy.read(folder / policy.FILE).second_head
    return Ledger(path, site_of(path), second)


def _agreement(
    agreed: Accord, home: Path, name: str, folder: Path, own: SitePolicy, held: bool
) -> tuple[Table, list[str]]:
    """Lay out what a site agrees to, for somebody who answers for its data; list what refuses."""
    from rich.table import Table
    from rich.text import Text

    from fedaccord import tasks
    from fedaccord.models.build import build, parameter_count, pretrained_of
    from fedaccord.privacy.plan import plan_for

    task = tasks.task_of(agreed, home)
    tasks.check_fits(agreed, task)
    model, student = agreed.model, agreed.distillation
    weights = parameter_count(build(model.name, task.spec, model.options, 0, pretrained_of(model)))
    models = [f"{model.name}, {_count(weights, 'parameter')}"]
    if agreed.training.personal:
        models.append("a personal model of this site, trained without noise, which stays here")
    if student.enabled:
        small = parameter_count(build(student.model, task.spec, student.options, 0))
        models.append(f"{student.model}, {_count(small, 'parameter')}: the student, evaluated here")
    approving = own.model_copy(update={"approved": [*own.approved, agreed.digest]})
    broken = approving.broken(agreed, name, kind="join", parameters=weights, now=datetime.now(UTC))
    refusals = [f"{rule}: {sentence}" for rule, sentence in broken.items()]
    here = next(site for site in agreed.sites if site.name == name)
    plan, rounds = plan_for(agreed, name), agreed.rounds
    budget, fault = _budget(agreed, name, folder, own, plan)
    until = f", until {own.expires}" if own.expires else ""
    refusals += fault
    said = {
        "Accord": [agreed.name],
        "Purpose": [agreed.purpose],
        "Task": [f"{agreed.task.name}: {task.spec.source}", *_read(agreed, folder)],
        "Sites": [f"{s}{' (this site)' if s == name else ''}" for s in agreed.roster],
        "Declared": [
            f"{_count(here.subjects, 'training subject')}, {_count(here.records or 0, 'record')}"
        ],
        "Rounds": [
            f"{rounds.rounds} and {rounds.spare_rounds} spare, of "
            f"{_count(agreed.training.steps, 'step')} each",
            f"at {own.hours} {own.timezone}{until}",
        ],
        "Model": models,
        "Privacy": [plan.statement() if plan else "none: privacy is off, epsilon infinite"],
        "Budget": budget,
        "Leaves": _leaves(agreed, plan),
        "Who sees": _seen(agreed, plan),
        "Policy": ["" if held else "there is none yet; a yes writes one that allows nothing more"]
        + [f"would still refuse by {refusal}" for refusal in refusals],
    }
    said["Policy"] = [line for line in said["Policy"] if line] or ["would let it in"]
    table = Table.grid(padding=(0, 1))
    for label, lines in said.items():
        for number, line in enumerate(lines):
            table.add_row(
                Text("" if number else label, "bold"),
                "-" if len(lines) > 1 else "",
                Text(_plain(line)),
            )
    return table, refusals


def _read(agreed: Accord, folder: Path) -> list[str]:
    """Say which file an accord on the site's own data reads, and what it takes from it."""
    from fedaccord.accord_task import OwnSection

    task = agreed.task
    if not isinstance(task, OwnSection):
        return []
    return [
        f"reads {task.file} in {folder / 'data' / task.dataset}, or in the folder {task.dataset} "
        f"of what the node config names as data; columns: {', '.join(task.columns)}"
    ]


def _budget(
    agreed: Accord, name: str, folder: Path, own: SitePolicy, plan: Plan | None
) -> tuple[list[str], list[str]]:
    """Say what each cap leaves before and after a plan, and which cap it would pass."""
    from fedaccord.privacy import accounting, budget
    from fedaccord.privacy.ledger import of_accord, spent

    entries = _entries(folder, name)
    same = of_accord(entries, agreed.digest)
    event = plan.event() if plan else accounting.NON_PRIVATE
    about = (agreed.task.name, own.disjoint)
    said, faults = [], []
    for cap, held, over in (
        (own.cap, entries, "over all accords"),
        (own.cap_for(agreed), same, "over the runs of this accord"),
    ):
        if cap is None:
            continue
        if math.isinf(cap.epsilon):
            said.append(f"no cap {over} (max_epsilon = inf)")
            continue
        used, then = spent(held, cap, None, *about), spent(held, cap, event, *about)
        said.append(
            f"cap {over}: epsilon {cap.epsilon:g} at delta {cap.delta:g}; used so far "
            f"{accounting.show(used)}, with one run of this plan {accounting.show(then)}, left "
            f"then {budget.show_left(max(0.0, cap.epsilon - then))}"
        )
        if then > cap.epsilon:
            faults.append(
                f"max_epsilon: the ledger would hold epsilon {accounting.show(then)} {over}, "
                f"above {cap.epsilon:g}. Raise the cap, or ask for fewer rounds or more noise."
            )
    return said, faults


def _entries(folder: Path, name: str) -> list[Entry]:
    """Read a site's ledger; one that has none yet gets none."""
    from fedaccord.privacy.ledger import Ledger

    path = folder / "ledger.sqlite"
    if not path.exists():
        return []
    book = Ledger(path, name)
    try:
        return book.entries()
    finally:
        book.close()


def _leaves(agreed: Accord, plan: Plan | None) -> list[str]:
    """List what leaves the site, each with what covers it."""
    from fedaccord.client.policy_rules import needed

    rounds = _count(agreed.reserved_rounds, "round")
    covered = "not covered: privacy is off"
    if plan:
        covered = "covered by the plan above"
        if agreed.privacy.unit == "client":
            covered = "not covered against the coordinator, which adds the noise"
    by_loss = "training loss" in needed(agreed)
    models = "the model and the student" if agreed.distillation.enabled else "the model"
    return [
        f"weights, in at most {rounds}: {covered}",
        *(["training loss, as often: exact, not covered"] if by_loss else []),
        f"group counts: evaluation subjects by {', '.join(agreed.fairness.attributes)}, label and "
        f"prediction of {models}, in every round: exact, not covered",
        "the ledger, which holds no record and no count: not covered",
        "when it answers: not covered",
    ]


def _seen(agreed: Accord, plan: Plan | None) -> list[str]:
    """Say who sees what of it."""
    noised = plan is not None and agreed.privacy.unit == "subject"
    student = " and the student" if agreed.distillation.enabled else ""
    models = f"the global model{student}"
    return [
        "the coordinator: all that leaves, the weights "
        + ("with the noise added here" if noised else "without noise"),
        f"the other sites: {models} of every round, and the last hash of this ledger",
        "whoever gets the run's folder or report: counts, figures, ledger and final models",
        "nobody else: records do not leave",
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _plain(words: str) -> str:
    """Show an accord's own words without the characters that move or hide text on a terminal."""
    return "".join(c if c.isprintable() else "?" for c in words)
