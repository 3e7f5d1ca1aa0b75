"""The seam for strategies: names, paths and options of others, refused in one line if wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.serverapp.strategy import FedAvg

from fedaccord import accord as accords
from fedaccord.errors import AccordError
from fedaccord.strategies.driver import Driver
from fedaccord.strategies.seam import Setting, driver_for, make, setting_of

SETTING = Setting(("a", "b", "c"), 3, 3, 10, 0.1, 0.0, "sgd", False)
THEIRS = '''"""Strategies of somebody else."""

from flwr.serverapp.strategy import FedAvg

from fedaccord.strategies.driver import Driver

NUMBER = 7


class Plain(FedAvg):
    pass


class Mean(FedAvg):
    takes = "mean"


class Odd(FedAvg):
    takes = "deltas"


class Picky(FedAvg):
    def __init__(self, share, more=1):
        super().__init__(min_available_nodes=1)
        if share > 1:
            raise RuntimeError("share is too large")


def kept(decay=0.5):
    return Driver(FedAvg(), "mean", ("memory",))


def other():
    return "a word"
'''


@pytest.fixture(autouse=True)
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that holds strategies of somebody else."""
    (tmp_path / "their_strategies.py").write_text(THEIRS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(("name", "takes"), [("Plain", "weights"), ("Mean", "mean")])
def test_a_class_of_others_is_found_by_path_and_asks_every_site_it_is_shown(
    name: str, takes: str
) -> None:
    driver = make(f"their_strategies:{name}", {}, SETTING)
    assert driver.takes == takes
    strategy = driver.strategy
    assert isinstance(strategy, FedAvg) and type(strategy).__name__ == name
    found = (strategy.fraction_train, strategy.min_train_nodes, strategy.min_available_nodes)
    assert found == (1.0, 1, 1)


def test_options_reach_a_class_of_others() -> None:
    driver = make("their_strategies:Plain", {"weighted_by_key": "rows"}, SETTING)
    assert isinstance(driver.strategy, FedAvg)
    assert driver.strategy.weighted_by_key == "rows"


def test_others_may_give_a_driver_that_says_what_it_keeps() -> None:
    driver = make("their_strategies:kept", {"decay": 0.1}, SETTING)
    assert isinstance(driver, Driver) and driver.takes == "mean"


FAULTS = [
    ("their_strategies:NUMBER", {}, "is 7, no class or function"),
    ("their_strategies:other", {}, "is a str, not a Flower Strategy"),
    ("their_strategies:Odd", {}, "says takes = 'deltas'.* one of 'mean', 'updates', 'weights'"),
    ("their_strategies:Picky", {"share": 2}, "RuntimeError: share is too large"),
    ("their_strategies:Picky", {}, "missing 1 required .*share"),
    ("their_strategies:Picky", {"shar": 1}, 'Did you mean "share".*Known: more, share'),
    ("their_strategies:Gone", {}, "cannot be loaded: AttributeError"),
    ("no_such_module:Name", {}, "cannot be loaded: ModuleNotFoundError"),
    ("builtins:dict", {}, "no class or function whose options can be read"),
    ("fedavg", {"eta": 1}, r"strategy.options.eta is not an option of fedavg.*Known: none"),
    ("fedadam", {"eta_l": 1}, r'eta_l is not.*Did you mean "eta".*beta_1, beta_2, eta, tau'),
    ("fedadm", {}, 'Did you mean "fedadam"'),
]


@pytest.mark.parametrize(("name", "options", "says"), FAULTS)
def test_what_is_no_strategy_is_refused_in_one_line(
    name: str, options: dict[str, int], says: str
) -> None:
    with pytest.raises(AccordError, match=says) as caught:
        make(name, options, SETTING)
    assert "\n" not in str(caught.value)


def test_the_setting_is_what_the_accord_says() -> None:
    heart = accords.load("heart")
    data = heart.model_dump(mode="json") | {
        "strategy": {"name": "krum", "options": {"num_malicious_nodes": 1}},
    }
    setting = setting_of(accords.parse(data))
    assert setting.sites == ("cleveland", "hungary", "switzerland", "va")
    assert (setting.steps, setting.learning_rate) == (
        heart.training.steps,
        heart.training.learning_rate,
    )
    assert setting.private and setting.quorum == heart.rounds.min_sites
    with pytest.raises(AccordError, match=r"krum: num_malicious_nodes = 1 needs at least 5"):
        driver_for(accords.parse(data))
    data["strategy"] = {"name": "fedmedian"}
    data["rounds"]["min_sites"] = 3
    assert driver_for(accords.parse(data)).takes == "updates"
