"""Partitioning: every record at one site, subjects whole, shares from the distribution named."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedaccord.simulations import partition
from fedaccord.simulations.partition import PartitionFault, Parts

ALPHA_OF_TEST = 2e-6  # a right sampler fails this often


@st.composite
def populations(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray | None, int, int]:
    """Labels, subjects or None, sites and a seed; at least as many subjects as sites."""
    sites = draw(st.integers(1, 6))
    people = draw(st.integers(sites, 40))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    extra = draw(st.integers(0, 60))
    subjects = rng.permutation(np.concatenate([np.arange(people), rng.integers(0, people, extra)]))
    labels = rng.integers(0, draw(st.integers(1, 5)), len(subjects))
    if draw(st.booleans()):
        return labels[:people], None, sites, seed
    return labels, subjects * 7 - 30, sites, seed


WAYS: dict[str, Callable[..., Parts]] = {
    "iid": lambda y, k, rng, who: partition.iid(len(y), k, rng, who),
    "dirichlet": lambda y, k, rng, who: partition.dirichlet_labels(y, k, 0.3, rng, 0, who),
    "sizes": lambda y, k, rng, who: partition.dirichlet_sizes(len(y), k, 0.5, rng, 0, who),
    "shards": lambda y, k, rng, who: partition.shards(y, k, 1, rng, who),
    "column": lambda y, k, rng, who: partition.by_column(y, rng, k, who),
    "values": lambda y, k, rng, who: partition.by_column(y, rng, None, who),
}


@pytest.mark.parametrize("way", WAYS)
@given(population=populations())
def test_every_record_is_at_one_site_and_every_subject_too(
    way: str, population: tuple[np.ndarray, np.ndarray | None, int, int]
) -> None:
    labels, subjects, sites, seed = population
    parts = WAYS[way](labels, sites, np.random.default_rng(seed), subjects)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    assert all(np.array_equal(part, np.sort(part)) for part in parts)
    if way != "values":
        assert len(parts) == sites
    if subjects is not None:
        homes = [set(subjects[part].tolist()) for part in parts]
        assert sum(map(len, homes)) == len(np.unique(subjects))
    again = WAYS[way](labels, sites, np.random.default_rng(seed), subjects)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


@given(population=populations())
def test_iid_sites_differ_by_one_subject_at_most(
    population: tuple[np.ndarray, np.ndarray | None, int, int],
) -> None:
    labels, subjects, sites, seed = population
    who = np.arange(len(labels)) if subjects is None else subjects
    parts = partition.iid(len(labels), sites, np.random.default_rng(seed), subjects)
    sizes = [len(np.unique(who[part])) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_a_site_of_k_shards_knows_at_most_2k_labels_where_a_label_fills_a_shard(
    sites: int, per_site: int, seed: int
) -> None:
    size = 10
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(sites * per_site), size))
    parts = partition.shards(labels, sites, per_site, np.random.default_rng(seed))
    assert [len(np.unique(labels[part])) for part in parts] == [per_site] * sites
    offset = np.concatenate([labels, np.full(3, labels.max())])  # now shards cross labels
    parts = partition.shards(offset, sites, per_site, np.random.default_rng(seed))
    assert all(len(np.unique(offset[part])) <= 2 * per_site for part in parts)


def test_mcmahans_shards_are_200_of_300_for_100_clients() -> None:
    # McMahan et al. 2017, section 3: 60,000 examples, 200 shards of size 300, two shards a client.
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 6000))
    parts = partition.shards(labels, 100, 2, np.random.default_rng(1))
    assert {len(part) for part in parts} == {600}
    assert {len(np.unique(labels[part])) for part in parts} == {1, 2}


EACH = 200  # subjects that shares are shares of


@cache
def shares(alpha: float, draws: int, sites: int = 4) -> np.ndarray:
    """The first site's share of each of many labels, (draws,)."""
    rng = np.random.default_rng(7)
    labels = np.repeat(np.arange(draws), EACH)
    part = partition.dirichlet_labels(labels, sites, alpha, rng, 0)[0]
    return np.bincount(labels[part], minlength=draws) / EACH


