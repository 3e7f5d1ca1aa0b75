"""Accounting: dp-accounting's figures, composed over everything, never printed below the truth."""

import math
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction

import dp_accounting
import pytest
from dp_accounting import NeighboringRelation
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from fedaccord import accord as accords
from fedaccord.errors import AccordError
from fedaccord.privacy import accounting
from fedaccord.privacy.plan import PrivacyPlan, plan_for

HEART = accords.load("heart")

# Reference values at delta 1e-5: sigma, q, steps, RDP and PLD computed with dp-accounting 0.6, and
# PRV with Opacus 1.6 (Gopi et al. 2021), an upper bound with an error of 0.01.
TABLE = [
    (1.0, 0.01, 1000, 2.10, 1.828, 1.838),
    (2.0, 0.1, 500, 6.03, 5.556, 5.566),
    (0.6, 0.05, 200, 17.5, 15.46, 15.47),
    (4.0, 1.0, 100, 14.1, 13.21, 13.22),
]


@pytest.fixture(scope="module")
def heart() -> PrivacyPlan:
    plan = plan_for(HEART, "cleveland")
    assert plan is not None
    return plan


def independent(sigma, q, steps, delta, relation=NeighboringRelation.ADD_OR_REMOVE_ONE):
    """Epsilon from (sigma, q, steps) with dp-accounting alone."""
    step = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))
    return PLDAccountant(relation).compose(step, steps).get_epsilon(delta)


@pytest.mark.parametrize(("sigma", "q", "steps", "rdp", "pld", "prv"), TABLE)
def test_epsilon_is_the_reference_value(sigma, q, steps, rdp, pld, prv):
    event = accounting.dp_sgd(sigma, q, steps)
    assert accounting.epsilon(event, 1e-5) == pytest.approx(pld, rel=0.005)
    assert accounting.epsilon(event, 1e-5, accountant="RDP") == pytest.approx(rdp, rel=0.005)
    assert prv - 0.02 <= accounting.epsilon(event, 1e-5) <= prv


@pytest.mark.parametrize(("sigma", "q", "steps", "rdp", "pld", "prv"), TABLE[:2])
def test_the_reference_tells_noise_that_is_two_per_cent_off(sigma, q, steps, rdp, pld, prv):
    event = accounting.dp_sgd(0.98 * sigma, q, steps)
    assert accounting.epsilon(event, 1e-5) != pytest.approx(pld, rel=0.005)


def test_the_heart_plans_epsilon_is_that_of_all_reserved_rounds(heart):
    rounds = HEART.rounds.rounds + HEART.rounds.spare_rounds
    steps = rounds * HEART.training.steps
    expected = independent(heart.noise_multiplier, HEART.privacy.sampling_prob, steps, 1e-4)
    assert steps == 220
    assert heart.epsilon() == pytest.approx(expected, abs=1e-6)
    assert heart.epsilon() <= HEART.privacy.target_epsilon == 3.0
    assert heart.epsilon(20) < heart.epsilon()


def test_no_part_of_a_plan_comes_from_records(heart):
    declared = HEART.model_dump()["privacy"]
    for key in ("sampling_prob", "max_grad_norm", "delta", "neighboring_relation"):
        assert heart.to_json()[key] == declared[key]
    assert heart.subjects == HEART.roster["cleveland"]
    assert heart.normaliser == declared["sampling_prob"] * heart.subjects


def test_replacing_a_subject_costs_about_twice_adding_one(heart):
    replace = heart.epsilon(relation="replace-one")
    steps = heart.rounds * heart.steps
    assert 1.9 < replace / heart.epsilon() < 2.1
    assert replace == pytest.approx(
        independent(
            heart.noise_multiplier,
            heart.sampling_prob,
            steps,
            heart.delta,
            NeighboringRelation.REPLACE_ONE,
        ),
        abs=1e-6,
    )


