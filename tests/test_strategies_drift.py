"""SCAFFOLD and FedDyn: sites that differ, many local steps, and the model that is right for all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord
from flwr.supercore.task_identity import TaskIdentity

from fedaccord.server.admission import DrawnGrid
from fedaccord.strategies.driver import Driver
from fedaccord.strategies.kept import Kept
from fedaccord.strategies.scaffold import next_control
from fedaccord.strategies.seam import Setting, make
from fedaccord.strategies.updates import Update, Weights, to_weights

STEPS, RATE = 50, 0.05
SITES = ("flat", "steep")
SETTING = Setting(SITES, 2, 1, STEPS, RATE, 0.0, "sgd", False)
# Site i minimises curve_i / 2 |w - at_i|^2.
CURVE = {"flat": 0.5, "steep": 4.0}
AT = {"flat": np.array([3.0, -1.0]), "steep": np.array([0.0, 2.0])}
SIZE = {"flat": 300, "steep": 100}


@pytest.fixture(autouse=True)
def inside_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower writes who sends a message into it, and refuses to make one outside a run."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def best() -> np.ndarray:
    """The minimum of the sites' objectives, weighted by size."""
    weights = {site: SIZE[site] * CURVE[site] for site in SITES}
    return sum(weights[s] * AT[s] for s in SITES) / sum(weights.values())


def train(site: str, start: np.ndarray, mu: float, correction: np.ndarray) -> np.ndarray:
    """A site's steps, as the contract between strategy and site words them."""
    w = start.copy()
    for _ in range(STEPS):
        w -= RATE * (CURVE[site] * (w - AT[site]) + correction + mu * (w - start))
    return w - start


def rounds(driver: Driver, number: int, drawn: tuple[str, ...] = SITES, first: int = 1) -> Weights:
    """Run rounds from zeros; return the model."""
    model: Weights = {"w": np.zeros(2)}
    for n in range(first, first + number):
        model = one(driver, n, model, drawn)
    return model


def one(driver: Driver, n: int, model: Weights, drawn: tuple[str, ...]) -> Weights:
    nodes = dict(enumerate(drawn, 7))
    found = []
    for message in driver.ask(n, model, ConfigRecord({}), DrawnGrid(None, nodes)):  # type: ignore[arg-type]
        site, content = nodes[message.metadata.dst_node_id], message.content
        mu: Any = content.config_records["config"].get("proximal-mu", 0.0)
        record = content.array_records.get("correction")
        correction = np.zeros(2) if record is None else to_weights(record)["w"]
        start = to_weights(content.array_records["arrays"])["w"]
        found.append(Update(site, {"w": train(site, start, mu, correction)}, SIZE[site], {}))
    made = driver.combine(n, model, found, bound=1e3, heaviest=300, quorum=1).model
    assert made is not None
    return made


def test_fedavg_settles_where_theory_says_and_that_is_off_the_optimum() -> None:
    # A site's K steps leave (1 - rate curve)^K of its distance; the mean stands still where the
    # moves, weighted by size, cancel.
    moves = {s: SIZE[s] * (1 - (1 - RATE * CURVE[s]) ** STEPS) for s in SITES}
    settled = sum(moves[s] * AT[s] for s in SITES) / sum(moves.values())
    found = rounds(make("fedavg", {}, SETTING), 60)["w"]
    np.testing.assert_allclose(found, settled, atol=1e-9)
    assert np.linalg.norm(settled - best()) > 1


@pytest.mark.parametrize(
    ("name", "options", "number"),
    [
        ("scaffold", {}, 60),
        ("scaffold", {"server_learning_rate": 0.7}, 90),
        ("feddyn", {"alpha": 1.0}, 60),
        ("feddyn", {"alpha": 2.0}, 60),
    ],
)
def test_with_many_local_steps_the_model_settles_at_the_optimum(
    name: str, options: dict[str, Any], number: int
) -> None:
    found = rounds(make(name, options, SETTING), number)["w"]
    np.testing.assert_allclose(found, best(), atol=1e-6)


