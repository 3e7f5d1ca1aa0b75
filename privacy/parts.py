"""Parts: what one use of a weight adds to each record's gradient; its norm, and its weighted sum.

A part knows each record's gradient without always holding it. It promises what float32 needs of
it: a record's gradient is finished by itself, from the record's own row, before it meets another
record's. So another record's presence changes it in no digit, whatever large terms cancel within
it, and only finished gradients, each at most the clip, are ever rounded together: FOLD of them at
a time, then in float64. FOLD terms of at most C each are summed with an error of at most
FOLD^2 u C / 2 = 1.3e-4 C in float32, whatever they are (Higham 2002, section 4.2).

| part | holds | for |
|---|---|---|
| `Whole` | each record's gradient | small weights |
| `Outer` | activation and output gradient, one position a record | Linear on rows |
| `Products` | activations and output gradients over positions | large weights |
| `Looked` | which rows of a table were looked up, and their gradients | Embedding |
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Protocol

import torch

FOLD = 64  # records whose finished gradients are added up in the precision of the pass


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


def folds(records: int) -> Iterator[tuple[int, int]]:
    """Divide records 0 to n into folds, each from its first to before its last."""
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
        weigh = factors.to(self._rows.dtype)
        if len(weigh) <= FOLD:
            return weigh @ self._rows
        whole = len(weigh) // FOLD * FOLD
        sums = torch.bmm(
            weigh[:whole].view(-1, 1, FOLD), self._rows[:whole].view(-1, FOLD, self.size)
        )
        last = weigh[whole:] @ self._rows[whole:]
        where = wide(last.device)
        return sums[:, 0].to(where).double().sum(0) + last.to(where)

    def empty(self, rows: torch.Tensor) -> None:
        """See `Part.empty`."""
        self._rows = without(self._rows, rows)
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
        for i, j in folds(len(scaled)):
            folded.add(scaled[i:j].T @ self._inputs[i:j])
        return folded.value(scaled, scaled.shape[1], self._inputs.shape[1])

    def empty(self, rows: torch.Tensor) -> None:
        """See `Part.empty`."""
        self._inputs, self._back = without(self._inputs, rows), without(self._back, rows)


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
        self._sums = without(self._sums, rows)


def without(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Put zeros in some rows: `where`, since 0 times infinity is not 0."""
    return torch.where(
        rows.reshape(-1, *[1] * (values.dim() - 1)), torch.zeros_like(values), values
    )
