"""The driver: what a Flower strategy is shown, in which order, and what becomes of its answer."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAdam, FedAvg
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st

from fedaccord.server.admission import DrawnGrid
from fedaccord.strategies.driver import Driver, Outcome, Takes
from fedaccord.strategies.seam import SHOWN
from fedaccord.strategies.updates import Update, Weights, to_weights

SITES = ("north", "south", "west")
MODEL: Weights = {"w": np.arange(4.0).reshape(2, 2), "b": np.array(5.0)}


@pytest.fixture(autouse=True, scope="module")
def inside_a_run() -> Iterator[None]:
    """Flower writes who sends a message into it, and refuses to make one outside a run."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_run_id", "_task_id", "_node_id"):
            patch.setattr(TaskIdentity, name, 1)
        yield


class Shown(FedAvg):
    """FedAvg that remembers what it was shown, and may answer something else."""

    def __init__(self, answer: ArrayRecord | None = None, **options: Any) -> None:
        super().__init__(**SHOWN, **options)  # type: ignore[arg-type]
        self.answer, self.asked, self.replies = answer, {}, []  # type: ignore[var-annotated]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Any
    ) -> Iterable[Message]:
        self.asked = to_weights(arrays)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self.replies = list(replies)
        made = super().aggregate_train(server_round, self.replies)
        return made if self.answer is None else (self.answer, made[1])


def grid(sites: tuple[str, ...] = SITES) -> DrawnGrid:
    return DrawnGrid(None, dict(enumerate(sites, 1)))  # type: ignore[arg-type]


def update(site: str, value: float, weight: int = 1) -> Update:
    return Update(site, {"w": np.full((2, 2), value), "b": np.array(-value)}, weight, {})


def combined(
    driver: Driver, found: Iterable[Update], model: Weights = MODEL, quorum: int = 1
) -> Outcome:
    driver.ask(1, model, ConfigRecord({}), grid())
    return driver.combine(1, model, found, bound=100.0, heaviest=10, quorum=quorum)


@pytest.mark.parametrize("takes", ["mean", "updates", "weights"])
def test_sites_are_sent_the_model_and_the_round(takes: Takes) -> None:
    strategy = Shown()
    messages = Driver(strategy, takes).ask(7, MODEL, ConfigRecord({"run": "r"}), grid())
    assert sorted(m.metadata.dst_node_id for m in messages) == [1, 2, 3]
    for message in messages:
        sent = to_weights(message.content.array_records["arrays"])
        assert all(np.array_equal(sent[name], MODEL[name]) for name in MODEL)
        config = dict(message.content.config_records["config"])
        assert (config["run"], config["server-round"]) == ("r", 7)
    for name, value in MODEL.items():  # the strategy itself sees zeros, but for whole weights
        shown = value if takes == "weights" else np.zeros(value.shape)
        assert np.array_equal(strategy.asked[name], shown)


def test_a_record_of_another_name_is_the_one_that_carries_the_model() -> None:
    driver = Driver(Shown(arrayrecord_key="model"), "updates")
    for message in driver.ask(1, MODEL, ConfigRecord({}), grid()):
        assert list(message.content.array_records) == ["model"]
        assert np.array_equal(to_weights(message.content.array_records["model"])["w"], MODEL["w"])


@pytest.mark.parametrize(("takes", "base"), [("updates", 0.0), ("weights", 1.0)])
def test_replies_come_in_order_of_site_with_weight_and_name_and_nothing_else(
    takes: Takes, base: float
) -> None:
    strategy = Shown()
    found = [update("west", 3.0, 5), update("north", 1.0, 2), update("south", 2.0, 3)]
    outcome = combined(Driver(strategy, takes), found)
    assert outcome.sites == SITES
    read = [
        (
            reply.content.config_records["config"]["site"],
            dict(reply.content.metric_records["metrics"]),
            to_weights(reply.content.array_records["arrays"])["w"].tolist(),
        )
        for reply in strategy.replies
    ]
    assert read == [
        (site, {"num-examples": n}, (base * MODEL["w"] + value).tolist())
        for site, n, value in [("north", 2, 1.0), ("south", 3, 2.0), ("west", 5, 3.0)]
    ]


@pytest.mark.parametrize("takes", ["mean", "updates", "weights"])
def test_the_new_model_is_the_old_one_and_the_weighted_mean(takes: Takes) -> None:
    found = [update("north", 1.0, 2), update("south", 2.0, 3), update("west", 3.0, 5)]
    outcome = combined(Driver(Shown(), takes), found)
    assert outcome.model is not None and outcome.fault == ""
    np.testing.assert_allclose(outcome.model["w"], MODEL["w"] + 2.3, rtol=1e-15)
    np.testing.assert_allclose(outcome.model["b"], 5 - 2.3, rtol=1e-15)
    assert outcome.model["b"].shape == ()


