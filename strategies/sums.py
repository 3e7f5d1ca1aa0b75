"""A sum that does not depend on the order of its terms, in memory that does not grow with them."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_BITS = 52  # of a float64's mantissa after the first


class OrderFreeSum:
    """The sum of rows that arrive in any order: the same bits for every order.

    Floating-point addition is not associative, so replies that arrive in another order would give
    another model. Here each term is first rounded to a multiple of a power of two so large that all
    partial sums are exact, and what the rounding left over is summed in the same way on a finer
    grid (reproducible summation: Demmel and Nguyen 2013, Fast Reproducible Floating-Point
    Summation, section 4, with two folds). What is lost, before the sum is rounded once to float64,
    is at most `count^2 x bound x 2^-102` a term.

    | term | what happens |
    |---|---|
    | a coordinate above the bound in magnitude, NaN or infinite | ValueError, nothing is added |
    | more terms than were said | ValueError |
    | no term at all | zeros |
    """

    def __init__(self, size: int, bound: float, count: int) -> None:
        """Prepare for a sum.

        Args:
            size: coordinates of a row, d.
            bound: no coordinate of a term is larger in magnitude; finite, above 0.
            count: terms at most, 1 or more.

        Raises:
            ValueError: a bound or count for which float64 has no room.
        """
        if not (0 < bound < 1e200 and 1 <= count <= 2**24):
            raise ValueError(f"bound = {bound}, count = {count}: no room for an exact sum")
        room = math.frexp(bound * count)[1]  # bound * count <= 2^room
        grid = room + 1 - _BITS
        self._magic = 1.5 * 2.0 ** (grid + _BITS)
        finer = grid - 1 + math.frexp(count)[1] + 1 - _BITS
        self._finer_magic = 1.5 * 2.0 ** (finer + _BITS)
        self._bound, self._left = bound, count
        self._high, self._low = np.zeros(size), np.zeros(size)

    def add(self, row: Floats) -> None:
        """Add one term, float64 (d,).

        Raises:
            ValueError: see the class.
        """
        if self._left == 0:
            raise ValueError("more terms than were said")
        if not bool((np.abs(row) <= self._bound).all()):
            raise ValueError(f"a coordinate is not finite or above {self._bound} in magnitude")
        self._left -= 1
        high = (row + self._magic) - self._magic
        low = row - high
        self._high += high
        self._low += (low + self._finer_magic) - self._finer_magic

    def total(self) -> Floats:
        """Return the sum so far, float64 (d,), rounded once."""
        return self._high + self._low
