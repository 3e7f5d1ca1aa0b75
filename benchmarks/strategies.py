"""`python -m benchmarks.strategies`: every strategy, with and without privacy, on several tasks.

Each cell is a task's bundled accord, run by `fedaccord simulate`'s engine with [strategy] and
[privacy] changed. Besides, in every cell alike: half the rounds of twice the steps, which are the
same steps under the same noise; the quorum is all sites, which the robust rules need of four; no
student is distilled. Accuracy is the mean over sites, parity the demographic parity difference over
all sites by the accord's first attribute, both of the global model after the last round.

The server learning rates of GRID are chosen, task by task, for the best accuracy without privacy,
under a seed that the table does not use. These tries read test figures of public data: no epsilon
below covers them.
"""

from __future__ import annotations

import argparse
import logging
import math
import multiprocessing
import os
import statistics
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}

import matplotlib
import tomlkit
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.heart_table_train import majority
from benchmarks.tasks import cell
from fedaccord import accord as accords
from fedaccord.accord import Accord
from fedaccord.errors import FedAccordError
from fedaccord.privacy.plan import plan_for
from fedaccord.reports.figures import CYCLE, SOFT, STYLE
from fedaccord.reports.figures import GRID as LINES
from fedaccord.runs import RunFolder
from fedaccord.simulations import display, engine
from fedaccord.tasks import load_task

Options = Mapping[str, Any]
TASKS = ("heart", "digits", "adult", "thyroid")
EPSILONS = (None, 8.0, 3.0)  # None: without privacy
# Strategies and the options that differ from docs/strategies.md; `options` adds the robust rules'.
STRATEGIES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedavgm": {"server_momentum": 0.9},
    "fedprox": {"proximal_mu": 0.1},
    "fedadam": {},
    "fedyogi": {},
    "fedadagrad": {},
    "scaffold": {},
    "feddyn": {"alpha": 0.1},
    "fedmedian": {"num_malicious_nodes": 1},
    "fedtrimmedavg": {"num_malicious_nodes": 1, "beta": 0.3},
    "multikrum": {},
    "centred-clipping": {"num_malicious_nodes": 1},
    "qfedavg": {"q": 0.1},
}
RATES = (0.01, 0.03, 0.1, 0.3)
GRID: dict[str, tuple[str, tuple[float, ...]]] = {
    "fedavgm": ("server_learning_rate", (0.1, 0.3, 1.0)),
    "fedadam": ("eta", RATES),
    "fedyogi": ("eta", RATES),
    "fedadagrad": ("eta", RATES),
}
GRID_SEED = 1_000
KRUM_NEEDS = 5  # sites, 2 f + 3, to stand f = 1
SHORT = {"num_malicious_nodes": "f", "server_learning_rate": "rate", "server_momentum": "momentum",
         "proximal_mu": "mu"}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One run: a cell of the table under one seed, or a try of GRID."""

    task: str
    strategy: str
    options: Options
    epsilon: float | None
    seed: int
    quick: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a run left: figures of its last round that was audited, or why there are none."""

    accuracy: float | None
    parity: float | None
    note: str = ""


Row = list[tuple[Case, list[Outcome]]]  # a cell an epsilon; an outcome a seed
Results = dict[str, dict[str, Row]]  # by task, then by strategy


# --- runs ---------------------------------------------------------------------------------------


def options(strategy: str, sites: int) -> dict[str, Any]:
    """Give a strategy's options for a task; f of multikrum is 0 where sites are too few for 1."""
    own = dict(STRATEGIES[strategy])
    if strategy == "multikrum":
        own["num_malicious_nodes"] = int(sites >= KRUM_NEEDS)
    return own


def variant(case: Case) -> str:
    """Write the bundled accord of a case's task as the case wants it."""
    text = tomllib.loads(accords.bundled()[case.task].read_text(encoding="utf-8"))
    text |= {"seed": case.seed, "distillation": {"enabled": False}}
    text["strategy"] = {"name": case.strategy, "options": dict(case.options)}
    rounds, training = text["rounds"], text["training"]
    rounds["min_sites"] = len(text["sites"])
    for key in ("rounds", "spare_rounds"):
        rounds[key] //= 2
    training["steps"] *= 2
    if case.quick:
        rounds["rounds"] = 2
    text["privacy"]["enabled"] = case.epsilon is not None
    if case.epsilon is not None:
        text["privacy"].pop("noise_multiplier", None)
        text["privacy"] |= {"target_epsilon": case.epsilon, "max_epsilon": case.epsilon}
    return tomlkit.dumps(text)


