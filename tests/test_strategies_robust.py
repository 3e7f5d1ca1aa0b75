"""Robust rules: what hostile updates can and cannot do, and which changes of units they follow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st

from fedaccord.server.admission import DrawnGrid
from fedaccord.strategies.centred_clipping import centred_clip
from fedaccord.strategies.mixing import mix
from fedaccord.strategies.seam import Setting, make
from fedaccord.strategies.updates import Update

SITES = tuple(f"site-{letter}" for letter in "abcdefghijk")
SETTING = Setting(SITES, 11, 11, 10, 0.1, 0.0, "sgd", False)
TWO = {"num_malicious_nodes": 2}
RULES: list[tuple[str, dict[str, Any]]] = [
    ("fedmedian", TWO),
    ("fedtrimmedavg", TWO),
    ("krum", TWO),
    ("multikrum", TWO),
    ("bulyan", TWO),
    ("centred-clipping", TWO | {"mixing": False}),
    ("centred-clipping", TWO),
    ("centred-clipping", TWO | {"momentum": 0.9}),
    ("fedmedian", TWO | {"mixing": True}),
    ("fedtrimmedavg", TWO | {"mixing": True}),
    ("krum", TWO | {"mixing": True}),
    ("multikrum", TWO | {"mixing": True}),
]
SEEDS = st.integers(0, 2**32)


@pytest.fixture(autouse=True)
def inside_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower writes who sends a message into it, and refuses to make one outside a run."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def ruled(name: str, options: dict[str, Any], rows: np.ndarray) -> np.ndarray:
    """What a strategy makes of one round's updates, all sites of the same weight."""
    driver = make(name, options, SETTING)
    model = {"w": np.zeros(rows.shape[1])}
    grid = DrawnGrid(None, dict(enumerate(SITES, 1)))  # type: ignore[arg-type]
    driver.ask(1, model, ConfigRecord({}), grid)
    found = [Update(site, {"w": row}, 1, {}) for site, row in zip(SITES, rows, strict=True)]
    made = driver.combine(1, model, found, bound=1e9, heaviest=1, quorum=11).model
    assert made is not None
    return made["w"]


