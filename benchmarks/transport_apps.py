"""Apps that carry weights and train nothing: `benchmarks.transport` runs them over each carrier.

A site sends back the weights that it got, multiplied by a number of its own, so that no chunk of a
reply equals one that is on the other side already.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

# Name, and how many float32 values each of its arrays holds.
MODELS: dict[str, list[int]] = {
    "0.1 MB": [6_250] * 4,
    "LoRA": [8 * 768] * 48,  # BERT-base, rank 8, query and value of 12 layers: 1.2 MB
    "20 MB": [312_500] * 16,
    "100 MB": [781_250] * 32,
}
CONFIG = {"model": "0.1 MB", "rounds": 1, "out": "", "sites": 4}

client_app = ClientApp()
server_app = ServerApp()


@client_app.train()
def answer(message: Message, context: Context) -> Message:
    """Send back the weights, multiplied."""
    config = message.content.config_records["config"]
    factor = np.float32(1 + message.metadata.dst_node_id % 97 * 1e-3 + int(config["server-round"]))
    old: ArrayRecord = message.content["arrays"]  # type: ignore[assignment]
    arrays = ArrayRecord({name: Array(value.numpy() * factor) for name, value in old.items()})
    return Message(RecordDict({"arrays": arrays}), reply_to=message)


def weights(model: str) -> list[np.ndarray]:
    """Make up the weights of a model."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(size, np.float32) for size in MODELS[model]]


def carry(
    grid: Grid, model: str, rounds: int, sites: int, run: str = "", accord: str = "", after: int = 0
) -> list[float]:
    """Send a model to all sites and wait for their replies, some rounds; seconds of each.

    Args:
        grid: any carrier.
        model: a name of `MODELS`.
        rounds: how many.
        sites: how many there are.
        run: the run's id, as our link holds messages to it.
        accord: the accord's digest, likewise.
        after: the last round that was carried before; a site refuses rounds that go back.
    """
    values, seconds = weights(model), []
    while len(nodes := sorted(grid.get_node_ids())) < sites:
        time.sleep(0.1)
    for number in range(after + 1, after + rounds + 1):
        values = [value * np.float32(1.01) for value in values]
        began = time.perf_counter()
        arrays = ArrayRecord({f"layer{n}": Array(value) for n, value in enumerate(values)})
        about = ConfigRecord({"run": run, "accord": accord, "server-round": number})
        content = RecordDict({"arrays": arrays, "config": about})
        open_ = set(grid.push_messages([Message(content, node, "train") for node in nodes]))
        pause = 0.002
        while open_:
            for mark in list(open_):
                for reply in grid.pull_messages([mark]):
                    if not reply.has_content():
                        raise RuntimeError(f"a site failed: {reply.error.reason}")
                    open_.discard(mark)
            clock = getattr(grid, "clock", time)
            clock.sleep(pause if open_ else 0)
            pause = min(0.2, 1.5 * pause)
        seconds.append(time.perf_counter() - began)
    return seconds


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Carry what the run config says, and write down how long it took."""
    config = context.run_config
    took = carry(
        grid,
        str(config["model"]),
        int(config["rounds"]),
        int(config["sites"]),
    )
    Path(str(config["out"])).write_text(json.dumps(took))
