"""Client-level privacy: clip, sum and noise at the coordinator, and the plan that they cost."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideAdaptiveClipping, FedAvg
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats
from wards import Silent

from fedaccord.errors import AccordError
from fedaccord.privacy.client_level import ROUNDING, ClientPlan, clip, clipped_sum, release
from fedaccord.privacy.noise import OsSource
from fedaccord.simulations.engine import InProcessGrid
from fedaccord.strategies.client_level import ClientLevelMean

ALPHA = 2e-6
PLAN = ClientPlan("a", 200, 20, 2, 2.0, 1.0, 1e-5)
ADAPTIVE = ClientPlan(
    "a", 200, 20, 2, 2.0, 1.0, 1e-5, 0.5, clipping_learning_rate=0.2, count_noise=10.0
)


# --- the sum ------------------------------------------------------------------------------------

NASTY = [0.0, -0.0, 1.0, -1.0, 1e30, -1e30, 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf]
UPDATES = st.lists(
    arrays.arrays(np.float64, 3, elements=st.one_of(st.sampled_from(NASTY), st.floats(-1e3, 1e3))),
    max_size=8,
)
ONE = arrays.arrays(np.float64, 3, elements=st.one_of(st.sampled_from(NASTY), st.floats()))


@settings(max_examples=500, deadline=None)
@given(UPDATES, ONE, st.integers(0, 8), st.sampled_from([1e-9, 0.3, 1.0, 1e6]))
def test_one_site_more_moves_the_sum_by_the_norm_and_the_votes_by_a_half(
    others: list[np.ndarray], one: np.ndarray, place: int, norm: float
) -> None:
    neighbour = [*others[:place], one, *others[place:]]
    left, votes = clipped_sum(others, 3, norm)
    right, more = clipped_sum(neighbour, 3, norm)
    assert np.isfinite(right).all()
    assert np.linalg.norm(right - left) <= norm * (1 + ROUNDING)
    assert abs(more - votes) <= 0.5


def test_the_norm_is_reached_so_the_bound_is_tight() -> None:
    left, _ = clipped_sum([], 3, 1.0)
    right, _ = clipped_sum([np.array([1e30, 0, 0])], 3, 1.0)
    assert np.linalg.norm(right - left) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(
    ("update", "contribution", "vote"),
    [
        ([0.0, 0.0], [0.0, 0.0], 0.5),
        ([0.6, 0.0], [0.6, 0.0], 0.5),
        ([0.6, 0.8], [0.6, 0.8], 0.5),
        ([3.0, 4.0], [0.6, 0.8], -0.5),
        ([1e308, 1e308], [0.5**0.5, 0.5**0.5], -0.5),
        ([math.nan, 1.0], [0.0, 0.0], 0.0),
        ([math.inf, 1.0], [0.0, 0.0], 0.0),
        ([5e-324, 0.0], [5e-324, 0.0], 0.5),
    ],
)
def test_what_an_update_contributes_is_the_table_in_the_docstring(
    update: list[float], contribution: list[float], vote: float
) -> None:
    clipped, said = clip(np.array(update), 1.0)
    assert clipped == pytest.approx(contribution, abs=1e-15)
    assert said == vote


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_sum_over_thousands_of_sites_stays_within_the_slack(dtype: Any) -> None:
    rng = np.random.default_rng(5)
    rows = [rng.standard_normal(50).astype(dtype).astype(np.float64) * 1e4 for _ in range(5000)]
    whole, _ = clipped_sum(rows, 50, 1.0)
    without, _ = clipped_sum(rows[1:], 50, 1.0)
    assert np.linalg.norm(whole - without) <= 1 + ROUNDING


# --- the mean -----------------------------------------------------------------------------------


def test_a_missing_update_leaves_the_denominator_at_the_sites_asked() -> None:
    two = [np.array([0.5, 0.0]), np.array([0.0, 0.5])]
    out = release(PLAN, two, 2, 10, 1.0, Silent())
    assert out.mean == pytest.approx([0.05, 0.05], abs=1e-6)
    assert out.asked == 10


def noises(plan: ClientPlan, factor: float) -> np.ndarray:
    """What is added to the sum, in units of the standard deviation that the plan declares."""

    class Scaled(OsSource):
        def normal(self, count: int) -> np.ndarray:
            return super().normal(count) * factor

    out = release(plan, [np.full(100_000, 1.0)], 100_000, 50, 3.0, Scaled())
    total = np.full(100_000, 3.0 / math.sqrt(100_000))
    return (out.mean * 50 - total) / (plan.mean_multiplier * 3.0)


def chance(draws: np.ndarray) -> float:
    """Two-sided p-value of a chi-square test that the draws have variance 1."""
    statistic = float(np.sum(draws**2))
    return 2 * min(stats.chi2.sf(statistic, draws.size), stats.chi2.cdf(statistic, draws.size))


@pytest.mark.parametrize("plan", [PLAN, ADAPTIVE])
def test_the_noise_on_the_sum_is_the_plans_and_neither_less_nor_more(plan: ClientPlan) -> None:
    assert chance(noises(plan, 1.0)) > ALPHA
    for factor in (0.0, 0.5, 0.9, 0.98, 1.02):
        assert chance(noises(plan, factor)) < ALPHA, factor


def test_the_noise_on_the_count_is_the_declared_and_neither_less_nor_more() -> None:
    plan = ADAPTIVE
    updates = [np.array([v]) for v in (0.0, 0.1, 5.0, 5.0)]  # two votes each way
    shares = [release(plan, updates, 1, 4, 1.0, OsSource()).unclipped for _ in range(4000)]
    counts = (np.array(shares, np.float64) - 0.5) * 4
    assert chance(counts / 10) > ALPHA
    assert chance(counts / 8) < ALPHA
    assert chance(counts / 12.5) < ALPHA


def test_a_released_sum_lies_on_the_public_grid() -> None:
    out = release(PLAN, [np.array([1 / 3, math.pi])], 2, 1, 1.0, OsSource())
    ticks = out.mean / 2.0 ** (math.floor(math.log2(out.noise_stddev)) - 20)
    assert (ticks == np.round(ticks)).all()


# --- adaptive clipping --------------------------------------------------------------------------


def follow(start: float, stream: Iterator[np.ndarray], rounds: int) -> float:
    """The clipping norm after some rounds of updates with the stream's norms, ours."""
    plan = ClientPlan("a", 100, rounds, 0, 1.0, start, 1e-5, 0.5, 0.2, 5.0)
    norm = start
    for _ in range(rounds):
        updates = [np.array([length]) for length in next(stream)]
        norm = release(plan, updates, 1, len(updates), norm, OsSource()).next_clipping_norm
    return norm


