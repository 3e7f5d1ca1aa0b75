"""What `benchmarks.simulate` runs: one site's training, and Flower apps around it.

A site has 100 records and takes 10 steps of 10, so the same work is done wherever it is called
from. Weights travel as one flat array in float32, updates too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fedaccord.accord import TrainingSection
from fedaccord.client.passes import How
from fedaccord.client.train import SeededSource, train_private
from fedaccord.models.build import build
from fedaccord.privacy.noise import OsSource
from fedaccord.privacy.plan import PrivacyPlan
from fedaccord.server.admission import DrawnGrid
from fedaccord.server.mail import Mail
from fedaccord.strategies.driver import Driver
from fedaccord.strategies.seam import Setting, make
from fedaccord.strategies.sums import OrderFreeSum
from fedaccord.strategies.updates import Update, to_weights
from fedaccord.tasks import Records, TaskSpec

Flat = npt.NDArray[np.float32]

RECORDS, STEPS, BATCH = 100, 10, 10  # of a site: records; steps a round; records a step
LEARNING_RATE = 0.05
DISTINCT = 100  # sites that have records of their own; the next hundred has the same again
BOUND = 100.0  # of a coordinate of an update
CLASSES = 10
TRAINING = TrainingSection(steps=STEPS, learning_rate=LEARNING_RATE)
# Kernels by rule and not by measuring, which could choose others in another process.
HOW = How("bookkeeping", "float32", measured=False)


# Models by name: the side of their square images in pixels.
MODELS = {"4k": 8, "55k": 28}


@dataclass(frozen=True)
class Work:
    """What every site does in a round.

    Attributes:
        model: a name in MODELS.
        private: whether it trains under a privacy plan.
        seeded: whether noise and sampling repeat, to compare models bit for bit. A run that is
            timed draws them as a site does, from the operating system.
    """

    model: str
    private: bool
    seeded: bool

    def config(self) -> ConfigRecord:
        """Write it for a message."""
        return ConfigRecord({"model": self.model, "private": self.private, "seeded": self.seeded})

    @staticmethod
    def read(config: Mapping[str, Any]) -> Work:
        """Read what `config` wrote."""
        return Work(str(config["model"]), bool(config["private"]), bool(config["seeded"]))


@cache
def network(model: str) -> nn.Module:
    """Build a model once in a process; its sites take turns with it."""
    return _built(model)


def initial(model: str) -> Flat:
    """Return a model's first weights as one row."""
    return parameters_to_vector(_built(model).parameters()).detach().numpy().copy()


