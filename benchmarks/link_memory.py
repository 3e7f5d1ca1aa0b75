"""`python -m benchmarks.link_memory`: how far memory grows while a large message is carried.

A coordinator sends one site a model over the link and gets one of the same size back; each is a
process of its own, new for each row. Counted is the peak of the resident set above what it was
before the message was made (Linux). The coordinator has to hold the model and the reply, the site
the model, which is also what it sends back: 2.0 and 1.0 are the least that is possible.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from rich.console import Console
from rich.table import Table

STATUS, PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MODULE = "benchmarks.link_memory"
SITE, LARGEST = "cleveland", 2.5  # times the message that either end may need

app = ClientApp()


@app.train()
def answer(message: Message, context: Context) -> Message:
    """Send back what came."""
    return Message(RecordDict({"arrays": message.content["arrays"]}), reply_to=message)


def _kilobytes(key: str) -> int:
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def begin() -> int:
    """Count the peak from here on; return what the process holds by now, in kilobytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    PEAK.write_text("5", encoding="ascii")  # see man 5 proc
    return _kilobytes("VmRSS")


def grown(before: int) -> float:
    """Return how far it grew at its peak, in 10^6 bytes."""
    return (_kilobytes("VmHWM") - before) * 1024 / 1e6


def site(kit: str) -> None:
    """Be the site; on SIGTERM, print how far it grew."""
    from fedaccord.client.link import Attendant
    from fedaccord.kit import SiteKit

    began = [0]
    attendant = Attendant(SiteKit.read(Path(kit)), app, lambda words: begin_at(words, began))
    signal.signal(signal.SIGTERM, lambda *_: (print(grown(began[0]), flush=True), os._exit(0)))
    attendant.run()


def begin_at(words: str, began: list[int]) -> None:
    """Count from the join on."""
    if "joined run" in words:
        began[0] = begin()


def coordinator(kits: str, megabytes: float, arrays: int) -> None:
    """Be the coordinator: send a model, wait for the reply, print how far it grew."""
    from fedaccord import accord as accords
    from fedaccord.kit import CoordinatorKit
    from fedaccord.server.coordinator import Which, opened

    kit = CoordinatorKit.read(Path(kits))
    accord = accords.load(kit.accord_file)
    with opened(kit, accord, Which(Path(kits) / "runs" / "carried", False)) as grid:
        while not (nodes := list(grid.get_node_ids())):
            time.sleep(0.05)
        before, rng = begin(), np.random.default_rng(0)
        each = int(megabytes * 1e6 / arrays)
        content = RecordDict(
            {
                "arrays": ArrayRecord({f"layer{n}": _array(rng, each) for n in range(arrays)}),
                "config": ConfigRecord(
                    {"run": "carried", "accord": accord.digest, "server-round": 1}
                ),
            }
        )
        marks = list(grid.push_messages([Message(content, nodes[0], "train")]))
        while not (replies := list(grid.pull_messages(marks))):
            time.sleep(0.05)
        assert replies[0].content["arrays"] == content["arrays"], "it came back changed"
        print(grown(before), flush=True)


def _array(rng: np.random.Generator, size: int) -> Array:
    """Make an array of bytes without the copies that numpy's way would leave in the figure."""
    return Array("uint8", (size,), "numpy.ndarray", rng.bytes(size))


def carried(work: Path, megabytes: float, arrays: int) -> tuple[float, float]:
    """Carry one message; how far coordinator and site grew, in 10^6 bytes."""
    words = [sys.executable, "-m", MODULE]
    size = ["--mb", str(megabytes), "--arrays", str(arrays)]
    there = subprocess.Popen([*words, "--site", str(work / SITE)], stdout=subprocess.PIPE)
    here = subprocess.run(
        [*words, "--coordinator", str(work / "coordinator"), *size], stdout=subprocess.PIPE
    )
    there.terminate()
    out, _ = there.communicate(timeout=60)
    here.check_returncode()
    return float(here.stdout), float(out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, prog=MODULE)
    parser.add_argument("--mb", type=float, action="append", help="10^6 bytes; repeatable")
    parser.add_argument("--arrays", type=int, action="append", help="that they are in; repeatable")
    parser.add_argument("--json", action="store_true", help="print figures only")
    parser.add_argument("--site", help=argparse.SUPPRESS)
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    for name in ("fedaccord.link", "fedaccord.coordinator"):
        logging.getLogger(name).propagate = False  # the coordinator's go into its file
        logging.getLogger(name).addHandler(logging.NullHandler())
    if asked.site:
        return site(asked.site)
    if asked.coordinator:
        return coordinator(asked.coordinator, asked.mb[0], asked.arrays[0])
    from fedaccord.simulations.deployment import Deployment

    table = Table("message", "arrays", "coordinator", "site", "wanted", title="growth / message")
    rows = []
    for megabytes in asked.mb or [100, 500]:
        for arrays in asked.arrays or [1, 32]:
            with tempfile.TemporaryDirectory() as folder:
                deployment = Deployment(Path(folder))
                deployment.provision("heart")
                toml = deployment.coordinator / "coordinator.toml"
                text = toml.read_text().replace("max_reply_mb = 0", "max_reply_mb = 2000")
                toml.write_text(text)
                ends = [one / megabytes for one in carried(Path(folder), megabytes, arrays)]
            rows.append({"mb": megabytes, "arrays": arrays, "growth": ends})
            shown = [f"{one:.2f}" for one in ends]
            table.add_row(f"{megabytes:g} MB", str(arrays), *shown, f"< {LARGEST}")
    if asked.json:
        print(json.dumps(rows))
    else:
        Console().print(table)
    return None


if __name__ == "__main__":
    main()
