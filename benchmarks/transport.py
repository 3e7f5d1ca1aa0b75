"""`python -m benchmarks.transport`: seconds and bytes of a round in which nothing is trained.

Four sites, each a process of its own, get a model and send one of the same size back; in one run
over the in-process engine, our link (mutual TLS, signed envelopes, audit log) and Flower's stock
engine (TLS, node authentication, database). Seconds are the median of the rounds after the first;
bytes are what went over the loopback, both ways, headers and TLS included.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flwr.serverapp import Grid
from rich.console import Console
from rich.table import Table

from benchmarks import transport_apps as apps
from benchmarks.stock_engine import Stock

SITES = 4
APPS = ("benchmarks.transport_apps:server_app", "benchmarks.transport_apps:client_app")
LEAST = {"0.1 MB": 20.0, "100 MB": 3.0}  # stock / link that is wanted
MOST = {"0.1 MB": 0.2}  # seconds of a round over the link


@dataclass(frozen=True)
class Taken:
    """What a round took.

    Attributes:
        seconds: median of the rounds after the first.
        sent: bytes over the loopback in a round, the mean of all; None within one process.
    """

    seconds: float
    sent: float | None


def loopback() -> int:
    """Return the bytes that the loopback has carried."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == "lo":
            return int(figures.split()[0])
    raise RuntimeError("no loopback in /proc/net/dev")


def taken(seconds: Sequence[float], sent: float | None) -> Taken:
    """Leave out the first round, in which connections and caches are new."""
    return Taken(statistics.median(seconds[1:] or seconds), sent)


def in_process(model: str, rounds: int) -> Taken:
    """Carry a model within this process."""
    from fedaccord.simulations.engine import InProcessGrid

    grid = InProcessGrid(apps.client_app, SITES, {})
    return taken(apps.carry(grid, model, rounds, SITES), None)


@contextmanager
def linked(work: Path) -> Iterator[tuple[Grid, str, str]]:
    """Start a coordinator's link here and four sites as processes; give the grid, run, accord."""
    from fedaccord import accord as accords
    from fedaccord.kit import CoordinatorKit
    from fedaccord.server.coordinator import Which, opened
    from fedaccord.simulations.deployment import Deployment

    deployment = Deployment(work)
    deployment.provision("heart")
    limits = deployment.coordinator / "coordinator.toml"
    limits.write_text(limits.read_text().replace("max_reply_mb = 0", "max_reply_mb = 1000"))
    kit = CoordinatorKit.read(deployment.coordinator)
    accord = accords.load(kit.accord_file)
    words = [sys.executable, "-m", "benchmarks.transport", "--site"]
    sites = [subprocess.Popen([*words, str(work / name)]) for name in accord.roster]
    try:
        with opened(kit, accord, Which(work / "runs" / "carried", False)) as grid:
            yield grid, "carried", accord.digest
    finally:
        for site in sites:
            site.terminate()
        for site in sites:
            site.wait(30)


def site(kit: str) -> None:
    """Be a site: the link's own process, with the benchmark's ClientApp."""
    import signal

    logging.getLogger("fedaccord.link").setLevel(logging.ERROR)
    from fedaccord.client.link import Attendant
    from fedaccord.kit import SiteKit

    attendant = Attendant(SiteKit.read(Path(kit)), apps.client_app, lambda _: None)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    attendant.run()


def over_the_link(models: Sequence[str], rounds: int, work: Path) -> dict[str, Taken]:
    """Carry each model over the link."""
    found = {}
    with linked(work) as (grid, run, accord):
        for place, model in enumerate(models):
            before = loopback()
            seconds = apps.carry(grid, model, rounds, SITES, run, accord, place * rounds)
            found[model] = taken(seconds, (loopback() - before) / rounds)
    return found


def over_stock(models: Sequence[str], rounds: int, work: Path) -> dict[str, Taken]:
    """Carry each model over Flower's stock engine, each in a run of its own."""
    found = {}
    names = [f"site-{n}" for n in range(SITES)]
    with Stock("heart", names, work, apps=APPS, config=apps.CONFIG) as stock:
        for model in models:
            out, before = work / "seconds.json", loopback()
            outcome = stock.run({"model": model, "rounds": rounds, "out": str(out)}, 900)
            if not outcome.completed:
                raise RuntimeError(f"the stock engine failed: {outcome.details}\n{outcome.log}")
            seconds = json.loads(out.read_text())
            found[model] = taken(seconds, (loopback() - before) / rounds)
    return found


def _bytes(sent: float | None) -> str:
    return "-" if sent is None else f"{sent / 1e6:,.2f} MB"


def show(ours: dict[str, Taken], stock: dict[str, Taken], here: dict[str, Taken]) -> Table:
    """Put the figures side by side."""
    heads = ("model", "in process", "link", "stock engine", "stock / link", "wanted")
    table = Table(*heads, "bytes, link", "bytes, stock", title=f"seconds a round, {SITES} sites")
    for model, link in ours.items():
        other = stock.get(model)
        ratio = other.seconds / link.seconds if other else None
        wanted = [f">= {LEAST[model]:g}"] if model in LEAST else []
        wanted += [f"link <= {MOST[model]:g} s"] if model in MOST else []
        table.add_row(
            model,
            f"{here[model].seconds:.3f}",
            f"{link.seconds:.3f}",
            f"{other.seconds:.2f}" if other else "-",
            f"{ratio:.1f}" if ratio else "-",
            ", ".join(wanted),
            _bytes(link.sent),
            _bytes(other.sent if other else None),
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, prog="benchmarks.transport")
    parser.add_argument(
        "--model", choices=apps.MODELS, action="append", help="only this; repeatable"
    )
    parser.add_argument("--rounds", type=int, default=7, help="of each model, over the link")
    parser.add_argument("--stock-rounds", type=int, default=3, help="0 leaves the stock engine out")
    parser.add_argument("--site", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.site:
        site(asked.site)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    logging.getLogger("fedaccord.link").propagate = False  # the coordinator's goes into a file
    models, began = asked.model or list(apps.MODELS), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        ours = over_the_link(models, asked.rounds, work / "link")
        stock = {}
        if asked.stock_rounds:
            (work / "stock").mkdir()
            stock = over_stock(models, asked.stock_rounds, work / "stock")
    here = {model: in_process(model, asked.rounds) for model in models}
    console = Console()
    console.print(show(ours, stock, here))
    console.print(f"measured in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
