"""Small models for table rows: a 1-D CNN with GroupNorm, and an MLP that serves as student."""

from __future__ import annotations

import math

import torch
from torch import nn

from fedaccord.models import options
from fedaccord.tasks import TaskSpec


def cnn1d(
    spec: TaskSpec,
    channels: int = 8,
    kernel: int = 5,
    groups: int = 2,
    blocks: int = 1,
    hidden: int = 0,
) -> nn.Module:
    """Build a 1-D CNN over a row's columns, or over the steps in time that a task declares.

    Inputs are float (batch, features), outputs are logits (batch, classes). It normalises with
    GroupNorm, since BatchNorm mixes patients and cannot be trained with a per-subject guarantee.

    | task | the convolution runs over | besides |
    |---|---|---|
    | no `sequence` | the columns, one channel | |
    | `sequence` (steps, channels) | the steps, the task's channels | other columns join before the last layers |

    Args:
        spec: the task, for its columns and classes.
        channels: feature maps of each convolution, a multiple of `groups`.
        kernel: columns or steps that one filter spans, odd.
        groups: groups of GroupNorm.
        blocks: convolutions, each with GroupNorm and ReLU, 1 to 8.
        hidden: units of a layer before the last; 0 for none.

    Raises:
        OptionFault: an option outside its bounds, or a task without rows.
    """  # noqa: E501  (a table row cannot be broken)
    width = options.row(spec, "cnn1d")
    options.groups("channels", channels, groups)
    options.odd("kernel", kernel, 1023)
    options.whole("blocks", blocks, 1, 8)
    options.whole("hidden", hidden, 0)
    steps, depth = spec.sequence or (width, 1)
    layers: list[nn.Module] = [] if spec.sequence else [nn.Unflatten(1, (1, width))]
    for _ in range(blocks):  # (batch, depth, steps)
        layers += [nn.Conv1d(depth, channels, kernel, padding=kernel // 2)]
        layers += [nn.GroupNorm(groups, channels), nn.ReLU()]
        depth = channels
    layers.append(nn.Flatten())  # (batch, channels * steps)
    read = channels * steps + (width - math.prod(spec.sequence) if spec.sequence else 0)
    head: list[nn.Module] = [nn.Linear(read, hidden), nn.ReLU()] if hidden else []
    head.append(nn.Linear(hidden or read, len(spec.classes)))
    if spec.sequence:
        return _Steps(nn.Sequential(*layers), nn.Sequential(*head), *spec.sequence)
    return nn.Sequential(*layers, *head)


class _Steps(nn.Module):
    """A trunk over the steps of a row, whose other columns join before the head."""

    def __init__(self, trunk: nn.Module, head: nn.Module, steps: int, channels: int) -> None:
        super().__init__()
        self.trunk, self.head, self._shape = trunk, head, (steps, channels)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        series, rest = split(inputs, *self._shape)
        return self.head(torch.cat([self.trunk(series.transpose(1, 2)), rest], dim=1))


def split(inputs: torch.Tensor, steps: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Take rows (batch, features) apart: series (batch, steps, channels), the rest (batch, k)."""
    series = inputs[:, : steps * channels].unflatten(1, (steps, channels))
    return series, inputs[:, steps * channels :]


def mlp(spec: TaskSpec, hidden: int = 8) -> nn.Module:
    """Build a perceptron with one hidden layer: float inputs of any shape to (batch, classes).

    Args:
        spec: the task, for the number of inputs and classes.
        hidden: units of the hidden layer.

    Raises:
        OptionFault: an option outside its bounds, or a task of tokens.
    """
    shape = options.numbers(spec, "mlp").shape
    flat = [nn.Flatten()] if len(shape) > 1 else []
    return nn.Sequential(
        *flat,
        nn.Linear(math.prod(shape), options.whole("hidden", hidden)),
        nn.Tanh(),
        nn.Linear(hidden, len(spec.classes)),
    )
