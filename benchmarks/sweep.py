"""`python -m benchmarks.sweep digits`: learning rates x clips of an accord, under its epsilon.

Each cell is one run of the accord, with privacy, and nothing else changed. Its data are public;
on private data every cell would be a try that `fedaccord plan --tries` has to count.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import tomllib
from pathlib import Path

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}

import tomlkit
from rich.console import Console
from rich.table import Table

from fedaccord import accord as accords
from fedaccord.simulations import display, engine

RATES = (0.25, 0.5, 1.0, 2.0, 4.0)  # x the accord's learning rate
CLIPS = (0.1, 1.0, 10.0)  # x its max_grad_norm


def accuracy(name: str, rate: float, clip: float, seed: int) -> tuple[float, float, float]:
    """Run one cell: the learning rate, the clip, and the mean accuracy over sites at the end."""
    data = tomllib.loads(accords.bundled()[name].read_text(encoding="utf-8"))
    data["seed"] = seed
    data["training"]["learning_rate"] = learning_rate = data["training"]["learning_rate"] * rate
    data["privacy"]["max_grad_norm"] = bound = data["privacy"].get("max_grad_norm", 1.0) * clip
    data["distillation"] = {"enabled": False}
    with tempfile.TemporaryDirectory() as folder:
        file, run = Path(folder, "accord.toml"), Path(folder, "run")
        file.write_text(tomlkit.dumps(data), encoding="utf-8")
        engine.simulate(file, run, run / "sites", len(data["sites"]))
        records = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    last = [r for r in records if r["kind"] == "round" and r["audit"]][-1]
    return learning_rate, bound, last["audit"]["model"]["figures"]["accuracy"]["mean"]


def main() -> None:
    """Run all cells and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", help="a bundled accord")
    parser.add_argument("--seeds", type=int, default=1, help="runs a cell (default 1)")
    asked = parser.parse_args()
    logging.disable(logging.INFO)
    display.quiet()
    table = Table(title=f"{asked.task}: accuracy, mean over sites and {asked.seeds} seeds")
    table.add_column("learning rate", justify="right")
    rows = []
    clips: list[float] = []
    for rate in RATES:
        cells, shown = [], 0.0
        for clip in CLIPS:
            runs = [accuracy(asked.task, rate, clip, seed) for seed in range(asked.seeds)]
            shown = runs[0][0]
            clips = [*clips, runs[0][1]] if rate == RATES[0] else clips
            cells.append(statistics.mean(run[2] for run in runs))
            print(f"rate {shown:g}, clip {runs[0][1]:g}: {cells[-1]:.3f}", file=sys.stderr)
        rows.append((f"{shown:g}", *(f"{cell:.3f}" for cell in cells)))
    for clip in clips:
        table.add_column(f"max_grad_norm {clip:g}", justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
