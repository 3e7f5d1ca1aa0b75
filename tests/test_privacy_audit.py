"""The audit's statistics: each accepts what is right and rejects what is slightly wrong."""

import math

import dp_accounting
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedaccord.privacy import audit
from fedaccord.privacy.audit import ALPHA
from fedaccord.privacy.noise import OsSource

DRAWS = 100_000
PEOPLE, STEPS, PROB = 50, 400, 0.2
DELTA = 1e-5


def normal(seed=None, count=DRAWS):
    if seed is None:
        return OsSource().normal(count)
    return np.random.default_rng(seed).standard_normal(count)


def poisson(rng, people=PEOPLE, steps=STEPS, prob=PROB):
    return rng.random((steps, people)) < prob


def shuffled(rng, people=PEOPLE, steps=STEPS, size=10):
    """Batches of one size, each subject once an epoch."""
    out = np.zeros((steps, people), bool)
    for step in range(steps):
        if step % (people // size) == 0:
            order = rng.permutation(people)
        place = step % (people // size) * size
        out[step, order[place : place + size]] = True
    return out


def test_alpha_is_small_enough_for_200_clean_repetitions_of_the_suite():
    tests = 20  # more than the suite has
    assert (1 - ALPHA) ** (200 * tests) > 0.99


def test_the_variance_of_right_noise_is_accepted():
    assert audit.variance_p(2.5 * normal(), 2.5) > ALPHA


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.9, 0.98, 1.02, 2.0])
def test_noise_two_per_cent_off_is_rejected_in_both_directions(factor):
    assert audit.variance_p(factor * normal(), 1.0) < ALPHA


def test_noise_two_per_cent_too_small_is_missed_less_than_once_in_10_000():
    # Power of the exact test: the chi-square quantiles at alpha / 2, the variance 0.98^2 of it.
    low = stats.chi2.ppf(ALPHA / 2, DRAWS)
    high = stats.chi2.isf(ALPHA / 2, DRAWS)
    missed = stats.chi2.cdf(high / 0.98**2, DRAWS) - stats.chi2.cdf(low / 0.98**2, DRAWS)
    assert missed < 1e-4


def test_the_variance_test_is_exact_for_few_draws():
    # Reference: NIST/SEMATECH e-Handbook, chi-square table, 10 degrees of freedom:
    # upper 2.5 % point 20.483, lower 3.247.
    for squares in (20.483, 3.247):
        draws = np.full(10, math.sqrt(squares / 10))
        assert audit.variance_p(draws, 1.0) == pytest.approx(0.05, abs=5e-5)


def test_the_shape_of_right_noise_is_accepted_and_of_other_noise_rejected():
    rng = np.random.default_rng(0)
    assert audit.shape_p(3 * normal(), 3.0) > ALPHA
    assert audit.shape_p(rng.uniform(-math.sqrt(3), math.sqrt(3), DRAWS), 1.0) < ALPHA
    assert audit.shape_p(rng.laplace(0, math.sqrt(0.5), DRAWS), 1.0) < ALPHA
    assert audit.shape_p(normal(0) + 0.03, 1.0) < ALPHA


def test_independent_noise_is_accepted_and_shared_noise_rejected():
    one, other = normal(), normal()
    assert audit.correlation_p(one, other) > ALPHA
    assert audit.correlation_p(one, 0.999 * other + 0.04 * one) < ALPHA
    assert audit.correlation_p(one, -one) == 0.0
    assert audit.correlation_p(one, np.zeros(DRAWS)) == 0.0


def test_independent_coordinates_are_accepted():
    assert audit.coordinates_p(2 * normal(), 2.0) > ALPHA


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: (x + np.roll(x, 1)) / math.sqrt(2),
        lambda x: np.sqrt(1 - 0.04**2) * x + 0.04 * np.roll(x, 777),
        lambda x: x + 0.03,
        lambda x: np.tile(x[: DRAWS // 10], 10),
        np.zeros_like,
    ],
    ids=["neighbour", "a far one, weakly", "common", "repeated block", "none"],
)
def test_coordinates_that_share_noise_are_rejected(spoil):
    assert audit.coordinates_p(spoil(normal(1)), 1.0) < ALPHA


def test_a_declared_rate_is_accepted_and_one_that_is_off_rejected():
    rng = np.random.default_rng()
    drawn = poisson(rng)
    assert audit.binomial_p(int(drawn.sum()), drawn.size, PROB) > ALPHA
    for wrong in (0.18, 0.22):
        drawn = poisson(np.random.default_rng(2), prob=wrong)
        assert audit.binomial_p(int(drawn.sum()), drawn.size, PROB) < ALPHA


@given(st.integers(1, 60), st.floats(0.01, 0.99))
@settings(max_examples=50, deadline=None)
def test_a_binomial_alarm_has_at_most_the_probability_that_it_claims(trials, prob):
    p = [audit.binomial_p(k, trials, prob) for k in range(trials + 1)]
    mass = stats.binom.pmf(np.arange(trials + 1), trials, prob)
    for level in (0.5, 0.05, 0.001):
        assert mass[np.array(p) < level].sum() <= level + 1e-12


