"""FedDyn: each site's objective is bent so that all sites' minima agree with the global one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedaccord.strategies import bounds
from fedaccord.strategies.driver import Driver
from fedaccord.strategies.kept import Corrected
from fedaccord.strategies.seam import Setting, StrategyFault
from fedaccord.strategies.updates import Update, Weights


class FedDyn(Corrected):
    """Dynamic regularisation; the sites' gradients are kept here, from released updates alone.

    Acar, Zhao, Matas Navarro, Mattina, Whatmough and Saligrama 2021, "Federated learning based on
    dynamic regularization", ICLR, algorithm 1. A site minimises
    L_i(w) - <h_i, w> + alpha/2 |w - w0|^2, so it is sent the correction -h_i and
    "proximal-mu" = alpha. After a round h_i <- h_i - alpha change_i, and the model moves by the
    mean change - h / alpha, with h the mean of all h_i. As for SCAFFOLD, h_i is a function of what
    the site released: sites keep nothing, and no un-noised value enters a step.

    Means are weighted as updates are. A site not heard yet has h_i = 0.
    """

    def __init__(self, sites: int, alpha: float) -> None:
        """Take the number of all sites and alpha, above 0."""
        super().__init__(sites)
        self._alpha = alpha

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every site that is shown, each with its correction, all with alpha."""
        config["proximal-mu"] = self._alpha
        return super().configure_train(server_round, arrays, config, grid)

    def _corrections(self, like: Weights) -> Callable[[str], Weights]:
        """Correct a site by -h_i."""
        return lambda site: {name: -value for name, value in self._kept.of(site, like).items()}

    def _renew(self, updates: list[Update], mean: Weights) -> Weights:
        """Renew the sites' gradients; return the mean update less h / alpha."""
        for update in updates:
            old = self._kept.of(update.site, update.change)
            new = {name: old[name] - self._alpha * update.change[name] for name in old}
            self._kept.put(update.site, new, update.weight)
        h = self._kept.mean(self._sites, mean)
        return {name: mean[name] - h[name] / self._alpha for name in mean}


def feddyn(setting: Setting, *, alpha: float = 0.1) -> Driver:
    """FedDyn.

    Raises:
        StrategyFault: alpha not above 0, or so large that a site's step would jump past the global
            model.
    """
    factor = bounds.pulled(setting, "alpha", alpha)
    if factor == 0:
        raise StrategyFault(
            "alpha = 0 is out of bounds: FedDyn divides by it. Give one above 0, such as 0.1."
        )
    return Driver(FedDyn(len(setting.sites), factor), "updates")