def follow_flower(start: float, stream: Iterator[np.ndarray], rounds: int) -> float:
    """The same with Flower's own wrapper, called as its server would."""
    wrapper = DifferentialPrivacyServerSideAdaptiveClipping(
        FedAvg(), 1.0, 100, initial_clipping_norm=start, clipped_count_stddev=5.0
    )
    InProcessGrid(ClientApp(), 1, {})  # Flower wants to know whose messages these are
    wrapper.current_arrays = ArrayRecord({"w": Array(np.zeros(1))})
    for number in range(rounds):
        replies = [reply(np.array([length]), 1, n) for n, length in enumerate(next(stream))]
        wrapper.aggregate_train(number + 1, replies)
    return wrapper.clipping_norm


def reply(weights: np.ndarray, examples: float, node: int) -> Message:
    asked = Message(RecordDict(), node + 1, "train")
    content = RecordDict(
        {
            "arrays": ArrayRecord({"w": Array(weights)}),
            "metrics": MetricRecord({"num-examples": examples}),
        }
    )
    return Message(content, reply_to=asked)


def norms(seed: int) -> Iterator[np.ndarray]:
    """Norms of 100 updates a round, log-normal with median 1; the same for whoever asks."""
    rng = np.random.default_rng(seed)
    while True:
        yield np.exp(0.5 * rng.standard_normal(100))