@cache
def sizes(alpha: float, draws: int, sites: int = 4) -> np.ndarray:
    """The first site's share of all records, in each of many splits, (draws,)."""
    rng = np.random.default_rng(8)
    return np.array(
        [len(partition.dirichlet_sizes(EACH, sites, alpha, rng, 0)[0]) / EACH for _ in range(draws)]
    )


def rejected(found: np.ndarray, alpha: float, sites: int = 4) -> bool:
    """Whether shares, rounded to 1/EACH, are no draws of Beta(alpha, (sites - 1) alpha).

    That is a Dirichlet's marginal. Shares are compared at the steps between rounded values, so the
    test is exact for them: chi-square over ten cells of equal probability.
    """
    edges = stats.beta.ppf(np.linspace(0, 1, 11), alpha, (sites - 1) * alpha)
    edges = (np.floor(edges * EACH) + 0.5) / EACH
    edges[0], edges[-1] = -1, 2
    expected = len(found) * np.diff(stats.beta.cdf(edges, alpha, (sites - 1) * alpha))
    counts = np.histogram(found, edges)[0]
    cells = expected > 0
    return bool(stats.chisquare(counts[cells], expected[cells]).pvalue < ALPHA_OF_TEST)


@pytest.mark.parametrize("draw", [shares, sizes])
@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_dirichlet_shares_follow_the_alpha_asked_for_and_not_one_near_it(
    draw: Callable[..., np.ndarray], alpha: float
) -> None:
    found = draw(alpha, 3000)
    assert not rejected(found, alpha)
    assert rejected(found, alpha * 1.3)
    assert rejected(found, alpha / 1.3)


@pytest.mark.parametrize("draw", [shares, sizes])
def test_dirichlet_shares_have_the_mean_and_variance_of_the_distribution(
    draw: Callable[..., np.ndarray],
) -> None:
    alpha, sites, draws = 0.3, 4, 3000
    found = draw(alpha, draws)
    mean, variance = 1 / sites, (1 / sites) * (1 - 1 / sites) / (sites * alpha + 1)
    bound = stats.norm.isf(ALPHA_OF_TEST / 2)
    z = (found.mean() - mean) / math.sqrt(variance / draws)
    assert abs(z) < bound
    fourth = stats.beta(alpha, (sites - 1) * alpha).stats("k") + 3
    spread = variance * math.sqrt((float(fourth) - 1) / draws)
    assert abs(found.var() - variance) < bound * spread
    wrong = (1 / sites) * (1 - 1 / sites) / (sites * alpha * 1.6 + 1)
    assert abs(found.var() - wrong) > bound * spread


def test_labels_are_divided_independently_of_each_other() -> None:
    found = shares(0.5, 3000)
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 4.8 / math.sqrt(len(found))


def test_a_record_is_as_likely_at_any_site_wherever_it_stands() -> None:
    rng, times = np.random.default_rng(3), 2000
    places = np.zeros((20, 4))
    for _ in range(times):
        for site, part in enumerate(partition.iid(20, 4, rng)):
            places[part, site] += 1
    z = (places - times / 4) / math.sqrt(times * 3 / 16)
    assert np.abs(z).max() < stats.norm.isf(ALPHA_OF_TEST / 2 / 80)


def test_the_least_size_holds_for_every_site_in_subjects() -> None:
    rng = np.random.default_rng(0)
    subjects = rng.integers(0, 120, 400)
    labels = rng.integers(0, 3, 400)
    free = partition.dirichlet_labels(labels, 6, 0.3, np.random.default_rng(1), 0, subjects)
    assert min(len(np.unique(subjects[part])) for part in free) < 10
    parts = partition.dirichlet_labels(labels, 6, 0.3, np.random.default_rng(1), 10, subjects)
    assert min(len(np.unique(subjects[part])) for part in parts) >= 10


def test_a_subject_counts_by_its_most_frequent_label_and_of_several_by_the_least() -> None:
    subjects = np.array([5, 5, 5, 2, 2, 9])
    labels = np.array([1, 0, 1, 1, 0, 1])
    parts = partition.by_column(labels, np.random.default_rng(0), None, subjects)
    assert [part.tolist() for part in parts] == [[3, 4], [0, 1, 2, 5]]


