"""The budget: PLD for what was fixed in advance, a Renyi filter for what was chosen later."""

import math

import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from fedaccord.privacy import accounting
from fedaccord.privacy.accounting import NON_PRIVATE, compose, dp_sgd
from fedaccord.privacy.budget import Cap, left, needs, order, show_left, spent

CAP = Cap(3.6, 1e-4)
HEART = dp_sgd(2.0108, 0.1, 220)  # epsilon 3.00 at delta 1e-4
EVENTS = st.builds(
    dp_sgd, st.sampled_from([1.5, 2.5, 6.0]), st.sampled_from([0.02, 0.1]), st.integers(1, 300)
)
LISTS = st.lists(EVENTS, max_size=3)
CAPS = st.builds(Cap, st.floats(0.3, 10), st.sampled_from([1e-4, 1e-6]))


def of_pld(events, delta):
    book = PLDAccountant()
    for event in events:
        book.compose(accounting.dp_event(event))
    return book.get_epsilon(delta)


@settings(deadline=None, max_examples=10)
@given(LISTS, CAPS)
def test_what_was_reserved_in_advance_costs_its_pld_epsilon(first, cap):
    assert spent(first, [], cap) == pytest.approx(of_pld(first, cap.delta), rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=15)
@given(LISTS, st.lists(EVENTS, min_size=1, max_size=3), CAPS)
def test_a_later_choice_never_costs_less_than_pld_of_everything(first, later, cap):
    assert spent(first, later, cap) >= of_pld([*first, *later], cap.delta) - 1e-6


@settings(deadline=None, max_examples=15)
@given(LISTS, LISTS, EVENTS, CAPS)
def test_a_further_reservation_never_lowers_what_is_spent(first, later, event, cap):
    before = spent(first, later, cap)
    assert spent(first, [*later, event], cap) >= before - 1e-6
    if not later:
        assert spent([*first, event], [], cap) >= before - 1e-9


@settings(deadline=None)
@given(st.lists(EVENTS, min_size=1, max_size=4), LISTS, CAPS)
def test_later_reservations_are_within_the_cap_if_and_only_if_renyi_dp_is(later, first, cap):
    # Feldman and Zrnic 2021: sum at one order, held to what converts to the cap at that order.
    alpha = order(cap)
    book = RdpAccountant([alpha])
    for event in [*first, *later]:
        book.compose(accounting.dp_event(event))
    # Canonne, Kamath and Steinke 2020, Proposition 12, solved for the Renyi divergence.
    most = cap.epsilon - math.log1p(-1 / alpha) + math.log(cap.delta * alpha) / (alpha - 1)
    total = book._rdp[0]
    if abs(total - most) > 1e-9 and most > cap.delta**2:
        assert (spent(first, later, cap) <= cap.epsilon) == (total <= most)


@given(CAPS, LISTS)
def test_the_order_depends_on_the_cap_alone_and_is_nearly_the_best_for_a_gaussian(cap, events):
    alpha = order(cap)

    def uses(a):
        bound = cap.epsilon - math.log1p(-1 / a) + math.log(cap.delta * a) / (a - 1)
        return bound / a  # how many Gaussians of divergence a / (2 sigma^2) fit, but for 2 sigma^2

    assert alpha in range(2, 1025)
    best = max(uses(a) for a in range(2, 1025))
    assert uses(alpha) >= 0.9 * best or best <= 0
    if events:
        spent([], events, cap)
    assert order(cap) == alpha


def test_the_figures_of_two_heart_plans_are_the_reference_values():
    # Reference: dp-accounting 0.6 at delta 1e-4; order 5 of a cap of 3.6.
    assert order(CAP) == 5
    assert spent([HEART], [], CAP) == pytest.approx(2.9998, abs=1e-3)
    assert spent([HEART, HEART], [], CAP) == pytest.approx(4.444, abs=1e-3)
    assert spent([HEART], [HEART], CAP) == pytest.approx(5.036, abs=1e-3)
    assert spent([], [HEART], CAP) == pytest.approx(3.357, abs=1e-3)
    assert spent([], [], CAP) == 0.0


@pytest.mark.parametrize(("first", "later"), [([NON_PRIVATE], []), ([], [HEART, NON_PRIVATE])])
def test_anything_that_is_not_private_is_infinite_on_either_side(first, later):
    assert spent(first, later, CAP) == math.inf
    assert left(first, later, CAP) == 0.0
    assert needs(HEART, CAP, first, later, seen=True) < math.inf


def test_a_plan_needs_its_own_epsilon_and_a_non_private_one_all():
    assert needs(HEART, CAP) == spent([HEART], [], CAP)
    assert needs(NON_PRIVATE, CAP) == needs(NON_PRIVATE, CAP, [HEART]) == math.inf


@settings(deadline=None, max_examples=20)
@given(LISTS, LISTS, EVENTS, st.booleans(), CAPS)
def test_a_plan_is_refused_only_where_it_needs_more_than_is_left(first, later, event, seen, cap):
    seen = seen or bool(later)
    after = spent(first, [*later, event], cap) if seen else spent([*first, event], later, cap)
    asked, room = needs(event, cap, first, later, seen=seen), left(first, later, cap)
    if after > cap.epsilon and spent(first, later, cap) <= cap.epsilon:
        assert asked > room
        assert float(accounting.show(asked)) > float(show_left(room))


@given(st.floats(0, 1e6), st.integers(0, 6))
def test_what_is_left_is_never_printed_above_the_true_figure(value, digits):
    assert value - 10.0**-digits <= float(show_left(value, digits)) <= value


def test_without_a_bound_there_is_no_end_to_what_is_left():
    cap = Cap(math.inf, 1e-4)
    assert show_left(left([HEART], [], cap)) == "no end"
    assert order(cap) == order(Cap(10.0, 1e-4))


def test_a_cap_too_small_for_anything_admits_nothing_later():
    cap = Cap(1e-3, 1e-9)
    assert order(cap) == 1024
    assert spent([], [dp_sgd(8.0, 0.1, 1)], cap) > cap.epsilon


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_a_cap_without_a_delta_is_refused(delta):
    with pytest.raises(ValueError, match=r"cap\.delta = .* must be in \(0, 1\)"):
        spent([HEART], [], Cap(1.0, delta))


def test_the_filter_is_dp_accountings_own_renyi_arithmetic():
    book = RdpAccountant([order(CAP)])
    book.compose(accounting.dp_event(compose([HEART, HEART])))
    assert spent([HEART], [HEART], CAP) == pytest.approx(book.get_epsilon(1e-4), rel=1e-12)
