"""The command `fedaccord plan`: what an accord will cost each site's subjects, before it runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from fedaccord.errors import AccordError

if TYPE_CHECKING:
    from rich.table import Table

    from fedaccord.accord import Accord
    from fedaccord.privacy.accounting import Event
    from fedaccord.privacy.plan import Plan

app = typer.Typer()

LARGEST = 300.0  # RDP epsilon beyond which no plan protects, and the exact one takes gigabytes
MOST_TRIES = 10_000
ACROSS = 4  # columns that 80 characters hold

Rows = list[tuple[str, list[str]]]


@app.command()
def plan(
    accord: Annotated[
        str, typer.Argument(help="A TOML file, or the name of a bundled accord (heart).")
    ],
    tries: Annotated[
        int, typer.Option(help="Runs of this plan, the best of which will be chosen.")
    ] = 1,
) -> None:
    """Print what an accord costs: noise, epsilon, and what a membership test could find."""
    if not 1 <= tries <= MOST_TRIES:
        raise AccordError(
            f"--tries = {tries} must be 1 to {MOST_TRIES}. Give how many runs there will be."
        )
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fedaccord import accord as accords
    from fedaccord import tasks
    from fedaccord.models import build as models
    from fedaccord.privacy.plan import plan_for

    agreed, console = accords.load(accord), Console(highlight=False)
    task = tasks.task_of(agreed, accords.find(accord).parent)
    tasks.check_fits(agreed, task)
    model = models.agreed(agreed.model, task.spec, agreed.seed)
    console.print(Text(f"Plan of accord {agreed.name}: {agreed.purpose}"))
    if not agreed.privacy.enabled:
        console.print(
            "NOT PRIVATE: privacy.enabled = false. Epsilon is infinite at every site; nothing "
            "bounds what the updates tell of a subject."
        )
        return
    with console.status("Computing epsilon from the privacy loss distributions ..."):
        plans = [made for site in agreed.roster if (made := plan_for(agreed, site)) is not None]
        _refuse_useless(plans)
        columns = grouped(plans)
        parameters = models.parameter_count(model)
        content = {names: rows(made, parameters) for names, made in columns.items()}
        lines = list(_lines(agreed, plans, parameters, tries))
    for start in range(0, len(content), ACROSS):
        console.print(_table(dict(list(content.items())[start : start + ACROSS])))
    notes = Table.grid(padding=(0, 2, 0, 0))
    for head, line in lines:
        notes.add_row(Text(head, "bold", no_wrap=True), Text(line))
    console.print(notes)


def grouped(plans: Iterable[Plan]) -> dict[str, Plan]:
    """Put sites whose plans differ in the name alone into one column, by their names."""
    alike: dict[str, tuple[list[str], Plan]] = {}
    for one in plans:
        key = repr({**one.to_json(), "site": ""})
        alike.setdefault(key, ([], one))[0].append(one.site)
    return {_names(sites): one for sites, one in alike.values()}


def _names(sites: list[str]) -> str:
    return ", ".join(sites) if len(sites) < 5 else f"{len(sites)} sites: {sites[0]} .. {sites[-1]}"


def _refuse_useless(plans: list[Plan]) -> None:
    """Refuse a plan whose epsilon is beyond all use, before the exact figure is tried."""
    for one in plans:
        bound = one.epsilon(accountant="RDP")
        if not bound <= LARGEST:
            raise AccordError(
                f"privacy.noise_multiplier = {one.noise_multiplier:g} gives site {one.site} "
                f"epsilon {bound:.3g} (RDP) over {one.rounds * one.steps} steps, above "
                f"{LARGEST:g}, where it protects nobody. Raise it, or plan fewer steps."
            )


def rows(one: Plan, parameters: int) -> Rows:
    """Say in rows of (quantity, value) what one plan does and costs; a row alone is a heading."""
    from fedaccord.privacy.accounting import epsilon, show
    from fedaccord.privacy.client_level import ClientPlan
    from fedaccord.privacy.tradeoff import membership

    if isinstance(one, ClientPlan):
        first: Rows = [
            ("sites asked in a full round", [f"{one.cohort}"]),
            ("update bound (clipping_norm)", [f"{one.clipping_norm:g}"]),
        ]
    else:
        first = [
            ("declared subjects", [f"{one.subjects:,}"]),
            ("sampling probability q", [f"{one.sampling_prob:g}"]),
            ("expected batch, q x subjects", [f"{one.normaliser:g}"]),
            ("gradient bound (max_grad_norm)", [f"{one.max_grad_norm:g}"]),
        ]
    found = membership(one.event())
    return [
        *first,
        (
            "steps a round x rounds + spare",
            [f"{one.steps} x {one.rounds - one.spare_rounds}+{one.spare_rounds}"],
        ),
        ("noise multiplier sigma", [f"{one.noise_multiplier:g}"]),
        ("noise stddev on a step's sum", [f"{one.noise_stddev:.4f}"]),
        ("noise / gradient over all steps", [f"{noise_ratio(one, parameters):.2f}"]),
        (f"Epsilon at delta {one.delta:g}", []),
        ("add-or-remove-one, PLD: claim", [show(one.epsilon())]),
        ("add-or-remove-one, RDP: check", [show(one.epsilon(accountant="RDP"))]),
        ("replace-one, PLD", [show(epsilon(one.event(), one.delta, "replace-one"))]),
        ("A membership test finds at most", []),
        ("with 1 % false alarms", [show(found["tpr_at_1_in_100"], 3)]),
        ("with 0.1 % false alarms", [show(found["tpr_at_1_in_1000"], 3)]),
        ("advantage (found less false)", [show(found["advantage"], 3)]),
    ]


def noise_ratio(one: Plan, parameters: int) -> float:
    """Compare the noise with the largest signal, both averaged over all planned steps.

    The noise in a step's mean gradient has norm stddev x sqrt(parameters) / normaliser; the mean of
    T independent steps has 1 / sqrt(T) of it. No mean gradient is longer than the clip. Above 1
    even gradients that all agree drown, so nothing can be learned.

    Args:
        one: the plan.
        parameters: weights of the model.
    """
    from fedaccord.privacy.client_level import ClientPlan

    bound = one.clipping_norm if isinstance(one, ClientPlan) else one.max_grad_norm
    planned = (one.rounds - one.spare_rounds) * one.steps
    return one.noise_stddev * math.sqrt(parameters / planned) / (one.normaliser * bound)


def at_two_sites(plans: list[Plan]) -> Event:
    """Describe what a subject at two sites loses, at the two whose plans cost the most.

    Sites add their noise independently, so their events compose. Under client-level privacy one
    noise covers both sites' updates: the sum moves by twice the norm, as if half the noise.
    """
    from fedaccord.privacy.accounting import compose
    from fedaccord.privacy.client_level import ClientPlan

    costly = sorted(plans, key=lambda one: -one.epsilon())[:2]
    first = costly[0]
    if isinstance(first, ClientPlan):
        step: Event = {"type": "Gaussian", "noise_multiplier": first.noise_multiplier / 2}
        return {"type": "SelfComposed", "count": first.rounds, "event": step}
    return compose([one.event() for one in costly])


def _lines(
    agreed: Accord, plans: list[Plan], parameters: int, tries: int
) -> Iterable[tuple[str, str]]:
    """Say what does not fit into a column: (heading, sentence)."""
    from fedaccord.privacy.accounting import show

    worst = max(plans, key=lambda one: one.epsilon())
    ratios = {names: noise_ratio(one, parameters) for names, one in grouped(plans).items()}
    if drowned := [f"{names} ({ratio:.2f})" for names, ratio in ratios.items() if ratio > 1]:
        yield (
            "Too small",
            f"{'; '.join(drowned)}: alone nothing can be learned there at this epsilon. Averaged "
            f"over all planned steps, the noise in the mean gradient of {parameters:,} weights is "
            "as many times as long as the longest mean gradient that there can be.",
        )
    if len(plans) > 1:
        both = _epsilon(at_two_sites(plans), worst.delta)
        yield "At 2 sites", f"epsilon {both} for a subject at the two costliest sites."
    if tries > 1:
        yield from _tries(agreed, worst, tries)
    half = math.ceil(worst.rounds / 2)
    moments = {1: "round 1", half: f"{half}", worst.rounds: f"all {worst.rounds}"}
    spent = [f"{show(worst.odometer(used))} after {words}" for used, words in moments.items()]
    yield (
        "Spent so far",
        f"counted by an odometer at delta / {worst.rounds} a round, so that it holds whenever the "
        f"run stops: epsilon {', '.join(spent)}. The claim stays the reserved plan.",
    )
    said: dict[str, list[str]] = {}
    for one in plans:
        said.setdefault(one.statement(), []).append(one.site)
    for statement, sites in said.items():
        whose = "each site" if len(said) == 1 and len(plans) > 1 else _names(sites)
        yield "Claim", f"at {whose}: {statement}."


def _tries(agreed: Accord, worst: Plan, tries: int) -> Iterable[tuple[str, str]]:
    """Say what several runs cost, of which the coordinator sees every one."""
    from fedaccord.privacy import accounting, budget

    event, cap = worst.event(), agreed.privacy.max_epsilon
    later = budget.spent([event], [event] * (tries - 1), budget.Cap(cap, worst.delta))
    words = (
        f"epsilon {_epsilon(accounting.tries(event, tries), worst.delta)} where all are reserved "
        f"before the first result, {accounting.show(later)} where later ones are asked for after "
        "it. The coordinator sees every run, so each is paid for; choosing the best is then free."
    )
    if _exceeds(event, tries, cap, worst.delta):
        words += f" Both are above privacy.max_epsilon = {cap:g}."
    elif later > cap:
        words += f" The second is above privacy.max_epsilon = {cap:g}."
    yield f"{tries} tries", words


def _exceeds(event: Event, tries: int, cap: float, delta: float) -> bool:
    """Whether so many tries pass the cap; by RDP where the exact figure takes gigabytes."""
    from fedaccord.privacy import accounting

    if accounting.epsilon(accounting.tries(event, tries), delta, accountant="RDP") > LARGEST:
        return True
    return accounting.would_exceed([accounting.tries(event, tries - 1)], event, cap, delta)


def _epsilon(event: Event, delta: float) -> str:
    """Show an epsilon; RDP's where the exact one takes gigabytes."""
    from fedaccord.privacy.accounting import epsilon, show

    bound = epsilon(event, delta, accountant="RDP")
    if not bound <= LARGEST:
        return f"{show(bound)} (RDP)"
    return f"{show(epsilon(event, delta))} (PLD)"


def _table(columns: dict[str, Rows]) -> Table:
    """Set plans side by side: a quantity a row, a group of equal sites a column."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for names in columns:
        table.add_column(Text(names), justify="right", overflow="fold")
    for lines in zip(*columns.values(), strict=True):
        label, values = lines[0][0], [cell for _, value in lines for cell in value]
        strong = "bold" if not values or label.endswith("claim") else ""
        table.add_row(Text(label if not values else f"  {label}", strong), *values, style=strong)
    return table
