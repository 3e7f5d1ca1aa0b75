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
from hypothesis import given
from hypothesis import strategies as st

from fedaccord import accord as accords
from fedaccord.errors import AccordError
from fedaccord.privacy import accounting
from fedaccord.privacy.plan import PrivacyPlan, plan_for

HEART = accords.load("heart")

# Reference values at delta 1e-5: shared/reference/traps.md, computed there with dp-accounting 0.6
# and checked against the PRV accountant (Gopi et al. 2021).
TABLE = [
    (1.0, 0.01, 1000, 2.10, 1.828),
    (2.0, 0.1, 500, 6.03, 5.556),
    (0.6, 0.05, 200, 17.5, 15.46),
    (4.0, 1.0, 100, 14.1, 13.21),
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


@pytest.mark.parametrize(("sigma", "q", "steps", "rdp", "pld"), TABLE)
def test_epsilon_is_the_reference_value(sigma, q, steps, rdp, pld):
    event = accounting.dp_sgd(sigma, q, steps)
    assert accounting.epsilon(event, 1e-5) == pytest.approx(pld, rel=0.005)
    assert accounting.epsilon(event, 1e-5, accountant="RDP") == pytest.approx(rdp, rel=0.005)


@pytest.mark.parametrize(("sigma", "q", "steps", "rdp", "pld"), TABLE[:2])
def test_the_reference_tells_noise_that_is_two_per_cent_off(sigma, q, steps, rdp, pld):
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


def test_the_statement_says_epsilon_with_all_that_it_means(heart):
    assert heart.statement() == (
        "(epsilon=3.00, delta=0.0001)-DP per training subject, add-or-remove-one, PLD, 22 rounds x "
        f"10 steps, Poisson q=0.1, noise multiplier {heart.noise_multiplier:g}"
    )


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
