"""`python -m benchmarks.heart_table`: the published table of heart hospitals, with our strategies.

First the set-up of Fed-Heart-Disease (benchmarks/heart_table_data.py) beside its published
figures; then what the epsilons of its published private runs come to; then the accord `heart` as it
is bundled, but for its model, at several epsilons: its inputs are scaled by declared bounds and no
statistic of the records. docs/heart-table.md explains all three.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}

import matplotlib
import numpy as np
import tomlkit
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.heart_table_data import SEEDS, hospitals, own_statistics, published
from benchmarks.heart_table_train import (
    BATCH,
    ROUNDS,
    ROWS,
    STEPS,
    federated,
    majority,
    pooled,
)
from fedaccord import accord as accords
from fedaccord import registry
from fedaccord.privacy import accounting
from fedaccord.privacy.plan import plan_for
from fedaccord.reports.figures import CYCLE, GRID, SOFT, STYLE
from fedaccord.runs import RunFolder
from fedaccord.simulations import display, engine
from fedaccord.tasks import load_task

EPSILONS = (1.0, 3.0, 8.0)
RATE, CLIP = 0.2, 0.5  # of our own rows, private or not; docs/heart-table.md on their tuning
CLAIMED, CLAIMED_DELTA = (1.0, 5.0), 1e-4  # of published private runs
MAJORITY = "the majority of each"
Tick = Callable[[], None]


# --- the published private runs -----------------------------------------------------------------


def spent(claimed: float, rows: int) -> float:
    """Give the epsilon of a hospital in a published private run, by the steps that were taken.

    The runs asked Opacus for the noise of ROUNDS epochs of the hospital's own loader, BATCH rows a
    step, and then took STEPS steps a round. The noise is found here by the same plan with PLD.

    Args:
        claimed: the epsilon that was asked for, at CLAIMED_DELTA.
        rows: training patients of the hospital.
    """
    epoch = -(-rows // BATCH)  # steps
    sigma = accounting.calibrate(claimed, CLAIMED_DELTA, 1 / epoch, ROUNDS * epoch)
    return accounting.epsilon(accounting.dp_sgd(sigma, 1 / epoch, ROUNDS * STEPS), CLAIMED_DELTA)


def claimed_table(claims: Sequence[float], tick: Tick) -> Table:
    """Set what published private runs claim beside what they spend, by hospital."""
    sites = hospitals()
    table = Table(title=f"published private runs: epsilon at delta {CLAIMED_DELTA:g}")
    for column in ("claimed", *(site.name for site in sites)):
        table.add_column(column, justify="right")
    for claimed in claims:
        found = [accounting.show(spent(claimed, len(site.train.labels))) for site in sites]
        table.add_row(f"{claimed:g}", *found)
        tick()
    return table


# --- our own pre-processing ---------------------------------------------------------------------


@contextmanager
def logistic_known() -> Iterator[None]:
    """Let accords name the model "logistic" meanwhile: the published model, with two classes."""
    registry.MODELS["logistic"] = "benchmarks.heart_table_train:logistic"
    try:
        yield
    finally:
        del registry.MODELS["logistic"]


def variant(seed: int, epsilon: float | None) -> str:
    """Write the heart accord with another seed, epsilon and model, and without its student."""
    text = tomllib.loads(accords.bundled()["heart"].read_text(encoding="utf-8"))
    text |= {"seed": seed, "model": {"name": "logistic"}, "distillation": {"enabled": False}}
    text["training"]["learning_rate"] = RATE
    text["privacy"] |= {"enabled": epsilon is not None, "max_grad_norm": CLIP}
    if epsilon is not None:
        text["privacy"] |= {"target_epsilon": epsilon, "max_epsilon": epsilon * 1.2}
    return tomlkit.dumps(text)


def own(seed: int, epsilon: float | None) -> tuple[list[float], str]:
    """Run the accord through the whole stack: accuracy by hospital, and the guarantee."""
    with tempfile.TemporaryDirectory() as folder, logistic_known():
        file, run = Path(folder, "accord.toml"), Path(folder, "run")
        file.write_text(variant(seed, epsilon), encoding="utf-8")
        accord = accords.load(file)
        engine.simulate(file, run, run / "sites", len(accord.roster))
        rounds = [record for record in RunFolder(run).records() if record["kind"] == "round"]
    plans = [plan_for(accord, site) for site in accord.roster]
    said = {plan.statement() for plan in plans if plan is not None}
    found = rounds[-1]["audit"]["model"]["figures"]["accuracy"]["sites"]
    return [found[site] for site in accord.roster], "; ".join(sorted(said))


# --- the tables and the picture -----------------------------------------------------------------


def mean_sd(runs: Sequence[Sequence[float]]) -> str:
    """Format the mean over hospitals, then over seeds, with its deviation over seeds."""
    means = [statistics.mean(run) for run in runs]
    spread = f" +- {statistics.stdev(means):.3f}" if len(means) > 1 else ""
    return f"{statistics.mean(means):.4f}{spread}"


def by_hospital(runs: Sequence[Sequence[float]]) -> list[str]:
    """Format each hospital's mean over seeds."""
    return [f"{value:.3f}" for value in np.mean(np.asarray(runs), axis=0)]


