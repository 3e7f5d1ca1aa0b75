"""Membership tests: bounds from the whole trade-off curve, never below the true curve."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from fedaccord.privacy import accounting, tradeoff
from fedaccord.privacy.accounting import dp_sgd
from fedaccord.privacy.tradeoff import advantage, membership, true_positive_rate

LONG = dp_sgd(2.0, 0.1, 500)  # epsilon 5.56 at delta 1e-5


@settings(deadline=None, max_examples=10)
@given(st.floats(1, 20), st.integers(1, 9), st.floats(0, 1))
def test_a_gaussian_mechanisms_curve_is_met_and_never_undercut(sigma, steps, alarm):
    # Dong, Roth and Su 2022: the curve of mu-GDP, mu = sqrt(steps) / sigma.
    mu = math.sqrt(steps) / sigma
    exact = norm.cdf(mu + norm.ppf(alarm))
    found = true_positive_rate(dp_sgd(sigma, 1.0, steps), alarm)
    assert exact - 1e-9 <= found <= exact + 1e-5


@settings(deadline=None, max_examples=10)
@given(st.floats(1, 20), st.integers(1, 9))
def test_a_gaussian_mechanisms_advantage_is_its_total_variation(sigma, steps):
    exact = 2 * norm.cdf(math.sqrt(steps) / sigma / 2) - 1
    assert exact - 1e-12 <= advantage(dp_sgd(sigma, 1.0, steps)) <= exact + 1e-6


def test_at_epsilon_5_56_one_false_alarm_in_a_hundred_finds_at_most_128_of_1000():
    # Reference: dp-accounting 0.6; one epsilon alone would allow .996.
    found = true_positive_rate(LONG, 0.01)
    epsilon = accounting.epsilon(LONG, 1e-5)
    assert epsilon == pytest.approx(5.556, rel=0.005)
    assert 0.12 < found <= 0.128
    alone = min(1.0, math.exp(epsilon) * 0.01, 1 - math.exp(-epsilon) * (1 - 0.01 - 1e-5))
    assert alone > 0.99


def test_the_bound_holds_for_the_best_test_on_a_sampled_step():
    # One step: N(0, s^2) against (1 - q) N(0, s^2) + q N(1, s^2). The best test is a threshold;
    # its power at each level is known, in both directions.
    sigma, q = 0.7, 0.2
    cuts = np.linspace(-2, 3, 8)
    without = norm.sf(cuts / sigma)
    with_it = (1 - q) * without + q * norm.sf((cuts - 1) / sigma)
    for alarm, power in (*zip(without, with_it, strict=True),):
        assert power <= true_positive_rate(dp_sgd(sigma, q, 1), float(alarm)) + 1e-9
    for alarm, power in (*zip(1 - with_it, 1 - without, strict=True),):
        assert power <= true_positive_rate(dp_sgd(sigma, q, 1), float(alarm)) + 1e-9
    half = q * (norm.sf(-0.5 / sigma) - norm.sf(0.5 / sigma))  # the best cut is at 1/2
    assert half == pytest.approx(advantage(dp_sgd(sigma, q, 1)), abs=1e-6)


@settings(deadline=None, max_examples=5)
@given(st.floats(1, 5), st.floats(0.01, 0.9), st.integers(1, 20), st.floats(0, 1), st.floats(0, 1))
def test_the_curve_rises_with_false_alarms_and_falls_with_noise(sigma, q, steps, one, other):
    low, high = sorted([one, other])
    event = dp_sgd(sigma, q, steps)
    at_low, at_high = true_positive_rate(event, low), true_positive_rate(event, high)
    assert low <= at_low <= at_high + 1e-9 <= 1 + 1e-9
    assert true_positive_rate(dp_sgd(1.5 * sigma, q, steps), low) <= at_low + 1e-9
    assert at_low - low <= advantage(event) + 1e-9


def test_without_privacy_everything_is_found_and_without_a_release_nothing():
    assert true_positive_rate(accounting.NON_PRIVATE, 0.0) == 1.0
    assert advantage(accounting.compose([LONG, accounting.NON_PRIVATE])) == 1.0
    assert true_positive_rate(accounting.compose([]), 0.25) == pytest.approx(0.25, abs=1e-12)
    assert advantage(accounting.compose([])) == pytest.approx(0, abs=1e-12)


def test_the_gathered_figures_are_those_of_their_names():
    assert membership(LONG) == {
        "tpr_at_1_in_100": true_positive_rate(LONG, 0.01),
        "tpr_at_1_in_1000": true_positive_rate(LONG, 0.001),
        "advantage": advantage(LONG),
    }
    assert tradeoff.FALSE_POSITIVES == {"tpr_at_1_in_100": 0.01, "tpr_at_1_in_1000": 0.001}


@pytest.mark.parametrize("alarm", [-1e-9, 1.1, math.nan])
def test_a_rate_that_is_none_is_refused(alarm):
    with pytest.raises(ValueError, match=r"false_positive_rate = .* must be in \[0, 1\]"):
        true_positive_rate(LONG, alarm)