def _built(model: str) -> nn.Module:
    """Build a CNN: of 4,090 weights and two layers, or the `cnn2d` of accords, of 55,434."""
    side = MODELS[model]
    if model == "4k":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(1)
            layers = [nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
            return nn.Sequential(*layers, nn.Linear(24 * (side // 2) ** 2, CLASSES))
    classes = tuple(f"class {i}" for i in range(CLASSES))
    spec = TaskSpec("random", ("image",), classes, {}, "drawn at random", (1, side, side))
    return build("cnn2d", spec, {}, seed=1)


@cache
def records(model: str, place: int) -> Records:
    """Draw a site's records once in a process, the same in every process."""
    side = MODELS[model]
    rng = np.random.default_rng([place, side])
    return Records(
        inputs=rng.random((RECORDS, 1, side, side), np.float32),
        labels=rng.integers(CLASSES, size=RECORDS),
        subjects=np.arange(RECORDS),
        groups={},
    )


def update(work: Work, place: int, number: int, weights: Flat) -> Flat:
    """Train at one site for one round.

    Args:
        work: what to do.
        place: of the site, from 0.
        number: the round.
        weights: the global model's, (d,); left as they are.

    Returns:
        What training added to them, float32 (d,).
    """
    model, own = network(work.model), records(work.model, place % DISTINCT)
    vector_to_parameters(torch.from_numpy(weights.copy()), model.parameters())
    if work.private:
        plan = PrivacyPlan(f"site {place}", RECORDS, 100, STEPS, BATCH / RECORDS, 1.0, 1.0, 1e-5)
        steps = iter(range(STEPS))

        def entropy() -> SeededSource | OsSource:
            return SeededSource(place, number, next(steps)) if work.seeded else OsSource()

        train_private(model, own, plan, TRAINING, entropy, HOW)
    else:
        _train(model, own, np.random.default_rng([place, number]).permutation(RECORDS))
    return parameters_to_vector(model.parameters()).detach().numpy() - weights


def _train(model: nn.Module, own: Records, order: npt.NDArray[np.int64]) -> None:
    """Go once through a site's records in an order, in plain torch."""
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    inputs, labels = torch.from_numpy(own.inputs), torch.from_numpy(own.labels)
    for rows in torch.from_numpy(order).split(BATCH):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
        optimizer.step()


def plain_round(work: Work, places: Sequence[int], number: int, weights: Flat) -> Flat:
    """Run a round as a plain Python loop: no message, no app, no strategy.

    Args:
        work: what a site does.
        places: the sites.
        number: the round.
        weights: the global model's, (d,).

    Returns:
        The new global model, float32 (d,).
    """
    total = OrderFreeSum(len(weights), BOUND, len(places))
    for place in places:
        total.add(update(work, place, number, weights).astype(np.float64))
    return (weights.astype(np.float64) + total.total() / len(places)).astype(np.float32)


app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer a training message with the site's update."""
    config = message.content["config"]
    weights = message.content["arrays"]["w"].numpy()
    place = int(context.node_config["partition-id"])
    change = update(Work.read(config), place, int(config["server-round"]), weights)  # type: ignore[arg-type]
    content = RecordDict(
        {
            "arrays": ArrayRecord({"w": Array(change)}),
            "metrics": MetricRecord({"num-examples": RECORDS}),
            "config": ConfigRecord({"site": site(place)}),
        }
    )
    return Message(content, reply_to=message)


def site(place: int) -> str:
    """Name a site; names sort as places do."""
    return f"site-{place:06d}"


def driver(name: str, cohort: int) -> Driver:
    """Make a strategy by its name in an accord, for sites of equal size."""
    sites = tuple(site(place) for place in range(cohort))
    return make(name, {}, Setting(sites, cohort, 1, STEPS, LEARNING_RATE, 0.0, "sgd", False))


def app_round(
    grid: Grid,
    strategy: Driver,
    work: Work,
    sites: Mapping[int, str],
    number: int,
    weights: Flat,
    flowers: bool = False,
) -> Flat:
    """Run a round over a Grid, as a ServerApp does.

    Args:
        grid: the carrier.
        strategy: combines the updates.
        work: what a site does.
        sites: the drawn nodes and their sites.
        number: the round.
        weights: the global model's, (d,).
        flowers: collect replies by Flower's own `send_and_receive`, which waits for all of them,
            and not one at a time.

    Returns:
        The new global model, float32 (d,).
    """
    model = {"w": weights}
    config = work.config()
    config["server-round"] = number
    messages = strategy.ask(number, model, config, DrawnGrid(grid, dict(sites)))
    replies = (
        grid.send_and_receive(messages)
        if flowers
        else Mail(grid).exchange(messages, 3600.0, f"round {number}")
    )
    outcome = strategy.combine(
        number, model, _updates(replies), bound=BOUND, heaviest=RECORDS, quorum=len(sites)
    )
    if outcome.model is None or len(outcome.sites) != len(sites):
        raise RuntimeError(f"round {number}: {len(outcome.sites)} of {len(sites)} sites answered")
    return np.asarray(outcome.model["w"], np.float32)


def _updates(replies: Iterable[Message]) -> Iterator[Update]:
    """Read replies one by one; a fault at a site ends the run with its words."""
    for reply in replies:
        if reply.has_error():
            raise RuntimeError(reply.error.reason)
        name = str(reply.content["config"]["site"])
        yield Update(name, to_weights(reply.content["arrays"]), RECORDS, {})