def test_by_column_puts_the_lowest_values_at_the_first_site() -> None:
    ages = np.random.default_rng(0).permutation(90).astype(float)
    parts = partition.by_column(ages, np.random.default_rng(0), 3)
    assert [(ages[part].min(), ages[part].max()) for part in parts] == [(0, 29), (30, 59), (60, 89)]
    towns = np.array(["ulm", "bonn", "ulm", "köln"])
    parts = partition.by_column(towns, np.random.default_rng(0))
    assert [part.tolist() for part in parts] == [[1], [3], [0, 2]]


def test_natural_leaves_records_where_they_are_and_a_site_may_be_empty() -> None:
    parts = partition.natural(np.array([2, 0, 2]), 3)
    assert [part.tolist() for part in parts] == [[1], [], [0, 2]]


TEN = np.arange(10)
RNG = np.random.default_rng(0)
REFUSED = [
    (lambda: partition.iid(3, 4, RNG), "sites = 4 is more than the 3 subjects"),
    (lambda: partition.iid(3, 0, RNG), "sites = 0 must be from 1 to 100,000"),
    (lambda: partition.iid(3, True, RNG), "sites = True must be a whole number"),
    (lambda: partition.dirichlet_labels(TEN, 2, 0.0, RNG), "alpha = 0 must be from 0.001 to 1e6"),
    (lambda: partition.dirichlet_labels(TEN, 2, math.nan, RNG), "alpha = nan must be"),
    (lambda: partition.dirichlet_labels(TEN, 4, 1.0, RNG, 3), "4 sites x min_size = 3 is more"),
    (lambda: partition.dirichlet_sizes(10, 10, 0.01, RNG), "none of 1000 draws left each site"),
    (lambda: partition.shards(TEN, 4, 3, RNG), "4 sites x 3 shards = 12 is more than the 10"),
    (lambda: partition.by_column(np.array([1.0, math.nan]), RNG), "column: holds NaN"),
    (lambda: partition.natural(TEN, 5), "assignment: 5 is not from 0 to sites - 1 = 4"),
    (lambda: partition.natural(np.array([0, 1]), 2, np.array([8, 8])), "subjects: 8 has records"),
    (lambda: partition.iid(3, 1, RNG, TEN), "subjects: 10 of them for 3 records"),
    (lambda: divided("dirichlet:x"), '"x" is not a number'),
    (lambda: divided("column:ward"), 'there is no column "ward". Known: label'),
    (lambda: divided("natural", 2), "natural has as many sites as there are, 3, not 2"),
    (lambda: divided("shards:-2"), '"shards:-2" is not a way to divide records'),
    (lambda: divided("iid:2"), '"iid:2" is not a way to divide records'),
]


def divided(how: str, sites: int | None = None) -> Parts:
    home = TEN % 3
    return partition.divide(how, {"label": TEN % 2}, sites, np.random.default_rng(4), TEN, home)


@pytest.mark.parametrize(("call", "said"), REFUSED)
def test_what_cannot_be_divided_is_refused_with_the_bound(
    call: Callable[[], Parts], said: str
) -> None:
    with pytest.raises(PartitionFault) as fault:
        call()
    assert said in str(fault.value)


def test_a_way_in_words_is_the_function_that_it_names() -> None:
    def rng() -> np.random.Generator:
        return np.random.default_rng(4)

    labels = TEN % 2
    same = {
        "iid": partition.iid(10, 3, rng()),
        "dirichlet:2": partition.dirichlet_labels(labels, 3, 2.0, rng()),
        "sizes:2": partition.dirichlet_sizes(10, 3, 2.0, rng()),
        "shards:2": partition.shards(labels, 3, 2, rng()),
        "column:label": partition.by_column(labels, rng()),
        "natural": partition.natural(TEN % 3, 3),
    }
    for how, parts in same.items():
        for found, wanted in zip(divided(how), parts, strict=True):
            assert np.array_equal(found, wanted), how
