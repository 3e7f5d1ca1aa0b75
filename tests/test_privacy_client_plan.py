"""The plan under client-level privacy: what it costs, what it refuses, what an accord may say."""

from __future__ import annotations

import math
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedaccord import accord as accords
from fedaccord import registry
from fedaccord.errors import AccordError
from fedaccord.privacy import accounting
from fedaccord.privacy.client_level import ClientPlan
from fedaccord.privacy.plan import PrivacyPlan, plan_for

PLAN = ClientPlan("a", 200, 20, 2, 2.0, 1.0, 1e-5)
ADAPTIVE = ClientPlan(
    "a", 200, 20, 2, 2.0, 1.0, 1e-5, 0.5, clipping_learning_rate=0.2, count_noise=10.0
)


# --- the plan -----------------------------------------------------------------------------------


@given(st.floats(0.3, 20), st.floats(0.2, 100))
def test_sum_and_noised_count_together_cost_the_declared_multiplier(z: float, count: float) -> None:
    if 2 * count <= z * 1.0001:
        return
    plan = ClientPlan("a", 9, 1, 0, z, 1.0, 1e-5, 0.5, 0.2, count)
    # Two Gaussians on the same sites are one whose squared inverse multipliers add up.
    both = (plan.mean_multiplier**-2 + (count / 0.5) ** -2) ** -0.5
    assert both == pytest.approx(z, rel=1e-9)
    assert plan.mean_multiplier > z


def test_the_count_and_the_mean_composed_cost_the_epsilon_of_the_plan() -> None:
    book = PLDAccountant()
    book.compose(
        dp_accounting.ComposedDpEvent(
            [
                dp_accounting.GaussianDpEvent(ADAPTIVE.mean_multiplier),
                dp_accounting.GaussianDpEvent(10.0 / 0.5),
            ]
        ),
        ADAPTIVE.rounds,
    )
    assert book.get_epsilon(1e-5) == pytest.approx(ADAPTIVE.epsilon(), rel=1e-3)


def test_the_epsilon_is_that_of_a_gaussian_with_the_rounds_composed() -> None:
    # T rounds of a Gaussian are one of multiplier z / sqrt(T); its exact curve is known: Balle and
    # Wang 2018, theorem 8.
    z = PLAN.noise_multiplier / math.sqrt(PLAN.rounds)
    e = PLAN.epsilon()
    upper = stats.norm.cdf(0.5 / z - e * z) - math.exp(e) * stats.norm.cdf(-0.5 / z - e * z)
    assert upper == pytest.approx(PLAN.delta, rel=1e-2)


def test_the_choice_of_sites_amplifies_nothing() -> None:
    few = toml({"rounds.sites_per_round": 2, "rounds.min_sites": 2})
    all_of_them = toml({})
    assert plan_for(few, "va").event() == plan_for(all_of_them, "va").event()


def test_the_odometer_never_reads_less_than_the_curve_and_ends_above_it() -> None:
    read = {used: PLAN.odometer(used) for used in (0, 1, 10, PLAN.rounds)}
    assert read[0] == 0.0
    assert list(read.values()) == sorted(read.values())
    assert all(value > PLAN.epsilon(used) for used, value in read.items() if used)


