"""The driver: it has a Flower strategy work on updates instead of on whole weights.

Averaging whole float32 weights loses up to a thousandth of an update; and a rule that looks at
distances, as Krum does, loses more. So a strategy is shown zeros for the global model and updates
for the sites' weights. That gives the same model for every rule that only adds to the global model
what it makes of the differences to it, which holds for all of Flower's and ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedaccord.errors import AccordError
from fedaccord.strategies.sums import OrderFreeSum
from fedaccord.strategies.updates import (
    Update,
    Weights,
    flat,
    moved,
    shaped,
    to_arrays,
    to_weights,
    zeros,
)

Takes = Literal["mean", "updates", "weights"]
State = dict[str, np.ndarray[Any, np.dtype[Any]]]


@dataclass(frozen=True)
class Outcome:
    """What became of a round's updates.

    Attributes:
        model: the new global model; None where the strategy made none.
        sites: whose updates were given to it, in order of name.
        said: what the strategy says of the round.
        fault: why there is no model, or "".
    """

    model: Weights | None
    sites: tuple[str, ...]
    said: Mapping[str, Any]
    fault: str = ""


class Driver:
    """A Flower strategy, with what the coordinator must know to drive it.

    | takes | the strategy is given | memory |
    |---|---|---|
    | "mean" | one reply: the weighted mean of all updates, equal in any order | one update |
    | "updates" | a reply for each site, in order of site, holding its update | all updates |
    | "weights" | a reply for each site, holding whole weights: any strategy, as in Flower | all |
    """

    def __init__(
        self, strategy: Strategy, takes: Takes = "weights", keeps: tuple[str, ...] = ()
    ) -> None:
        """Take a strategy.

        Args:
            strategy: Flower's, ours or anybody's; it asks all nodes of the grid that it is shown.
            takes: see the class.
            keeps: names of its attributes that hold arrays from round to round, as dicts by name,
                for strategies without `state` and `restore` of their own.
        """
        self.strategy, self.takes, self._keeps = strategy, takes, keeps
        self._names: list[str] = []
        self._asked = 1

    def ask(self, number: int, model: Weights, config: ConfigRecord, grid: Grid) -> list[Message]:
        """Have the strategy write its training messages to the nodes of a grid.

        Args:
            number: the round.
            model: the global model.
            config: what every message carries.
            grid: shows the drawn nodes alone.
        """
        self._names = list(model)
        shown = model if self.takes == "weights" else zeros(model)
        messages = list(self.strategy.configure_train(number, to_arrays(shown), config, grid))
        if self.takes != "weights":
            arrays, key = to_arrays(model), getattr(self.strategy, "arrayrecord_key", "arrays")
            for message in messages:
                message.content[key] = arrays
        self._asked = max(1, len(messages))
        return messages

    def combine(
        self,
        number: int,
        model: Weights,
        updates: Iterable[Update],
        *,
        bound: float,
        heaviest: int,
        quorum: int,
    ) -> Outcome:
        """Make the new global model out of the accepted updates, taken as they arrive.

        Args:
            number: the round.
            model: the global model that was asked with.
            updates: any number, in any order, at most one a site.
            bound: no coordinate of an update is larger in magnitude.
            heaviest: the largest weight of a site.
            quorum: with fewer updates the round has failed, and the strategy is not called.

        Raises:
            AccordError: the strategy raised.
        """
        if self.takes == "mean":
            replies, sites = self._mean(model, updates, bound, heaviest)
        else:
            found = sorted(updates, key=lambda update: update.site)
            sites = [update.site for update in found]
            replies = [self._reply(update, model) for update in found]
        if len(sites) < quorum:
            return Outcome(None, (), {}, f"accepted updates: {len(sites)}, {quorum} are needed")
        try:
            arrays, said = self.strategy.aggregate_train(number, replies)
        except Exception as fault:  # whatever another's code raises; no round of it can count
            raise AccordError(
                f"strategy {type(self.strategy).__name__} failed in round {number}: "
                f"{type(fault).__name__}: {fault}. Mend it, then resume the run."
            ) from fault
        if arrays is None:
            return Outcome(None, (), dict(said or {}), "the strategy made no model of the updates")
        made = to_weights(arrays)
        if unfit := _unlike(made, model):
            return Outcome(None, (), dict(said or {}), unfit)
        if self.takes != "weights":
            model = moved(model, made)
        else:
            model = {name: np.asarray(made[name], value.dtype) for name, value in model.items()}
        return Outcome(model, tuple(sorted(sites)), dict(said or {}))

    def _mean(
        self, model: Weights, updates: Iterable[Update], bound: float, heaviest: int
    ) -> tuple[list[Message], list[str]]:
        """Sum the updates as they come; give back one reply that holds their weighted mean."""
        size = sum(value.size for value in model.values())
        total, weight, sites = OrderFreeSum(size, bound, self._asked), 0, []
        for update in updates:
            ordered = {name: update.change[name] for name in model}
            total.add(flat(ordered) * (update.weight / heaviest))
            weight += update.weight
            sites.append(update.site)
        if not sites:
            return [], []
        mean = shaped(total.total() * (heaviest / weight), model)
        return [self._reply(Update("all", mean, weight, {}), model)], sites

    def _reply(self, update: Update, model: Weights) -> Message:
        """Write what the strategy is given of one update: arrays, weight, site, nothing else."""
        change = {name: update.change[name] for name in model}
        if self.takes == "weights":
            change = moved(model, change)
        content = RecordDict(
            {
                "arrays": to_arrays(change),
                "metrics": MetricRecord({"num-examples": update.weight, **update.metrics}),
                "config": ConfigRecord({"site": update.site}),
            }
        )
        return Message(content, reply_to=Message(RecordDict(), 1, "train"))

    def state(self) -> State:
        """Return the arrays that the strategy keeps from round to round, by name."""
        own: Callable[[], State] | None = getattr(self.strategy, "state", None)
        if own is not None:
            return dict(own())
        out: State = {}
        for attribute in self._keeps:
            for name, value in (getattr(self.strategy, attribute) or {}).items():
                out[f"{attribute}/{name}"] = np.asarray(value)
        return out

    def restore(self, state: State) -> None:
        """Give the strategy back what `state` returned, in a new process."""
        own: Callable[[State], None] | None = getattr(self.strategy, "restore", None)
        if own is not None:
            own(state)
            return
        for attribute in self._keeps:
            start = f"{attribute}/"
            kept = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
            setattr(self.strategy, attribute, kept or None)


def _unlike(made: Weights, model: Weights) -> str:
    """Say why what a strategy made cannot be the model, or ""."""
    if made.keys() != model.keys():
        return "the strategy made weights of other names than the model's"
    for name, value in model.items():
        if made[name].shape != value.shape or not np.isfinite(made[name]).all():
            return f"the strategy made {name} of another shape, or not finite"
    return ""