@contextmanager
def agreed(case: Case) -> Iterator[tuple[Accord, Path]]:
    """Load a case's accord from a folder that lasts as long as the context."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "accord.toml")
        file.write_text(variant(case), encoding="utf-8")
        yield accords.load(file), file


def run(case: Case) -> Outcome:
    """Run a case through the whole stack; an accord that is refused has no figures but a reason."""
    try:
        with agreed(case) as (accord, file):
            folder = file.parent / "run"
            engine.simulate(file, folder, folder / "sites", len(accord.roster))
            rounds = [r for r in RunFolder(folder).records() if r["kind"] == "round"]
    except FedAccordError as fault:
        return Outcome(None, None, f"refused: {fault}")
    audited = [record for record in rounds if record["audit"]]
    failed = len(rounds) - len(audited)
    why = f"{failed} of {len(rounds)} rounds did not count" if failed else ""
    if not audited:
        return Outcome(None, None, why)
    figures = audited[-1]["audit"]["model"]["figures"]
    parity = figures["attributes"][accord.fairness.attributes[0]]["all"]
    return Outcome(
        figures["accuracy"]["mean"], parity["demographic_parity_difference"]["value"], why
    )


def quiet() -> None:
    """Silence Flower, and let torch use one core."""
    logging.disable(logging.INFO)
    display.quiet()
    torch.set_num_threads(1)


@contextmanager
def runner(jobs: int) -> Iterator[Callable[[Iterable[Case]], Iterator[Outcome]]]:
    """Give a function that runs cases in their order, in this process or in several."""
    quiet()
    if jobs == 1:
        yield lambda cases: map(run, cases)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, initializer=quiet) as pool:
        yield lambda cases: pool.map(run, cases)


# --- what is run --------------------------------------------------------------------------------


def tries(task: str, strategies: Iterable[str], quick: bool) -> list[Case]:
    """List the runs that choose the server learning rates of GRID."""
    sites = len(load_task(task).sites)
    found = []
    for strategy in strategies:
        name, values = GRID.get(strategy, ("", ()))
        for value in values[-1:] if quick else values:
            chosen = options(strategy, sites) | {name: value}
            found.append(Case(task, strategy, chosen, None, GRID_SEED, quick))
    return found


def best(cases: Sequence[Case], outcomes: Sequence[Outcome]) -> dict[tuple[str, str], Options]:
    """Pick, by task and strategy, the options of the most accurate try; of equal ones the first."""
    found: dict[tuple[str, str], tuple[float, Options]] = {}
    for case, outcome in zip(cases, outcomes, strict=True):
        key, reached = (case.task, case.strategy), outcome.accuracy or 0.0
        if key not in found or reached > found[key][0]:
            found[key] = (reached, case.options)
    return {key: chosen for key, (_, chosen) in found.items()}


def cells(task: str, strategies: Iterable[str], tuned: Mapping[Any, Options]) -> list[Case]:
    """List the table's cells of a task, under seed 0."""
    sites = len(load_task(task).sites)
    return [
        Case(task, strategy, tuned.get((task, strategy), options(strategy, sites)), epsilon, 0)
        for strategy in strategies
        for epsilon in EPSILONS
    ]


def constant(task: str) -> float:
    """Accuracy of answering each site with its majority of training labels, mean over sites."""
    found = load_task(task)
    parts = [found.site(name) for name in found.sites]
    return statistics.mean(majority(p.train.labels, p.test.labels) for p in parts)


# --- the table and the picture ------------------------------------------------------------------


def figures(outcomes: Sequence[Outcome], name: str) -> list[float]:
    """Take one figure of the outcomes that have it."""
    found = [getattr(outcome, name) for outcome in outcomes]
    return [value for value in found if value is not None]


def said(own: Options) -> str:
    """Write options short."""
    return ", ".join(f"{SHORT.get(k, k)} {v:g}" for k, v in own.items()) or "-"


def level(epsilon: float | None) -> str:
    """Name a level of privacy."""
    return "none" if epsilon is None else f"{epsilon:g}"


def report(results: Results) -> Table:
    """Set the table out: a row for each task and strategy."""
    table = Table(title="accuracy and parity difference of the global model, by epsilon")
    headings = [f"{what}\n{level(e)}" for what in ("accuracy", "parity diff.") for e in EPSILONS]
    for heading in ("task", "strategy", "options", *headings):
        table.add_column(heading, justify="left" if "\n" not in heading else "right")
    for task, rows in results.items():
        table.add_section()
        table.add_row(task, "majority of each site", "-", *[f"{constant(task):.3f}"] * 3, *"---")
        for strategy, found in rows.items():
            shown = []
            for name in ("accuracy", "parity"):
                for _, outcomes in found:
                    values = figures(outcomes, name)
                    shown.append(cell(values) if values else "-")
            table.add_row(task, strategy, said(found[0][0].options), *shown)
    return table


def picture(results: Results, file: Path) -> None:
    """Draw accuracy by strategy: a panel a task, a colour an epsilon, bars of one deviation."""
    names = list(dict.fromkeys(strategy for rows in results.values() for strategy in rows))
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "strategies"}):
        size = (1.6 + 3.1 * len(results), 1.2 + 0.34 * len(names))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
        for axes, (task, rows) in zip(panels, results.items(), strict=True):
            panel(axes, task, rows, names)
        panels[0].set_yticks(range(len(names)), names)
        panels[0].invert_yaxis()
        marks, words = panels[0].get_legend_handles_labels()
        figure.legend(
            marks, words, loc="outside upper center", ncols=2 * min(2, len(results)), frameon=False
        )
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing)


