"""Layers for book-keeping: each runs as torch would, and notes parts, not a weight's gradient.

Each is an autograd function whose backward pass skips the gradient of the weights: it gives the
gradient of its inputs and hands the parts of its weights (`privacy.parts`) to a book. Their
arguments are those of the functions of torch.nn.functional that they stand for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from fedaccord.privacy.convolutions import convolved
from fedaccord.privacy.parts import Looked, Outer, Whole
from fedaccord.privacy.products import Book, products

Function: Any = torch.autograd.Function  # torch ships no type that can be inherited from


def check_rows(tensor: torch.Tensor, rows: int) -> None:
    """Hold a tensor to (n * k, ...) for n records.

    Raises:
        ValueError: the first axis does not hold the records.
    """
    if tensor.dim() == 0 or len(tensor) % rows:
        raise ValueError(
            f"a layer is fed {list(tensor.shape)} for {rows} records, not one gradient for each "
            "record: without the batch axis, or with it not in the first place"
        )


def per_record(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Split (n * k, ...) into (n, k, ...).

    Raises:
        ValueError: the first axis does not hold the records.
    """
    check_rows(tensor, rows)
    return tensor.reshape(rows, len(tensor) // rows, *tensor.shape[1:])


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """Bring half precision to float32, in which parts are made."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _summed(gradient: torch.Tensor, rows: int, axes: int) -> Whole:
    """Sum each record's gradient over all but the last `axes` axes."""
    split = exact(gradient).reshape(rows, -1, *gradient.shape[gradient.dim() - axes :])
    return Whole(split.sum(1))


class Linear(Function):  # type: ignore[misc]
    """functional.linear."""

    @staticmethod
    def forward(ctx: Any, inputs: Any, weight: Any, bias: Any, book: Book) -> torch.Tensor:
        """Run, and keep the inputs."""
        ctx.save_for_backward(inputs)
        ctx.weight, ctx.bias, ctx.book = weight, bias, book
        return functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, back: torch.Tensor) -> Any:
        """Give the inputs' gradient; note the parts of weight and bias."""
        (inputs,) = ctx.saved_tensors
        book, weight, bias = ctx.book, ctx.weight, ctx.bias
        check_rows(back, book.rows)
        ends = exact(back).reshape(book.rows, -1, back.shape[-1])
        if bias is not None and bias.requires_grad:
            book.note(bias, Whole(ends.sum(1)))
        if weight.requires_grad:
            rows = exact(inputs).reshape(book.rows, -1, inputs.shape[-1])
            if rows.shape[1] == 1:
                book.note(weight, Outer(rows[:, 0], ends[:, 0]))
            else:
                turned = ends.transpose(1, 2)
                ways = products(lambda i, j: rows[i:j], turned, rows.shape[2])
                book.note(weight, book.choose(("linear", rows.shape[2]), ways, turned))
        ahead = back.to(weight.dtype) @ weight if ctx.needs_input_grad[0] else None
        return ahead, None, None, None


class Convolution(Function):  # type: ignore[misc]
    """functional.conv1d and conv2d, as a convolution of images; padding is a pair of numbers."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Any, weight: Any, bias: Any, how: dict[str, Any], book: Book
    ) -> torch.Tensor:
        """Run, and keep the inputs; how: stride, padding, dilation (pairs) and groups."""
        ctx.save_for_backward(inputs)
        ctx.weight, ctx.bias, ctx.how, ctx.book = weight, bias, how, book
        return functional.conv2d(inputs, _image(weight), bias, **how)

    @staticmethod
    def backward(ctx: Any, back: torch.Tensor) -> Any:
        """Give the inputs' gradient; note the parts of weight and bias."""
        (inputs,) = ctx.saved_tensors
        weight, bias, how, book = ctx.weight, ctx.bias, ctx.how, ctx.book
        ahead = None
        if ctx.needs_input_grad[0]:
            ahead = torch.ops.aten.convolution_backward(
                back, inputs, _image(weight), None, how["stride"], how["padding"], how["dilation"],
                False, [0, 0], how["groups"], [True, False, False],
            )[0]  # fmt: skip
        check_rows(inputs, book.rows)
        if bias is not None and bias.requires_grad:
            split = exact(per_record(back, book.rows)).sum((-1, -2))
            book.note(bias, Whole(split.sum(1)))
        if weight.requires_grad:
            book.note(weight, convolved(exact(inputs), exact(back), _image(weight), how, book))
        return ahead, None, None, None, None


def _image(weight: torch.Tensor) -> torch.Tensor:
    """View the weight of a convolution of rows as one of images of height 1."""
    return weight if weight.dim() == 4 else weight[:, :, None]