def test_two_heart_plans_cost_about_half_as_much_again_and_pass_the_cap(heart):
    both = accounting.epsilon(accounting.compose([heart.event(), heart.event()]), heart.delta)
    assert 1.4 < both / heart.epsilon() < 1.6
    assert both > HEART.privacy.max_epsilon == pytest.approx(1.2 * 3.0)
    twice = independent(heart.noise_multiplier, 0.1, 440, heart.delta)
    assert both == pytest.approx(twice, rel=1e-3)


@pytest.mark.parametrize(
    ("target", "delta", "q", "steps"),
    [(3.0, 1e-4, 0.1, 220), (0.5, 1e-6, 1.0, 10), (1.0, 1e-5, 0.05, 300)],
)
def test_calibrate_gives_the_smallest_ten_thousandth_that_keeps_the_target(target, delta, q, steps):
    sigma = accounting.calibrate(target, delta, q, steps)
    less = round(sigma - 1e-4, 4)
    assert sigma == round(sigma, 4)
    assert independent(sigma, q, steps, delta) <= target
    assert independent(less, q, steps, delta) > target


@pytest.mark.parametrize(("target", "steps"), [(1e-3, 10**8), (1e-9, 100)])
def test_an_epsilon_that_no_noise_can_give_is_refused_in_one_line(target, steps):
    with pytest.raises(
        AccordError, match=r"privacy\.target_epsilon = .* plan fewer steps"
    ) as fault:
        accounting.calibrate(target, 1e-5, 1.0, steps)
    assert "\n" not in str(fault.value)


def test_whatever_is_composed_with_something_non_private_is_infinite():
    private = accounting.dp_sgd(1.0, 0.1, 10)
    for events in ([accounting.NON_PRIVATE], [private, accounting.NON_PRIVATE, private]):
        assert accounting.epsilon(accounting.compose(events), 1e-5) == math.inf
        assert accounting.epsilon(accounting.compose(events), 1e-5, accountant="RDP") == math.inf
    assert accounting.show(math.inf) == "infinite"


@given(st.floats(0.05, 20), st.floats(0.001, 1.0), st.integers(1, 500))
def test_an_event_says_to_dp_accounting_what_ran(sigma, q, steps):
    step = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))
    event = accounting.compose([accounting.dp_sgd(sigma, q, steps)])
    expected = dp_accounting.ComposedDpEvent([dp_accounting.SelfComposedDpEvent(step, steps)])
    assert accounting.dp_event(event) == expected


PARTS = st.builds(
    accounting.dp_sgd,
    st.sampled_from([1.5, 3.0]),
    st.sampled_from([0.05, 0.3, 1.0]),
    st.integers(1, 40),
)


@pytest.mark.parametrize("relation", accounting.RELATIONS)
@pytest.mark.parametrize(
    "parts",
    [[(2.0, 0.1, 50)], [(4.0, 1.0, 20)], [(2.0, 0.1, 30), (3.0, 0.05, 40), (2.0, 0.1, 20)]],
)
def test_epsilon_is_that_of_dp_accountings_own_accountant(parts, relation):
    events = [accounting.dp_sgd(*part) for part in parts]
    whole = accounting.compose(events)
    ours = accounting.epsilon(whole, 1e-5, relation)
    book = PLDAccountant(accounting.RELATIONS[relation])
    book.compose(accounting.dp_event(accounting.normalised(whole)))
    assert ours == pytest.approx(book.get_epsilon(1e-5), rel=1e-12)
    # As it was written, before equal parts were merged: the same but for rounding on the grid.
    book = PLDAccountant(accounting.RELATIONS[relation])
    for event in events:
        book.compose(accounting.dp_event(event))
    assert ours == pytest.approx(book.get_epsilon(1e-5), rel=1e-6)