def published_table(seeds: Sequence[int], tick: Tick) -> Table:
    """Train every row of the published table, and set its published figure beside it."""
    raw = hospitals()
    sites = [own_statistics(site) for site in raw]
    table = Table(title=f"published set-up, {len(seeds)} seeds: test accuracy")
    for column in ("training", "published", "here", *(s.name for s in sites), "cells off"):
        table.add_column(column, justify="left" if column == "training" else "right")
    trained: list[tuple[str, str, Callable[[int], list[float]]]] = [
        (row.published, row.note, partial(federated, row, sites)) for row in ROWS
    ]
    trained.append(("pooled", "", partial(pooled, [site.train for site in raw], sites)))
    for name, note, train in trained:
        runs = []
        for seed in seeds:
            runs.append(train(seed))
            tick()
        then = published(name)[[SEEDS.index(seed) for seed in seeds]]
        off = np.abs(np.asarray(runs) - then) > 1e-9
        title = f"{name} ({note})" if note else name
        figures = (mean_sd(then.tolist()), mean_sd(runs), *by_hospital(runs))
        table.add_row(title, *figures, f"{off.sum()} of {off.size}")
    constants = {
        MAJORITY: [majority(s.train.labels, s.test.labels) for s in raw],
        '"disease" for everybody': [float(s.test.labels.mean()) for s in raw],
    }
    for title, found in constants.items():
        table.add_row(title, "-", mean_sd([found]), *by_hospital([found]), "-")
    return table


def own_table(
    seeds: Sequence[int], epsilons: Sequence[float | None], tick: Tick
) -> tuple[Table, dict[float | None, list[float]], list[str]]:
    """Run our own accord at several epsilons: the table, means by epsilon, the guarantees."""
    task = load_task("heart")
    table = Table(
        title=f"the accord heart (declared bounds, 920 patients), logistic, {len(seeds)} seeds"
    )
    for column in ("epsilon", "accuracy", *task.sites):
        table.add_column(column, justify="right")
    means, statements = {}, []
    for epsilon in epsilons:
        runs = []
        for seed in seeds:
            found, said = own(seed, epsilon)
            runs.append(found)
            tick()
        means[epsilon] = [statistics.mean(run) for run in runs]
        statements += [said] if said else []
        title = "without privacy" if epsilon is None else f"{epsilon:g}"
        table.add_row(title, mean_sd(runs), *by_hospital(runs))
    found = own_constant()
    table.add_row(MAJORITY, mean_sd([found]), *by_hospital([found]))
    return table, means, statements


def own_constant() -> list[float]:
    """Accuracy of the best constant answer by hospital, in our own task."""
    task = load_task("heart")
    parts = [task.site(name) for name in task.sites]
    return [majority(p.train.labels, p.test.labels) for p in parts]


def picture(means: Mapping[float | None, Sequence[float]], constant: float, file: Path) -> None:
    """Draw accuracy over epsilon: a dot a run, a line through the means, the constant answer."""
    places = [str(epsilon) if epsilon is None else f"{epsilon:g}" for epsilon in means]
    places = ["no privacy" if place == "None" else place for place in places]
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "heart-table"}):
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        axes = figure.add_subplot()
        for place, values in enumerate(means.values()):
            axes.plot([place] * len(values), values, "o", color=CYCLE[0], alpha=0.35, ms=4, mew=0)
        over = [statistics.mean(values) for values in means.values()]
        axes.plot(range(len(over)), over, "-", color=CYCLE[0], lw=1.6)
        for place, (value, values) in enumerate(zip(over, means.values(), strict=True)):
            axes.annotate(
                f"{value:.3f}", (place, min(values)), (0, -14),
                textcoords="offset points", ha="center",
            )  # fmt: skip
        axes.axhline(constant, color=SOFT, lw=1, ls="--")
        axes.annotate(
            f"majority of each hospital {constant:.3f}", (len(over) - 1, constant), (0, 4),
            textcoords="offset points", ha="right", color=SOFT,
        )  # fmt: skip
        axes.set_title("Test accuracy, mean over four hospitals; a dot is a run")
        axes.set_xticks(range(len(over)), places)
        axes.set_xlabel("epsilon of every training patient (delta 0.0001)")
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        axes.margins(x=0.12, y=0.15)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing)


def main() -> None:
    """Run what was asked for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, fewer epsilons")
    parser.add_argument("--only", choices=("published", "claimed", "own"), help="only this table")
    parser.add_argument("--picture", type=Path, help="draw the epsilons into this SVG file")
    asked = parser.parse_args()
    logging.disable(logging.INFO)
    display.quiet()
    torch.set_num_threads(1)
    seeds = SEEDS[:1] if asked.quick else SEEDS
    epsilons: tuple[float | None, ...] = (3.0, None) if asked.quick else (*EPSILONS, None)
    claims = CLAIMED[:1] if asked.quick else CLAIMED
    work = {
        "published": len(seeds) * (len(ROWS) + 1),
        "claimed": len(claims),
        "own": len(seeds) * len(epsilons),
    }
    wanted, console = [asked.only] if asked.only else list(work), Console(width=120)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("runs", total=sum(work[name] for name in wanted))
        tick = partial(progress.advance, bar)
        if "published" in wanted:
            console.print(published_table(seeds, tick))
            console.print("Mean over hospitals +- over seeds. cells off: seeds x hospitals.")
        if "claimed" in wanted:
            console.print(claimed_table(claims, tick))
        if "own" in wanted:
            table, means, statements = own_table(seeds, epsilons, tick)
            console.print(table)
            console.print("\n".join(statements), soft_wrap=True, highlight=False)
            if asked.picture:
                picture(means, statistics.mean(own_constant()), asked.picture)


if __name__ == "__main__":
    main()
