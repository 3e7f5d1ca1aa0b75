"""`python -m benchmarks.noise`: what the noise of a step costs, as a ratio to torch.randn.

Ten million values on one thread, each way in turn, several times; medians. "added and rounded" is
what a step does: draw, scale, add to the sum in float64, round to the grid. torch.randn is the
default one, float32, whose generator is no source of noise for privacy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fedaccord.privacy.noise import OsSource, add_noise


def seconds(what: Callable[[], object]) -> float:
    """Time one call, on the processor, so that other programs count less."""
    began = time.thread_time()
    what()
    return time.thread_time() - began


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--values", type=int, default=10_000_000, help="(default 10 million)")
    parser.add_argument("--times", type=int, default=5, help="repetitions (default 5)")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    count, total = asked.values, np.zeros(asked.values)
    ways: dict[str, Callable[[], object]] = {
        "torch.randn, float32": lambda: torch.randn(count),
        "torch.randn, float64": lambda: torch.randn(count, dtype=torch.float64),
        "OsSource.normal, float64": lambda: OsSource().normal(count),
        "added and rounded, float64": lambda: add_noise(total, 1.3, 2.0**-20, OsSource()),
    }
    for way in ways.values():
        way()
    taken = [{name: seconds(way) for name, way in ways.items()} for _ in range(asked.times)]
    medians = {name: statistics.median(run[name] for run in taken) for name in ways}
    first = next(iter(medians.values()))
    table = Table(title=f"{count:,} normal values, one thread, median of {asked.times}")
    for column in ("way", "s", "x torch.randn"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, median in medians.items():
        table.add_row(name, f"{median:.3f}", f"{median / first:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