@settings(deadline=None, max_examples=50)
@given(st.lists(PARTS, min_size=1, max_size=4), st.randoms())
def test_equal_parts_in_any_order_and_nesting_are_one_event(events, rng):
    shuffled = rng.sample(events, len(events))
    nested = accounting.compose([shuffled[0], accounting.compose(shuffled[1:])])
    assert accounting.normalised(nested) == accounting.normalised(accounting.compose(events))
    thrice = accounting.normalised(accounting.tries(nested, 3))
    assert thrice == accounting.normalised(accounting.compose(events * 3))


def test_merging_keeps_apart_what_differs_and_adds_up_what_does_not():
    merged = accounting.normalised(
        accounting.compose(
            [accounting.dp_sgd(2.0, 0.1, 5), accounting.dp_sgd(2.0, 1.0, 7),
             accounting.dp_sgd(2.0, 0.1, 6), accounting.dp_sgd(3.0, 0.0, 9)]
        )
    )  # fmt: skip
    gaussian = {"type": "Gaussian", "noise_multiplier": 2.0}
    assert merged == accounting.compose(
        [
            accounting.dp_sgd(2.0, 0.1, 11),
            {"type": "SelfComposed", "count": 7, "event": gaussian},
        ]
    )
    assert accounting.normalised(gaussian) == {"type": "SelfComposed", "count": 1} | {
        "event": gaussian
    }


@pytest.mark.parametrize(("sigma", "q", "steps"), [(2.0, 0.1, 100), (1.0, 0.01, 300), (4.0, 1, 20)])
def test_pld_is_never_below_the_value_on_a_ten_times_finer_grid(sigma, q, steps):
    event = accounting.dp_sgd(sigma, q, steps)
    fine = PLDAccountant(value_discretization_interval=1e-5)
    fine.compose(accounting.dp_event(accounting.normalised(event)))
    for delta in (1e-3, 1e-5, 1e-8):
        coarse = accounting.epsilon(event, delta)
        assert coarse * (1 - 1e-3) <= fine.get_epsilon(delta) <= coarse


@settings(deadline=None, max_examples=15)
@given(st.floats(0.8, 8), st.floats(0.001, 1), st.integers(1, 200), st.sampled_from([1e-4, 1e-7]))
def test_rdp_is_never_below_pld(sigma, q, steps, delta):
    event = accounting.dp_sgd(sigma, q, steps)
    rdp = accounting.epsilon(event, delta, accountant="RDP")
    assert rdp >= accounting.epsilon(event, delta) - 1e-6


def test_a_bound_is_exceeded_by_what_is_above_it_and_by_nothing_else():
    event = accounting.dp_sgd(2.0, 0.1, 50)
    twice = accounting.epsilon(accounting.compose([event, event]), 1e-5)
    assert not accounting.would_exceed([event], event, twice, 1e-5)
    assert accounting.would_exceed([event], event, math.nextafter(twice, 0), 1e-5)
    assert not accounting.would_exceed([], event, twice, 1e-5)
    assert accounting.would_exceed([event, accounting.NON_PRIVATE], event, 1e9, 1e-5)
    assert accounting.would_exceed([], event, math.nan, 1e-5)


def test_twenty_tries_of_a_plan_cost_what_traps_measured():
    # sigma 1, q 0.01, 1,000 steps at delta 1e-5: one run 1.83, 20 composed 9.27 (dp-accounting 0.6)
    event = accounting.dp_sgd(1.0, 0.01, 1000)
    assert accounting.epsilon(event, 1e-5) == pytest.approx(1.83, abs=0.01)
    assert accounting.epsilon(accounting.tries(event, 20), 1e-5) == pytest.approx(9.27, abs=0.02)
    with pytest.raises(ValueError, match="tries = 0 must be at least 1"):
        accounting.tries(event, 0)


