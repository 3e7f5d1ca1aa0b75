"""FedAvg (McMahan et al. 2017): Flower's own, set up for sites that the coordinator has drawn."""

from __future__ import annotations

from flwr.serverapp.strategy import FedAvg


def fedavg() -> FedAvg:
    """Build Flower's FedAvg so that it trains every site it is shown.

    The coordinator draws the sites itself, reproducibly (Flower draws unseeded), so FedAvg is told
    to take all of them. Weights are the accord's declared sizes, put beside each accepted reply
    under "num-examples". Its evaluation is not used: the coordinator audits by counts.
    """
    return FedAvg(
        fraction_train=1.0,
        min_train_nodes=1,
        min_available_nodes=1,
        weighted_by_key="num-examples",
    )
