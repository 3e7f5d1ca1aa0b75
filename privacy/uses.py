"""Which functions of torch may read a trained weight under book-keeping, and what runs instead.

A function that is not here, or is used in a way that is not, is refused by name: nothing that reads
a trained weight is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.nn import functional

from fedaccord.privacy import layers, products


class Book(products.Book, Protocol):
    """A book that knows which weights are trained."""

    def trained(self, value: Any) -> bool:
        """Tell whether a value is a trained weight."""
        ...


def _refuse(what: str) -> NotImplementedError:
    return NotImplementedError(
        f'{what}, of which the engine "bookkeeping" does not know each record\'s gradient'
    )


def _linear(book: Book, _: Any, inputs: Any, weight: Any, bias: Any = None) -> Any:
    return layers.Linear.apply(inputs, weight, bias, book)


def _pair(value: int | Sequence[int], images: bool, filler: int) -> tuple[int, int]:
    """Read a stride, padding or dilation as that of an image."""
    if isinstance(value, int):
        return (value, value) if images else (filler, value)
    several = tuple(value)
    if len(several) == 1:
        return (several[0], several[0]) if images else (filler, several[0])
    return several[0], several[1]


def _convolution(
    book: Book,
    func: Any,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    images = weight.dim() == 4
    if input.dim() != weight.dim():
        raise _refuse("a convolution is fed without the batch axis")
    inputs = input if images else input[:, :, None]
    apart = _pair(dilation, images, 1)
    if isinstance(padding, str):
        kernel = tuple(weight.shape[2:]) if images else (1, weight.shape[2])
        same = int(padding == "same")
        high, across = (same * d * (k - 1) for d, k in zip(apart, kernel, strict=True))
        inputs = functional.pad(
            inputs, (across // 2, across - across // 2, high // 2, high - high // 2)
        )
        padding = (0, 0)
    how = {
        "stride": _pair(stride, images, 1),
        "padding": _pair(padding, images, 0),
        "dilation": apart,
        "groups": groups,
    }
    made = layers.Convolution.apply(inputs, weight, bias, how, book)
    return made if images else made[:, :, 0]


def _embedding(
    book: Book,
    _: Any,
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise _refuse("an embedding has max_norm, scale_grad_by_freq or sparse")
    if input.dim() > 1 and len(input) == 1 != book.rows:  # positions that the batch shares
        input = input.expand(book.rows, *input.shape[1:])
    return layers.Embedding.apply(input, weight, padding_idx, book)


def _layer_norm(
    book: Book,
    _: Any,
    input: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Any:
    return layers.LayerNorm.apply(input, tuple(normalized_shape), weight, bias, eps, book)


def _group_norm(
    book: Book,
    _: Any,
    input: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Any:
    return layers.GroupNorm.apply(input, num_groups, weight, bias, eps, book)


def _rms_norm(
    book: Book,
    _: Any,
    input: Any,
    normalized_shape: Any,
    weight: Any = None,
    eps: float | None = None,
) -> Any:
    normal = functional.rms_norm(input, tuple(normalized_shape), None, eps)
    return normal * _spread(book, weight, normal)


def _prelu(book: Book, _: Any, input: Any, weight: Any) -> Any:
    ones = [1] * (input.dim() - 2)
    slope = layers.Spread.apply(weight, (len(weight), *ones), book)
    return torch.where(input > 0, input, slope * input)


def _spread(book: Book, weight: Any, beside: Any) -> Any:
    """Repeat a bare weight for each record, as it is broadcast beside another tensor.

    Raises:
        NotImplementedError: where the first axis of both together is not the batch.
    """
    if not isinstance(beside, torch.Tensor) or beside.dim() == 0 or len(beside) != book.rows:
        raise _refuse("a bare parameter meets a value without the batch axis")
    missing = beside.dim() - weight.dim()
    if missing > 0:
        shape = (*[1] * (missing - 1), *weight.shape)
    elif missing == 0 and len(weight) == 1:
        shape = tuple(weight.shape[1:])
    else:
        raise _refuse("a bare parameter stands where the batch axis is")
    return layers.Spread.apply(weight, shape, book)


def _elementwise(book: Book, func: Any, first: Any, second: Any, **how: Any) -> Any:
    if how or (book.trained(first) and book.trained(second)):
        raise _refuse("a bare parameter is used with another or with options")
    if book.trained(first):
        return func(_spread(book, first, second), second)
    return func(first, _spread(book, second, first))


def _expand(book: Book, _: Any, weight: Any, *sizes: Any) -> Any:
    flat = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    if len(flat) != weight.dim() or len(weight) != 1 or flat[0] != book.rows:
        raise _refuse("a bare parameter is expanded over other axes than the batch")
    return layers.Spread.apply(weight, tuple(weight.shape[1:]), book).expand(*flat)


ELEMENTWISE = (
    *(torch.add, torch.sub, torch.mul, torch.div, torch.maximum, torch.minimum),
    *(torch.Tensor.add, torch.Tensor.sub, torch.Tensor.mul, torch.Tensor.div),
    *(torch.Tensor.__add__, torch.Tensor.__radd__, torch.Tensor.__sub__, torch.Tensor.__mul__),
    *(torch.Tensor.__rmul__, torch.Tensor.__truediv__),
)
USES: dict[Any, Callable[..., Any]] = {
    functional.linear: _linear,
    functional.conv1d: _convolution,
    functional.conv2d: _convolution,
    functional.embedding: _embedding,
    functional.layer_norm: _layer_norm,
    functional.group_norm: _group_norm,
    functional.rms_norm: _rms_norm,
    functional.prelu: _prelu,
    torch.Tensor.expand: _expand,
    **dict.fromkeys(ELEMENTWISE, _elementwise),
}
