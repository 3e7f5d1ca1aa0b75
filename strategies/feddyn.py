"""FedDyn: each site's objective is bent so that all sites' minima agree with the global one."""

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


class FedDyn(FedAvg):
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
        super().__init__(**SHOWN)  # type: ignore[arg-type]
        self._sites, self._alpha = sites, alpha
        self._gradients = Kept()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every site that is shown, each with its correction -h_i, all with alpha."""
        like = to_weights(arrays)
        config["proximal-mu"] = self._alpha

        def correction(site: str) -> Weights:
            return {name: -value for name, value in self._gradients.of(site, like).items()}

        return corrected(
            super().configure_train(server_round, arrays, config, grid), grid, correction
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Renew the sites' gradients; return the mean update less h / alpha."""
        replies = list(replies)
        updates = heard(replies)
        arrays, said = super().aggregate_train(server_round, replies)
        if arrays is None:
            return None, said
        for update in updates:
            old = self._gradients.of(update.site, update.change)
            new = {name: old[name] - self._alpha * update.change[name] for name in old}
            self._gradients.put(update.site, new, update.weight)
        mean = to_weights(arrays)
        h = self._gradients.mean(self._sites, mean)
        return to_arrays({k: np.asarray(mean[k] - h[k] / self._alpha) for k in mean}), said

    def state(self) -> State:
        """Return the sites' gradients."""
        return self._gradients.state()

    def restore(self, state: State) -> None:
        """Take the gradients back."""
        self._gradients.restore(state)


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
