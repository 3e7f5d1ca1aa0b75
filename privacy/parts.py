"""Parts: what one use of a weight adds to each record's gradient; its norm, and its weighted sum.

A part knows each record's gradient without always holding it. It promises what float32 needs of
it: a record's gradient is finished by itself, from the record's own row, before it meets another
record's. So another record's presence changes it in no digit, whatever large terms cancel within
it, and only finished gradients, each at most the clip, are ever rounded together: FOLD of them at
a time, then in float64. FOLD terms of at most C each are summed with an error below
FOLD^2 u C = 2.5e-4 C in float32, whatever they are (Higham 2002, section 4.2).

| part | holds | for |
|---|---|---|
| `Whole` | each record's gradient | small weights |
| `Outer` | activation and output gradient, one position a record | Linear on rows |
| `Products` | activations and output gradients over positions | large weights |
| `Looked` | which rows of a table were looked up, and their gradients | Embedding |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Protocol

import torch

FOLD = 64  # records whose finished gradients are added up in the precision of the pass
BLOCK = 2**18  # numbers of one block of products: it should stay in a core's second cache
HELD = 4  # gradients are held where they are at most so many times as many as what makes them
Windows = Callable[[int, int], torch.Tensor]  # of records i to j: (j - i, positions, inputs)
One = Callable[[int, torch.Tensor], torch.Tensor]  # record i, its output gradient: its gradient


class Part(Protocol):
    """One use of a weight on a page of n records."""

    @property
    def squares(self) -> torch.Tensor:
        """Square of the L2 norm of each record's gradient, (n,)."""
        ...

    def each(self) -> torch.Tensor:
        """Each record's gradient, (n, size of the weight)."""
        ...

    def total(self, factors: torch.Tensor) -> torch.Tensor:
        """Sum the gradients times factors (n,), as many numbers as the weight, in its order.

        Float64, or as it is where it was rounded once (at most FOLD records).
        """
        ...

    def empty(self, rows: torch.Tensor) -> None:
        """Turn the gradients of some records, bool (n,), into zeros."""
        ...


Ways = dict[str, Callable[[], Part]]  # to make one part, the best by rule first


def square(rows: torch.Tensor) -> torch.Tensor:
    """Square the L2 norm of each row of (n, ...)."""
    return torch.linalg.vector_norm(rows.flatten(1), dim=1).square()


def wide(device: torch.device) -> torch.device:
    """Where float64 sums of a device are kept: there, or on the CPU where it has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


class Folded:
    """A sum in float64 of sums over at most FOLD records each; one alone stays as it is."""

    def __init__(self) -> None:
        self._value: torch.Tensor | None = None

    def add(self, part: torch.Tensor) -> None:
        """Add a finished sum of at most FOLD records."""
        if self._value is None:
            self._value = part
            return
        if self._value.dtype != torch.float64:
            self._value = self._value.to(wide(part.device)).double()
        self._value += part.to(self._value.device)

    def value(self, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """Return the sum; zeros of a shape where nothing was added."""
        return like.new_zeros(shape) if self._value is None else self._value


def _folds(records: int) -> Iterator[tuple[int, int]]:
    return ((i, min(i + FOLD, records)) for i in range(0, records, FOLD))


class Whole:
    """Each record's gradient, held (n, size)."""

    def __init__(self, gradients: torch.Tensor) -> None:
        """Hold the gradients (n, *shape of the weight)."""
        self._rows = gradients.reshape(len(gradients), -1)

    @cached_property
    def squares(self) -> torch.Tensor:
        """See `Part.squares`; worked out when asked for, since small parts are joined first."""
        return square(self._rows)

    @property
    def size(self) -> int:
        """Numbers of a record's gradient."""
        return self._rows.shape[1]

    def each(self) -> torch.Tensor:
        """See `Part.each`."""
        return self._rows

    def total(self, factors: torch.Tensor) -> torch.Tensor:
        """See `Part.total`."""
        folded = Folded()
        for i, j in _folds(len(self._rows)):
            folded.add(factors[i:j].to(self._rows.dtype) @ self._rows[i:j])
        return folded.value(self._rows, self._rows.shape[1])

    def empty(self, rows: torch.Tensor) -> None:
        """See `Part.empty`."""
        self._rows = _without(self._rows, rows)
        self.__dict__.pop("squares", None)