@pytest.mark.parametrize("name", ["scaffold", "feddyn"])
def test_where_one_site_is_drawn_at_a_time_the_optimum_stands_still(name: str) -> None:
    # Once every site has been heard near the optimum, a round of one site does not leave it.
    options = {"alpha": 1.0} if name == "feddyn" else {}
    driver = make(name, options, SETTING)
    model = rounds(driver, 80)
    for n in range(80, 100):
        model = one(driver, n, model, (SITES[n % 2],))
    np.testing.assert_allclose(model["w"], best(), atol=1e-5)


@pytest.mark.parametrize("name", ["scaffold", "feddyn"])
def test_a_single_site_or_equal_sites_need_no_correction(name: str) -> None:
    driver = make(name, {}, SETTING)
    message = next(
        iter(driver.ask(1, {"w": np.ones(2)}, ConfigRecord({}), DrawnGrid(None, {1: "flat"})))
    )  # type: ignore[arg-type]
    assert to_weights(message.content.array_records["correction"])["w"].tolist() == [0.0, 0.0]


def test_a_control_variate_is_the_mean_of_the_gradients_that_the_site_saw() -> None:
    rng = np.random.default_rng(0)
    control, centre = ({"w": rng.normal(size=2)} for _ in range(2))
    w, seen = np.array([5.0, 5.0]), []
    start = w.copy()
    for _ in range(STEPS):
        seen.append(CURVE["steep"] * (w - AT["steep"]))
        w = w - RATE * (seen[-1] + centre["w"] - control["w"])
    found = next_control(control, centre, {"w": w - start}, STEPS * RATE)
    np.testing.assert_allclose(found["w"], np.mean(seen, axis=0), rtol=1e-12)


@pytest.mark.parametrize("name", ["scaffold", "feddyn"])
def test_each_site_gets_its_own_correction_and_one_not_drawn_keeps_its(name: str) -> None:
    driver = make(name, {}, SETTING)
    model = one(driver, 1, {"w": np.zeros(2)}, SITES)
    before = driver.state()
    model = one(driver, 2, model, ("flat",))
    after = driver.state()
    assert before["arrays/steep/w"].tobytes() == after["arrays/steep/w"].tobytes()
    assert before["arrays/flat/w"].tobytes() != after["arrays/flat/w"].tobytes()
    nodes = {5: "steep", 9: "flat"}  # another order, other nodes: the name decides
    sent = {
        nodes[m.metadata.dst_node_id]: to_weights(m.content.array_records["correction"])["w"]
        for m in driver.ask(3, model, ConfigRecord({}), DrawnGrid(None, nodes))  # type: ignore[arg-type]
    }
    kept = {site: after[f"arrays/{site}/w"] for site in SITES}
    mean = sum(SIZE[site] * kept[site] for site in SITES) / 400
    for site in SITES:
        expected = mean - kept[site] if name == "scaffold" else -kept[site]
        np.testing.assert_allclose(sent[site], expected, rtol=1e-12, atol=1e-12)
        assert sent[site].dtype == np.float64


def test_a_round_that_failed_changes_no_control_variate() -> None:
    driver = make("scaffold", {}, SETTING)
    model = one(driver, 1, {"w": np.zeros(2)}, SITES)
    before = {key: value.tobytes() for key, value in driver.state().items()}
    driver.ask(2, model, ConfigRecord({}), DrawnGrid(None, {1: "flat"}))  # type: ignore[arg-type]
    found = [Update("flat", {"w": np.ones(2)}, 300, {})]
    assert driver.combine(2, model, found, bound=1.0, heaviest=300, quorum=2).model is None
    assert {key: value.tobytes() for key, value in driver.state().items()} == before


def test_the_mean_over_all_sites_has_zeros_for_those_not_heard() -> None:
    kept, like = Kept(), {"w": np.zeros(2)}
    assert kept.mean(4, like)["w"].tolist() == [0.0, 0.0]
    kept.put("a", {"w": np.array([4.0, 8.0])}, 10)
    np.testing.assert_allclose(kept.mean(4, like)["w"], [1.0, 2.0])  # one of four, equal weights
    kept.put("b", {"w": np.array([0.0, 0.0])}, 30)
    np.testing.assert_allclose(kept.mean(2, like)["w"], [1.0, 2.0])  # 10 of 40
