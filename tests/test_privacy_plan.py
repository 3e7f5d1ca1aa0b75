"""The plan: what it refuses to be, what it says, and what its odometer reads."""

import dataclasses
import math

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from fedaccord import accord as accords
from fedaccord.errors import AccordError
from fedaccord.privacy import accounting
from fedaccord.privacy.plan import LEAST_NOISE, PrivacyPlan, plan_for

HEART = accords.load("heart")
PLAN = PrivacyPlan("ward", 100, 10, 5, 0.1, 1.5, 1.0, 1e-5, spare_rounds=2)

BAD = [
    ("subjects", (0, -1, 1.5, True)),
    ("rounds", (0, -3, 2.0, math.inf)),
    ("steps", (0, math.nan, "5")),
    ("spare_rounds", (-1, 10, 11, 0.5)),
    ("sampling_prob", (0.0, -0.1, 1.0000001, math.nan, math.inf)),
    ("noise_multiplier", (0.0, 0.2999, -1.0, math.nan, math.inf)),
    ("max_grad_norm", (0.0, 9e-10, -1.0, math.nan, math.inf)),
    ("delta", (0.0, 1.0, -1e-5, math.nan)),
    ("slack", (-1e-9, math.nan, math.inf)),
    ("neighboring_relation", ("replace-one", "")),
    ("unit", ("record", "client")),
]


def by_pld(sigma: float, q: float, steps: int, delta: float) -> float:
    """Epsilon with dp-accounting alone."""
    step = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))
    return PLDAccountant().compose(step, steps).get_epsilon(delta)


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, values in BAD for v in values])
def test_no_plan_exists_with_a_value_out_of_its_bounds(name, value):
    with pytest.raises(ValueError, match=rf"^{name} = .* must be ") as fault:
        dataclasses.replace(PLAN, **{name: value})
    assert "\n" not in str(fault.value)


@given(
    st.integers(1, 10**9),
    st.integers(1, 10**5),
    st.integers(1, 10**5),
    st.floats(0, 1, exclude_min=True),
    st.floats(LEAST_NOISE, 1e4),
    st.floats(1e-9, 1e6),
    st.floats(1e-12, 0.1),
    st.floats(0, 1),
    st.data(),
)
def test_every_plan_within_the_bounds_exists_and_is_read_back(
    subjects, rounds, steps, q, sigma, clip, delta, slack, data
):
    spare = data.draw(st.integers(0, rounds - 1))
    plan = PrivacyPlan(
        "ward", subjects, rounds, steps, q, sigma, clip, delta, slack, spare_rounds=spare
    )
    assert PrivacyPlan(**plan.to_json()) == plan
    assert 0 < plan.grid <= plan.noise_stddev
    assert plan.noise_stddev >= sigma * clip


def test_the_bounds_themselves_are_allowed():
    assert dataclasses.replace(PLAN, sampling_prob=1.0, noise_multiplier=LEAST_NOISE, slack=0.0)


def test_the_statement_says_epsilon_with_all_that_it_means():
    plan = plan_for(HEART, "cleveland")
    assert plan.statement() == (
        "(epsilon=3.00, delta=0.0001)-DP per training subject, add-or-remove-one, PLD, "
        "20+2 rounds x 10 steps, Poisson q=0.1, noise multiplier 2.0108"
    )


def test_the_accords_spare_rounds_are_among_those_reserved():
    plan = plan_for(HEART, "va")
    assert (plan.rounds, plan.spare_rounds) == (22, 2)
    assert plan.unit == plan.to_json()["unit"] == "training subject"
    assert dataclasses.replace(plan, spare_rounds=1).digest != plan.digest


def test_an_epsilon_that_needs_hardly_any_noise_is_refused_in_one_line():
    data = HEART.model_dump()
    data["privacy"] |= {"target_epsilon": 20.0, "max_epsilon": 20.0, "sampling_prob": 0.001}
    data["rounds"] |= {"rounds": 1, "spare_rounds": 0}
    data["training"] |= {"steps": 1}
    with pytest.raises(AccordError, match=r"privacy\.target_epsilon = 20 .* below the least") as no:
        plan_for(accords.parse(data), "va")
    assert "\n" not in str(no.value)


def test_the_odometer_of_heart_at_round_10_of_20_reads_2_56_where_the_curve_has_2_06():
    # Reference: computed with dp-accounting 0.6, sigma calibrated for epsilon 3 over 200 steps.
    sigma = accounting.calibrate(3.0, 1e-4, 0.1, 200)
    plan = PrivacyPlan("va", 130, 20, 10, 0.1, sigma, 1.0, 1e-4)
    assert plan.odometer(10) == pytest.approx(2.56, abs=0.006)
    assert plan.epsilon(10) == pytest.approx(2.06, abs=0.006)
    assert plan.odometer(10) == pytest.approx(by_pld(sigma, 0.1, 100, 1e-4 / 20), rel=1e-9)


def test_the_odometer_tells_a_delta_that_was_not_divided():
    assert PLAN.odometer(4) != pytest.approx(PLAN.epsilon(4), rel=0.01)


@settings(deadline=None, max_examples=5)
@given(st.floats(1, 5), st.floats(0.01, 0.9), st.integers(2, 5), st.floats(1e-8, 1e-3))
def test_the_odometer_starts_at_0_never_falls_and_is_never_below_the_curve(sigma, q, rounds, delta):
    plan = PrivacyPlan("ward", 100, rounds, 2, q, sigma, 1.0, delta)
    read = [plan.odometer(used) for used in range(rounds + 1)]
    assert read[0] == 0.0
    assert read == sorted(read)
    assert all(read[used] >= plan.epsilon(used) for used in (1, rounds))


@pytest.mark.parametrize("used", [-1, 11])
def test_the_odometer_knows_no_rounds_outside_the_plan(used):
    with pytest.raises(ValueError, match=f"used = {used} must be 0 to rounds = 10"):
        PLAN.odometer(used)