class Embedding(Function):  # type: ignore[misc]
    """functional.embedding."""

    @staticmethod
    def forward(ctx: Any, ids: Any, weight: Any, padding: Any, book: Book) -> torch.Tensor:
        """Look up; padding: the row that is not trained, or None."""
        ctx.ids, ctx.weight, ctx.padding, ctx.book = ids, weight, padding, book
        return functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, back: torch.Tensor) -> Any:
        """Note the part of the table."""
        ids, book = ctx.ids, ctx.book
        if ctx.padding is not None:
            ids = torch.where(ids == ctx.padding % len(ctx.weight), torch.full_like(ids, -1), ids)
        ids = per_record(ids, book.rows).reshape(book.rows, -1)
        rows = exact(back).reshape(book.rows, -1, back.shape[-1])
        book.note(ctx.weight, Looked(ids, rows, len(ctx.weight)))
        return None, None, None, None


class LayerNorm(Function):  # type: ignore[misc]
    """functional.layer_norm."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Any, shape: Any, weight: Any, bias: Any, eps: float, book: Book
    ) -> torch.Tensor:
        """Run, and keep the inputs, their means and deviations."""
        out, mean, inverse = torch.native_layer_norm(inputs, shape, weight, bias, eps)
        ctx.save_for_backward(inputs, mean, inverse)
        ctx.shape, ctx.weight, ctx.bias, ctx.book = shape, weight, bias, book
        return out

    @staticmethod
    def backward(ctx: Any, back: torch.Tensor) -> Any:
        """Give the inputs' gradient; note the parts of weight and bias."""
        inputs, mean, inverse = ctx.saved_tensors
        weight, bias, book, axes = ctx.weight, ctx.bias, ctx.book, len(ctx.shape)
        check_rows(inputs, book.rows)
        if weight.requires_grad:
            made = ((inputs - mean) * inverse).mul_(back)
            book.note(weight, _summed(made, book.rows, axes))
        if bias is not None and bias.requires_grad:
            book.note(bias, _summed(back, book.rows, axes))
        ahead = None
        if ctx.needs_input_grad[0]:
            ahead = torch.ops.aten.native_layer_norm_backward(
                back.contiguous(), inputs, ctx.shape, mean, inverse, weight, bias,
                [True, False, False],
            )[0]  # fmt: skip
        return ahead, None, None, None, None, None


class GroupNorm(Function):  # type: ignore[misc]
    """functional.group_norm."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Any, groups: int, weight: Any, bias: Any, eps: float, book: Book
    ) -> torch.Tensor:
        """Run, and keep the inputs, their means and deviations."""
        inputs = inputs.contiguous()
        count, channels = inputs.shape[:2]
        places = inputs[0, 0].numel() if count else 0
        ctx.sizes = (count, channels, places)
        out, mean, inverse = torch.native_group_norm(
            inputs, weight, bias, count, channels, places, groups, eps
        )
        ctx.save_for_backward(inputs, mean, inverse)
        ctx.groups, ctx.weight, ctx.bias, ctx.book = groups, weight, bias, book
        return out

    @staticmethod
    def backward(ctx: Any, back: torch.Tensor) -> Any:
        """Give the inputs' gradient; note the parts of weight and bias."""
        inputs, mean, inverse = ctx.saved_tensors
        weight, bias, book = ctx.weight, ctx.bias, ctx.book
        count, channels, _ = ctx.sizes
        back = back.contiguous()
        ends = exact(back).reshape(count, channels, -1)
        beyond = ends.sum(2)
        if weight.requires_grad:
            along = (ends * exact(inputs).reshape(count, channels, -1)).sum(2)
            split = (count, ctx.groups, channels // ctx.groups)
            middle, scale = mean.view(count, ctx.groups, 1), inverse.view(count, ctx.groups, 1)
            made = (along.view(split) - beyond.view(split) * middle) * scale
            book.note(weight, Whole(per_record(made.reshape(count, channels), book.rows).sum(1)))
        if bias is not None and bias.requires_grad:
            book.note(bias, Whole(per_record(beyond, book.rows).sum(1)))
        ahead = None
        if ctx.needs_input_grad[0]:
            ahead = torch.ops.aten.native_group_norm_backward(
                back, inputs, mean, inverse, weight, *ctx.sizes, ctx.groups, [True, False, False]
            )[0]
        return ahead, None, None, None, None, None


class Spread(Function):  # type: ignore[misc]
    """A bare parameter, repeated for each record, so that each has a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, weight: Any, shape: tuple[int, ...], book: Book) -> torch.Tensor:
        """Repeat a parameter for each record: (n, *shape), shape the parameter's up to ones."""
        ctx.weight, ctx.book = weight, book
        return weight.reshape(1, *shape).expand(book.rows, *shape)

    @staticmethod
    def backward(ctx: Any, back: torch.Tensor) -> Any:
        """Note the part."""
        ctx.book.note(ctx.weight, Whole(exact(back)))
        return None, None, None
