"""Flower's strategies by name: driven on updates they are what Flower makes of whole weights."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.supercore.task_identity import TaskIdentity
from safetensors import numpy as safetensors

from fedaccord import registry
from fedaccord.errors import AccordError
from fedaccord.server.admission import DrawnGrid
from fedaccord.strategies.driver import Driver
from fedaccord.strategies.seam import SHOWN, Setting, make
from fedaccord.strategies.updates import Update, Weights, to_arrays, to_weights

SITES = tuple(f"site-{letter}" for letter in "abcdefghijk")
SETTING = Setting(SITES, 11, 11, 10, 0.1, 0.0, "sgd", False)
WEIGHTS = {site: 50 + 13 * number for number, site in enumerate(SITES)}
SHAPES: dict[str, tuple[int, ...]] = {"layer.weight": (3, 2), "layer.bias": (3,), "scale": ()}


@pytest.fixture(autouse=True)
def inside_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower writes who sends a message into it, and refuses to make one outside a run."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def settled() -> Iterator[None]:
    """Have Flower's own collections of garbage, one a site and 0.1 s each, look at nothing old."""
    gc.freeze()
    yield
    gc.unfreeze()


def grid(sites: tuple[str, ...] = SITES) -> DrawnGrid:
    return DrawnGrid(None, dict(enumerate(sites, 1)))  # type: ignore[arg-type]


def some(rng: np.random.Generator, scale: float = 1.0) -> Weights:
    return {name: np.asarray(scale * rng.normal(size=shape)) for name, shape in SHAPES.items()}


def updates(rng: np.random.Generator, sites: tuple[str, ...] = SITES) -> list[Update]:
    """Skewed updates, one of them far out."""
    common = some(rng)
    out = []
    for number, site in enumerate(sites):
        own = some(rng, 5.0 if number == 3 else 0.5)
        change = {name: common[name] + own[name] for name in SHAPES}
        loss = {"train_loss": float(rng.uniform(0.1, 3.0))}
        out.append(Update(site, change, WEIGHTS[site], loss))
    return out


def step(driver: Driver, number: int, model: Weights, found: list[Update]) -> Weights:
    driver.ask(number, model, ConfigRecord({}), grid(tuple(u.site for u in found)))
    made = driver.combine(number, model, found, bound=1e3, heaviest=500, quorum=1).model
    assert made is not None
    return made


def whole(strategy: flower.Strategy, number: int, model: Weights, found: list[Update]) -> Weights:
    """One round as Flower does it: whole weights there, whole weights back."""
    messages = strategy.configure_train(number, to_arrays(model), ConfigRecord({}), grid())
    replies = []
    for message, update in zip(messages, found, strict=True):
        local = {name: model[name] + update.change[name] for name in SHAPES}
        metrics = MetricRecord({"num-examples": update.weight, **update.metrics})
        content = RecordDict({"arrays": to_arrays(local), "metrics": metrics})
        replies.append(Message(content, reply_to=message))
    arrays, _ = strategy.aggregate_train(number, replies)
    assert arrays is not None
    return to_weights(arrays)


ORACLES: list[tuple[str, dict[str, Any], Callable[..., flower.Strategy], dict[str, Any]]] = [
    ("fedavg", {}, flower.FedAvg, {}),
    ("fedavgm", {}, flower.FedAvgM, {"server_momentum": 0.9}),
    (
        "fedavgm",
        {"server_learning_rate": 0.5, "server_momentum": 0.3},
        flower.FedAvgM,
        {"server_learning_rate": 0.5, "server_momentum": 0.3},
    ),
    ("fedprox", {"proximal_mu": 1}, flower.FedProx, {"proximal_mu": 1.0}),
    ("fedadam", {}, flower.FedAdam, {}),
    (
        "fedadam",
        {"eta": 1, "beta_1": 0.5, "beta_2": 0.7, "tau": 0.1},
        flower.FedAdam,
        {"eta": 1.0, "beta_1": 0.5, "beta_2": 0.7, "tau": 0.1},
    ),
    ("fedyogi", {}, flower.FedYogi, {}),
    ("fedadagrad", {}, flower.FedAdagrad, {}),
    ("qfedavg", {"q": 2.0}, flower.QFedAvg, {"q": 2.0, "client_learning_rate": 0.1}),
    ("fedmedian", {}, flower.FedMedian, {}),
    ("fedtrimmedavg", {"beta": 0.3}, flower.FedTrimmedAvg, {"beta": 0.3}),
    ("krum", {"num_malicious_nodes": 2}, flower.Krum, {"num_malicious_nodes": 2}),
    (
        "multikrum",
        {"num_malicious_nodes": 2, "num_nodes_to_select": 4},
        flower.MultiKrum,
        {"num_malicious_nodes": 2, "num_nodes_to_select": 4},
    ),
    ("bulyan", {"num_malicious_nodes": 2}, flower.Bulyan, {"num_malicious_nodes": 2}),
]