@given(st.integers(0, 2**32), st.permutations(range(7)))
@settings(max_examples=30, deadline=None)
def test_a_mean_has_the_same_bits_in_any_order_of_arrival(seed: int, order: list[int]) -> None:
    rng = np.random.default_rng(seed)
    model = {"w": rng.normal(size=5)}
    sites = tuple("abcdefg")
    found = [
        Update(s, {"w": rng.normal(size=5)}, int(w), {})
        for s, w in zip(sites, rng.integers(1, 900, 7), strict=True)
    ]
    made = []
    for updates in (found, [found[i] for i in order]):
        driver = Driver(FedAvg(**SHOWN), "mean")  # type: ignore[arg-type]
        driver.ask(1, model, ConfigRecord({}), grid(sites))
        out = driver.combine(1, model, updates, bound=9.0, heaviest=900, quorum=7)
        assert out.model is not None
        made.append(out.model["w"].tobytes())
    assert made[0] == made[1]
    exact = sum(u.change["w"] * u.weight for u in found) / sum(u.weight for u in found)
    np.testing.assert_allclose(np.frombuffer(made[0]), model["w"] + exact, rtol=0, atol=1e-14)


def most_alive(driver: Driver) -> int:
    """How many updates exist at once while a round of 20 is combined."""
    sites, seen, most = tuple(f"s{n:02}" for n in range(20)), [], 0

    def arriving() -> Iterator[Update]:
        nonlocal most
        for site in sites:
            made = update(site, 1.0)
            seen.append(weakref.ref(made))
            most = max(most, sum(ref() is not None for ref in seen))
            yield made
            del made

    driver.ask(1, MODEL, ConfigRecord({}), grid(sites))
    out = driver.combine(1, MODEL, arriving(), bound=9.0, heaviest=1, quorum=20)
    assert out.model is not None
    return most


def test_a_strategy_that_takes_the_mean_holds_two_updates_at_most_however_many_sites() -> None:
    assert most_alive(Driver(Shown(), "mean")) <= 2
    assert most_alive(Driver(Shown(), "updates")) == 20  # else the count could not fail


@pytest.mark.parametrize("takes", ["mean", "updates", "weights"])
def test_only_whole_weights_round_a_small_update_of_a_large_weight_away(takes: Takes) -> None:
    # As float32, 1000 + 2.9e-5 is 1000, and 1000 + 3.3e-5 the next number, 6.1e-5 further.
    model: Weights = {"w": np.full(3, 1000.0, np.float32)}
    changes = zip(SITES[:2], (2.9e-5, 3.3e-5), strict=True)
    found = [Update(site, {"w": np.full(3, change)}, 1, {}) for site, change in changes]
    after = combined(Driver(Shown(), takes), found, model).model
    assert after is not None and after["w"].dtype == np.float32
    right = np.float32(1000 + 3.1e-5)
    assert right > 1000
    assert (after["w"] == (1000 if takes == "weights" else right)).all()


@pytest.mark.parametrize("takes", ["mean", "updates", "weights"])
@pytest.mark.parametrize("quorum", [1, 3])
def test_below_the_quorum_the_strategy_is_not_called(takes: Takes, quorum: int) -> None:
    strategy = Shown()
    found = [update("north", 1.0), update("west", 1.0)][: quorum - 1]
    outcome = combined(Driver(strategy, takes), found, quorum=quorum)
    assert outcome.model is None and outcome.sites == () and strategy.replies == []
    assert outcome.fault == f"accepted updates: {quorum - 1}, {quorum} are needed"


def test_an_update_beyond_its_bound_is_an_error_and_not_a_model() -> None:
    with pytest.raises(ValueError, match="above 100"):
        combined(Driver(Shown(), "mean"), [update("north", 100.5, 10)])


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ({"w": np.zeros((2, 2))}, "other names"),
        ({"w": np.zeros((2, 2)), "b": np.array(0.0), "more": np.zeros(1)}, "other names"),
        ({"w": np.zeros(4), "b": np.array(0.0)}, "w of another shape"),
        ({"w": np.zeros((2, 2)), "b": np.array(np.nan)}, "b of another shape, or not finite"),
        ({"w": np.full((2, 2), np.inf), "b": np.array(0.0)}, "w of another shape, or not finite"),
    ],
)
@pytest.mark.parametrize("takes", ["updates", "weights"])
def test_what_cannot_be_the_model_fails_the_round(
    answer: dict[str, Any], why: str, takes: Takes
) -> None:
    record = ArrayRecord({name: Array(value) for name, value in answer.items()})
    outcome = combined(Driver(Shown(record), takes), [update("north", 1.0)])
    assert outcome.model is None and outcome.sites == ()
    assert why in outcome.fault


def test_a_strategy_that_makes_no_model_fails_the_round() -> None:
    class Silent(Shown):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            return None, None

    outcome = combined(Driver(Silent(), "updates"), [update("north", 1.0)])
    assert outcome.model is None and "no model" in outcome.fault


def test_attributes_that_it_keeps_are_its_state() -> None:
    driver = Driver(FedAdam(**SHOWN), "mean", ("m_t", "v_t"))  # type: ignore[arg-type]
    assert driver.state() == {}
    combined(driver, [update("north", 1.0)])
    state = driver.state()
    assert sorted(state) == ["m_t/b", "m_t/w", "v_t/b", "v_t/w"]
    np.testing.assert_allclose(state["m_t/w"], 0.1, rtol=1e-12)  # 1 - beta_1, in the first round
    fresh = Driver(FedAdam(**SHOWN), "mean", ("m_t", "v_t"))  # type: ignore[arg-type]
    fresh.restore(state)
    assert {k: v.tobytes() for k, v in fresh.state().items()} == {
        k: v.tobytes() for k, v in state.items()
    }
    fresh.restore({})
    assert fresh.state() == {}
