"""Flower's own strategies by name: made to take every site they are shown, options checked."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    Bulyan,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    QFedAvg,
    Strategy,
)

from fedaccord.strategies import bounds
from fedaccord.strategies.driver import Driver
from fedaccord.strategies.kept import State
from fedaccord.strategies.mixing import Mixed
from fedaccord.strategies.seam import SHOWN, Setting, StrategyFault
from fedaccord.strategies.updates import arrays_of

MOMENTS = ("m_t", "v_t")  # where Flower's adaptive strategies keep theirs


def fedavg(setting: Setting) -> Driver:
    """FedAvg (McMahan et al. 2017): the mean of the updates, weighted by the roster."""
    return Driver(FedAvg(**SHOWN), "mean")  # type: ignore[arg-type]


def fedavgm(
    setting: Setting, *, server_learning_rate: float = 1.0, server_momentum: float = 0.9
) -> Driver:
    """FedAvgM (Hsu, Qi and Brown 2019): the mean update with momentum from round to round."""
    rate = bounds.number("server_learning_rate", server_learning_rate, 0.0, 100.0, above=True)
    momentum = bounds.number("server_momentum", server_momentum, 0.0, 1.0, below=True)
    made = Momentum(server_learning_rate=rate, server_momentum=momentum, **SHOWN)  # type: ignore[arg-type]
    return Driver(made, "mean")


class Momentum(FedAvgM):
    """Flower's FedAvgM, which takes the model of its first round to be the last aggregate since.

    Its aggregate is an update here, so it is given each round's start anew; its momentum, a list,
    is kept by number.
    """

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Start the round at the arrays shown."""
        self.current_arrays = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def state(self) -> State:
        """Return the momentum of each of the model's arrays, by its number."""
        kept = self.momentum_vector or []
        return {f"momentum/{number}": np.asarray(value) for number, value in enumerate(kept)}

    def restore(self, state: State) -> None:
        """Take the momentum back."""
        kept = [state[f"momentum/{number}"] for number in range(len(state))]
        self.momentum_vector = kept or None


def fedprox(setting: Setting, *, proximal_mu: float = 0.1) -> Driver:
    """FedProx (Li et al. 2020): sites are pulled back to the global model as they train."""
    mu = bounds.pulled(setting, "proximal_mu", proximal_mu)
    return Driver(FedProx(proximal_mu=mu, **SHOWN), "mean")  # type: ignore[arg-type]


def fedadam(
    setting: Setting,
    *,
    eta: float = 0.1,
    beta_1: float = 0.9,
    beta_2: float = 0.99,
    tau: float = 1e-3,
) -> Driver:
    """FedAdam (Reddi et al. 2021): Adam at the coordinator, with the mean update as gradient."""
    adaptive = _adaptive(eta, beta_1, beta_2, tau)
    return Driver(FedAdam(**adaptive, **SHOWN), "mean", MOMENTS)  # type: ignore[arg-type]


def fedyogi(
    setting: Setting,
    *,
    eta: float = 0.01,
    beta_1: float = 0.9,
    beta_2: float = 0.99,
    tau: float = 1e-3,
) -> Driver:
    """FedYogi (Reddi et al. 2021): as FedAdam; the second moment grows and shrinks more slowly."""
    adaptive = _adaptive(eta, beta_1, beta_2, tau)
    return Driver(FedYogi(**adaptive, **SHOWN), "mean", MOMENTS)  # type: ignore[arg-type]


def fedadagrad(setting: Setting, *, eta: float = 0.1, tau: float = 1e-3) -> Driver:
    """FedAdagrad (Reddi et al. 2021): as FedAdam, without momentum; the second moment is a sum."""
    adaptive = _adaptive(eta, 0.0, 0.0, tau)
    made = FedAdagrad(eta=adaptive["eta"], tau=adaptive["tau"], **SHOWN)  # type: ignore[arg-type]
    return Driver(made, "mean", MOMENTS)


def _adaptive(eta: float, beta_1: float, beta_2: float, tau: float) -> dict[str, float]:
    """Check the options of the adaptive strategies (eta_l, which Flower never reads, is none)."""
    return {
        "eta": bounds.number("eta", eta, 0.0, 100.0, above=True),
        "beta_1": bounds.number("beta_1", beta_1, 0.0, 1.0, below=True),
        "beta_2": bounds.number("beta_2", beta_2, 0.0, 1.0, below=True),
        "tau": bounds.number("tau", tau, 0.0, 1e3, above=True),
    }


def qfedavg(setting: Setting, *, q: float = 0.1) -> Driver:
    """q-FedAvg (Li, Sanjabi, Beirami and Smith 2020): sites with a higher loss count more.

    Raises:
        StrategyFault: a private run, or q out of its bounds.
    """
    if setting.private:
        raise StrategyFault(
            "qfedavg needs each site's training loss without noise, which privacy.enabled = true "
            'does not let out. Choose another strategy, such as "fedavg", or set privacy.enabled '
            "to false."
        )
    q = bounds.number("q", q, 0.0, 100.0)
    rate = setting.learning_rate
    made = Losses(client_learning_rate=rate, q=q, **SHOWN)  # type: ignore[arg-type]
    return Driver(made, "updates")