def test_the_statement_names_unit_rounds_noise_clip_and_who_sees_what() -> None:
    assert PLAN.statement() == (
        f"(epsilon={accounting.show(PLAN.epsilon())}, delta=1e-05)-DP per client (whole site), "
        "add-or-remove-one, PLD, 18+2 rounds, Gaussian, noise multiplier 2, clipping norm 1; the "
        "coordinator sees un-noised updates"
    )
    assert "clipping norm 1, then adapted to quantile 0.5" in ADAPTIVE.statement()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cohort", 0),
        ("rounds", 2),  # all of them spare
        ("rounds", 20.0),
        ("spare_rounds", -1),
        ("noise_multiplier", 0.29),
        ("noise_multiplier", math.nan),
        ("clipping_norm", 0.0),
        ("clipping_norm", math.inf),
        ("delta", 1.0),
        ("slack", -1e-6),
        ("count_noise", 1.0),  # half of the noise multiplier
        ("count_noise", None),  # without the others' being None
        ("unit", "subject"),
        ("neighboring_relation", "replace-one"),
    ],
)
def test_a_plan_that_says_nothing_cannot_be_made(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{key if value is not None else 'target_quantile'} = "):
        ClientPlan(**ADAPTIVE.to_json() | {key: value})


@pytest.mark.parametrize("used", [-1, PLAN.rounds + 1])
def test_the_odometer_counts_reserved_rounds_only(used: int) -> None:
    with pytest.raises(ValueError, match="must be 0 to rounds"):
        PLAN.odometer(used)


# --- the accord ---------------------------------------------------------------------------------

CLIENT = {
    "privacy.unit": "client",
    "privacy.clipping_norm": 1.0,
    "privacy.noise_multiplier": 4.0,
    "privacy.target_epsilon": None,
    "privacy.max_epsilon": 100.0,
}


def toml(changes: dict[str, Any], base: dict[str, Any] = CLIENT) -> accords.Accord:
    """The heart accord with some values changed; None takes a key out."""
    data = accords.load("heart").model_dump(mode="json", exclude_defaults=True)
    for path, value in (base | changes).items():
        *tables, key = path.split(".")
        here = data
        for table in tables:
            here = here.setdefault(table, {})
        here.pop(key, None)
        if value is not None:
            here[key] = value
    return accords.parse(data)


def test_an_accord_without_a_unit_has_plans_per_subject() -> None:
    assert isinstance(plan_for(toml({}, {}), "va"), PrivacyPlan)
    assert isinstance(plan_for(toml({}), "va"), ClientPlan)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"privacy.clipping_norm": None}, 'key "privacy.clipping_norm" is missing'),
        ({"privacy.max_grad_norm": 2.0}, 'belongs to privacy.unit = "subject", not to "client"'),
        ({"privacy.precision": "float32"}, 'privacy.precision = "float32" belongs to privacy.unit'),
        ({"privacy.engine": "ghost"}, 'privacy.engine = "ghost" belongs to privacy.unit'),
        ({"strategy.max_update_norm": 5.0}, "strategy.max_update_norm = 5 belongs to privacy.unit"),
        ({"privacy.unit": "subject"}, 'privacy.clipping_norm = 1 belongs to privacy.unit = "cli'),
        ({"privacy.count_noise": 3.0}, "privacy.count_noise = 3 belongs to adaptive clipping"),
        ({"privacy.clipping_learning_rate": 0.1}, "belongs to adaptive clipping"),
        (
            {"privacy.target_quantile": 0.5},
            "privacy.count_noise = 0.2 must be above half of the noise multiplier 4",
        ),
        (
            {"privacy.target_quantile": 0.5, "privacy.count_noise": 2.0},
            "privacy.count_noise = 2 must be above half of the noise multiplier 4",
        ),
    ],
)
def test_what_does_not_go_with_the_unit_is_refused_in_one_line(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(AccordError) as caught:
        toml(changes)
    said = str(caught.value)
    assert words in said
    assert "\n" not in said and said.endswith(".")


def test_noise_that_target_epsilon_asks_for_is_held_to_the_count_too() -> None:
    accord = toml(
        {
            "privacy.noise_multiplier": None,
            "privacy.target_epsilon": 3.0,
            "privacy.target_quantile": 0.5,
            "privacy.count_noise": 2.0,
        }
    )
    with pytest.raises(AccordError, match=r"privacy.count_noise = 2 must be above half"):
        plan_for(accord, "va")


def test_target_epsilon_becomes_the_smallest_noise_that_keeps_it() -> None:
    changes = {"privacy.noise_multiplier": None, "privacy.target_epsilon": 3.0}
    plan = plan_for(toml(changes), "va")
    assert isinstance(plan, ClientPlan)
    assert plan.rounds == 22
    assert plan.epsilon() <= 3.0
    less = ClientPlan(**plan.to_json() | {"noise_multiplier": plan.noise_multiplier - 1e-4})
    assert less.epsilon() > 3.0


@pytest.mark.slow  # a PLD of so little noise is wide
def test_an_epsilon_that_asks_for_next_to_no_noise_is_refused() -> None:
    changes = {"privacy.noise_multiplier": None, "privacy.target_epsilon": 20.0}
    accord = toml(changes | {"rounds.rounds": 1, "rounds.spare_rounds": None})
    with pytest.raises(AccordError, match=r"below the least, 0\.3"):
        plan_for(accord, "va")


def test_a_mean_is_the_only_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.STRATEGIES, "median", "no.such:thing")
    with pytest.raises(AccordError, match="only a mean has a sensitivity"):
        toml({"strategy.name": "median"})