def test_every_name_that_stands_for_one_of_flowers_is_compared_with_it() -> None:
    ours = {name for name, place in registry.STRATEGIES.items() if ".flower:" in place}
    assert {name for name, *_ in ORACLES} == ours


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(("name", "options", "theirs", "same"), ORACLES)
def test_driven_on_updates_a_strategy_gives_what_flowers_gives_on_whole_weights(
    name: str,
    options: dict[str, Any],
    theirs: Callable[..., flower.Strategy],
    same: dict[str, Any],
) -> None:
    rng = np.random.default_rng(5)
    driver, oracle = make(name, options, SETTING), theirs(**same, **SHOWN)
    model = some(rng, 3.0)
    expected = dict(model)
    for number in range(1, 5):
        found = updates(rng)
        model = step(driver, number, model, found)
        # Flower's draws its nodes in any order; what a node replies depends on its place alone.
        expected = whole(oracle, number, expected, found)
        for key in SHAPES:
            assert model[key].shape == expected[key].shape == SHAPES[key]
            np.testing.assert_allclose(model[key], expected[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(registry.STRATEGIES))
def test_a_strategy_that_is_restored_goes_on_with_the_same_bits(name: str) -> None:
    rng = np.random.default_rng(7)
    model, first = some(rng), make(name, {}, SETTING)
    model = step(first, 1, model, updates(rng))
    model = step(first, 2, model, updates(rng, SITES[:-1]))
    kept = safetensors.load(safetensors.save(first.state()))
    second = make(name, {}, SETTING)
    second.restore(kept)
    for number in (3, 4):
        found = updates(rng)
        asked = [d.ask(number, model, ConfigRecord({}), grid()) for d in (first, second)]
        told = [{m.metadata.dst_node_id: content_of(m) for m in messages} for messages in asked]
        assert told[0] == told[1]
        made = [step(driver, number, model, found) for driver in (first, second)]
        assert [made[0][key].tobytes() for key in SHAPES] == [
            made[1][key].tobytes() for key in SHAPES
        ]
        model = made[0]
    assert {k: v.tobytes() for k, v in first.state().items()} == {
        k: v.tobytes() for k, v in second.state().items()
    }


def content_of(message: Message) -> dict[str, Any]:
    """What a message says, arrays as bytes."""
    out: dict[str, Any] = {"config": dict(message.content.config_records["config"])}
    for key, arrays in message.content.array_records.items():
        out[key] = {name: value.tobytes() for name, value in to_weights(arrays).items()}
    return out


REMEMBERS = {
    "centred-clipping",
    "fedadagrad",
    "fedadam",
    "fedavgm",
    "feddyn",
    "fedyogi",
    "scaffold",
}


@pytest.mark.parametrize("name", sorted(registry.STRATEGIES))
def test_without_its_state_a_strategy_that_remembers_goes_on_otherwise(name: str) -> None:
    # Else the test above would hold of a state that is left empty.
    rng = np.random.default_rng(7)
    model, first = some(rng), make(name, {}, SETTING)
    model = step(first, 1, model, updates(rng))
    assert bool(first.state()) == (name in REMEMBERS)
    found = updates(rng)
    after, fresh = (step(d, 2, model, found) for d in (first, make(name, {}, SETTING)))
    differs = any(not np.array_equal(after[key], fresh[key]) for key in SHAPES)
    assert differs == (name in REMEMBERS - {"scaffold"})  # its memory works through the sites


@pytest.mark.parametrize("name", sorted(registry.STRATEGIES))
def test_the_order_of_the_replies_changes_no_bit(name: str) -> None:
    rng = np.random.default_rng(3)
    model, found = some(rng), updates(rng)
    made = []
    for order in (range(11), rng.permutation(11), reversed(range(11))):
        after = step(make(name, {}, SETTING), 1, model, [found[i] for i in order])
        made.append([after[key].tobytes() for key in SHAPES])
    assert made[0] == made[1] == made[2]


def test_qfedavg_asks_for_the_loss_and_no_other_does() -> None:
    for name in registry.STRATEGIES:
        (message, *_) = make(name, {}, SETTING).ask(
            1, some(np.random.default_rng()), ConfigRecord({}), grid()
        )
        wants = message.content.config_records["config"].get("wants")
        assert wants == ("train-loss" if name == "qfedavg" else None)


@pytest.mark.parametrize("name", ["bulyan", "qfedavg"])
def test_no_collection_of_garbage_is_run_for_a_round(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, calls = np.random.default_rng(1), []
    monkeypatch.setattr(gc, "collect", lambda: calls.append(1))
    step(make(name, {}, SETTING), 1, some(rng), updates(rng))
    assert calls == []
    whole(flower.Bulyan(num_malicious_nodes=2, **SHOWN), 1, some(rng), updates(rng))
    assert calls != []  # else this could not fail


def test_fedprox_tells_the_sites_its_factor_as_a_float() -> None:
    driver = make("fedprox", {"proximal_mu": 1}, SETTING)
    (message, *_) = driver.ask(1, some(np.random.default_rng()), ConfigRecord({}), grid())
    assert repr(message.content.config_records["config"]["proximal-mu"]) == "1.0"


FAULTS: list[tuple[str, dict[str, Any], dict[str, Any], list[str]]] = [
    # name, options, what is other in the setting, what the fault must say
    ("fedavgm", {"server_momentum": 1.0}, {}, ["server_momentum = 1.0", "below 1"]),
    ("fedavgm", {"server_momentum": -0.1}, {}, ["server_momentum = -0.1", "at least 0"]),
    ("fedavgm", {"server_learning_rate": 0}, {}, ["server_learning_rate = 0 ", "above 0"]),
    ("fedavgm", {"server_learning_rate": "fast"}, {}, ["server_learning_rate = 'fast'", "above 0"]),
    ("fedprox", {"proximal_mu": -1}, {}, ["proximal_mu = -1", "at least 0"]),
    ("fedprox", {"proximal_mu": True}, {}, ["proximal_mu = True is no number"]),
    (
        "fedprox",
        {"proximal_mu": 3.0},
        {"learning_rate": 0.6},
        ["proximal_mu = 3", "learning_rate = 0.6", "above 1", "Set proximal_mu to 1.6665 or less"],
    ),
    ("fedadam", {"eta": 0.0}, {}, ["eta = 0.0", "above 0 and at most 100"]),
    ("fedadam", {"beta_1": 1}, {}, ["beta_1 = 1 ", "at least 0 and below 1"]),
    ("fedyogi", {"beta_2": 1.5}, {}, ["beta_2 = 1.5", "below 1"]),
    ("fedadagrad", {"tau": 0}, {}, ["tau = 0 ", "above 0"]),
    ("qfedavg", {}, {"private": True}, ["privacy.enabled = true", "loss", "fedavg"]),
    ("qfedavg", {"q": -1.0}, {}, ["q = -1.0", "at least 0"]),
    (
        "fedmedian",
        {"num_malicious_nodes": 2},
        {"quorum": 4},
        ["num_malicious_nodes = 2", "at least 5", "min_sites = 4", "Set rounds.min_sites to 5"],
    ),
    ("fedmedian", {"num_malicious_nodes": 1.0}, {}, ["num_malicious_nodes = 1.0", "whole number"]),
    ("fedmedian", {"mixing": 1}, {}, ["mixing = 1 ", "true or false"]),
    (
        "fedmedian",
        {"mixing": True, "num_malicious_nodes": 0},
        {},
        ["mixing = true", "num_malicious_nodes = 0", "to 1 or more"],
    ),
    ("fedtrimmedavg", {"beta": 0.5}, {}, ["beta = 0.5", "below 0.5"]),
    (
        "fedtrimmedavg",
        {},
        {"quorum": 4},
        ["beta = 0.2 cuts 0", "min_sites = 4", "num_malicious_nodes = 1", "Raise beta to 0.25"],
    ),
    (
        "krum",
        {"num_malicious_nodes": 2},
        {"quorum": 6},
        ["num_malicious_nodes = 2", "at least 7", "(2 x 2 + 3)", "min_sites = 6"],
    ),
    (
        "multikrum",
        {"num_malicious_nodes": 2, "num_nodes_to_select": 10},
        {},
        ["num_nodes_to_select = 10 is above 9", "min_sites = 11", "num_malicious_nodes = 2"],
    ),
    ("multikrum", {"num_nodes_to_select": 0}, {}, ["num_nodes_to_select = 0", "from 1"]),
    (
        "bulyan",
        {"num_malicious_nodes": 3},
        {},
        ["num_malicious_nodes = 3", "at least 15", "(4 x 3 + 3)", "min_sites = 11"],
    ),
    ("centred-clipping", {}, {"quorum": 2}, ["num_malicious_nodes = 1", "at least 3"]),
    ("centred-clipping", {"radius": 0.0}, {}, ["radius = 0.0", "above 0"]),
    ("centred-clipping", {"iterations": 0}, {}, ["iterations = 0", "from 1 to 100"]),
    ("centred-clipping", {"momentum": 1.0}, {}, ["momentum = 1.0", "below 1"]),
    ("scaffold", {}, {"momentum": 0.9}, ["training.momentum = 0.9", "to 0", "feddyn"]),
    ("scaffold", {}, {"optimizer": "adam"}, ['training.optimizer = "adam"', '"sgd"', "feddyn"]),
    ("scaffold", {"server_learning_rate": 0.0}, {}, ["server_learning_rate = 0.0", "above 0"]),
    ("feddyn", {"alpha": 0.0}, {}, ["alpha = 0 ", "above 0"]),
    ("feddyn", {"alpha": 11.0}, {}, ["alpha = 11", "above 1", "Set alpha to 10 or less"]),
]


@pytest.mark.parametrize(("name", "options", "other", "says"), FAULTS)
def test_a_fault_names_parameter_value_bound_and_remedy(
    name: str, options: dict[str, Any], other: dict[str, Any], says: list[str]
) -> None:
    with pytest.raises(AccordError) as caught:
        make(name, options, replace(SETTING, **other))
    for part in [f"strategy.options of {name}: ", *says]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "other"),
    [
        ("fedprox", {"proximal_mu": 1.6665}, {"learning_rate": 0.6}),
        ("feddyn", {"alpha": 10.0}, {}),
        ("fedmedian", {"num_malicious_nodes": 2}, {"quorum": 5}),
        ("fedtrimmedavg", {"beta": 0.25}, {"quorum": 4}),
        ("fedtrimmedavg", {"beta": 0.2}, {"quorum": 5}),
        ("krum", {"num_malicious_nodes": 2}, {"quorum": 7}),
        ("multikrum", {"num_malicious_nodes": 2, "num_nodes_to_select": 9}, {}),
        ("bulyan", {"num_malicious_nodes": 2}, {}),
        ("centred-clipping", {}, {"quorum": 3}),
        ("qfedavg", {"q": 0}, {}),
    ],
)
def test_what_is_just_within_the_bounds_is_made(
    name: str, options: dict[str, Any], other: dict[str, Any]
) -> None:
    assert isinstance(make(name, options, replace(SETTING, **other)), Driver)


