"""What a strategy adds to a site's gradients: a proximal term, and a correction for its drift.

Both come after the noise and look at no record: the proximal term at the weights, which are made
of released steps, the correction at what the coordinator made of released updates. So they are
post-processing and cost no epsilon.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from flwr.app import RecordDict
from torch import nn

from fedaccord.accord import TrainingSection
from fedaccord.errors import AccordError
from fedaccord.strategies.updates import arrays_of, config_of

FARTHEST = 100.0  # what a correction may move a weight in a round, at most


@dataclass(frozen=True)
class Pull:
    """What is added to every step's gradient.

    Attributes:
        mu: of the proximal term mu/2 |w - w0|^2, whose gradient is mu (w - w0); 0: none
            (FedProx, Li et al. 2020).
        correction: added as it is, by the weights' names; empty: none (SCAFFOLD's c - c_i,
            Karimireddy et al. 2020; FedDyn's -h_i, Acar et al. 2021).
        anchor: w0, by the weights' names; none: the weights that a round starts from.
    """

    mu: float
    correction: Mapping[str, torch.Tensor]
    anchor: Mapping[str, torch.Tensor] | None = None

    def start(self, model: nn.Module) -> Started | None:
        """Note the weights that a round starts from; None: there is nothing to add."""
        if not self.mu and not self.correction:
            return None
        weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
        held = weights if self.anchor is None else self.anchor
        first = {n: held[n].detach().clone().to(p.device, p.dtype) for n, p in weights.items()}
        return Started(self.mu, self.correction, weights, first)


NOTHING = Pull(0.0, {})


@dataclass(frozen=True)
class Started:
    """A pull in a round that has begun: weights as they change, and as they are pulled to."""

    mu: float
    correction: Mapping[str, torch.Tensor]
    weights: Mapping[str, nn.Parameter]
    first: Mapping[str, torch.Tensor]

    def add(self) -> None:
        """Add to the gradients that stand in the weights."""
        for name, weight in self.weights.items():
            grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            if self.mu:
                grad = grad + self.mu * (weight.detach() - self.first[name])
            if name in self.correction:
                grad = grad + self.correction[name].to(grad.device, grad.dtype)
            weight.grad = grad


def pull_of(content: RecordDict, model: nn.Module, training: TrainingSection) -> Pull:
    """Read what a training message asks to be added to the gradients.

    What a strategy says of buffers is passed over: no gradient moves them. A coordinator may move
    the weights as it likes by the model that it sends, within a bound; so it may by these, within
    the same one.

    Raises:
        AccordError: a term that would let the weights run away, or a correction of other names,
            shapes or sizes than the model's weights.
    """
    said = config_of(content).get("proximal-mu", 0.0)
    mu = float(said) if isinstance(said, int | float) else -1.0
    if not 0 <= mu * training.learning_rate <= 1:
        raise AccordError(
            f"strategy: proximal-mu = {str(said)[:20]} must be from 0 to 1 / "
            f"training.learning_rate, which is {1 / training.learning_rate:g}. Lower it."
        )
    if "correction" not in arrays_of(content):
        return Pull(mu, {})
    said_of = arrays_of(content)["correction"].to_torch_state_dict()
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    room = FARTHEST / (training.learning_rate * training.steps)
    sent = {n: v for n, v in said_of.items() if n not in dict(model.named_buffers())}
    for name, value in sent.items():
        fits = name in weights and value.shape == weights[name].shape and value.is_floating_point()
        if not fits or not bool((value.abs() <= room).all()):
            raise AccordError(
                f"strategy: the correction of {name} is not of the model's, not finite, or above "
                f"{room:g}, from where a round could move a weight by {FARTHEST:g}. Lower "
                "training.learning_rate or choose another strategy."
            )
    return Pull(mu, sent)
