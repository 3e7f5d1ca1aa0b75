"""Training in the published set-up of four heart hospitals: ours by name, and all rows pooled.

The hospitals are a Flower ClientApp on the in-process engine's grid; a strategy is made and driven
as an accord's is. Weights to start from, batches, steps and rounds are those of the published runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.heart_table_data import INPUTS, Floats, Hospital, Part
from fedaccord.server.admission import DrawnGrid
from fedaccord.simulations import engine
from fedaccord.strategies.seam import Setting, make
from fedaccord.strategies.updates import Update, Weights, flat, shaped, to_arrays, to_weights
from fedaccord.tasks import TaskSpec

ROUNDS, STEPS, BATCH = 15, 100, 4
EPOCHS, POOLED_RATE = 50, 0.001  # of the pooled row: Adam on the rows of all hospitals
FARTHEST = 100.0  # no coordinate of an update comes near it: 100 steps of a rate of 0.01 or less


@dataclass(frozen=True)
class Row:
    """A strategy with the settings that were published with its figure.

    Attributes:
        published: the published row.
        name: of the strategy, as in an accord.
        rate: learning rate of the hospitals.
        options: of the strategy.
        note: what differs from the published settings, for the table.
    """

    published: str
    name: str
    rate: float
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


def adam_correction(beta_1: float, beta_2: float, rounds: int) -> float:
    """Give the mean over rounds of what Flower's FedAdam multiplies eta by.

    Its bias correction in round t is sqrt(1 - beta_2^(t + 1)) / (1 - beta_1^(t + 1)); the published
    runs had none.
    """
    t = np.arange(1, rounds + 1) + 1
    return float(np.mean(np.sqrt(1 - beta_2**t) / (1 - beta_1**t)))


MOMENTS = {"beta_1": 0.9, "beta_2": 0.999, "tau": 1e-8}
RAISED = 0.01 / adam_correction(0.9, 0.999, ROUNDS)
ROWS = (
    Row("FedAvg", "fedavg", 0.001),
    Row("FedProx", "fedprox", 0.001, {"proximal_mu": 0.01}),
    Row("SCAFFOLD", "scaffold", 0.001, {"server_learning_rate": 1.0}),
    Row("FedAdam", "fedadam", 0.01, {"eta": 0.01, **MOMENTS}),
    Row("FedAdam", "fedadam", 0.01, {"eta": RAISED, **MOMENTS}, f"eta {RAISED:.3f}"),
    Row("FedYogi", "fedyogi", 0.003162, {"eta": 0.01, **MOMENTS}),
    Row("FedAdagrad", "fedadagrad", 0.003162, {"eta": 0.316228, "tau": 1e-8}),
)


def start(seed: int) -> Weights:
    """Draw the weights that a published run of this seed started from: torch's own, of 13 + 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = torch.nn.Linear(len(INPUTS), 1)
    return {name: p.detach().numpy().copy() for name, p in layer.named_parameters()}


def logistic(spec: TaskSpec) -> torch.nn.Module:
    """Build logistic regression over a task's columns."""
    return torch.nn.Linear(len(spec.features), len(spec.classes))


def batches(rows: int, rng: np.random.Generator) -> Iterator[npt.NDArray[np.int64]]:
    """Go through shuffled rows in batches for ever, the rest of an epoch as a smaller batch."""
    while True:
        order = rng.permutation(rows)
        yield from (order[place : place + BATCH] for place in range(0, rows, BATCH))


