"""The order-free sum: the same bits in any order, and as close as a float64 can be."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedaccord.strategies.sums import OrderFreeSum

BOUND = 1000.0
TERMS = st.lists(st.floats(-BOUND, BOUND, allow_subnormal=True), min_size=1, max_size=6)


def total(rows: np.ndarray, bound: float = BOUND, count: int | None = None) -> np.ndarray:
    made = OrderFreeSum(rows.shape[1], bound, len(rows) if count is None else count)
    for row in rows:
        made.add(row)
    return made.total()


@settings(deadline=None)
@given(TERMS)
def test_every_order_of_the_terms_gives_the_same_bits(terms: list[float]) -> None:
    orders = np.array(list(permutations(terms))).T  # a column for each order
    assert len({value.tobytes() for value in total(orders)}) == 1


def test_a_plain_sum_of_the_same_kind_of_terms_does_depend_on_the_order() -> None:
    # Without this the law above could be met by luck.
    terms = np.random.default_rng(0).normal(size=6)
    assert len({sum(order) for order in permutations(terms.tolist())}) > 1


@settings(deadline=None)
@given(TERMS, st.integers(0, 2**20))
def test_what_is_lost_is_within_the_stated_bound(terms: list[float], more: int) -> None:
    count = len(terms) + more
    exact = math.fsum(terms)
    lost = len(terms) * count**2 * BOUND * 2.0**-102
    found = float(total(np.array([terms]).T, count=count)[0])
    assert abs(found - exact) <= 2.0**-52 * abs(exact) + lost


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 300))
def test_the_sum_is_the_exact_one_to_a_few_parts_in_1e15(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, 4)) * 10.0 ** rng.integers(-3, 1, size=4)
    exact = np.array([math.fsum(column) for column in rows.T])
    largest = np.abs(rows).max(axis=0)
    assert (np.abs(total(rows) - exact) <= 1e-15 * np.maximum(np.abs(exact), largest)).all()


def test_terms_that_cancel_leave_what_a_plain_sum_loses() -> None:
    rows = np.array([[1e3], [1e-14], [-1e3]])
    assert total(rows)[0] == pytest.approx(1e-14, rel=1e-12)
    assert (rows[0] + rows[1] + rows[2])[0] == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1000.0001, -1e300])
def test_a_term_out_of_bounds_is_refused_and_leaves_the_sum_as_it_was(value: float) -> None:
    made = OrderFreeSum(2, BOUND, 2)
    made.add(np.array([1.0, 2.0]))
    with pytest.raises(ValueError, match="not finite or above"):
        made.add(np.array([0.0, value]))
    made.add(np.array([1.0, 1.0]))  # the refused term has not used its place
    assert made.total().tolist() == [2.0, 3.0]


def test_more_terms_than_were_said_are_refused() -> None:
    made = OrderFreeSum(1, BOUND, 1)
    made.add(np.ones(1))
    with pytest.raises(ValueError, match="more terms"):
        made.add(np.ones(1))


@pytest.mark.parametrize(("bound", "count"), [(0.0, 1), (1e200, 1), (1.0, 0), (1.0, 2**24 + 1)])
def test_a_sum_without_room_is_refused(bound: float, count: int) -> None:
    with pytest.raises(ValueError, match="no room"):
        OrderFreeSum(1, bound, count)


def test_no_term_at_all_gives_zeros() -> None:
    assert OrderFreeSum(3, 1.0, 5).total().tolist() == [0.0, 0.0, 0.0]