class Uncollected(ArrayRecord):
    """Arrays that are read without a collection of garbage, which Flower runs after each site's.

    Flower's QFedAvg and Bulyan ask for it where they take a reply's arrays out of it. With torch in
    memory that takes some 0.1 s a site, for arrays that are freed by themselves.
    """

    def to_numpy_ndarrays(self, *, keep_input: bool = True) -> list[npt.NDArray[Any]]:
        """Read all arrays; they stay in the record, too."""
        return super().to_numpy_ndarrays(keep_input=True)


def uncollected(replies: Iterable[Message]) -> list[Message]:
    """Have replies' arrays read without a collection of garbage."""
    kept = list(replies)
    for reply in kept:
        reply.content["arrays"] = Uncollected(dict(arrays_of(reply.content)["arrays"]))
    return kept


class Losses(QFedAvg):
    """Flower's QFedAvg, which asks each site for the loss of the model that it is sent."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask for the loss as well."""
        config["wants"] = "train-loss"
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Have Flower's do it."""
        self.current_arrays = Uncollected(dict(self.current_arrays or {}))
        return super().aggregate_train(server_round, uncollected(replies))


def fedmedian(setting: Setting, *, num_malicious_nodes: int = 1, mixing: bool = False) -> Driver:
    """FedMedian (Yin et al. 2018): the median of each coordinate.

    Raises:
        StrategyFault: an option out of its bounds, or rounds.min_sites below 2 f + 1.
    """
    f = bounds.tolerated(setting, num_malicious_nodes, 2, 1)
    return _robust(FedMedian(**SHOWN), f, mixing)  # type: ignore[arg-type]


def fedtrimmedavg(
    setting: Setting, *, beta: float = 0.2, num_malicious_nodes: int = 1, mixing: bool = False
) -> Driver:
    """FedTrimmedAvg (Yin et al. 2018): each coordinate's mean without a share at both ends.

    Raises:
        StrategyFault: an option out of its bounds, or a share that is fewer than f replies.
    """
    f = bounds.tolerated(setting, num_malicious_nodes, 2, 1)
    share = bounds.number("beta", beta, 0.0, 0.5, below=True)
    n = setting.quorum
    if int(share * n) < f:  # as Flower counts them
        least = math.ceil(1000 * f / n) / 1000
        if int(least * n) < f or least >= 0.5:
            least = (f / n + 0.5) / 2
        raise StrategyFault(
            f"beta = {share:g} cuts {int(share * n)} of rounds.min_sites = {n} replies off each "
            f"end, fewer than num_malicious_nodes = {f}. Raise beta to {least:.6g} or more (below "
            "0.5), raise rounds.min_sites, or lower num_malicious_nodes."
        )
    return _robust(FedTrimmedAvg(beta=share, **SHOWN), f, mixing)  # type: ignore[arg-type]


def krum(setting: Setting, *, num_malicious_nodes: int = 1, mixing: bool = False) -> Driver:
    """Krum (Blanchard et al. 2017): the one update whose nearest neighbours are nearest.

    Raises:
        StrategyFault: an option out of its bounds, or rounds.min_sites below 2 f + 3.
    """
    f = bounds.tolerated(setting, num_malicious_nodes, 2, 3)
    return _robust(Krum(num_malicious_nodes=f, **SHOWN), f, mixing)  # type: ignore[arg-type]


def multikrum(
    setting: Setting,
    *,
    num_malicious_nodes: int = 1,
    num_nodes_to_select: int | None = None,
    mixing: bool = False,
) -> Driver:
    """MultiKrum (Blanchard et al. 2017): the mean of the updates that Krum likes best.

    Raises:
        StrategyFault: an option out of its bounds, or rounds.min_sites below 2 f + 3.
    """
    f = bounds.tolerated(setting, num_malicious_nodes, 2, 3)
    most = setting.quorum - f
    number = most - 2 if num_nodes_to_select is None else num_nodes_to_select
    if bounds.whole("num_nodes_to_select", number, 1, 10_000) > most:
        raise StrategyFault(
            f"num_nodes_to_select = {number} is above {most}, which is rounds.min_sites = "
            f"{setting.quorum} less num_malicious_nodes = {f}: a hostile update would be among "
            "them. Lower num_nodes_to_select or raise rounds.min_sites."
        )
    made = MultiKrum(num_malicious_nodes=f, num_nodes_to_select=number, **SHOWN)  # type: ignore[arg-type]
    return _robust(made, f, mixing)


def bulyan(setting: Setting, *, num_malicious_nodes: int = 1) -> Driver:
    """Bulyan (El Mhamdi et al. 2018): of what MultiKrum selects, each coordinate's middle.

    Raises:
        StrategyFault: an option out of its bounds, or rounds.min_sites below 4 f + 3.
    """
    f = bounds.tolerated(setting, num_malicious_nodes, 4, 3)
    return _robust(Middle(num_malicious_nodes=f, **SHOWN), f, False)  # type: ignore[arg-type]


class Middle(Bulyan):
    """Flower's Bulyan, without its collections of garbage."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Have Flower's do it."""
        return super().aggregate_train(server_round, uncollected(replies))


def _robust(rule: Strategy, f: int, mixing: bool) -> Driver:
    """Drive a rule that sees all updates, mixed if wanted."""
    return Driver(Mixed(rule, f) if bounds.mixed(mixing, f) else rule, "updates")
