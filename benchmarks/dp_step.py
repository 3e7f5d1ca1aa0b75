"""`python -m benchmarks.dp_step`: what a private step costs, as a ratio to a plain one.

For each model, in one process and in turn: plain training, the modes of Opacus 1.6 and the engines
of FedAccord take a step on the same batch. A step is forward pass, backward pass, clip, sum and an
update by SGD, in float32 where nothing else is said. Shown are the median of processor time, its
ratio to plain, the most that the ratio should be ("floor"), the relative error of the clipped sum
against a loop over single records in float64, and with `--memory` how far the resident set grows.

Noise is not in a step: it is drawn once for each logical batch, however many pages that has. It
stands in a table of its own, with the rows that pages have beyond the records that are expected:
the price of a step of training is ratio times rows, and noise.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.dp_step_cases import CASES, Case
from benchmarks.dp_step_memory import growth
from benchmarks.dp_step_methods import BOOKKEEPING, PLAIN, WAYS, Way, make, one_by_one, trained
from fedaccord import devices
from fedaccord.privacy.noise import OsSource, add_noise
from fedaccord.privacy.sampling import MICRO_BATCH, page_shape

WARM_UP = 1  # steps that are not timed, besides the one that gives the error
SHORT = 0.5  # seconds that the plain steps of a model take together, at least
LARGE = 1024  # expected records of a large batch, in the table of pages


def why(fault: Exception) -> str:
    """Say in one line why a way cannot run a model."""
    lines = str(fault).strip().splitlines() or [""]
    return f"refused: {type(fault).__name__}: {lines[0][:160]}"


def prepare(
    case: Case, names: Sequence[str]
) -> tuple[dict[str, Way], dict[str, float], dict[str, str]]:
    """Set up every way of a case.

    Returns:
        Ways that run, each one's relative error, and why the others do not run.
    """
    clip, wanted = one_by_one(case)
    ways: dict[str, Way] = {}
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name in names:
        try:
            way = make(name, case, clip)
            found = way.total()
            way.clear()
            for _ in range(WARM_UP):
                way.step()
                way.clear()
        except Exception as fault:  # of any kind: Opacus raises what torch raises
            refused[name] = why(fault)
            continue
        ways[name] = way
        errors[name] = float((found - wanted).norm() / wanted.norm())
    return ways, errors, refused


def seconds(ways: dict[str, Way], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Time a step of every way in turn; the median of each.

    There are `rounds` turns, and more of a small model, whose steps are short: SHORT together.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    while len(taken[PLAIN]) < rounds or sum(taken[PLAIN]) < SHORT * min(1, rounds - 1):
        for name, way in ways.items():
            began = clock()
            way.step()
            taken[name].append(clock() - began)
            way.clear()
    return {name: statistics.median(each) for name, each in taken.items()}


def show(case: Case, asked: argparse.Namespace, clock: Callable[[], float]) -> tuple[Table, float]:
    """Measure a case.

    Returns:
        Its table, and the seconds of a plain step.
    """
    names = [PLAIN, *(name for name in asked.way or WAYS if name != PLAIN)]
    ways, errors, refused = prepare(case, names)
    took = seconds(ways, asked.repeats, clock)
    weights = sum(p.numel() for p in trained(case.build()))
    table = Table(
        title=f"{case.name}: {case.batch} records, {weights:,} weights train",
        caption=verdict(case, took),
        title_justify="left",
        caption_justify="left",
    )
    columns = ["way", "ms", "x plain", "floor", "relative error"] + ["MB"] * asked.memory
    for column in columns:
        table.add_column(column, justify="left" if column == "way" else "right")
    for name in ways:
        floor = f"{case.floor:.2f}" if name == BOOKKEEPING and case.floor else ""
        error = "" if name == PLAIN else f"{errors[name]:.0e}"
        cells = [name, f"{1e3 * took[name]:.1f}", f"{took[name] / took[PLAIN]:.2f}", floor, error]
        if asked.memory:
            cells.append(f"{growth(case.name, name, 1.0):,.0f}")
        table.add_row(*cells)
    for name, reason in refused.items():
        table.add_row(name, "-", "-")
        table.caption = f"{table.caption}\n{name}: {reason}"
    return table, took[PLAIN]


def verdict(case: Case, took: dict[str, float]) -> str:
    """Hold book-keeping to its floor and to the best mode of Opacus, in one line."""
    modes = {name: spent for name, spent in took.items() if name.startswith("Opacus")}
    if BOOKKEEPING not in took or not modes:
        return ""
    best, ours = min(modes, key=lambda name: modes[name]), took[BOOKKEEPING]
    return (
        f"{BOOKKEEPING} {ours / took[PLAIN]:.2f} (floor {case.floor:.2f}); best mode of Opacus: "
        f"{best} {modes[best] / took[PLAIN]:.2f}, {modes[best] / ours:.2f} times book-keeping"
    )


def once_a_batch(
    plain: dict[str, float], cases: Sequence[Case], repeats: int, clock: Callable[[], float]
) -> Table:
    """Measure what is paid once a logical batch, and how many rows pass for it.

    Args:
        plain: seconds of a plain step, by case.
        cases: to show.
        repeats: of the noise; the median counts.
        clock: in seconds.
    """
    table = Table(
        title="Besides, once a logical batch: noise; and rows that pass for the records expected",
        title_justify="left",
    )
    for column in (
        "model",
        "weights",
        "noise, ms",
        "x plain",
        "records",
        "pages x rows",
        "rows / record",
    ):
        table.add_column(column, justify="left" if column == "model" else "right")
    for case in cases:
        total = np.zeros(sum(p.numel() for p in trained(case.build())))
        taken = []
        for _ in range(repeats):
            began = clock()
            add_noise(total, 1.0, 2.0**-20, OsSource())
            taken.append(clock() - began)
        noise = statistics.median(taken)
        for records in (case.batch, LARGE):
            pages, rows = page_shape(records, MICRO_BATCH)
            cells = [f"{records:,}", f"{pages} x {rows}", f"{pages * rows / records:.2f}"]
            first = [case.name, f"{len(total):,}", f"{1e3 * noise:.1f}"]
            first.append(f"{noise / plain[case.name]:.2f}")
            table.add_row(*(first if records == case.batch else [""] * 4), *cells)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [case.name for case in CASES]
    parser.add_argument("--only", action="append", choices=names, help="this model; repeatable")
    parser.add_argument("--way", action="append", choices=list(WAYS), help="this way; repeatable")
    parser.add_argument("--repeats", type=int, default=7, help="steps of each way (default 7)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument(
        "--memory", action="store_true", help="measure memory too, which takes long"
    )
    asked = parser.parse_args(arguments)
    devices.settle()  # the same allocator for every way
    torch.set_num_threads(asked.threads)
    clock = time.process_time if asked.threads == 1 else time.perf_counter
    console = Console(width=max(Console().width, 120))
    console.print(
        f"torch {torch.__version__}, {asked.threads} thread(s), median of {asked.repeats}, "
        f"{'processor' if asked.threads == 1 else 'wall'} time"
    )
    cases = [case for case in CASES if case.name in (asked.only or names)]
    plain = {}
    for case in cases:
        table, plain[case.name] = show(case, asked, clock)
        console.print(table, "")
    console.print(once_a_batch(plain, cases, asked.repeats, clock))


if __name__ == "__main__":
    main()
