"""`python -m benchmarks.personalisation`: accuracy at each hospital, with and without its own.

Every row is the heart accord without its student, with the keys that the row names, run by
`fedaccord simulate`'s engine once a seed. Accuracy is that of a hospital's held-out patients after
the last round, averaged over the seeds; a personal model's is worked out here, from the simulated
hospitals' folders, since no hospital sends it.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
from pathlib import Path

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fedaccord import accord as accords
from fedaccord.client import personal
from fedaccord.client.evaluate import predict
from fedaccord.models.build import agreed
from fedaccord.runs import RunFolder
from fedaccord.simulations import engine
from fedaccord.tasks import load_task

# what a hospital uses -> lines of the accord that change, as (before, after)
LOCAL, PERSONAL = "\nlocal = [] ", "\npersonal = 0.0 "
KINDS = {
    "the global model": [],
    'local = ["2."] (the norms)': [(LOCAL, '\nlocal = ["2."] ')],
    'local = ["5."] (the head)': [(LOCAL, '\nlocal = ["5."] ')],
    "personal = 1.0": [(PERSONAL, "\npersonal = 1.0 ")],
    "personal = 0.1": [(PERSONAL, "\npersonal = 0.1 ")],
}
Scores = dict[str, float]


def variant(seed: int, private: bool, changes: list[tuple[str, str]]) -> str:
    """Write the heart accord's text with another seed, with or without privacy, and changed."""
    text = accords.bundled()["heart"].read_text(encoding="utf-8")
    for old, new in (
        ("\nseed = 0 ", f"\nseed = {seed} "),
        ("\nenabled = true       # false: plain", f"\nenabled = {str(private).lower()} # plain"),
        ("\nenabled = true       # (default", "\nenabled = false # (default"),
        *changes,
    ):
        if text.count(old) != 1:
            raise SystemExit(f"benchmarks.personalisation: heart has no single {old.strip()!r}")
        text = text.replace(old, new)
    return text


def scores(seed: int, private: bool, changes: list[tuple[str, str]], folder: Path) -> Scores:
    """Run one variant; accuracy by hospital of what it uses: its personal model if there is one."""
    file = folder / "accord.toml"
    file.write_text(variant(seed, private, changes), encoding="utf-8")
    accord, run = accords.load(file), folder / "run"
    engine.simulate(file, run, folder / "sites", len(accord.roster))
    if not accord.training.personal:
        last = [record for record in RunFolder(run).records() if record["kind"] == "round"][-1]
        return dict(last["audit"]["model"]["figures"]["accuracy"]["sites"])
    task, out = load_task("heart"), {}
    for site in accord.roster:
        model = agreed(accord.model, task.spec, accord.seed)
        personal.find(folder / "sites" / site, run.name).put(model)
        test = task.site(site).test
        _, first = np.unique(test.subjects, return_index=True)
        out[site] = float((predict(model, test.inputs[first]) == test.labels[first]).mean())
    return out


def main() -> None:
    """Run all rows and print the table."""
    options = argparse.ArgumentParser(description=__doc__, prog="benchmarks.personalisation")
    options.add_argument("--seeds", type=int, default=3, help="runs of each row")
    seeds = range(options.parse_args().seeds)
    logging.disable(logging.CRITICAL)
    sites = list(accords.load("heart").roster)
    people = {site: len(load_task("heart").site(site).test.labels) for site in sites}
    heads = [f"{site} ({people[site]})" for site in sites]
    table = Table("what a hospital uses", *heads, "mean", title=f"{len(seeds)} seeds")
    rows = [(private, kind) for private in (False, True) for kind in KINDS]
    for private, kind in track(rows, "runs", console=Console(stderr=True)):
        found = []
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                found.append(scores(seed, private, KINDS[kind], Path(folder)))
        means = [statistics.mean(row[site] for row in found) for site in sites]
        name = f"{'epsilon 3' if private else 'no privacy'}: {kind}"
        table.add_row(name, *(f"{value:.3f}" for value in [*means, statistics.mean(means)]))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
