"""Intervals: they hold the truth as often as they say, and the tests can tell when they do not."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtri
from scipy.stats import binom
from scipy.stats import binomtest as scipy_binomtest

from fedaccord.fairness.intervals import (
    difference_interval,
    equalized_odds_interval,
    rate_intervals,
    ratio_interval,
)

REPETITIONS = 8_000  # at a coverage of .94, .93 is 3.8 standard errors away
LEAST_COVERAGE = 0.93  # asked of 95 % intervals

# (rates, trials): true largest differences 0 and .15, with 2, 3 and 6 groups of 30 to 400.
SETTINGS = [
    (base + np.array(offsets), np.broadcast_to(trials, len(offsets)))
    for base in (0.1, 0.3, 0.5)
    for offsets in (
        [0.0] * 2,
        [0.0] * 3,
        [0.0] * 6,
        [0.0, 0.15],
        [0.0, 0.0, 0.15],
        [0.0, 0.03, 0.06, 0.09, 0.12, 0.15],
        [0.0, 0.0, 0.0, 0.15, 0.15, 0.15],
    )
    for trials in (30, 100, 400)
] + [
    (np.full(6, 0.3), np.array([30, 60, 100, 200, 300, 400])),
    (np.full(2, 0.3), np.array([30, 400])),
]


def coverage(interval, rates, trials, seed=0):
    """How often `interval` holds the true largest difference, over seeded repetitions."""
    x = np.random.default_rng(seed).binomial(trials, rates, (REPETITIONS, len(rates)))
    low, high = interval(x, trials, 0.95)
    return np.mean((low <= np.ptp(rates) + 1e-9) & (np.ptp(rates) - 1e-9 <= high))


def least_coverage(interval):
    """The coverage at the worst of SETTINGS."""
    return min(coverage(interval, rates, trials) for rates, trials in SETTINGS)


def naive_wald(x, n, confidence):
    """The textbook interval for the two extreme groups, as if nobody had looked for them."""
    rate = x / n
    top, bottom = rate.argmax(-1)[..., None], rate.argmin(-1)[..., None]
    variance = rate * (1 - rate) / n
    gap = np.ptp(rate, axis=-1)
    both = np.take_along_axis(variance, top, -1) + np.take_along_axis(variance, bottom, -1)
    half = ndtri((1 + confidence) / 2) * np.sqrt(both[..., 0])
    return gap - half, gap + half


def percentile_bootstrap(x, n, confidence, seed=1):
    """Percentiles of the largest difference over resampled subjects."""
    x = x[:60]
    resampled = np.random.default_rng(seed).binomial(n, x / n, (400, *x.shape)) / n
    tail = (1 - confidence) / 2
    return tuple(np.quantile(np.ptp(resampled, axis=-1), [tail, 1 - tail], axis=0))


# --- statistic: the difference ---


@pytest.mark.parametrize(("rates", "trials"), SETTINGS)
def test_difference_interval_holds_the_true_difference(rates, trials):
    assert coverage(difference_interval, rates, trials) >= LEAST_COVERAGE


def test_the_coverage_test_rejects_an_interval_without_multiplicity_correction():
    assert coverage(naive_wald, np.full(6, 0.3), np.full(6, 100)) < 0.8


def test_the_coverage_test_rejects_an_interval_that_is_slightly_too_short():
    def at_90_percent(x, n, confidence):
        return difference_interval(x, n, 1 - 2 * (1 - confidence))

    assert least_coverage(at_90_percent) < LEAST_COVERAGE


def test_the_percentile_bootstrap_misses_a_true_difference_of_zero_every_time():
    x = np.random.default_rng(0).binomial(100, 0.3, (60, 6))
    low, _ = percentile_bootstrap(x, 100, 0.95)
    ours, _ = difference_interval(x, 100, 0.95)
    assert np.sum(low <= 0) == 0
    assert np.mean(ours <= 0) > 0.85


def test_difference_interval_excludes_zero_for_a_gap_of_15_points_with_400_in_each_of_2_groups():
    x = np.random.default_rng(0).binomial(400, [0.3, 0.45], (REPETITIONS, 2))
    low, _ = difference_interval(x, 400, 0.95)
    assert np.mean(low > 0) >= 0.9


def test_two_groups_get_the_agresti_caffo_interval():
    # 7 of 30 and 15 of 40: rates 8/32 and 16/42, difference .130952, z .975 = 1.959964.
    low, high = difference_interval([7, 15], [30, 40], 0.95)
    half = 1.959964 * np.sqrt(8 / 32 * 24 / 32 / 32 + 16 / 42 * 26 / 42 / 42)
    assert (low, high) == pytest.approx((0.0, 16 / 42 - 8 / 32 + half), abs=1e-6)


def test_three_groups_get_tukeys_quantile_at_infinite_degrees_of_freedom():
    # q(.95; 3, inf) = 3.314 in printed tables of the studentized range; q**2 / 8 is added twice.
    _, high = difference_interval([50, 50, 50], [100, 100, 100], 0.95)
    assert high == pytest.approx(3.314 * np.sqrt(0.25 / (100 + 3.314**2 / 4)), abs=1e-4)


# --- statistic: rates and their ratio ---


def simultaneous_coverage(intervals, n, groups, rates):
    """The exact least coverage over `rates` of intervals for `groups` groups of one rate."""
    x = np.repeat(np.arange(n + 1)[:, None], groups, axis=1)
    low, high = (side[:, 0] for side in intervals(x, n, 0.95))
    held = [
        binom.pmf(np.arange(n + 1), n, rate)[(low <= rate) & (rate <= high)].sum() for rate in rates
    ]
    return min(held) ** groups


RATES = np.linspace(0.002, 0.998, 499)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("n", [5, 30, 400])
def test_rate_intervals_hold_all_rates_at_once_at_any_rate(n, groups):
    assert simultaneous_coverage(rate_intervals, n, groups, RATES) >= 0.95


def test_the_exact_coverage_rejects_rates_that_are_bounded_one_at_a_time():
    def one_at_a_time(x, n, confidence):
        low, high = rate_intervals(x[:, :1], n, confidence)
        return low, high

    assert simultaneous_coverage(one_at_a_time, 400, 6, RATES) < 0.8


def test_the_exact_coverage_rejects_wilsons_intervals():
    def wilson(x, n, confidence):
        z = ndtri((1 + confidence ** (1 / x.shape[-1])) / 2)
        middle = (x + z**2 / 2) / (n + z**2)
        half = z / (n + z**2) * np.sqrt(x * (n - x) / n + z**2 / 4)
        return middle - half, middle + half

    assert simultaneous_coverage(wilson, 30, 6, RATES) < 0.75


def test_one_group_gets_scipys_clopper_pearson_interval():
    for x in (0, 1, 7, 29, 30):
        exact = scipy_binomtest(x, 30).proportion_ci(0.9, method="exact")
        low, high = rate_intervals([x], [30], 0.9)
        assert (low[0], high[0]) == pytest.approx((exact.low, exact.high), abs=1e-10)


@pytest.mark.parametrize("rates", [[0.3, 0.3], [0.05, 0.05, 0.05], [0.2, 0.3, 0.4, 0.4]])
def test_ratio_interval_holds_the_true_ratio(rates):
    for n in (30, 100, 400):
        x = np.random.default_rng(0).binomial(n, rates, (REPETITIONS, len(rates)))
        low, high = ratio_interval(x, n, 0.95)
        assert np.mean((low <= min(rates) / max(rates)) & (min(rates) / max(rates) <= high)) >= 0.95


def test_ratio_interval_excludes_one_for_a_gap_of_15_points_with_400_in_each_of_2_groups():
    x = np.random.default_rng(0).binomial(400, [0.3, 0.45], (REPETITIONS, 2))
    assert np.mean(ratio_interval(x, 400, 0.95)[1] < 1) >= 0.85


@pytest.mark.parametrize("gap", [0.0, 0.15])
def test_equalized_odds_interval_holds_the_true_larger_difference(gap):
    rng = np.random.default_rng(0)
    for n in (30, 100, 400):
        hits = rng.binomial(n, [0.6, 0.6, 0.6], (REPETITIONS, 3))
        alarms = rng.binomial(n, [0.2, 0.2 + gap, 0.2], (REPETITIONS, 3))
        low, high = equalized_odds_interval(hits, n, alarms, n, 0.95)
        assert np.mean((low <= gap + 1e-9) & (gap - 1e-9 <= high)) >= LEAST_COVERAGE


def test_the_coverage_test_rejects_equalized_odds_without_bonferroni():
    x = np.random.default_rng(0).binomial(400, 0.3, (2, REPETITIONS, 3))
    low = np.maximum(*(difference_interval(each, 400, 0.95)[0] for each in x))
    assert np.mean(low <= 0) < LEAST_COVERAGE


# --- law ---


@st.composite
def samples(draw, least_groups=2):
    """(successes, trials) of 2 to 6 groups of 1 to 500."""
    trials = draw(st.lists(st.integers(1, 500), min_size=least_groups, max_size=6))
    successes = [draw(st.one_of(st.just(0), st.just(n), st.integers(0, n))) for n in trials]
    return np.array(successes), np.array(trials)


CONFIDENCES = st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.99])


@given(samples(), CONFIDENCES)
@settings(deadline=None)
def test_every_interval_contains_its_estimate_and_stays_in_0_to_1(sample, confidence):
    x, n = sample
    rate = x / n
    low, high = rate_intervals(x, n, confidence)
    assert (low >= 0).all() and (low <= rate).all() and (rate <= high).all() and (high <= 1).all()
    low, high = difference_interval(x, n, confidence)
    assert 0 <= low <= np.ptp(rate) <= high <= 1
    low, high = ratio_interval(x, n, confidence)
    assert 0 <= low <= high <= 1
    if x.any():
        assert low <= rate.min() / rate.max() <= high


@given(samples(), CONFIDENCES, CONFIDENCES)
@settings(deadline=None)
def test_more_confidence_never_shortens_an_interval(sample, one, other):
    less, more = sorted((one, other))
    for interval in (rate_intervals, difference_interval, ratio_interval):
        low, high = interval(*sample, less)
        wider_low, wider_high = interval(*sample, more)
        assert (wider_low <= low + 1e-12).all() and (wider_high >= high - 1e-12).all()


@given(samples(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_order_of_groups_does_not_matter(sample, random):
    x, n = sample
    order = random.sample(range(len(x)), len(x))
    assert np.array_equal(
        rate_intervals(x[order], n[order], 0.95)[0], rate_intervals(x, n, 0.95)[0][order]
    )
    for interval in (difference_interval, ratio_interval):
        assert interval(x[order], n[order], 0.95) == pytest.approx(interval(x, n, 0.95), abs=1e-12)


@given(samples())
@settings(deadline=None)
def test_leading_axes_are_separate_problems(sample):
    x, n = sample
    stacked = np.stack([x, n - x])
    for interval in (rate_intervals, difference_interval, ratio_interval):
        together = np.array(interval(stacked, n, 0.95))
        apart = np.array([interval(row, n, 0.95) for row in stacked])
        assert np.array_equal(together, apart.swapaxes(0, 1))


def test_more_groups_of_the_same_rate_widen_the_difference():
    highs = [difference_interval([30] * g, [100] * g, 0.95)[1] for g in (2, 3, 6)]
    assert highs == sorted(highs) and highs[0] < highs[2]


def test_a_group_without_trials_has_the_rate_interval_0_to_1():
    low, high = rate_intervals([0, 5], [0, 10], 0.95)
    assert (low[0], high[0]) == (0.0, 1.0)


def test_nobody_selected_leaves_the_ratio_open():
    assert ratio_interval([0, 0], [50, 50], 0.95) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([5], [10], 0.95), "successes has 1 groups; it needs at least 2"),
        (([5, 0], [10, 0], 0.95), "trials holds 0; it must be at least 1"),
        (([5, 11], [10, 10], 0.95), "successes holds 11; it must lie between 0 and its trials"),
        (([5, -1], [10, 10], 0.95), "successes holds -1"),
        (([5, float("nan")], [10, 10], 0.95), "successes holds nan"),
        (([5, 5], [10, 10], 95), "confidence is 95; it must lie between 0 and 1"),
    ],
)
def test_counts_that_allow_no_interval_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        difference_interval(*arguments)