class Reordered:
    """A part of a weight whose axes stand in another order than the part's."""

    def __init__(self, part: Part, shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
        """Hold a part of `shape`, of whose axes the weight's are `axes`."""
        self._part, self._shape = part, shape
        self._axes = axes
        self.squares = part.squares

    def each(self) -> torch.Tensor:
        """See `Part.each`."""
        rows = self._part.each()
        axes = (0, *(axis + 1 for axis in self._axes))
        return rows.reshape(-1, *self._shape).permute(axes).reshape(len(rows), -1)

    def total(self, factors: torch.Tensor) -> torch.Tensor:
        """See `Part.total`."""
        return self._part.total(factors).reshape(self._shape).permute(self._axes)

    def empty(self, rows: torch.Tensor) -> None:
        """See `Part.empty`."""
        self._part.empty(rows)


class Outer:
    """One position a record: the gradient is the product of a column and a row."""

    def __init__(self, inputs: torch.Tensor, back: torch.Tensor) -> None:
        """Hold inputs (n, in) and output gradients (n, out)."""
        self._inputs, self._back = inputs, back
        self.squares = square(inputs) * square(back)

    def each(self) -> torch.Tensor:
        """See `Part.each`."""
        return (self._back[:, :, None] * self._inputs[:, None]).flatten(1)

    def total(self, factors: torch.Tensor) -> torch.Tensor:
        """See `Part.total`."""
        scaled = self._back * factors.to(self._back.dtype)[:, None]
        folded = Folded()
        for i, j in _folds(len(scaled)):
            folded.add(scaled[i:j].T @ self._inputs[i:j])
        return folded.value(scaled, scaled.shape[1], self._inputs.shape[1])

    def empty(self, rows: torch.Tensor) -> None:
        """See `Part.empty`."""
        self._inputs, self._back = _without(self._inputs, rows), _without(self._back, rows)


class Products:
    """Positions summed over: the gradient is `back^T windows`, made a block at a time.

    Norms come from products of positions ("gram": Li et al. 2022, section 3; Bu et al. 2022) or
    from the gradients themselves ("direct"), which are made again for the sum.
    """

    def __init__(
        self,
        windows: Windows,
        back: torch.Tensor,
        inputs: int,
        norms: str = "",
        double: bool = False,
    ) -> None:
        """Hold what the gradients are made of.

        Args:
            windows: of records i to j what the weight was multiplied with, (j - i, positions, in).
            back: output gradients (n, out, positions), any strides.
            inputs: columns of the weight.
            norms: "gram", "direct", or "" for none, where only the gradients are wanted.
            double: whether the sum is over all records and positions at once, in float64.
        """
        self._windows, self._back, self._inputs, self._double = windows, back, inputs, double
        self.squares = back.new_zeros(0)
        if norms:
            made = _gram(windows, back, inputs) if norms == "gram" else self._direct()
            self.squares = made

    def _direct(self) -> torch.Tensor:
        """Square norms (n,) of the gradients, in the blocks in which `total` makes them again.

        They must round alike: where terms cancel, what is left is rounding, and a gradient that is
        made in another way (of factors times `back`, say) can be several times as long.
        """
        found = self._back.new_zeros(len(self._back))
        for start, end in _folds(len(self._back)):
            for i, j, _, made in self._blocks(start, end):
                found[i:j] += square(made)
        return found

    def _blocks(self, start: int, end: int) -> Iterator[tuple[int, int, slice, torch.Tensor]]:
        """Make the gradients of records i to j in blocks (j - i, rows of the weight, inputs)."""
        back, outputs = self._back, self._back.shape[1]
        high = max(1, min(outputs, BLOCK // self._inputs))
        step = self._step(high)
        room = back.new_empty(min(step, end - start), high, self._inputs)
        for i in range(start, end, step):
            j = min(i + step, end)
            rows = self._windows(i, j)
            for top in range(0, outputs, high):
                part = slice(top, min(top + high, outputs))
                out = room[: j - i, : part.stop - top]
                yield i, j, part, torch.bmm(back[i:j, part], rows, out=out)

    def _step(self, high: int) -> int:
        """Records at a time, so that windows and `high` rows of the gradients stay in the cache."""
        return max(1, BLOCK // (max(high, self._back.shape[2]) * self._inputs))

    def each(self) -> torch.Tensor:
        """See `Part.each`."""
        records, outputs, _ = self._back.shape
        out = self._back.new_empty(records, outputs, self._inputs)
        step = self._step(outputs)
        for i in range(0, records, step):
            rows = self._windows(i, min(i + step, records))
            torch.bmm(self._back[i : i + step], rows, out=out[i : i + step])
        return out.flatten(1)

    def total(self, factors: torch.Tensor) -> torch.Tensor:
        """See `Part.total`."""
        weigh = factors.to(self._back.dtype)
        if self._double:
            return self._total_in_double(self._back * weigh[:, None, None])
        folded, size = Folded(), (self._back.shape[1], self._inputs)
        for fold, end in _folds(len(weigh)):
            partial = weigh.new_zeros(size)
            for i, j, part, made in self._blocks(fold, end):
                partial[part].view(-1).addmv_(made.flatten(1).T, weigh[i:j])
            folded.add(partial)
        return folded.value(weigh, *size)

    def _total_in_double(self, scaled: torch.Tensor) -> torch.Tensor:
        """Sum over all records and positions at once, in float64, so that nothing is rounded."""
        records, outputs, positions = scaled.shape
        total = torch.zeros(outputs, self._inputs, dtype=torch.float64, device=wide(scaled.device))
        step = max(1, 4 * BLOCK // (positions * max(outputs, self._inputs)))
        for i in range(0, records, step):
            rows = self._windows(i, min(i + step, records)).to(total.device).double()
            back = scaled[i : i + step].transpose(1, 2).to(total.device).double()
            total.addmm_(back.reshape(-1, outputs).T, rows.reshape(-1, self._inputs))
        return total

    def empty(self, rows: torch.Tensor) -> None:
        """See `Part.empty`."""
        windows = self._windows
        self._windows = lambda i, j: _without(windows(i, j), rows[i:j])
        self._back = _without(self._back, rows)


def _gram(windows: Windows, back: torch.Tensor, inputs: int) -> torch.Tensor:
    """Square norms (n,) from products of positions, never below the true ones.

    Where terms cancel, what is left may be rounding. A bound on that is added, 64 units of
    |windows windows^T| |back back^T|, so that a norm is at most too large, by a relative 1e-5
    where nothing cancels.
    """
    records, _, positions = back.shape
    unit = 32 * torch.finfo(back.dtype).eps
    found = back.new_zeros(records)
    step = max(1, 4 * BLOCK // (positions * max(positions, inputs)))
    for i in range(0, records, step):
        rows, ends = windows(i, min(i + step, records)), back[i : i + step]
        first = torch.bmm(rows, rows.transpose(1, 2)).flatten(1)
        second = torch.bmm(ends.transpose(1, 2), ends).flatten(1)
        bound = (square(first) * square(second)).sqrt()
        found[i : i + step] = (first * second).sum(1).clamp(min=0) + unit * bound
    return found


def products(windows: Windows, back: torch.Tensor, inputs: int) -> Ways:
    """List the ways to make the part of a weight that many positions share; see `Products`."""
    _, outputs, positions = back.shape
    ways: Ways = {
        "gram": lambda: Products(windows, back, inputs, "gram"),
        "gram, double": lambda: Products(windows, back, inputs, "gram", double=True),
        "direct": lambda: Products(windows, back, inputs, "direct"),
    }
    if positions >= outputs:
        ways = {"direct": ways.pop("direct")} | ways
    if _few(outputs * inputs, positions, outputs + inputs):
        held: Ways = {"held": lambda: Whole(Products(windows, back, inputs).each())}
        ways = held | ways
    return ways


def _few(weights: int, positions: int, width: int) -> bool:
    """Whether a record's gradient is small enough to be held."""
    return weights <= HELD * positions * width


class Looped:
    """Positions summed over, a record at a time by torch's own kernel for one record."""

    def __init__(self, one: One, back: torch.Tensor, squares: torch.Tensor) -> None:
        """Hold how a record's gradient is made of its output gradient, and the norms' squares."""
        self._one, self._back, self.squares = one, back, squares

    def each(self) -> torch.Tensor:
        """See `Part.each`."""
        ends = self._back.split(1)
        return torch.cat([self._one(i, end).flatten()[None] for i, end in enumerate(ends)])

    def total(self, factors: torch.Tensor) -> torch.Tensor:
        """See `Part.total`."""
        scaled = self._back * factors.to(self._back.dtype).view(-1, *[1] * (self._back.dim() - 1))
        folded = Folded()
        for start, end in _folds(len(scaled)):
            partial = self._one(start, scaled[start : start + 1])
            for i in range(start + 1, end):
                partial += self._one(i, scaled[i : i + 1])
            folded.add(partial)
        return folded.value(scaled, 0)

    def empty(self, rows: torch.Tensor) -> None:
        """See `Part.empty`."""
        kept, one = ~rows, self._one
        self._back = _without(self._back, rows)
        self._one = lambda i, end: one(i, end) if bool(kept[i]) else torch.zeros_like(one(i, end))


def looped(one: One, back: torch.Tensor, windows: Windows, inputs: int) -> Ways:
    """List the ways to make a convolution's part a record at a time.

    Args:
        one: see `Looped`.
        back: output gradients (n, out, high, across).
        windows: see `Products`.
        inputs: numbers of a window.
    """
    outputs = back.shape[1]
    ends = back.flatten(2)
    ways: Ways = {
        "gram, looped": lambda: Looped(one, back, _gram(windows, ends, inputs)),
    }
    if _few(outputs * inputs, ends.shape[2], outputs + inputs):
        ways["held, looped"] = lambda: Whole(Looped(one, back, back.new_zeros(0)).each())
    return ways


class Looked:
    """Rows of a table that were looked up."""

    def __init__(self, ids: torch.Tensor, back: torch.Tensor, table: int) -> None:
        """Add up, within each record, the gradients of positions that looked up the same row.

        Args:
            ids: int64 (n, positions), a row of the table each; below 0: none.
            back: gradients (n, positions, width).
            table: rows of the table.
        """
        self._ids, self._rows, self._sums = ids, table, back
        same = ids[:, :, None] == ids[:, None, :]  # (n, positions, positions)
        if int(same.sum()) == ids.numel() and int(ids.min()) >= 0:  # as positions are
            self.squares = square(back)
            return
        first = ~torch.tril(same, diagonal=-1).any(dim=2) & (ids >= 0)  # of its id in the record
        back = torch.where((ids >= 0)[:, :, None], back, torch.zeros_like(back))
        self._sums = torch.bmm((same & first[:, :, None]).to(back.dtype), back)
        self.squares = square(self._sums)

    def each(self) -> torch.Tensor:
        """See `Part.each`."""
        records, _, width = self._sums.shape
        place = torch.arange(records, device=self._ids.device)[:, None] * self._rows
        out = self._sums.new_zeros(records * self._rows, width)
        known = (self._ids.clamp(min=0) + place).flatten()
        out.index_add_(0, known, self._sums.reshape(-1, width))
        return out.view(records, -1)

    def total(self, factors: torch.Tensor) -> torch.Tensor:
        """See `Part.total`."""
        width = self._sums.shape[2]
        scaled = self._sums * factors.to(self._sums.dtype)[:, None, None]
        where = wide(scaled.device)
        out = torch.zeros(self._rows, width, dtype=torch.float64, device=where)
        flat = scaled.reshape(-1, width).to(where).double()
        return out.index_add_(0, self._ids.clamp(min=0).flatten().to(where), flat)

    def empty(self, rows: torch.Tensor) -> None:
        """See `Part.empty`."""
        self._sums = _without(self._sums, rows)


def _without(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Put zeros in some rows: `where`, since 0 times infinity is not 0."""
    return torch.where(
        rows.reshape(-1, *[1] * (values.dim() - 1)), torch.zeros_like(values), values
    )
