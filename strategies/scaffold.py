"""SCAFFOLD: sites' steps are corrected for the way in which their data differ from the others'."""

from __future__ import annotations

from collections.abc import Callable

from fedaccord.strategies import bounds
from fedaccord.strategies.driver import Driver
from fedaccord.strategies.kept import Corrected
from fedaccord.strategies.seam import Setting, StrategyFault
from fedaccord.strategies.updates import Update, Weights


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


class Scaffold(Corrected):
    """FedAvg with corrected steps; control variates are kept here, from released updates alone.

    The paper has each site keep its own c_i. Option II makes it a function of what the site has
    released and what it was sent, so the coordinator can keep all of them: a site has no state that
    could get lost, and under privacy nothing enters a step that was not released before with noise.

    c is the mean of all c_i, weighted as updates are. A site not heard yet has c_i = 0. A site
    whose update was not accepted keeps its c_i.
    """

    def __init__(self, sites: int, distance: float, server_learning_rate: float) -> None:
        """Take the number of all sites, a site's steps times its learning rate, and our own."""
        super().__init__(sites)
        self._distance, self._rate = distance, server_learning_rate

    def _corrections(self, like: Weights) -> Callable[[str], Weights]:
        """Correct a site by c - c_i."""
        centre = self._kept.mean(self._sites, like)

        def correction(site: str) -> Weights:
            control = self._kept.of(site, like)
            return {name: centre[name] - control[name] for name in like}

        return correction

    def _renew(self, updates: list[Update], mean: Weights) -> Weights:
        """Renew the sites' controls; return the mean update times the server's learning rate."""
        centre = self._kept.mean(self._sites, mean)
        for update in updates:
            control = self._kept.of(update.site, update.change)
            control = next_control(control, centre, update.change, self._distance)
            self._kept.put(update.site, control, update.weight)
        return {name: self._rate * value for name, value in mean.items()}


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
