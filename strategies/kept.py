"""What a strategy keeps for each site between rounds, and how it sends a site its correction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

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


def corrected(
    messages: Iterable[Message], grid: Grid, correction: Callable[[str], Weights]
) -> list[Message]:
    """Give each message the correction of the site that it goes to.

    Args:
        messages: to nodes of the grid.
        grid: what a strategy is shown; `grid.sites` has the site of each node.
        correction: for a site's name, what it adds to each step's gradient, after any noise.
    """
    sites: Mapping[int, str] = grid.sites  # type: ignore[attr-defined]
    out = []
    for message in messages:
        node = message.metadata.dst_node_id
        content = RecordDict(dict(message.content))
        kinds = {k: np.dtype(array.dtype) for k, array in arrays_of(content)["arrays"].items()}
        real = [name for name, kind in kinds.items() if np.issubdtype(kind, np.floating)]
        made = correction(sites[node])  # what holds whole numbers has no gradient
        content["correction"] = to_arrays({name: made[name] for name in real})
        out.append(Message(content, node, message.metadata.message_type))
    return out