def near(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


# --- every rule -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), RULES)
def test_it_does_not_matter_which_site_sent_which_update(
    name: str, options: dict[str, Any]
) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        rows = rng.normal(size=(11, 6))
        near(ruled(name, options, rng.permutation(rows)), ruled(name, options, rows))


@pytest.mark.parametrize(("name", "options"), RULES)
def test_updates_in_another_unit_give_the_result_in_that_unit(
    name: str, options: dict[str, Any]
) -> None:
    rows = np.random.default_rng(1).normal(size=(11, 6))
    for factor in (-1.0, 1e-6, 3.0, 1e6):
        near(ruled(name, options, factor * rows) / factor, ruled(name, options, rows))


@pytest.mark.parametrize(
    ("name", "options"), [rule for rule in RULES if rule[0] != "centred-clipping"]
)
def test_a_shift_of_all_updates_shifts_the_result(name: str, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(2)
    rows, shift = rng.normal(size=(11, 6)), rng.normal(size=6)
    near(ruled(name, options, rows + shift), ruled(name, options, rows) + shift)


def attack(kind: str, honest: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    mean, spread = honest.mean(axis=0), honest.std(axis=0)
    return {
        "far": np.full((2, honest.shape[1]), 1e8),
        "opposite": np.array([-100 * mean, -50 * mean]),
        "apart": np.array([mean + 1e6, mean - 3e6]),
        "a little is enough": np.array([mean - 1.5 * spread] * 2),
        "random": 1e3 * rng.normal(size=(2, honest.shape[1])),
    }[kind]


@pytest.mark.parametrize("kind", ["far", "opposite", "apart", "a little is enough", "random"])
@pytest.mark.parametrize(("name", "options"), RULES)
def test_two_hostile_sites_of_eleven_cannot_take_the_result_out_of_the_honest_updates_reach(
    name: str, options: dict[str, Any], kind: str
) -> None:
    rng = np.random.default_rng(3)
    honest = 2.0 + rng.normal(size=(9, 20))
    reach = max(np.linalg.norm(row - honest.mean(axis=0)) for row in honest)
    rows = np.vstack([honest[:4], attack(kind, honest, rng), honest[4:]])
    assert np.linalg.norm(ruled(name, options, rows) - honest.mean(axis=0)) <= reach
    if kind != "a little is enough":  # the others ruin a mean, so the bound can fail
        assert np.linalg.norm(ruled("fedavg", {}, rows) - honest.mean(axis=0)) > 2 * reach


# --- mixing ---------------------------------------------------------------------------------------


def slowly(rows: np.ndarray, f: int) -> np.ndarray:
    """Mixing as the paper words it: for each update, the n - f nearest by direct differences."""
    out = []
    for row in rows:
        order = np.argsort(np.linalg.norm(rows - row, axis=1), kind="stable")
        out.append(rows[order[: len(rows) - f]].mean(axis=0))
    return np.array(out)


@given(SEEDS, st.integers(1, 12), st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_mixing_is_the_mean_of_the_nearest(seed: int, n: int, d: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(n, d))
    near(mix(rows, (n - 1) // 2), slowly(rows, (n - 1) // 2))


@given(SEEDS, st.floats(-1e3, 1e3), st.sampled_from([-8.0, 0.25, 1024.0]))
@settings(max_examples=50, deadline=None)
def test_mixing_follows_shift_scale_and_order(seed: int, shift: float, scale: float) -> None:
    rng = np.random.default_rng(seed)
    rows, order = rng.normal(size=(9, 5)), rng.permutation(9)
    mixed = mix(rows, 3)
    near(mix(rows + shift, 3), mixed + shift)
    near(mix(scale * rows, 3), scale * mixed)
    near(mix(rows[order], 3), mixed[order])


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=5), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_identical_updates_stay_what_they_are_to_the_bit(row: list[float], n: int) -> None:
    rows = np.array([row] * n)
    assert mix(rows, (n - 1) // 2).tobytes() == (rows + 0.0).tobytes()


def test_a_hostile_update_of_any_length_leaves_the_digits_in_which_honest_ones_differ() -> None:
    rng = np.random.default_rng(4)
    honest = 1.0 + 1e-6 * rng.normal(size=(9, 30))
    for length in (1e6, 1e9, 1e100, 1e200):
        rows = np.vstack([honest, np.full((2, 30), length)])
        found = mix(rows, 2)[:9]
        np.testing.assert_allclose(found - 1, slowly(honest, 0) - 1, rtol=1e-6, atol=1e-15)
    # Relative to the mean, as one would do it first, the same digits are lost:
    rows = np.vstack([honest, np.full((2, 30), 1e9)])
    apart = rows - rows.mean(axis=0)
    products = apart @ apart.T
    squares = np.diagonal(products)
    plain = (squares[:, None] + squares[None, :] - 2 * products)[:9, :9]
    exact = ((honest[:, None] - honest[None, :]) ** 2).sum(axis=2)
    assert np.abs(plain - exact).max() > 1e3 * exact.max()


@pytest.mark.parametrize(("n", "f"), [(4, 2), (3, -1), (1, 1), (10, 5)])
def test_mixing_half_or_more_away_is_refused(n: int, f: int) -> None:
    with pytest.raises(ValueError, match="0 <= f < n / 2"):
        mix(np.zeros((n, 2)), f)


def test_mixing_brings_honest_updates_together_which_the_median_alone_does_not() -> None:
    # Two camps of honest sites: what mixing is for.
    rng = np.random.default_rng(6)
    side = np.repeat([-1.0, 1.0], [5, 6])[:, None]
    rows = side + 0.1 * rng.normal(size=(11, 50))
    plain = np.linalg.norm(ruled("fedmedian", TWO, rows) - rows.mean(axis=0))
    mixed = np.linalg.norm(ruled("fedmedian", TWO | {"mixing": True}, rows) - rows.mean(axis=0))
    assert mixed < 0.5 * plain


# --- centred clipping -----------------------------------------------------------------------------


def test_one_iteration_is_the_papers_formula() -> None:
    rows = np.array([[0.0, 0.0], [30.0, 40.0], [0.6, 0.8]])
    expected = np.array([0.6 * 2 + 0.6, 0.8 * 2 + 0.8]) / 3  # the second is cut from 50 to 2
    near(centred_clip(rows, np.zeros(2), 2.0, 1), expected)


@given(
    st.lists(st.lists(st.floats(-1e300, 1e300), min_size=3, max_size=3), min_size=1, max_size=7),
    st.floats(1e-3, 1e3),
    st.integers(1, 5),
)
@settings(deadline=None)
def test_no_updates_at_all_can_move_the_centre_further_than_a_radius_an_iteration(
    rows: list[list[float]], radius: float, iterations: int
) -> None:
    centre = np.array([1.0, -2.0, 3.0])
    moved = centred_clip(np.array(rows), centre, radius, iterations)
    assert np.linalg.norm(moved - centre) <= iterations * radius * (1 + 1e-9)


@given(SEEDS, st.integers(1, 4), st.floats(-1e6, 1e6))
@settings(max_examples=50, deadline=None)
def test_f_hostile_updates_move_an_iteration_by_at_most_2_f_over_n_radii(
    seed: int, f: int, size: float
) -> None:
    rng = np.random.default_rng(seed)
    rows, centre = rng.normal(size=(11, 4)), rng.normal(size=4)
    hostile = rows.copy()
    hostile[:f] = size * rng.normal(size=(f, 4))
    one, other = (centred_clip(found, centre, 0.7, 1) for found in (rows, hostile))
    assert np.linalg.norm(one - other) <= 2 * f / 11 * 0.7 * (1 + 1e-9)


@given(SEEDS, st.integers(0, 5), st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
@settings(max_examples=50, deadline=None)
def test_without_a_radius_a_far_centre_comes_home_at_the_stated_rate(
    seed: int, f: int, size: float, away: float
) -> None:
    rng = np.random.default_rng(seed)
    agreed, centre = rng.normal(size=4), rng.normal(size=4)
    centre = agreed + away * (centre / np.linalg.norm(centre))
    rows = np.vstack([np.tile(agreed, (11 - f, 1)), size * rng.normal(size=(f, 4))])
    left = np.linalg.norm(centred_clip(rows, centre, None, 1) - agreed)
    assert left <= (2 * f / 11 + 1e-9) * away
    if f <= 2:
        assert np.linalg.norm(centred_clip(rows, centre, None, 5) - agreed) <= 0.01 * away


def test_a_fixed_radius_would_leave_a_far_centre_far() -> None:
    rows, centre = np.zeros((11, 2)), np.array([100.0, 0.0])
    assert np.linalg.norm(centred_clip(rows, centre, 1.0, 5)) == pytest.approx(95)
    assert np.linalg.norm(centred_clip(rows, centre, None, 5)) == 0


@given(SEEDS, st.floats(-1e3, 1e3), st.sampled_from([-8.0, 0.25, 1024.0]))
@settings(max_examples=50, deadline=None)
def test_without_a_radius_it_follows_shift_scale_and_order(
    seed: int, shift: float, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    rows, centre = rng.normal(size=(9, 5)), rng.normal(size=5)
    found = centred_clip(rows, centre, None, 3)
    near(centred_clip(rows + shift, centre + shift, None, 3), found + shift)
    near(centred_clip(scale * rows, scale * centre, None, 3), scale * found)
    near(centred_clip(rng.permutation(rows), centre, None, 3), found)


def test_the_centre_is_the_last_rounds_aggregate() -> None:
    rows = np.random.default_rng(8).normal(size=(11, 3))
    options = {"radius": 0.01, "iterations": 1, "mixing": False}
    driver = make("centred-clipping", options, SETTING)
    grid = DrawnGrid(None, dict(enumerate(SITES, 1)))  # type: ignore[arg-type]
    found = [Update(site, {"w": row}, 1, {}) for site, row in zip(SITES, rows, strict=True)]
    model, centre = {"w": np.zeros(3)}, np.zeros(3)
    for number in (1, 2, 3):
        driver.ask(number, model, ConfigRecord({}), grid)
        after = driver.combine(number, model, found, bound=1e9, heaviest=1, quorum=11).model
        assert after is not None
        centre = centred_clip(rows, centre, 0.01, 1)
        near(after["w"] - model["w"], centre)
        model = after