def test_batch_sizes_of_poisson_sampling_are_accepted_and_of_others_rejected():
    sizes = poisson(np.random.default_rng()).sum(axis=1)
    assert audit.sizes_p(sizes, PEOPLE, PROB) > ALPHA
    fixed = shuffled(np.random.default_rng(3)).sum(axis=1)
    assert audit.sizes_p(fixed, PEOPLE, PROB) < ALPHA
    # Families that come and go together: the right rate, twice the variance.
    pairs = np.repeat(poisson(np.random.default_rng(4), people=25), 2, axis=1)
    assert audit.sizes_p(pairs.sum(axis=1), PEOPLE, PROB) < ALPHA


def test_the_distribution_of_the_sizes_is_exact():
    # Two steps of two people at 1/2: (size - 1)^2 is 1 with probability 1/2, so the sum of two is
    # 0, 1, 2 with probabilities 1/4, 1/2, 1/4.
    assert audit.sizes_p(np.array([1, 1]), 2, 0.5) == pytest.approx(0.5)
    assert audit.sizes_p(np.array([1, 2]), 2, 0.5) == 1.0
    assert audit.sizes_p(np.array([0, 2]), 2, 0.5) == pytest.approx(0.5)


def test_independent_subjects_are_accepted_and_dependent_ones_rejected():
    assert audit.pairs_p(poisson(np.random.default_rng()), PROB) > ALPHA
    assert audit.pairs_p(shuffled(np.random.default_rng(5)), PROB) < ALPHA
    couple = poisson(np.random.default_rng(6))
    couple[:, 7] = couple[:, 31]
    assert audit.pairs_p(couple, PROB) < ALPHA
    lasting = poisson(np.random.default_rng(7))
    lasting[1::2] = lasting[0::2]
    assert audit.pairs_p(lasting, PROB) < ALPHA


def scores(rng, mu, count=10_000):
    return rng.standard_normal(count) + mu, rng.standard_normal(count)


def test_a_lower_bound_on_mu_stays_under_the_truth_and_is_not_far_from_it():
    inside, outside = scores(np.random.default_rng(), 1.0)
    found = audit.mu_lower_bound(inside, outside, threshold=0.5)
    assert 0.8 < found.value < 1.0
    assert found.canaries == 20_000
    assert found.true_positives == pytest.approx(stats.norm.sf(-0.5), abs=0.03)
    assert found.false_positives == pytest.approx(stats.norm.sf(0.5), abs=0.03)


def test_20_000_canaries_refute_a_claim_whose_noise_is_a_fifth_too_small():
    inside, outside = scores(np.random.default_rng(8), 1.0 / 0.8)
    assert audit.mu_lower_bound(inside, outside, threshold=0.5).value > 1.0


def test_a_lower_bound_on_epsilon_stays_under_the_truth():
    inside, outside = scores(np.random.default_rng(), 1.0)
    truth = dp_accounting.get_epsilon_gaussian(1.0, DELTA)
    found = audit.epsilon_lower_bound(inside, outside, DELTA)
    assert 0.5 < found.value < truth


def test_a_lower_bound_on_epsilon_refutes_a_claim_that_is_too_small():
    inside, outside = scores(np.random.default_rng(9), 4.0)
    assert audit.epsilon_lower_bound(inside, outside, DELTA).value > 4.0


def test_scores_that_tell_nothing_give_a_bound_of_zero():
    inside, outside = scores(np.random.default_rng(10), 0.0)
    assert audit.epsilon_lower_bound(inside, outside, DELTA).value == 0.0
    assert audit.mu_lower_bound(inside, outside, threshold=0.0).value == 0.0


def test_no_number_of_scores_gives_more_than_they_can_show():
    n = 1000
    found = audit.epsilon_lower_bound(np.full(2 * n, 1.0), np.full(2 * n, 0.0), DELTA)
    # All of n right, none of n wrong: limits (a/2)^(1/n) and 1 - (a/2)^(1/n), by the formula.
    edge = (ALPHA / 2) ** (1 / n)
    assert found.value == pytest.approx(math.log((edge - DELTA) / (1 - edge)), rel=1e-9)


def test_mu_becomes_epsilon_as_balle_and_wang_have_it():
    # Balle and Wang 2018, theorem 8: delta of the Gaussian mechanism at an epsilon.
    for mu in (0.3, 1.0, 2.5):
        e = audit.mu_to_epsilon(mu, DELTA)
        delta = stats.norm.cdf(mu / 2 - e / mu) - math.exp(e) * stats.norm.cdf(-mu / 2 - e / mu)
        assert delta == pytest.approx(DELTA, rel=1e-3)
    assert audit.mu_to_epsilon(0.0, DELTA) == 0.0
