"""`python -m benchmarks.simulate`: client-rounds per second of three ways to run the same rounds.

* plain: a Python loop over sites, with no message and no Flower.
* ours: the in-process engine, a Driver and the coordinator's Mail.
* Ray: Flower's own simulation runtime with one actor, the same ClientApp, the same Driver, and
  Flower's `send_and_receive`.

Every site has 100 records and takes 10 steps of 10 (see `simulate_apps`); a message holds the
weights as one array; the models that the three leave are compared bit for bit. All processes share
one core and torch has one thread. Turns alternate, and ratios are the median over turns: by the
clock, and by processor time, which other programs on the machine disturb less, and in which Ray's
waits cost nothing. Ray's start is shown apart.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console
from rich.table import Table

from benchmarks import simulate_apps as apps
from benchmarks.simulate_apps import MODELS, Flat, Work
from fedaccord import devices
from fedaccord.server.one_run import FIRST_NODE
from fedaccord.simulations import display
from fedaccord.simulations.engine import InProcessGrid

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else Ray listens on every interface
    "RAY_DISABLE_MEMORY_MONITOR": "1",
    "OMP_NUM_THREADS": "1",
    "NO_PROXY": "127.0.0.1",
}
ANSWER = "@@answer "  # what the child's lines for us begin with, among Ray's own
MARK = "FEDACCORD_BENCHMARK"  # in the environment of every process that we start
CHECKED = 2  # rounds after which models are compared
CLIENT_ROUNDS = 100  # of a turn, at least
# The least ratio that is wanted: to plain by model; to Ray with the small model at 100 sites.
WANTED = {"55k": 0.90, "4k": 0.80}
WANTED_TO_RAY = 3.0


@dataclass(frozen=True)
class Spent:
    """What some rounds took, in seconds: on the clock, and of a processor."""

    wall: float
    processor: float
    model: str  # the SHA-256 of the weights that they left


class Way(Protocol):
    """A way to run rounds."""

    def rounds(self, work: Work, count: int) -> Spent:
        """Run rounds from the first weights."""


class Watch:
    """Starts when it is made."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def spent(self, weights: Flat) -> Spent:
        """Stop, and name a model by its bits."""
        wall, processor = time.perf_counter() - self._wall, time.process_time() - self._processor
        return Spent(wall, processor, sha256(weights.tobytes()).hexdigest())


class Plain:
    """A Python loop."""

    def __init__(self, sites: int) -> None:
        self.sites = sites

    def rounds(self, work: Work, count: int) -> Spent:
        """See `Way`."""
        weights, watch = apps.initial(work.model), Watch()
        for number in range(1, count + 1):
            weights = apps.plain_round(work, range(self.sites), number, weights)
        return watch.spent(weights)


class Ours:
    """The in-process engine."""

    def __init__(self, sites: int) -> None:
        self.grid = InProcessGrid(apps.app, sites, {})
        self.sites = {FIRST_NODE + place: apps.site(place) for place in range(sites)}

    def rounds(self, work: Work, count: int) -> Spent:
        """See `Way`."""
        return by_app(self.grid, work, count, self.sites, False)


def by_app(grid: Grid, work: Work, count: int, sites: dict[int, str], flowers: bool) -> Spent:
    """Run rounds over a Grid; see `Way`."""
    strategy, weights = apps.driver("fedavg", len(sites)), apps.initial(work.model)
    watch = Watch()
    for number in range(1, count + 1):
        weights = apps.app_round(grid, strategy, work, sites, number, weights, flowers)
    return watch.spent(weights)


class Ray:
    """Flower's runtime in processes of its own, which end with it."""

    def __init__(self, sites: int) -> None:
        self._folder = tempfile.mkdtemp(prefix="ray-")  # short: Ray puts Unix sockets below it
        self._mark = f"{MARK}={self._folder}"
        self._log = Path(self._folder) / "errors.txt"
        began = time.perf_counter()
        with self._log.open("w") as errors:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.simulate", "--ray-child", str(sites)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | QUIET | {"RAY_TMPDIR": self._folder, MARK: self._folder},
                start_new_session=True,
            )
        self.rounds(Work("4k", False, False), 1)
        self.started = time.perf_counter() - began

    def rounds(self, work: Work, count: int) -> Spent:
        """See `Way`; processor time is that of all processes together.

        Raises:
            RuntimeError: the child has ended; with what it wrote last.
        """
        assert self._child.stdin is not None and self._child.stdout is not None
        asked = {"model": work.model, "private": work.private, "seeded": work.seeded}
        before = self._ticks()
        with contextlib.suppress(BrokenPipeError):  # it has ended: said below
            self._child.stdin.write(json.dumps(asked | {"count": count}) + "\n")
            self._child.stdin.flush()
        for line in self._child.stdout:
            if line.startswith(ANSWER):
                wall, model = json.loads(line.removeprefix(ANSWER))
                ticks = sum(n - before.get(pid, 0) for pid, n in self._ticks().items())
                return Spent(float(wall), ticks / os.sysconf("SC_CLK_TCK"), str(model))
        raise RuntimeError(f"Ray's child ended: {self._log.read_text()[-2000:]}")

    def end(self) -> None:
        """End the child and whatever it started; no process is left."""
        if self._child.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._child.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(60)
        for pid in self._left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._child.wait()
        if self._child.stdout is not None:
            self._child.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _ticks(self) -> dict[int, int]:
        """Read the processor time of every process, in the kernel's ticks."""
        found = {}
        for pid in self._left():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                found[pid] = int(fields[11]) + int(fields[12])  # in user and in kernel mode
        return found

    def _left(self) -> list[int]:
        """List living processes that the child started, by the mark in their environment."""
        found = [self._child.pid] if self._child.poll() is None else []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self._mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found


