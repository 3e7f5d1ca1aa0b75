"""SCAFFOLD: sites' steps are corrected for the way in which their data differ from the others'."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedaccord.strategies import bounds
from fedaccord.strategies.driver import Driver
from fedaccord.strategies.kept import Kept, State, corrected, heard
from fedaccord.strategies.seam import SHOWN, Setting, StrategyFault
from fedaccord.strategies.updates import Weights, to_arrays, to_weights


def next_control(control: Weights, centre: Weights, change: Weights, distance: float) -> Weights:
    """Return a site's next control variate: the mean gradient that its update shows.

    c_i <- c_i - c + (x - y_i) / (K eta), option II of Karimireddy, Kale, Mohri, Reddi, Stich and
    Suresh 2020, "SCAFFOLD", ICML, algorithm 1.

    Args:
        control: c_i, that the site was corrected with.
        centre: c, likewise.
        change: y_i - x, the update that the site released.
        distance: K eta, steps times learning rate.
    """
    return {name: control[name] - centre[name] - change[name] / distance for name in change}


class Scaffold(FedAvg):
    """FedAvg with corrected steps; control variates are kept here, from released updates alone.

    The paper has each site keep its own c_i. Option II makes it a function of what the site has
    released and what it was sent, so the coordinator can keep all of them: a site has no state that
    could get lost, and under privacy nothing enters a step that was not released before with noise.

    c is the mean of all c_i, weighted as updates are. A site not heard yet has c_i = 0. A site
    whose update was not accepted keeps its c_i.
    """

    def __init__(self, sites: int, distance: float, server_learning_rate: float) -> None:
        """Take the number of all sites, a site's steps times its learning rate, and our own."""
        super().__init__(**SHOWN)  # type: ignore[arg-type]
        self._sites, self._distance, self._rate = sites, distance, server_learning_rate
        self._controls = Kept()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every site that is shown, each with its correction c - c_i."""
        like = to_weights(arrays)
        centre = self._controls.mean(self._sites, like)

        def correction(site: str) -> Weights:
            control = self._controls.of(site, like)
            return {name: centre[name] - control[name] for name in like}

        return corrected(
            super().configure_train(server_round, arrays, config, grid), grid, correction
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the mean update times the server's learning rate; renew the sites' controls."""
        replies = list(replies)
        updates = heard(replies)
        arrays, said = super().aggregate_train(server_round, replies)
        if arrays is None:
            return None, said
        centre = self._controls.mean(self._sites, updates[0].change)
        for update in updates:
            control = self._controls.of(update.site, update.change)
            control = next_control(control, centre, update.change, self._distance)
            self._controls.put(update.site, control, update.weight)
        mean = {name: self._rate * value for name, value in to_weights(arrays).items()}
        return to_arrays({name: np.asarray(value) for name, value in mean.items()}), said

    def state(self) -> State:
        """Return the sites' control variates."""
        return self._controls.state()

    def restore(self, state: State) -> None:
        """Take the control variates back."""
        self._controls.restore(state)


def scaffold(setting: Setting, *, server_learning_rate: float = 1.0) -> Driver:
    """SCAFFOLD, option II.

    Raises:
        StrategyFault: sites whose optimiser is not plain gradient descent, whose updates are then
            no sum of gradients times the learning rate; or an option out of its bounds.
    """
    if setting.optimizer != "sgd":
        raise StrategyFault(
            f'scaffold reads gradients off updates, and training.optimizer = "{setting.optimizer}" '
            'rescales them. Set training.optimizer to "sgd", or choose feddyn.'
        )
    if setting.momentum != 0:
        raise StrategyFault(
            f"scaffold reads gradients off updates, and training.momentum = {setting.momentum:g} "
            "stretches them. Set training.momentum to 0, or choose feddyn."
        )
    rate = bounds.number("server_learning_rate", server_learning_rate, 0.0, 100.0, above=True)
    distance = setting.steps * setting.learning_rate
    return Driver(Scaffold(len(setting.sites), distance, rate), "updates")
