"""`python -m benchmarks.simulate_scale`: many sites in one process, and the memory of a round.

First, 10,000 sites of the 4k-weight model of `benchmarks.simulate`, 1,000 of them a round: seconds
and the resident set after every round, with a line of progress meanwhile. Then what a round needs
at its peak (tracemalloc: Python and numpy, not torch's kernels) as more sites take part: for a rule
that takes the updates one by one, and for one that must see all of them. With `--apps 100 1000`,
instead: FedAccord's own apps, with policies and ledgers, on a made-up table of so many sites.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from flwr.app import Message
from flwr.serverapp.strategy import FedAvg
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from benchmarks import simulate_apps as apps
from benchmarks.simulate_apps import Work
from fedaccord.runs import RunFolder
from fedaccord.server.one_run import FIRST_NODE
from fedaccord.simulations import display, engine
from fedaccord.simulations.engine import InProcessGrid
from fedaccord.strategies.driver import Driver
from fedaccord.strategies.seam import SHOWN

WORK = Work("4k", False, False)
ACCORD = """
name = "many"
purpose = "How the apps scale with sites."
sites = [{sites}]
model = {{ name = "mlp" }}
rounds = {{ rounds = {rounds} }}
training = {{ steps = 10, learning_rate = 0.05 }}
privacy = {{ enabled = {private}, noise_multiplier = 1.0, sampling_prob = 0.1 }}
fairness = {{ attributes = ["sex"] }}

[task]
kind = "table"
dataset = "many"
file = "table.csv"
site_column = "site"
subject = "person"
label = {{ column = "label", classes = ["no", "yes"] }}
attributes = {{ sex = ["female", "male"] }}
inputs.a = {{ min = 0, max = 1 }}
inputs.b = {{ min = 0, max = 1 }}
"""
ROWS = 150  # of a site: a third is held out


def resident() -> float:
    """Read this process's resident set, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def drawn(count: int, sites: int, number: int) -> dict[int, str]:
    """Draw a round's nodes and their sites, in order of site."""
    places = sorted(random.Random(f"{number}").sample(range(sites), count))
    return {FIRST_NODE + place: apps.site(place) for place in places}


def run(sites: int, count: int, rounds: int, console: Console) -> Table:
    """Run rounds of `count` sites out of `sites`, and tabulate time and memory."""
    table = Table(title=f"{sites:,} sites, {count:,} a round, 4k weights", title_justify="left")
    for column in ("round", "seconds", "client-rounds/s", "resident MB", "largest weight"):
        table.add_column(column, justify="right")
    answers = display.Answers()
    with Live(console=console, transient=True, refresh_per_second=4) as live:

        def on_reply(reply: Message) -> None:
            answers.note("train", str(reply.metadata.src_node_id))
            live.update(Text(f"round {number} of {rounds}   {answers.line(sites)}"))

        grid = InProcessGrid(apps.app, sites, {}, on_reply)
        strategy, weights = apps.driver("fedavg", count), apps.initial(WORK.model)
        for number in range(1, rounds + 1):
            answers.ask("train")
            began, chosen = time.perf_counter(), drawn(count, sites, number)
            weights = apps.app_round(grid, strategy, WORK, chosen, number, weights)
            seconds = time.perf_counter() - began
            cells = [f"{number}", f"{seconds:.1f}", f"{count / seconds:,.0f}"]
            table.add_row(*cells, f"{resident():,.0f}", f"{np.abs(weights).max():.3f}")
    return table


def rules() -> dict[str, Driver]:
    """Make the mean twice: of updates as they come, and of all updates at once."""
    gathered = Driver(FedAvg(**SHOWN), "updates")  # type: ignore[arg-type]
    return {"one by one": apps.driver("fedavg", 1), "all at once": gathered}


def peak(strategy: Driver, count: int) -> float:
    """Measure how far Python's memory grows in a round of so many sites, at its peak, in bytes."""
    grid, weights = InProcessGrid(apps.app, count, {}), apps.initial(WORK.model)
    sites = drawn(count, count, 1)
    apps.app_round(grid, strategy, WORK, sites, 1, weights)  # whatever is made once
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        apps.app_round(grid, strategy, WORK, sites, 2, weights)
        return float(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()


def peaks(counts: Sequence[int]) -> Table:
    """Tabulate the peak of a round by sites, in updates of the model in float64."""
    size = 8 * len(apps.initial(WORK.model))
    title = f"peak of a round, in updates of {size / 1000:.0f} kB (4k weights, float64)"
    table = Table(title=title, title_justify="left")
    table.add_column("the rule takes updates")
    for count in counts:
        table.add_column(f"{count:,} sites", justify="right")
    for name, strategy in rules().items():
        table.add_row(name, *(f"{peak(strategy, count) / size:,.1f}" for count in counts))
    return table


def write_accord(folder: Path, sites: int, rounds: int, private: bool) -> Path:
    """Write an accord of so many sites, with a made-up table beside it."""
    rng = np.random.default_rng(sites)
    lines = ["site,person,a,b,sex,label"]
    names = [apps.site(place) for place in range(sites)]
    for row, name in enumerate(name for name in names for _ in range(ROWS)):
        a, b = rng.random(2).round(3)
        sex, label = rng.choice(["female", "male"]), "yes" if a + rng.normal() / 4 > b else "no"
        lines.append(f"{name},p{row},{a},{b},{sex},{label}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    roster = ", ".join(f'{{ name = "{name}", subjects = 100 }}' for name in names)
    text = ACCORD.format(sites=roster, rounds=rounds, private=str(private).lower())
    path = folder / "accord.toml"
    path.write_text(text, encoding="utf-8")
    return path


def own_apps(sites: int, rounds: int, private: bool) -> list[str]:
    """Run FedAccord's own apps; a line of the table: milliseconds a site of each part."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        accord = write_accord(folder, sites, rounds, private)
        ends: dict[str, float] = {}
        began = time.perf_counter()

        def on_reply(reply: Message) -> None:
            ends[reply.metadata.message_type] = time.perf_counter()

        engine.simulate(accord, folder / "run", folder / "sites", sites, on_reply)
        total = time.perf_counter() - began
        records = RunFolder.open(folder / "run").records()
        took = [record["seconds"] for record in records if record["kind"] == "round"]
    admission = ends["query.reserve"] - began
    parts = (admission, statistics.median(took), total - admission - sum(took))
    cells = [f"{sites:,}", "yes" if private else "no"]
    return [*cells, *(f"{1e3 * part / sites:,.0f}" for part in parts), f"{resident():,.0f}"]


def show_apps(counts: Sequence[int], rounds: int) -> Table:
    """Tabulate what FedAccord's own apps take for each site."""
    table = Table(title="own apps: milliseconds a site", title_justify="left")
    for column in ("sites", "DP", "admission", "a round", "the end", "resident MB"):
        table.add_column(column, justify="right")
    for count in counts:
        for private in (False, True):
            table.add_row(*own_apps(count, rounds, private))
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sites", type=int, default=10_000)
    parser.add_argument("--drawn", type=int, default=1_000, help="sites a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peaks", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--apps", type=int, nargs="+", help="sites of FedAccord's own apps")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    display.quiet()
    console = Console()
    if asked.apps:
        console.print(show_apps(asked.apps, asked.rounds))
        return
    console.print(run(asked.sites, asked.drawn, asked.rounds, console))
    console.print(peaks(asked.peaks))


if __name__ == "__main__":
    main()
