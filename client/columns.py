"""Columns of records: each record is judged by itself, so that an odd one removes only itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedaccord.tasks import Records

Column = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
LARGEST = 2.0**53  # up to here every whole number is a float64


def usable(records: Records) -> Records:
    """Keep the records that have whole numbers for subject and label, and numbers for inputs.

    One missing value turns a whole column into another type (pandas makes floats of whole numbers,
    numpy makes objects). Taken as a whole such a column would be of no use, and one subject would
    remove all others.

    | a record's | record |
    |---|---|
    | subject or label is missing, text, or no whole number | left out |
    | input is text that is no number, or an object | left out |
    | input is None | kept, as NaN: its gradient is not finite and becomes zero |
    | column is shorter than that of the subjects | left out |

    Args:
        records: as a task gave them, of whatever types.

    Returns:
        Without groups: subjects and labels int64 (of other whole numbers as they came), inputs
        numbers (n, ...).

    Raises:
        Exception: columns that are no arrays, or of a type in which no record can be used.
    """
    subjects, known = whole(records.subjects)
    labels, said = whole(records.labels)
    inputs, given = numbers(records.inputs)
    count = min(len(subjects), len(labels), len(inputs))
    kept = np.flatnonzero(known[:count] & said[:count] & given[:count])
    if len(kept) == len(inputs):  # as ever; inputs may be large, so they are not copied
        return Records(inputs, labels[:count].astype(np.int64), subjects[:count], {})
    return Records(inputs[kept], labels[kept].astype(np.int64), subjects[kept], {})


def whole(column: Column) -> tuple[Column, Mask]:
    """Read a column of whole numbers (n,); the mask says which of its values are some.

    Raises:
        ValueError: a column of another shape or type.
    """
    if column.ndim != 1 or column.dtype.kind not in "iufO":
        raise ValueError(f"{column.dtype}{list(column.shape)} is no column of whole numbers")
    if column.dtype.kind in "iu":
        return column, np.ones(len(column), np.bool_)
    good = np.array([_is_whole(value) for value in column], np.bool_)
    found = np.zeros(len(column), np.int64)
    found[good] = [int(value) for value in column[good]]
    return found, good


def _is_whole(value: Any) -> bool:
    if isinstance(value, bool | np.bool_):
        return False
    if isinstance(value, int | np.integer):
        return -(2**63) <= int(value) < 2**63
    if isinstance(value, float | np.floating):
        return abs(float(value)) <= LARGEST and float(value).is_integer()
    return False


def numbers(column: Column) -> tuple[Column, Mask]:
    """Read a column of numbers (n, ...); the mask says which rows are some."""
    good = np.ones(len(column), np.bool_)
    if column.dtype.kind != "O":
        return column, good
    found = np.zeros(column.shape, np.float64)
    for place, row in enumerate(column):
        try:
            found[place] = np.array(row, np.float64)
        except (TypeError, ValueError, OverflowError):
            good[place] = False
    return found, good