# The norm walks with sd about lr * noise of the share / sqrt(2 * lr * slope), below 0.03 in log
# (share's sd: 5/100 of noise and 0.05 of sampling; slope 0.56 to 0.8): 0.3 is more than nine of
# them.
NEAR = 0.3


@pytest.mark.parametrize("start", [0.1, 10.0])
def test_the_norm_converges_to_the_true_quantile_and_flowers_own_does_not(
    start: float, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "flwr")  # it writes a line for every update
    assert abs(math.log(follow(start, norms(1), 80))) < NEAR
    astray = follow_flower(start, norms(1), 80)
    assert abs(math.log(astray)) > abs(math.log(start)) - NEAR  # no nearer than where it began


@pytest.mark.parametrize("gamma", [0.2, 0.8])
def test_the_norm_converges_to_other_quantiles_too(gamma: float) -> None:
    plan = ClientPlan("a", 100, 120, 0, 1.0, 1.0, 1e-5, gamma, 0.2, 5.0)
    norm, stream = 1.0, norms(2)
    for _ in range(120):
        updates = [np.array([length]) for length in next(stream)]
        norm = release(plan, updates, 1, 100, norm, OsSource()).next_clipping_norm
    right = 0.5 * stats.norm.ppf(gamma)
    assert abs(math.log(norm) - right) < NEAR
    assert abs(math.log(norm) + right) > NEAR  # and not to the one on the other side


def test_a_norm_that_nobody_needs_stays_a_number() -> None:
    norm = 1.0
    for _ in range(5000):
        norm = ADAPTIVE.next_norm(norm, 40.0)
    assert 0 < norm < 1e-9
    for _ in range(5000):
        norm = ADAPTIVE.next_norm(norm, -40.0)
    assert 1e9 < norm < math.inf


# --- the strategy -------------------------------------------------------------------------------


def one_round(updates: list[np.ndarray], examples: list[float], asked: int) -> np.ndarray:
    strategy = ClientLevelMean(PLAN, Silent)
    base = ArrayRecord({"w": Array(np.array([10.0, 20.0]))})
    messages = list(
        strategy.configure_train(1, base, ConfigRecord({}), InProcessGrid(ClientApp(), asked, {}))
    )
    assert len(messages) == asked
    replies = [
        reply(base["w"].numpy() + update, n, node)
        for node, (update, n) in enumerate(zip(updates, examples, strict=True))
    ]
    out, _ = strategy.aggregate_train(1, replies)
    assert out is not None
    return out["w"].numpy() - base["w"].numpy()


@given(st.lists(st.sampled_from([0.0, 1.0, 1e18, -5.0]), min_size=3, max_size=3))
@settings(deadline=None)
def test_every_site_counts_the_same_whatever_number_of_examples_it_claims(
    examples: list[float],
) -> None:
    updates = [np.array([0.5, 0.0]), np.array([0.0, 0.5]), np.array([30.0, 40.0])]
    mean = one_round(updates, examples, 3)
    assert mean == pytest.approx([1.1 / 3, 1.3 / 3], abs=1e-5)


def test_the_mean_is_over_the_sites_asked_where_some_do_not_reply() -> None:
    updates = [np.array([0.5, 0.0]), np.array([0.0, 0.5])]
    assert one_round(updates, [1, 1], 5) == pytest.approx([0.1, 0.1], abs=1e-5)


def test_an_update_that_is_not_finite_contributes_zero() -> None:
    updates = [np.array([0.5, 0.0]), np.array([math.nan, 1.0]), np.array([math.inf, 0.0])]
    assert one_round(updates, [1, 1, 1], 3) == pytest.approx([0.5 / 3, 0.0], abs=1e-5)


def test_weights_that_take_no_noise_are_refused() -> None:
    strategy = ClientLevelMean(PLAN)
    base = ArrayRecord({"steps": Array(np.array([3]))})
    with pytest.raises(AccordError, match="takes no noise"):
        strategy.configure_train(1, base, ConfigRecord({}), InProcessGrid(ClientApp(), 1, {}))
