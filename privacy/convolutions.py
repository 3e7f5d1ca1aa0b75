"""Parts of convolutions: windows of the inputs that a filter saw, laid out for products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from fedaccord.privacy.parts import Part, Reordered, Whole
from fedaccord.privacy.products import Book, looped, products


def convolved(
    inputs: torch.Tensor, back: torch.Tensor, weight: torch.Tensor, how: Any, book: Book
) -> Part:
    """Make the part of a convolution's weight.

    Args:
        inputs: (n * k, channels, height, width).
        back: output gradients (n * k, outputs, high, across).
        weight: (outputs, channels / groups, kernel height, kernel width).
        how: stride, padding, dilation (pairs) and groups.
        book: where it is noted.
    """
    outputs, channels, tall, broad = weight.shape
    groups, images, size = how["groups"], len(inputs), weight[0].numel()
    ends = back.reshape(images, outputs, -1)
    shape, axes = (outputs, tall, broad, channels), (0, 3, 1, 2)
    if groups > 1 or images != book.rows:  # few weights, or images folded into the batch
        every = torch.einsum(
            "ngol,nglk->ngok",
            ends.reshape(images, groups, outputs // groups, -1),
            _deep(inputs, back, weight, how).reshape(images, groups, -1, size),
        ).reshape(book.rows, -1, outputs * size)
        return Reordered(Whole(every.sum(1)), shape, axes)

    def one(i: int, end: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.convolution_backward(
            end, inputs[i : i + 1], weight, None, how["stride"], how["padding"],
            how["dilation"], False, [0, 0], 1, [False, True, False],
        )[1]  # fmt: skip

    if channels * broad < back.shape[3]:  # what lies side by side in memory is copied together
        flat = _planes(inputs, back, weight, how)

        def windows(i: int, j: int) -> torch.Tensor:
            return flat[i:j].reshape(j - i, size, -1).transpose(1, 2)

        ways = products(windows, ends, size)
    else:
        seen = _deep(inputs, back, weight, how)[:, 0]

        def windows(i: int, j: int) -> torch.Tensor:
            return seen[i:j].reshape(j - i, -1, size)

        made = products(windows, ends, size)
        ways = {name: _reorders(make, shape, axes) for name, make in made.items()}
    ways |= looped(one, back, windows, size)
    return book.choose(("conv", *weight.shape, *how["stride"]), ways, back)


def _deep(inputs: torch.Tensor, back: torch.Tensor, weight: torch.Tensor, how: Any) -> torch.Tensor:
    """View windows, channels last: (images, groups, high, across, tall, broad, channels)."""
    _, channels, tall, broad = weight.shape
    above, beside = how["padding"]
    padded = functional.pad(inputs.permute(0, 2, 3, 1), (0, 0, beside, beside, above, above))
    padded = padded.contiguous()
    image, row, column, unit = padded.stride()
    return padded.as_strided(
        (len(inputs), how["groups"], *back.shape[2:], tall, broad, channels),
        (image, unit * channels, *_steps(row, column, how), unit),
    )


def _planes(
    inputs: torch.Tensor, back: torch.Tensor, weight: torch.Tensor, how: Any
) -> torch.Tensor:
    """View windows, positions last: (images, channels, tall, broad, high, across)."""
    _, channels, tall, broad = weight.shape
    above, beside = how["padding"]
    padded = functional.pad(inputs, (beside, beside, above, above)).contiguous()
    image, plane, row, column = padded.stride()
    down, right, *within = _steps(row, column, how)
    return padded.as_strided(
        (len(inputs), channels, tall, broad, *back.shape[2:]),
        (image, plane, *within, down, right),
    )


def _steps(row: int, column: int, how: Any) -> tuple[int, int, int, int]:
    """Say how far apart neighbours lie: of positions (down, right), within a window (the same)."""
    (down, right), (tall, broad) = how["stride"], how["dilation"]
    return down * row, right * column, tall * row, broad * column


def _reorders(
    make: Callable[[], Part], shape: tuple[int, ...], axes: tuple[int, ...]
) -> Callable[[], Part]:
    """Reorder the part that a way makes."""
    return lambda: Reordered(make(), shape, axes)
