"""Parts of weights that many positions of a record share, and the ways to make them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from fedaccord.privacy.parts import Folded, Part, Whole, folds, square, wide, without

BLOCK = 2**18  # numbers of one block of products: it should stay in a core's second cache
HELD = 2**20  # numbers: gradients of a page that are no more are held anyhow
Windows = Callable[[int, int], torch.Tensor]  # of records i to j: (j - i, positions, inputs)
One = Callable[[int, torch.Tensor], torch.Tensor]  # record i, its output gradient: its gradient
Ways = dict[str, Callable[[], Part]]  # to make one part, the best by rule first


class Book(Protocol):
    """Where a page's parts are noted."""

    rows: int  # records on the page

    def note(self, weight: torch.Tensor, part: Part) -> None:
        """Note a part of a weight."""
        ...

    def choose(self, key: tuple[Any, ...], ways: Ways, like: torch.Tensor) -> Part:
        """Make a part by whichever way is best for such shapes.

        Args:
            key: kind of layer and what its cost depends on besides the size of `like`.
            ways: by name, the one that is best by rule first.
            like: output gradients (n, ...).
        """
        ...


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
        for start, end in folds(len(self._back)):
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
        if self._double:
            return self._total_in_double(factors)
        weigh = factors.to(self._back.dtype)
        folded, size = Folded(), (self._back.shape[1], self._inputs)
        for fold, end in folds(len(weigh)):
            partial = weigh.new_zeros(size)
            for i, j, part, made in self._blocks(fold, end):
                partial[part].view(-1).addmv_(made.flatten(1).T, weigh[i:j])
            folded.add(partial)
        return folded.value(weigh, *size)

    def _total_in_double(self, factors: torch.Tensor) -> torch.Tensor:
        """Sum over all records and positions at once, in float64, so that nothing is rounded."""
        records, outputs, positions = self._back.shape
        where = wide(self._back.device)
        weigh = factors.to(where).double()[:, None, None]
        total = torch.zeros(outputs, self._inputs, dtype=torch.float64, device=where)
        step = max(1, 4 * BLOCK // (positions * max(outputs, self._inputs)))
        for i in range(0, records, step):
            rows = self._windows(i, min(i + step, records)).to(where).double()
            ends = self._back[i : i + step].transpose(1, 2).to(where) * weigh[i : i + step]
            total.addmm_(ends.reshape(-1, outputs).T, rows.reshape(-1, self._inputs))
        return total

    def empty(self, rows: torch.Tensor) -> None:
        """See `Part.empty`."""
        windows = self._windows
        self._windows = lambda i, j: without(windows(i, j), rows[i:j])
        self._back = without(self._back, rows)


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
    if _few(back, outputs * inputs, positions * (outputs + inputs)):
        held: Ways = {"held": lambda: Whole(Products(windows, back, inputs).each())}
        ways = held | ways
    return ways


def _few(back: torch.Tensor, weights: int, made_of: int) -> bool:
    """Whether gradients are held: where they are few, or at most twice what they are made of."""
    return len(back) * weights <= HELD or weights <= 2 * made_of


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
        weigh, folded = factors.to(self._back.dtype), Folded()
        for start, end in folds(len(weigh)):
            partial = self._one(start, self._back[start : start + 1]) * weigh[start]
            for i in range(start + 1, end):
                partial.addcmul_(self._one(i, self._back[i : i + 1]), weigh[i])
            folded.add(partial)
        return folded.value(self._back, 0)

    def empty(self, rows: torch.Tensor) -> None:
        """See `Part.empty`."""
        kept, one = ~rows, self._one
        self._back = without(self._back, rows)
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
    if _few(back, outputs * inputs, ends.shape[2] * (outputs + inputs)):
        ways["held, looped"] = lambda: Whole(Looped(one, back, back.new_zeros(0)).each())
    return ways
