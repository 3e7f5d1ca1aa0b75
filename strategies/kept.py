"""What a strategy keeps for each site between rounds, and how it sends a site its correction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedaccord.strategies.seam import SHOWN
from fedaccord.strategies.updates import (
    Update,
    Weights,
    arrays_of,
    config_of,
    metrics_of,
    to_arrays,
    to_weights,
    zeros,
)

State = dict[str, npt.NDArray[Any]]


class Kept:
    """Arrays by site, in float64, with the site's weight; zeros for a site not heard yet."""

    def __init__(self) -> None:
        self._arrays: dict[str, Weights] = {}
        self._weights: dict[str, int] = {}

    def __contains__(self, site: str) -> bool:
        return site in self._arrays

    def of(self, site: str, like: Weights) -> Weights:
        """Return a site's arrays, in the order of names of others."""
        kept = self._arrays.get(site)
        return zeros(like) if kept is None else {name: kept[name] for name in like}

    def put(self, site: str, arrays: Weights, weight: int) -> None:
        """Keep arrays for a site in place of what was kept, with its weight."""
        self._arrays[site] = {name: np.asarray(value, float) for name, value in arrays.items()}
        self._weights[site] = weight

    def mean(self, sites: int, like: Weights) -> Weights:
        """Return the weighted mean over all sites, with zeros for those not heard yet.

        A site not heard yet counts with the mean weight of those that were.

        Args:
            sites: how many there are in all.
            like: names and shapes.
        """
        out = zeros(like)
        share = len(self._weights) / (max(1, sum(self._weights.values())) * sites)
        for site in sorted(self._arrays):
            for name in like:
                out[name] = out[name] + self._arrays[site][name] * (self._weights[site] * share)
        return out

    def state(self) -> State:
        """Return everything by name: "arrays/<site>/<name>" and "weight/<site>"."""
        out: State = {f"weight/{site}": np.asarray(n) for site, n in self._weights.items()}
        for site, arrays in self._arrays.items():
            out |= {f"arrays/{site}/{name}": np.asarray(value) for name, value in arrays.items()}
        return out

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take back what `state` returned."""
        self._arrays, self._weights = {}, {}
        for key, value in state.items():
            kind, site, *name = key.split("/", 2)
            if kind == "weight":
                self._weights[site] = int(value)
            elif kind == "arrays":
                self._arrays.setdefault(site, {})[name[0]] = np.asarray(value, float)


def heard(replies: Iterable[Message]) -> list[Update]:
    """Read the updates out of what the driver gives a strategy that takes updates."""
    out = []
    for reply in replies:
        content = reply.content
        metrics: Mapping[str, Any] = metrics_of(content)["metrics"]
        site = str(config_of(content)["site"])
        change = to_weights(arrays_of(content)["arrays"])
        out.append(Update(site, change, int(metrics["num-examples"]), {}))
    return out


class Corrected(FedAvg, ABC):
    """FedAvg whose sites' steps are corrected, by arrays that are kept for each site."""

    def __init__(self, sites: int) -> None:
        """Take the number of all sites."""
        super().__init__(**SHOWN)  # type: ignore[arg-type]
        self._sites, self._kept = sites, Kept()

    @abstractmethod
    def _corrections(self, like: Weights) -> Callable[[str], Weights]:
        """Return what a site, by name, adds to each step's gradient after any noise."""

    @abstractmethod
    def _renew(self, updates: list[Update], mean: Weights) -> Weights:
        """Renew what is kept by released updates; return the change that the model makes."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every site that is shown, each with its own correction."""
        like, out = to_weights(arrays), []
        sites: Mapping[int, str] = grid.sites  # type: ignore[attr-defined]
        correction = self._corrections(like)
        real = [name for name, value in like.items() if np.issubdtype(value.dtype, np.floating)]
        for message in super().configure_train(server_round, arrays, config, grid):
            node = message.metadata.dst_node_id
            content = RecordDict(dict(message.content))
            made = correction(sites[node])  # what holds whole numbers has no gradient
            content["correction"] = to_arrays({name: made[name] for name in real})
            out.append(Message(content, node, message.metadata.message_type))
        return out

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Renew what is kept, and return the change of the model."""
        replies = list(replies)
        arrays, said = super().aggregate_train(server_round, replies)
        if arrays is None:
            return None, said
        change = self._renew(heard(replies), to_weights(arrays))
        return to_arrays({name: np.asarray(value) for name, value in change.items()}), said

    def state(self) -> State:
        """Return what is kept for the sites."""
        return self._kept.state()

    def restore(self, state: State) -> None:
        """Take it back."""
        self._kept.restore(state)