def hospitals_app(sites: Sequence[Hospital], rate: float, seed: int) -> ClientApp:
    """Make the four hospitals: logistic regression by plain gradient descent.

    They follow what a strategy may ask of a site: FedProx' term by `proximal-mu`, and a
    `correction` added to every gradient. An order of rows goes on from round to round.
    """
    app = ClientApp()
    orders = [
        batches(len(site.train.labels), np.random.default_rng([seed, place]))
        for place, site in enumerate(sites)
    ]

    @app.train()
    def train(message: Message, context: Context) -> Message:
        """Send what a round's steps add to the weights."""
        place = int(context.node_config["partition-id"])
        content = message.content
        model = to_weights(content.array_records["arrays"])
        mu = content.config_records["config"].get("proximal-mu", 0.0)
        assert isinstance(mu, int | float)
        shift = np.zeros(len(INPUTS) + 1)
        if "correction" in content.array_records:
            sent = to_weights(content.array_records["correction"])
            shift = flat({name: sent[name] for name in model})
        inputs, labels = with_one(sites[place].train), sites[place].train.labels
        begin = flat(model)
        now = begin.copy()
        for _ in range(STEPS):
            rows = next(orders[place])
            error = 1 / (1 + np.exp(-inputs[rows] @ now)) - labels[rows]
            slope = error @ inputs[rows] / len(rows)
            now = now - rate * (slope + mu * (now - begin) + shift)
        change = to_arrays(shaped(now - begin, model))
        return Message(RecordDict({"arrays": change}), reply_to=message)

    return app


def with_one(part: Part) -> Floats:
    """Return inputs with a column of ones, so that weight and bias are one row."""
    return np.c_[part.inputs, np.ones(len(part.labels))]


def federated(row: Row, sites: Sequence[Hospital], seed: int) -> list[float]:
    """Train by one of our strategies, through Flower's messages; accuracy by hospital."""
    names = tuple(site.name for site in sites)
    weights = {site.name: len(site.train.labels) for site in sites}
    setting = Setting(names, len(names), len(names), STEPS, row.rate, 0.0, "sgd", False)
    driver = make(row.name, row.options, setting)
    grid = engine.InProcessGrid(hospitals_app(sites, row.rate, seed), len(names), {})
    nodes = dict(zip(grid.get_node_ids(), names, strict=True))
    model = start(seed)
    for number in range(1, ROUNDS + 1):
        asked = driver.ask(number, model, ConfigRecord(), DrawnGrid(grid, nodes))
        updates = [
            Update(site := nodes[reply.metadata.src_node_id], change(reply), weights[site], {})
            for reply in grid.send_and_receive(asked)
        ]
        outcome = driver.combine(
            number, model, updates,
            bound=FARTHEST, heaviest=max(weights.values()), quorum=len(names),
        )  # fmt: skip
        assert outcome.model is not None
        model = outcome.model
    return [accuracy(model, site.test) for site in sites]


def change(reply: Message) -> Weights:
    """Read the update out of a hospital's reply."""
    if reply.has_error():
        raise SystemExit(f"benchmarks.heart_table: a hospital failed: {reply.error.reason}")
    return to_weights(reply.content.array_records["arrays"])


def pooled(parts: Sequence[Part], sites: Sequence[Hospital], seed: int) -> list[float]:
    """Train on all hospitals' rows together, normalised together, as the published row was.

    Args:
        parts: the hospitals' training patients, not normalised.
        sites: the hospitals, each normalised by its own: they test on their own inputs.
        seed: of weights and order.
    """
    every = Part(
        np.concatenate([part.inputs for part in parts]),
        np.concatenate([part.labels for part in parts]),
    )
    part = every.normalised(every.inputs)
    model = {name: torch.from_numpy(value) for name, value in start(seed).items()}
    leaves = [value.double().requires_grad_() for value in model.values()]
    optimizer = torch.optim.Adam(leaves, POOLED_RATE)
    inputs, labels = torch.from_numpy(part.inputs), torch.from_numpy(part.labels)
    rounds = EPOCHS * -(-len(part.labels) // BATCH)
    order = batches(len(part.labels), np.random.default_rng(seed))
    for _ in range(rounds):
        rows = next(order)
        scores = torch.nn.functional.linear(inputs[rows], *leaves)[:, 0]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = {name: leaf.detach().numpy() for name, leaf in zip(model, leaves, strict=True)}
    return [accuracy(trained, site.test) for site in sites]


def accuracy(model: Weights, part: Part) -> float:
    """Share of patients whose score is on the side of their label; 0.5 counts as healthy."""
    return float(((with_one(part) @ flat(model) > 0) == (part.labels == 1)).mean())


def majority(train: npt.NDArray[Any], test: npt.NDArray[Any]) -> float:
    """Accuracy of answering everybody with the more frequent label of the training patients."""
    return float((test == round(float(train.mean()))).mean())