@pytest.mark.parametrize("n", [3, 5, 7, 10, 31, 100, 2001])
def test_the_share_that_a_fault_proposes_cuts_enough(n: int) -> None:
    for f in {1, n // 3, (n - 1) // 2}:
        if int(0.0001 * n) < f:
            with pytest.raises(AccordError, match="Raise beta to") as caught:
                make(
                    "fedtrimmedavg",
                    {"beta": 0.0001, "num_malicious_nodes": f},
                    replace(SETTING, quorum=n),
                )
            said = float(str(caught.value).split("Raise beta to ")[1].split()[0])
            options = {"beta": said, "num_malicious_nodes": f}
            assert make("fedtrimmedavg", options, replace(SETTING, quorum=n))


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.03, 0.07, 0.3, 0.6, 0.7, 1.1, 3.0, 1000.0])
def test_the_factor_that_a_fault_proposes_is_taken_by_us_and_by_the_sites(rate: float) -> None:
    setting = replace(SETTING, learning_rate=rate)
    with pytest.raises(AccordError, match="Set proximal_mu to") as caught:
        make("fedprox", {"proximal_mu": 1e5}, setting)
    said = float(str(caught.value).split("Set proximal_mu to ")[1].split()[0])
    assert said * rate <= 1 and math.isclose(said * rate, 1, rel_tol=1e-3)
    assert make("fedprox", {"proximal_mu": said}, setting)


@pytest.mark.parametrize("name", sorted(registry.STRATEGIES))
def test_only_a_strategy_that_needs_raw_losses_is_refused_under_privacy(name: str) -> None:
    setting = replace(SETTING, private=True)
    if name == "qfedavg":
        with pytest.raises(AccordError, match="training loss without noise"):
            make(name, {}, setting)
    else:
        assert isinstance(make(name, {}, setting), Driver)


def test_which_strategies_hold_one_update_at_a_time() -> None:
    takes = {name: make(name, {}, SETTING).takes for name in registry.STRATEGIES}
    mean = {name for name, kind in takes.items() if kind == "mean"}
    assert mean == {"fedavg", "fedavgm", "fedprox", "fedadam", "fedyogi", "fedadagrad"}
    assert set(takes.values()) == {"mean", "updates"}
