"""Views: K changed copies of each record, whose gradients are averaged before the clip.

A record's K views are one contribution: their mean is clipped to `max_grad_norm` like any record's
gradient, so they cost no epsilon (augmentation multiplicity: De et al. 2022, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
NOISE = 0.05  # standard deviation that "noise" adds to inputs, which lie in [-1, 1]
REACH = 8  # "shift" moves an image by at most an eighth of its height and width


def shifted(images: torch.Tensor) -> torch.Tensor:
    """Move each image (n, channels, height, width) by whole pixels at random, zeros come in."""
    count, _, height, width = images.shape
    down, right = max(1, height // REACH), max(1, width // REACH)
    wide = functional.pad(images, (right, right, down, down))
    device = images.device
    rows = torch.arange(height, device=device) + torch.randint(
        0, 2 * down + 1, (count, 1), device=device
    )
    columns = torch.arange(width, device=device) + torch.randint(
        0, 2 * right + 1, (count, 1), device=device
    )
    which = torch.arange(count, device=device)[:, None, None]
    return wide.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def flipped(images: torch.Tensor) -> torch.Tensor:
    """Mirror each image (n, ..., width) with probability one half."""
    turn = torch.rand(len(images), *[1] * (images.dim() - 1), device=images.device) < 0.5
    return torch.where(turn, images.flip(-1), images)


def noisy(rows: torch.Tensor) -> torch.Tensor:
    """Add normal noise of NOISE to floats (n, ...)."""
    return rows + NOISE * torch.randn_like(rows)


AUGMENTATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda inputs: inputs,
    "noise": noisy,
    "shift": shifted,
    "shift-flip": lambda images: flipped(shifted(images)),
}


class Views:
    """How many views of a record there are, and what makes them differ."""

    def __init__(self, count: int = 1, augmentation: str = "none") -> None:
        """Choose.

        Args:
            count: views of each record, 1 or more.
            augmentation: a name of AUGMENTATIONS; with "none" every view is the record.
        """
        self._count, self._augment = count, AUGMENTATIONS[augmentation]
        self._plain = count == 1 and augmentation == "none"

    def model(self, model: nn.Module) -> nn.Module:
        """Wrap a model: inputs (n, ...) to the logits (n, views, classes) of their views."""
        return model if self._plain else _Viewed(model, self._count, self._augment)

    def loss(self, loss: Loss) -> Loss:
        """Wrap a loss: the mean over the views of each record, (n,)."""
        if self._plain:
            return loss

        def mean(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            each = loss(outputs.flatten(0, 1), labels.repeat_interleave(self._count))
            return each.view(len(labels), self._count).mean(1)

        return mean


class _Viewed(nn.Module):
    """A model that looks at views."""

    def __init__(
        self, model: nn.Module, count: int, augment: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self.viewed, self._count, self._augment = model, count, augment

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Read (n, ...) to (n, views, classes)."""
        views = self._augment(inputs.repeat_interleave(self._count, 0))
        logits: torch.Tensor = self.viewed(views)
        return logits.view(len(inputs), self._count, logits.shape[-1])
