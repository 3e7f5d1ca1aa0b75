"""Client-level privacy under the conformance suite: the coordinator's mean, and how to break it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedaccord.client.app import app as client_app
from fedaccord.conformance.site import planted, together
from fedaccord.privacy.client_level import ClientPlan
from fedaccord.privacy.noise import Floats
from fedaccord.simulations.engine import InProcessGrid
from fedaccord.strategies.client_level import ClientLevelMean

WIDTH = 8
COHORT = 20
WIDE = 100_000  # weights of the round whose noise is tested


@dataclass(frozen=True)
class ClientRuns:
    """What the coordinator's mean did.

    Attributes:
        noise: float64 (100,000,), the released sum of a round in which all updates are zero.
        moved: how far one site's long update, sent with a million "num-examples", moves the sum.
        missing: the released sum of ten equal updates of norm 1 / 2 where twenty were asked, as a
            share of what it must be.
        norms: where adaptive clipping ends from 0.1 x and from 10 x the true quantile, over it.
        plan: the plan.
    """

    noise: Floats
    moved: float
    missing: float
    norms: list[float]
    plan: ClientPlan


class Silent:
    """A source of zeros: what it leaves of a release is the sum."""

    def uniform(self, count: int) -> Floats:
        """Return zeros."""
        return np.zeros(count)

    def normal(self, count: int) -> Floats:
        """Return zeros."""
        return np.zeros(count)


def plan_of(**changes: Any) -> ClientPlan:
    """Make a plan of twenty sites with a clipping norm of 1."""
    about: dict[str, Any] = {
        "site": "north",
        "cohort": COHORT,
        "rounds": 4,
        "spare_rounds": 0,
        "noise_multiplier": 1.0,
        "clipping_norm": 1.0,
        "delta": 1e-5,
    }
    return ClientPlan(**about | changes)


def mean_of(
    plan: ClientPlan, updates: list[Floats], examples: list[int], silent: bool = True
) -> Floats:
    """Run one round of the installed strategy; return the released mean, float64 (d,).

    Args:
        plan: the run's plan.
        updates: float64 (d,) of each site that replies; the others of the cohort are silent.
        examples: the "num-examples" that each reply claims.
        silent: whether the mechanism's source draws zeros.
    """
    width = len(updates[0])
    strategy = ClientLevelMean(plan, Silent) if silent else ClientLevelMean(plan)
    grid = InProcessGrid(client_app, plan.cohort, {})
    base = ArrayRecord({"weights": Array(np.zeros(width))})
    asked = list(strategy.configure_train(1, base, ConfigRecord({}), grid))
    replies = []
    for message, update, count in zip(asked, updates, examples, strict=False):
        arrays = ArrayRecord({"weights": Array(update)})
        metrics = MetricRecord({"num-examples": count})
        content = RecordDict({"arrays": arrays, "metrics": metrics})
        replies.append(Message(content, reply_to=message))
    mean, _ = strategy.aggregate_train(1, replies)
    assert mean is not None
    return mean["weights"].numpy().astype(np.float64)


def observe() -> ClientRuns:
    """Run the rounds that the checks of client-level privacy look at."""
    plan = plan_of()
    zeros = [np.zeros(WIDE)] * COHORT
    drawn = mean_of(plan, zeros, [1] * COHORT, silent=False) * COHORT
    rng = np.random.default_rng(0)
    others = [0.1 * rng.standard_normal(WIDTH) for _ in range(COHORT - 1)]
    long = np.full(WIDTH, 1e6)
    counts = [100] * (COHORT - 1)
    with_it = mean_of(plan, [*others, long], [*counts, 10**6])
    without = mean_of(plan, others, counts)
    half = np.zeros(WIDTH)
    half[0] = 0.5
    missing = mean_of(plan, [half] * 10, [1] * 10)[0] / (10 * 0.5 / COHORT)
    moved = float(np.linalg.norm(with_it - without)) * COHORT
    return ClientRuns(drawn, moved, float(missing), [adapted(0.1), adapted(10.0)], plan)


def adapted(start: float) -> float:
    """Adapt a clipping norm for 150 rounds to updates whose median norm is 1; return its end."""
    plan = plan_of(
        clipping_norm=start, target_quantile=0.5, clipping_learning_rate=0.2, count_noise=1.0
    )
    lengths = np.exp(np.linspace(-1, 1, 101))
    norm = start
    for _ in range(150):
        norm = plan.next_norm(norm, float((lengths <= norm).mean()))
    return norm


@contextmanager
def weighted_by_examples() -> Iterator[None]:
    """Weigh clipped updates by the "num-examples" of their replies, as Flower's FedAvg does."""
    weights: list[float] = []

    def listen(real: Any) -> Any:
        def aggregate(self: Any, number: int, replies: Any) -> Any:
            replies = list(replies)
            counts = [float(r.content["metrics"]["num-examples"]) for r in replies]
            weights[:] = [count * len(counts) / sum(counts) for count in counts]
            return real(self, number, replies)

        return aggregate

    def make(real: Any) -> Any:
        def clipped_sum(updates: Any, width: int, clipping_norm: float) -> tuple[Floats, float]:
            total, votes = np.zeros(width), 0.0
            for update, weight in zip(updates, weights, strict=True):
                part, vote = real([update], width, clipping_norm)
                total += weight * part
                votes += vote
            return total, votes

        return clipped_sum

    with together(
        planted("fedaccord.strategies.client_level:ClientLevelMean.aggregate_train", listen),
        planted("fedaccord.privacy.client_level:clipped_sum", make),
    ):
        yield


def divided_by_replies() -> Any:
    """Divide by the sites that replied, whose number depends on who is there."""

    def make(real: Any) -> Any:
        def release(plan: Any, updates: Any, width: int, asked: int, *rest: Any) -> Any:
            found = list(updates)
            return real(plan, found, width, len(found), *rest)

        return release

    return planted("fedaccord.privacy.client_level:release", make)


def wrong_sign() -> Any:
    """Turn the sign of adaptive clipping round, as flwr 1.41 does."""

    def make(real: Any) -> Any:
        def next_norm(self: ClientPlan, norm: float, unclipped: float) -> float:
            assert self.target_quantile is not None
            return real(self, norm, 2 * self.target_quantile - unclipped)

        return next_norm

    return planted("fedaccord.privacy.client_level:ClientPlan.next_norm", make)