def panel(axes: Axes, task: str, rows: Mapping[str, Row], names: Sequence[str]) -> None:
    """Draw one task; every other strategy stands on a band."""
    for place in range(0, len(names), 2):
        axes.axhspan(place - 0.5, place + 0.5, color=LINES, alpha=0.35, lw=0)
    for number, epsilon in enumerate(EPSILONS):
        places, means, spreads = [], [], []
        for strategy, row in rows.items():
            values = figures(row[number][1], "accuracy")
            if values:
                places.append(names.index(strategy) + 0.22 * (number - 1))
                means.append(statistics.mean(values))
                spreads.append(statistics.stdev(values) if len(values) > 1 else 0.0)
        axes.errorbar(
            means, places, xerr=spreads, fmt="os^"[number], color=CYCLE[number], ms=4, lw=1.2,
            label="no privacy" if epsilon is None else f"epsilon {epsilon:g}",
        )  # fmt: skip
    axes.axvline(constant(task), color=SOFT, lw=1, ls="--", label="majority of each site")
    axes.set_title(task)
    axes.set_xlabel("test accuracy, mean over sites")
    axes.grid(axis="x", color=LINES, linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.5, len(names) - 0.5)


# --- the command --------------------------------------------------------------------------------


def statements(task: str, quick: bool) -> list[str]:
    """Say the guarantees of a task's private cells, which are those of each of its sites."""
    found = []
    for epsilon in EPSILONS:
        with agreed(Case(task, "fedavg", {}, epsilon, 0, quick)) as (accord, _):
            plans = {plan_for(accord, site) for site in accord.roster}
        found += sorted({f"{task}: {plan.statement()}" for plan in plans if plan is not None})
    return found


def notes(results: Results) -> list[str]:
    """Say why figures are missing or rest on fewer rounds."""
    found: dict[str, dict[str, None]] = {}
    for case, outcomes in (both for rows in results.values() for r in rows.values() for both in r):
        for outcome in outcomes:
            if outcome.note:
                what = f"{case.task}, {case.strategy}: {outcome.note}"
                found.setdefault(what, {})[level(case.epsilon)] = None
    return [f"{what} (epsilon {', '.join(levels)})" for what, levels in found.items()]


def work(asked: argparse.Namespace, progress: Progress) -> Results:
    """Choose the server learning rates, then run every cell under every seed."""
    tasks, strategies = asked.task or TASKS[:2], asked.strategy or list(STRATEGIES)
    seeds = range(1 if asked.quick else asked.seeds)
    grid = [case for task in tasks for case in tries(task, strategies, asked.quick)]
    count = len(tasks) * len(strategies) * len(EPSILONS) * len(seeds)
    bar = progress.add_task("runs", total=len(grid) + count)

    def noted(outcomes: Iterable[Outcome]) -> list[Outcome]:
        kept = []
        for outcome in outcomes:
            kept.append(outcome)
            progress.advance(bar)
        return kept

    with runner(asked.jobs) as run_all:
        tuned = best(grid, noted(run_all(grid)))
        table = [case for task in tasks for case in cells(task, strategies, tuned)]
        runs = [replace(case, seed=s, quick=asked.quick) for case in table for s in seeds]
        outcomes = iter(noted(run_all(runs)))
    results: Results = {}
    for case in table:
        row = results.setdefault(case.task, {}).setdefault(case.strategy, [])
        row.append((case, [next(outcomes) for _ in seeds]))
    return results


def main() -> None:
    """Run what was asked for, print the table, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TASKS, action="append", help="default: heart and digits")
    parser.add_argument("--strategy", choices=STRATEGIES, action="append", help="only this")
    parser.add_argument("--seeds", type=int, default=2, help="runs a cell (default 2)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument(
        "--quick", action="store_true", help="see it run: 1 seed, 2 rounds, no grid"
    )
    parser.add_argument("--picture", type=Path, help="draw the accuracies into this SVG file")
    asked = parser.parse_args()
    began = time.monotonic()
    shown = (TextColumn("{task.completed} of {task.total} runs"), BarColumn(), TimeElapsedColumn(),
             TextColumn("left:"), TimeRemainingColumn())  # fmt: skip
    with Progress(*shown, console=Console(stderr=True), transient=True) as progress:
        results = work(asked, progress)
    console = Console(width=170)
    console.print(report(results))
    console.print(
        "Mean +- standard deviation over runs; epsilon none: no privacy. Not covered: the"
    )
    console.print("server learning rates (rate, eta) were chosen by test figures of this task.")
    for task in results:
        console.print("\n".join(statements(task, asked.quick)), soft_wrap=True, highlight=False)
    console.print("\n".join(notes(results)), soft_wrap=True, highlight=False)
    spent = math.ceil((time.monotonic() - began) / 60)
    console.print(f"{asked.jobs} processes, {spent} minutes")
    if asked.picture:
        picture(results, asked.picture)


if __name__ == "__main__":
    main()
