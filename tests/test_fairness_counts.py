"""Counts: exact, additive over sites, and strict about what they accept."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedaccord.fairness.counts import LARGEST_TOTAL, count, total


@st.composite
def rows(draw):
    """(groups, labels, predictions, n_groups, n_classes) of 0 to 80 rows."""
    n_groups, n_classes = draw(st.integers(1, 5)), draw(st.integers(2, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(0, 80))
    codes = (rng.integers(0, bound, n) for bound in (n_groups, n_classes, n_classes))
    return (*codes, n_groups, n_classes)


def test_each_cell_is_the_number_of_its_rows():
    counts = count([0, 0, 0, 2], [1, 1, 0, 1], [1, 1, 0, 0], n_groups=3)
    assert counts.tolist() == [[[1, 0], [0, 2]], [[0, 0], [0, 0]], [[0, 0], [1, 0]]]
    assert counts.dtype == np.int64


@given(rows(), st.integers(1, 6), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_counts_of_sites_sum_to_the_counts_of_all_rows(drawn, n_sites, seed):
    groups, labels, predictions, n_groups, n_classes = drawn
    site = np.random.default_rng(seed).integers(0, n_sites, groups.size)
    parts = [
        count(groups[site == s], labels[site == s], predictions[site == s], n_groups, n_classes)
        for s in range(n_sites)
    ]
    pooled = count(groups, labels, predictions, n_groups, n_classes)
    assert np.array_equal(total(parts), pooled)
    assert np.array_equal(total(parts[::-1]), pooled)


@given(rows())
@settings(deadline=None)
def test_counts_do_not_depend_on_the_order_of_rows_and_sum_to_n(drawn):
    groups, labels, predictions, n_groups, n_classes = drawn
    counts = count(groups, labels, predictions, n_groups, n_classes)
    backwards = count(groups[::-1], labels[::-1], predictions[::-1], n_groups, n_classes)
    assert np.array_equal(counts, backwards)
    assert counts.sum() == groups.size


def test_no_rows_count_to_zeros_of_the_full_shape():
    assert count([], [], [], n_groups=3, n_classes=4).shape == (3, 4, 4)
    assert not count([], [], [], n_groups=3).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([3], [0], [0], 3), "groups holds 3; with n_groups = 3 it must lie in 0 .. 2"),
        (([-1], [0], [0], 3), "groups holds -1"),
        (([0], [2], [0], 3), "labels holds 2; with n_classes = 2 it must lie in 0 .. 1"),
        (([0], [0], [0.7], 3), "predictions has dtype float64; it must be whole numbers"),
        (([0], [0], [[0]], 3), "predictions has shape (1, 1); it must be (n,)"),
        (([0, 1], [0], [0, 1], 3), "have [2, 1, 2] rows; the three must be equal"),
        (([0], [0], [0], 0), "n_groups is 0; it must be at least 1"),
        (([0], [0], [0], 1, 1), "n_classes is 1; it must be at least 2"),
    ],
)
def test_rows_that_cannot_be_counted_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        count(*arguments)


ZEROS = np.zeros((2, 2, 2), np.int64)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "parts is empty; it needs at least 1 site"),
        ([ZEROS, np.zeros((3, 2, 2), int)], "parts[1] has shape (3, 2, 2); parts[0] has (2, 2, 2)"),
        ([np.zeros((2, 2), int)], "parts[0] has shape (2, 2); it must be (groups, classes"),
        ([np.zeros((2, 2, 3), int)], "parts[0] has shape (2, 2, 3)"),
        ([ZEROS, ZEROS + 0.5], "parts[1] has dtype float64; counts are whole numbers"),
        ([ZEROS, ZEROS - 1], "parts[1] holds -1; a count is at least 0"),
        ([ZEROS + LARGEST_TOTAL], "parts[0] sums to"),
        ([ZEROS + LARGEST_TOTAL // 8] * 2, "the sum of parts[0] to parts[1] sums to"),
    ],
)
def test_parts_that_are_not_counts_of_one_accord_are_refused(parts, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        total(parts)


def test_the_largest_total_is_itself_accepted():
    assert total([ZEROS + LARGEST_TOTAL // 8, ZEROS]).sum() == LARGEST_TOTAL
