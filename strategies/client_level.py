"""The mean under client-level privacy: Flower's FedAvg asks, `privacy.client_level` sums up."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import nn

from fedaccord.errors import AccordError
from fedaccord.privacy import noise
from fedaccord.privacy.client_level import ClientPlan, Released, release
from fedaccord.strategies.updates import arrays_of, flat, shaped, to_arrays, to_weights


class ClientLevelMean(FedAvg):
    """The mean of clipped updates with noise; only what it returns may leave the coordinator.

    Every site that was asked counts the same, whatever "num-examples" its reply has; one that did
    not reply, or whose update is not finite, contributes zero. What it says of a round holds for
    all sites together, and no figure of a single site is kept.

    Flower's own wrapper for adaptive clipping (flwr 1.41, `dp_adaptive_clipping.py`) moves its norm
    away from the quantile and weighs by "num-examples"; it is not used.
    """

    def __init__(
        self, plan: ClientPlan, entropy: Callable[[], noise.Source] = noise.OsSource
    ) -> None:
        """Take a plan of the run; all its plans differ in their site alone.

        Args:
            plan: any site's plan.
            entropy: makes the randomness of a round; tests pass their own, no accord can.
        """
        super().__init__(fraction_train=1.0, min_train_nodes=1, min_available_nodes=1)
        self.plan, self.clipping_norm = plan, plan.clipping_norm
        self._entropy = entropy
        self._base = ArrayRecord()
        self._asked = 0

    takes = "updates"

    def state(self) -> dict[str, np.ndarray]:
        """Return what outlives a round: the clipping norm, which adaptive clipping moves."""
        return {"clipping_norm": np.array(self.clipping_norm)}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `state` returned."""
        self.clipping_norm = float(state["clipping_norm"])

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every node of the grid; their number is what the sum will be divided by.

        Raises:
            AccordError: a weight that is no real number, to which no noise could be added.
        """
        for name, array in arrays.items():
            if not np.issubdtype(np.dtype(array.dtype), np.floating):
                raise AccordError(
                    f"model: {name} holds {array.dtype}, which takes no noise. Choose a model "
                    "whose weights are all floating-point numbers."
                )
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._base, self._asked = arrays, len(messages)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the noised mean's weights, and what a round may say of how they came about."""
        contents = [arrays_of(reply.content)["arrays"] for reply in replies if reply.has_content()]
        if not self._asked or not contents:
            return None, None
        base = to_weights(self._base)
        start = flat(base)
        updates = (
            flat({name: record[name].numpy() for name in base}) - start for record in contents
        )
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite becomes zero
            out = release(
                self.plan, updates, len(start), self._asked, self.clipping_norm, self._entropy()
            )
        self.clipping_norm = out.next_clipping_norm
        return to_arrays(shaped(start + out.mean, base)), _words(out)


def refuse_state(model: nn.Module) -> None:
    """Refuse a model that holds anything but trained weights.

    What is not trained (running statistics, counters, frozen layers) would travel with the update
    and share its clipping norm, and a whole number takes no noise.

    Raises:
        AccordError: the first such tensor, by name.
    """
    trained = {n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    for name in model.state_dict():
        if name not in trained:
            raise AccordError(
                f"model: {name} is not trained, and under privacy.unit = "
                '"client" only trained weights are sent. Choose a model without it, or register it '
                "with persistent=False."
            )


def _words(out: Released) -> MetricRecord:
    """Say what is public about a round."""
    said: dict[str, int | float] = {
        "asked": out.asked,
        "clipping_norm": out.clipping_norm,
        "noise_stddev": out.noise_stddev,
        "next_clipping_norm": out.next_clipping_norm,
    }
    if out.unclipped is not None:
        said["unclipped"] = out.unclipped
    return MetricRecord(said)  # type: ignore[arg-type]
