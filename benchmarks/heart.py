"""`python -m benchmarks.heart`: the accuracy that the README quotes, on four hospitals, over seeds.

Every row is the heart accord as it is, run by `fedaccord simulate`'s engine, once a seed; only the
seed changes, and privacy.enabled in the row without privacy. Accuracy is the unweighted mean over
the four hospitals' held-out patients after the last round.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}

from rich.console import Console
from rich.progress import track
from rich.table import Table

from fedaccord import accord as accords
from fedaccord.privacy.plan import plan_for
from fedaccord.runs import RunFolder
from fedaccord.simulations import display, engine
from fedaccord.tasks import load_task


def variant(text: str, seed: int, private: bool) -> str:
    """Write the heart accord's text with another seed, and with or without privacy."""
    for old, new in (
        ("\nseed = 0 ", f"\nseed = {seed} "),
        ("\nenabled = true       # false: plain", f"\nenabled = {str(private).lower()} # plain"),
    ):
        if old not in text:
            raise SystemExit(f"benchmarks.heart: the heart accord no longer has {old.strip()!r}")
        text = text.replace(old, new)
    return text


def last_round(seed: int, private: bool, folder: Path) -> dict[str, Any]:
    """Run one variant and return its last round's record."""
    text = accords.bundled()["heart"].read_text(encoding="utf-8")
    file = folder / f"heart-{seed}-{private}.toml"
    file.write_text(variant(text, seed, private), encoding="utf-8")
    agreed = accords.load(file)
    run = folder / file.stem
    engine.simulate(file, run, run / "sites", len(agreed.roster))
    return [record for record in RunFolder(run).records() if record["kind"] == "round"][-1]


def constant() -> float:
    """Accuracy of answering each hospital "disease" for everybody, mean over hospitals."""
    task = load_task("heart")
    return statistics.mean(float(task.site(name).test.labels.mean()) for name in task.sites)


def mean_sd(values: list[float]) -> str:
    """Format a mean over seeds with its standard deviation."""
    spread = f"{statistics.stdev(values):.3f}" if len(values) > 1 else "-"
    return f"{statistics.mean(values):.3f} +- {spread}"


def main() -> None:
    """Run all variants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds, from 0 (default 5)")
    seeds = range(parser.parse_args().seeds)
    logging.disable(logging.INFO)
    display.quiet()
    table = Table(title=f"heart, {len(seeds)} seeds: test accuracy, mean over four hospitals")
    for column in ("training", "model", "student", "parity diff.", "s a run"):
        table.add_column(column, justify="left" if column == "training" else "right")
    heart = accords.load("heart")
    for private, name in ((False, "without privacy"), (True, "with privacy")):
        rows, began = [], time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            for seed in track(list(seeds), name, transient=True):
                rows.append(last_round(seed, private, Path(folder))["audit"])
        cells = [
            mean_sd([row[section]["figures"]["accuracy"]["mean"] for row in rows])
            for section in ("model", "student")
        ]
        parity = [
            row["model"]["figures"]["attributes"]["sex"]["all"]["demographic_parity_difference"]
            for row in rows
        ]
        spent = (time.monotonic() - began) / len(seeds)
        table.add_row(name, *cells, mean_sd([p["value"] for p in parity]), f"{spent:.0f}")
    table.add_row('"disease" for all', f"{constant():.3f}", "-", "-", "-")
    Console().print(table)
    site = max(heart.roster, key=lambda name: heart.roster[name])
    plan = plan_for(heart, site)
    print("Mean +- standard deviation over seeds. parity diff.: of the model, by sex.")
    print(f"With privacy: {plan.statement() if plan else 'off'}")


if __name__ == "__main__":
    main()
