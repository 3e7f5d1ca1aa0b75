"""`python -m benchmarks.tasks thyroid`: AUC with privacy, without, and pooled, over seeds.

Each row is the task's bundled accord, run by `fedaccord simulate`'s engine. Between the rows only
privacy.enabled and, for "pooled", the sites change: one site then holds the records of all. AUC is
of a site's held-out records after the last round; the mean is over the sites that have 200 or more
subjects, training and held out together.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import statistics
import sys
import tempfile
import time
import tomllib
from pathlib import Path

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}

import numpy as np
import tomlkit
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from fedaccord import accord as accords
from fedaccord import registry
from fedaccord.accord import ModelSection
from fedaccord.models.build import agreed, put
from fedaccord.privacy.plan import plan_for
from fedaccord.simulations import display, engine
from fedaccord.tasks import Records, SiteData, Task, load_task

LARGE = 200  # subjects that a site needs to count in the mean
ROWS = ("with privacy", "without privacy", "pooled, without privacy")
PAGE = 1024


class Pooled:
    """A task whose one site, "all", holds the records of all sites of another task."""

    sites = ("all",)

    def __init__(self, of: str) -> None:
        self.task = load_task(of)
        self.spec, self.public = self.task.spec, self.task.public

    def site(self, name: str) -> SiteData:
        """Join the records of all sites."""
        parts = [self.task.site(site) for site in self.task.sites]
        return SiteData(_joined([p.train for p in parts]), _joined([p.test for p in parts]))


def _joined(parts: list[Records]) -> Records:
    names = parts[0].groups
    return Records(
        inputs=np.concatenate([p.inputs for p in parts]),
        labels=np.concatenate([p.labels for p in parts]),
        subjects=np.concatenate([p.subjects for p in parts]),
        groups={name: np.concatenate([p.groups[name] for p in parts]) for name in names},
    )


def variant(name: str, row: str, seed: int) -> str:
    """Write a task's accord with another seed, with or without privacy, or pooled."""
    text = tomllib.loads(accords.bundled()[name].read_text(encoding="utf-8"))
    text["seed"] = seed
    text["privacy"]["enabled"] = row == ROWS[0]
    if row == ROWS[2]:
        subjects = sum(site["subjects"] for site in text["sites"])
        text["sites"] = [{"name": "all", "subjects": subjects}]
        text["rounds"]["min_sites"] = 1
        text["task"] = {"name": "pooled", "options": {"of": name}}
    return tomlkit.dumps(text)


def areas(weights: Path, made: ModelSection, task: Task, seed: int) -> dict[str, float]:
    """Score a run's model on each site's held-out records: AUC by site."""
    model = agreed(made, task.spec, seed).eval()
    put(model, load_file(weights))
    found = {}
    for site in task.sites:
        held = task.site(site)
        parts = torch.from_numpy(held.test.inputs).split(PAGE)
        with torch.no_grad():
            scores = torch.cat([model(page).softmax(1) for page in parts]).numpy()
        both = len(task.spec.classes) == 2
        found[site] = float(
            roc_auc_score(held.test.labels, scores[:, 1] if both else scores, multi_class="ovr")
        )
    return found


def run(name: str, row: str, seed: int) -> dict[str, dict[str, float]]:
    """Run one variant; AUC by site of its model and its student."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "accord.toml")
        file.write_text(variant(name, row, seed), encoding="utf-8")
        accord = accords.load(file)
        where = Path(folder, "run")
        engine.simulate(file, where, where / "sites", len(accord.roster))
        task, taught = load_task(name), accord.distillation
        student = ModelSection(name=taught.model, options=taught.options)
        return {
            who: areas(where / f"{who}.safetensors", made, task, seed)
            for who, made in {"model": accord.model, "student": student}.items()
        }


def counted(task: Task) -> list[str]:
    """List the sites that count in the mean."""
    sizes = {}
    for site in task.sites:
        held = task.site(site)
        sizes[site] = len({*held.train.subjects.tolist(), *held.test.subjects.tolist()})
    return [site for site, size in sizes.items() if size >= LARGE]


def cell(values: list[float]) -> str:
    """Format a mean over seeds with its standard deviation."""
    spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def main() -> None:
    """Run the asked rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", help="a task with a bundled accord of its name")
    parser.add_argument("--seeds", type=int, default=2, help="how many seeds, from 0 (default 2)")
    parser.add_argument("--row", choices=ROWS, action="append", help="only this row; repeatable")
    asked = parser.parse_args()
    registry.TASKS["pooled"] = "benchmarks.tasks:Pooled"
    logging.disable(logging.INFO)
    display.quiet()
    task = load_task(asked.task)
    large = counted(task)
    table = Table(title=f"{asked.task}, {asked.seeds} seeds: AUC on held-out records")
    others = [f"{site}{'' if site in large else ' *'}" for site in task.sites]
    for column in ("training", "of", "mean", *others, "s a run"):
        table.add_column(column, justify="left" if column in ("training", "of") else "right")
    for row in asked.row or ROWS:
        began = time.monotonic()
        seeds = []
        for seed in range(asked.seeds):
            seeds.append(run(asked.task, row, seed))
            mean = statistics.mean(seeds[-1]["model"][site] for site in large)
            print(f"{row}, seed {seed}: mean AUC {mean:.4f}", file=sys.stderr, flush=True)
        spent = math.ceil((time.monotonic() - began) / asked.seeds)
        for who in ("model", "student"):
            found = [seed[who] for seed in seeds]
            mean = cell([statistics.mean(seed[site] for site in large) for seed in found])
            cells = [cell([seed[site] for seed in found]) for site in task.sites]
            table.add_row(row, who, mean, *cells, str(spent) if who == "model" else "")
    Console(width=200).print(table)
    print(f"mean: over sites with {LARGE} or more subjects; * has fewer. +-: over seeds.")
    accord = accords.load(asked.task)
    site = max(accord.roster, key=lambda name: accord.roster[name])
    plan = plan_for(accord, site)
    print(f"With privacy: {plan.statement() if plan else 'off'}")


if __name__ == "__main__":
    main()