def ray_child(sites: int) -> None:
    """Run Flower's runtime; its ServerApp takes orders from standard input until that ends."""
    from flwr.simulation import run_simulation

    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        while len(nodes := sorted(grid.get_node_ids())) < sites:
            time.sleep(0.05)
        # Which node is which site only the nodes know; sums do not depend on the order.
        names = {node: apps.site(place) for place, node in enumerate(nodes)}
        for line in sys.stdin:
            asked = json.loads(line)
            spent = by_app(grid, Work.read(asked), asked["count"], names, True)
            print(ANSWER + json.dumps([spent.wall, spent.model]), flush=True)

    one: Any = {"num_cpus": 1, "num_gpus": 0}
    run_simulation(
        server,
        apps.app,
        sites,
        backend_config={
            "init_args": {"num_cpus": 1, "num_gpus": 0, "include_dashboard": False},
            "client_resources": one,
        },
    )


@contextlib.contextmanager
def ways(sites: int, ray: bool) -> Iterator[dict[str, Way]]:
    """Make the ways for a number of sites, and end their processes."""
    found: dict[str, Way] = {"plain": Plain(sites), "ours": Ours(sites)}
    if not ray:
        yield found
        return
    flower = Ray(sites)
    try:
        yield found | {"Ray": flower}
    finally:
        flower.end()


Taken = dict[str, list[Spent]]  # by way, for each turn


def turns(
    found: dict[str, Way], model: str, private: bool, sites: int, repeats: int
) -> tuple[Taken, int, bool]:
    """Time the ways in turn.

    Returns:
        What each turn took; client-rounds of a turn; and whether all ways leave the same bits,
        which is looked at before, in rounds that repeat.
    """
    seeded, timed = Work(model, private, True), Work(model, private, False)
    models = {way.rounds(seeded, CHECKED).model for way in found.values()}
    rounds = max(1, CLIENT_ROUNDS // sites)
    taken: Taken = {name: [] for name in found}
    for turn in range(repeats):
        names = list(found)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken[name].append(found[name].rounds(timed, rounds))
    return taken, rounds * sites, len(models) == 1


def ratio(taken: Taken, name: str, other: str, clock: str) -> float:
    """Say how many times as fast one way is as another, by a clock: the median over turns."""
    pairs = zip(taken[name], taken[other], strict=True)
    return statistics.median(getattr(b, clock) / getattr(a, clock) for a, b in pairs)


def row(model: str, private: bool, sites: int, taken: Taken, count: int, same: bool) -> list[str]:
    """Write a line of the table."""
    cells = [model, str(sites), "yes" if private else "no"]
    for name in ("plain", "ours", "Ray"):
        walls = [spent.wall for spent in taken.get(name, [])]
        cells.append(f"{count / statistics.median(walls):,.1f}" if walls else "-")
    for clock in ("wall", "processor"):
        cells.append(f"{ratio(taken, 'ours', 'plain', clock):.3f}")
    cells.append(f"{WANTED[model]:.2f}")
    for clock in ("wall", "processor"):
        cells.append(f"{ratio(taken, 'ours', 'Ray', clock):.2f}" if "Ray" in taken else "-")
    small = model == "4k" and sites == 100 and not private
    return [*cells, f"{WANTED_TO_RAY:.2f}" if small else "", "yes" if same else "NO"]


def measure(asked: argparse.Namespace, console: Console) -> None:
    """Measure and print the table."""
    table = Table(title="client-rounds per second, all on one core", title_justify="left")
    for column in (
        *("weights", "sites", "DP", "plain", "ours", "Ray"),
        *("ours/plain\nwall", "\nprocessor", "\nwanted"),
        *("ours/Ray\nwall", "\nprocessor", "\nwanted", "same\nbits"),
    ):
        table.add_column(column, justify="right")
    starts = []
    for sites in asked.sites:
        with ways(sites, not asked.no_ray) as found:
            if isinstance(flower := found.get("Ray"), Ray):
                starts.append(f"{flower.started:.1f} s with {sites} sites")
            for model in asked.model or MODELS:
                for private in (False, True):
                    result = turns(found, model, private, sites, asked.repeats)
                    table.add_row(*row(model, private, sites, *result))
    console.print(table)
    if starts:
        console.print(f"Ray's start to its first answer, not in the table: {', '.join(starts)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print, or be Ray's child."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sites", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--model", action="append", choices=list(MODELS), help="repeatable")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each way (default 5)")
    parser.add_argument("--core", type=int, default=0, help="that everything runs on (default 0)")
    parser.add_argument("--no-ray", action="store_true", help="leave Flower's runtime out")
    parser.add_argument("--ray-child", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.ray_child:
        ray_child(asked.ray_child)
        return
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {asked.core})
    os.environ |= QUIET
    devices.settle()
    torch.set_num_threads(1)
    display.quiet()
    logging.getLogger("ray").setLevel(logging.ERROR)
    measure(asked, Console(width=max(Console().width, 120)))


if __name__ == "__main__":
    main()
