"""Small models for table rows: a 1-D CNN with GroupNorm, and an MLP that serves as student."""

from __future__ import annotations

from torch import nn

from fedaccord.tasks import TaskSpec


def cnn1d(spec: TaskSpec, channels: int = 8, kernel: int = 5, groups: int = 2) -> nn.Module:
    """Build a 1-D CNN that reads a table row as a sequence of its columns.

    Inputs are float32 (batch, features), outputs are logits (batch, classes). It normalises with
    GroupNorm, since BatchNorm mixes patients and cannot be trained with a per-subject guarantee.

    Args:
        spec: the task, for the number of inputs and classes.
        channels: feature maps of the convolution, a multiple of `groups`.
        kernel: columns that one filter spans, odd.
        groups: groups of GroupNorm.
    """
    width = len(spec.features)
    return nn.Sequential(
        nn.Unflatten(1, (1, width)),  # (batch, 1, features)
        nn.Conv1d(1, channels, kernel, padding=kernel // 2),
        nn.GroupNorm(groups, channels),
        nn.ReLU(),
        nn.Flatten(),  # (batch, channels * features)
        nn.Linear(channels * width, len(spec.classes)),
    )


def mlp(spec: TaskSpec, hidden: int = 8) -> nn.Module:
    """Build a perceptron with one hidden layer: float32 (batch, features) to (batch, classes)."""
    return nn.Sequential(
        nn.Linear(len(spec.features), hidden),
        nn.Tanh(),
        nn.Linear(hidden, len(spec.classes)),
    )
