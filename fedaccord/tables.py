"""A user's own table as inputs: numbers and categories in [-1, 1], by declared bounds alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedaccord.accord_task import InputSection, TableSection
from fedaccord.own_columns import Unusable, each, is_missing, number, place
from fedaccord.own_files import Cell
from fedaccord.tasks import Inputs

MISSING_SHARE = 0.25  # of the made-up values of a column that may be missing
Numbers = npt.NDArray[np.float32]


class TableInputs:
    """How rows of a table become inputs; no statistic of any record has a part in it.

    | value | becomes |
    |---|---|
    | a number between its bounds | -1 at `min` to 1 at `max`, on a log scale if said |
    | a number outside them | the record is left out, or the bound with outside = "clip" |
    | one of the declared values | 1 in its place, 0 in the others |
    | missing, where it may be | 0, and 1 in the indicator "column:missing" |
    | missing where it may not, undeclared, no number | the record is left out |
    """

    vocabulary = 0

    def __init__(self, section: TableSection) -> None:
        self._section = section
        self.features: tuple[str, ...] = tuple(
            feature
            for name in section.input_columns
            for feature in _features(name, section.inputs[name])
        )
        self.shape: tuple[int, ...] = (len(self.features),)

    def encode(
        self, columns: Mapping[str, Sequence[Cell]], folder: Path
    ) -> tuple[Inputs, dict[str, list[str]]]:
        """Turn cells into inputs (n, features), and say for each column's cells "" or why not."""
        blocks: list[Numbers] = []
        why: dict[str, list[str]] = {}
        for name in self._section.input_columns:
            section = self._section.inputs[name]
            wide = len(_features(name, section))
            found, why[name] = each(columns[name], partial(self._row, section), (0.0,) * wide)
            blocks.append(np.array(found, np.float32).reshape(-1, wide))
        return np.concatenate(blocks, axis=1), why

    def _row(self, section: InputSection, cell: Cell) -> tuple[float, ...]:
        values = section.values or []
        if cell is None or (cell not in values and is_missing(cell, self._section.missing_values)):
            if not section.missing:
                raise Unusable("is missing")
            return (*(0.0,) * max(1, len(values)), 1.0)
        if section.kind == "category":
            here = place(cell, values)
            found = tuple(float(here == other) for other in range(len(values)))
        else:
            found = (self._scaled(number(cell), section),)
        return (*found, 0.0) if section.missing else found

    def _scaled(self, value: float, section: InputSection) -> float:
        low, high = _bounds(section)
        if not low <= value <= high:
            if self._section.outside == "refuse":
                raise Unusable(f"{value:.15g} is outside {low:.15g} to {high:.15g}")
            value = min(max(value, low), high)
        if section.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return 2 * (value - low) / (high - low) - 1

    def draw(self, rows: int, rng: np.random.Generator) -> Inputs:
        """Make up inputs (rows, features), uniform between the bounds and over the values."""
        blocks: list[Numbers] = []
        for name in self._section.input_columns:
            section = self._section.inputs[name]
            if section.kind == "category":
                count = len(section.values or [])
                block = np.eye(count, dtype=np.float32)[rng.integers(count, size=rows)]
            else:
                block = rng.uniform(-1, 1, (rows, 1)).astype(np.float32)
            if section.missing:
                gone = (rng.random((rows, 1)) < MISSING_SHARE).astype(np.float32)
                block = np.concatenate([block * (1 - gone), gone], axis=1)
            blocks.append(block)
        return np.concatenate(blocks, axis=1)


def _bounds(section: InputSection) -> tuple[float, float]:
    assert section.min is not None and section.max is not None  # a number has both
    return section.min, section.max


def _features(name: str, section: InputSection) -> list[str]:
    """Name the inputs that a column makes."""
    named = [f"{name}={value}" for value in section.values or []] or [name]
    return [*named, f"{name}:missing"] if section.missing else named
