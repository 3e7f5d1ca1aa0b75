"""Statistics that audit a mechanism from what it released: tests, and lower bounds on loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from dp_accounting import get_epsilon_gaussian
from scipy import stats

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]

# Chance that one test calls a right mechanism wrong. 5,000 tests at this level are all silent 99
# times in 100; noise that is 2 % too small is still found in 100,000 draws.
ALPHA = 2e-6


def variance_p(draws: Floats, stddev: float) -> float:
    """Test whether Gaussian draws of mean zero have a standard deviation; both directions.

    The sum of squares over the variance is chi-square with n degrees of freedom, exactly. With
    100,000 draws a deviation of 2 % is found with probability above 0.9999 at `ALPHA`.

    Args:
        draws: float64 (n,).
        stddev: what is claimed, above 0.

    Returns:
        The two-sided p-value.
    """
    squares = float(((draws / stddev) ** 2).sum())
    low, high = stats.chi2.cdf(squares, draws.size), stats.chi2.sf(squares, draws.size)
    return _two_sided(low, high)


def shape_p(draws: Floats, stddev: float) -> float:
    """Test whether draws are normal with mean 0 and a stddev (Kolmogorov 1933, Smirnov 1948).

    Args:
        draws: float64 (n,).
        stddev: what is claimed, above 0.

    Returns:
        The p-value of the largest distance between the two distribution functions.
    """
    return float(stats.kstest(draws / stddev, "norm").pvalue)


def correlation_p(one: Floats, other: Floats) -> float:
    """Test whether two normal series are independent of each other, by Fisher's z (1921).

    | series | p-value |
    |---|---|
    | one a multiple of the other | 0 |
    | one of them constant | 0: noise is never constant |

    Args:
        one: float64 (n,), n above 3.
        other: float64 (n,).

    Returns:
        The two-sided p-value.
    """
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    r = float(np.corrcoef(one, other)[0, 1])
    if abs(r) > 1 - 1e-12:
        return 0.0
    return float(2 * stats.norm.sf(abs(math.atanh(r)) * math.sqrt(one.size - 3)))


def coordinates_p(draws: Floats, stddev: float) -> float:
    """Test whether the coordinates of one draw of noise are independent of each other.

    Two tests share the level: the sum, in which a part that all coordinates share grows n times as
    fast as the rest; and the largest circular autocorrelation over all n / 2 lags, which finds a
    neighbour's share, a repeated block and a copied tensor (Box and Jenkins 1970, section 2.1.4).

    Args:
        draws: float64 (n,), n at least 10,000 for the normal approximation.
        stddev: what is claimed, above 0.

    Returns:
        The least of the p-values, corrected for their number (Bonferroni).
    """
    n = draws.size
    shared = float(2 * stats.norm.sf(abs(draws.sum()) / (stddev * math.sqrt(n))))
    spectrum = np.abs(np.fft.rfft(draws)) ** 2
    squares = float(np.square(draws).sum())
    if squares == 0:
        return 0.0
    lags = np.fft.irfft(spectrum, n)[1 : n // 2] / squares
    lagged = float(2 * stats.norm.sf(np.abs(lags).max() * math.sqrt(n)))
    return min(1.0, 2 * shared, 2 * lagged * lags.size)


def binomial_p(successes: int, trials: int, probability: float) -> float:
    """Test a count of independent successes against a probability, exactly, in both directions.

    Args:
        successes: how many there were.
        trials: of how many.
        probability: what is claimed, in [0, 1].

    Returns:
        The two-sided p-value (twice the smaller tail).
    """
    low = float(stats.binom.cdf(successes, trials, probability))
    high = float(stats.binom.sf(successes - 1, trials, probability))
    return _two_sided(low, high)


def sizes_p(sizes: Whole, people: int, probability: float) -> float:
    """Test whether batch sizes vary as those of Poisson sampling, in both directions.

    The sum of squared distances from the expected size has a distribution that is computed here by
    convolution, so the test is exact also for few steps. A fixed batch size has none of the
    variance on which Poisson accounting rests (traps O3: it claims 1.83 where 17.86 is true).

    Args:
        sizes: int64 (steps,), how many were drawn in each step.
        people: how many there are to draw from; `people * probability` must be a whole number.
        probability: inclusion of each, in (0, 1).

    Returns:
        The two-sided p-value.
    """
    expected = round(people * probability)
    values = (np.arange(people + 1) - expected) ** 2
    one = np.zeros(int(values.max()) * sizes.size + 1)
    np.add.at(one, values, stats.binom.pmf(np.arange(people + 1), people, probability))
    length = 1 << (one.size - 1).bit_length()
    mass = np.fft.irfft(np.fft.rfft(one, length) ** sizes.size, length)
    mass = np.clip(mass, 0.0, None)
    seen = int(((sizes - expected) ** 2).sum())
    if seen >= mass.size:
        return 0.0
    return _two_sided(float(mass[: seen + 1].sum()), float(mass[seen:].sum()))


def pairs_p(drawn: npt.NDArray[np.bool_], probability: float) -> float:
    """Test whether subjects are drawn independently: each pair of them, and each two steps.

    Args:
        drawn: bool (steps, people), who was drawn in which step; an even number of steps.
        probability: inclusion of each, in (0, 1).

    Returns:
        The least exact two-sided p-value over all pairs of subjects, and of drawing the same
        subject in steps 2k and 2k + 1, corrected for their number (Bonferroni).
    """
    steps, people = drawn.shape
    counts = drawn.T.astype(np.int64) @ drawn.astype(np.int64)
    pairs = counts[np.triu_indices(people, 1)]
    found = [binomial_p(int(k), steps, probability**2) for k in {*pairs.tolist()}]
    again = int((drawn[0::2] & drawn[1::2]).sum())
    found.append(binomial_p(again, people * (steps // 2), probability**2))
    return min(1.0, min(found) * (pairs.size + 1))


@dataclass(frozen=True)
class LowerBound:
    """What an audit showed; a LOWER BOUND on the loss: the true one may be far larger.

    Attributes:
        value: epsilon at the audit's delta, or mu.
        true_positives: share of the subjects that took part and were recognised.
        false_positives: share of those that did not take part and were taken for members.
        canaries: how many scores it rests on.
    """

    value: float
    true_positives: float
    false_positives: float
    canaries: int


def epsilon_lower_bound(
    inside: Floats, outside: Floats, delta: float, alpha: float = ALPHA
) -> LowerBound:
    """Bound epsilon from below by how well a threshold on scores tells members from others.

    Any (epsilon, delta)-DP mechanism has TPR <= exp(epsilon) FPR + delta (Kairouz et al. 2015,
    theorem 2.1). The threshold is chosen on the first half of the scores; the bound comes from the
    second half, with Clopper and Pearson's limits (1934) at alpha / 2 each. Beyond independent
    scores nothing is assumed. No bound from n scores exceeds about log(n / log(2 / alpha)).

    Args:
        inside: float64 (n,), scores of subjects that took part, higher for more evidence.
        outside: float64 (m,), scores of subjects that did not.
        delta: of the claim.
        alpha: chance that the bound is above the true epsilon.

    Returns:
        The bound at confidence 1 - alpha, at least 0.
    """
    (first_in, rest_in), (first_out, rest_out) = _halves(inside), _halves(outside)
    tries = np.quantile(np.concatenate([first_in, first_out]), np.linspace(0.3, 0.9999, 200))

    def bound(members: Floats, others: Floats, threshold: float) -> float:
        least, most = _limits(members, others, threshold, alpha)
        return math.log(max((least - delta) / most, 1.0))

    best = max(tries, key=lambda threshold: bound(first_in, first_out, threshold))
    return LowerBound(
        bound(rest_in, rest_out, best),
        float((rest_in > best).mean()),
        float((rest_out > best).mean()),
        inside.size + outside.size,
    )


def mu_lower_bound(
    inside: Floats, outside: Floats, threshold: float, alpha: float = ALPHA
) -> LowerBound:
    """Bound mu of Gaussian DP from below by a threshold test (Nasr et al. 2023, section 4.2).

    For a mechanism whose trade-off curve is Gaussian, as one of Gaussian noise without sampling,
    mu = probit(TPR) - probit(FPR); limits by Clopper and Pearson at alpha / 2 each.

    Args:
        inside: float64 (n,), scores of subjects that took part.
        outside: float64 (m,), scores of subjects that did not.
        threshold: chosen without looking at the scores.
        alpha: chance that the bound is above the true mu.

    Returns:
        The bound at confidence 1 - alpha, at least 0.
    """
    least, most = _limits(inside, outside, threshold, alpha)
    value = float(stats.norm.ppf(least) - stats.norm.ppf(most))
    return LowerBound(
        max(0.0, value),
        float((inside > threshold).mean()),
        float((outside > threshold).mean()),
        inside.size + outside.size,
    )


def mu_to_epsilon(mu: float, delta: float) -> float:
    """Convert mu of Gaussian DP to epsilon at a delta, by dp-accounting (Balle and Wang 2018)."""
    return float(get_epsilon_gaussian(1 / mu, delta)) if mu > 0 else 0.0


def _limits(inside: Floats, outside: Floats, threshold: float, alpha: float) -> tuple[float, float]:
    """Least TPR and largest FPR that the scores allow, each at confidence 1 - alpha / 2."""
    hits, alarms = int((inside > threshold).sum()), int((outside > threshold).sum())
    least = stats.beta.ppf(alpha / 2, hits, inside.size - hits + 1) if hits else 0.0
    most = (
        stats.beta.ppf(1 - alpha / 2, alarms + 1, outside.size - alarms)
        if alarms < outside.size
        else 1.0
    )
    return float(least), float(most)


def _halves(scores: Floats) -> tuple[Floats, Floats]:
    return scores[: scores.size // 2], scores[scores.size // 2 :]


def _two_sided(low: float, high: float) -> float:
    return float(min(1.0, 2 * min(low, high)))