@pytest.mark.parametrize("kind", ["RepeatAndSelect", "RepeatAndSelectDpEvent"])
def test_selecting_the_best_run_is_refused_since_the_coordinator_sees_every_try(kind):
    event = {"type": kind, "event": accounting.dp_sgd(1.0, 0.1, 10), "mean": 20, "shape": 1}
    for book in ("PLD", "RDP"):
        with pytest.raises(ValueError, match=rf"{kind}.*the coordinator sees every one"):
            accounting.epsilon(event, 1e-5, accountant=book)


@pytest.mark.parametrize(
    "event",
    [
        accounting.dp_sgd(1.0, 0.1, 0),
        accounting.dp_sgd(1.0, 0.1, -5),
        accounting.dp_sgd(1.0, 1.5, 5),
        accounting.dp_sgd(-1.0, 0.1, 5),
        accounting.dp_sgd(math.inf, 0.1, 5),
        accounting.dp_sgd(math.nan, 0.1, 5),
        {"type": "PoissonSampled", "sampling_prob": 0.1, "event": accounting.dp_sgd(1.0, 0.1, 2)},
    ],
)
def test_an_event_out_of_its_bounds_costs_no_epsilon_but_is_refused(event):
    with pytest.raises(ValueError, match="event"):
        accounting.epsilon(event, 1e-5)


def test_a_multiplier_of_0_is_not_private():
    assert accounting.epsilon(accounting.dp_sgd(0.0, 0.1, 5), 1e-5) == math.inf
    with pytest.raises(ValueError, match="no privacy loss distribution"):
        accounting.loss(accounting.dp_sgd(0.0, 0.1, 5))


@given(st.floats(0, 1e6), st.integers(0, 6))
def test_what_is_rounded_down_is_never_above_the_true_figure(value, digits):
    assert value - 10.0**-digits <= accounting.round_down(value, digits) <= value
    assert accounting.round_down(math.inf) == math.inf


@pytest.mark.parametrize("event", [{}, {"type": "Laplace"}, {"type": "ZCDp", "rho": 0.1}])
def test_an_event_that_is_never_written_is_not_accounted_for(event):
    with pytest.raises(ValueError, match="not one that FedAccord accounts for"):
        accounting.epsilon(event, 1e-5)


@given(st.floats(0, 1e6), st.integers(0, 6))
def test_a_printed_epsilon_is_never_below_the_true_one_nor_a_digit_above(value, digits):
    shown = float(accounting.show(value, digits))
    assert value <= shown == accounting.round_up(value, digits)
    assert Fraction(repr(shown)) - Fraction(repr(value)) < Fraction(1, 10**digits)


@given(st.integers(0, 10**9), st.integers(0, 6))
def test_an_epsilon_that_has_no_further_digits_is_printed_as_it_is(count, digits):
    value = float(Decimal(count).scaleb(-digits))
    assert accounting.round_up(value, digits) == value
    assert accounting.show(value, digits) == f"{value:.{digits}f}"


@given(st.floats(0, 1e300), st.floats(0, 1e300), st.integers(0, 6))
def test_a_larger_epsilon_is_never_printed_smaller(one, other, digits):
    small, large = sorted([one, other])
    assert accounting.round_up(small, digits) <= accounting.round_up(large, digits)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (3.0, "3.00"),
        (2.0000000001, "2.01"),
        (math.nextafter(3.0, 4), "3.01"),
        (1.1, "1.10"),  # 1.1 * 100 is above 110 in binary
        (0.07, "0.07"),
        (0.29, "0.29"),  # 0.29 * 100 is below 29
        (0.0, "0.00"),
        (5e-324, "0.01"),
    ],
)
def test_rounding_up_is_decimal(value, shown):
    assert accounting.show(value) == shown


def test_an_order_that_rdp_leaves_out_is_no_warning_and_never_lowers_epsilon():
    code = (
        "from fedaccord.privacy import accounting as a; e = a.dp_sgd(1.0663, 0.1, 30); "
        "print(a.epsilon(e, 1e-4, accountant='RDP') >= a.epsilon(e, 1e-4))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("True\n", "")
