"""Table rows as inputs, by what was declared about each column and by no statistic of the records.

The bundled tables share this: a number by its bounds, and by cut-points where those are public
knowledge; a choice by its values; an indicator where a value may be missing.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedaccord.errors import TaskError
from fedaccord.evidence import sha256
from fedaccord.tasks import Records

Column = npt.NDArray[Any]
TEST_SHARE = 3  # one subject in three is held out


@dataclass(frozen=True)
class Number:
    """A measurement.

    Attributes:
        low: declared bound; values below it count as it.
        high: declared bound; values above it count as it.
        scale: "linear"; "log" for what spans orders of magnitude; "signed-log" for amounts of both
            signs, sign(x) log(1 + |x| / unit).
        unit: the amount at which "signed-log" turns from linear to logarithmic.
        cuts: increasing declared cut-points; each interval between them is an input of its own.
        missing: whether it may be missing, which is an input of its own.
    """

    low: float
    high: float
    scale: Literal["linear", "log", "signed-log"] = "linear"
    unit: float = 1.0
    cuts: tuple[float, ...] = ()
    missing: bool = False

    def scaled(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Map values inside the bounds to [-1, 1]; monotone."""
        low, here, high = (self._bend(x) for x in (np.array(self.low), values, np.array(self.high)))
        return 2 * (here - low) / (high - low) - 1

    def _bend(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        if self.scale == "log":
            return np.log(values)
        if self.scale == "signed-log":
            return np.sign(values) * np.log1p(np.abs(values) / self.unit)
        return values

    def unscaled(self, places: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Map [-1, 1] back to values: the inverse of `scaled`."""
        low, high = self._bend(np.array(self.low)), self._bend(np.array(self.high))
        bent = low + (places + 1) / 2 * (high - low)
        if self.scale == "log":
            return np.exp(bent)
        if self.scale == "signed-log":
            return np.sign(bent) * np.expm1(np.abs(bent)) * self.unit
        return bent


@dataclass(frozen=True)
class Choice:
    """One of some declared values; whether it may be missing, which is an input of its own."""

    values: tuple[str, ...]
    missing: bool = False


Schema = Mapping[str, Number | Choice]


def names(schema: Schema) -> tuple[str, ...]:
    """Name the inputs in order; those of a column stand side by side."""
    found: list[str] = []
    for name, kind in schema.items():
        if isinstance(kind, Choice):
            found += [f"{name}={value}" for value in kind.values]
        else:
            found.append(name)
            limits = [f"{cut:g}" for cut in kind.cuts]
            if limits:
                found += [f"{name}<{limits[0]}"]
                found += [f"{name}={a}-{b}" for a, b in pairwise(limits)]
                found += [f"{name}>={limits[-1]}"]
        found += [f"{name}:missing"] if kind.missing else []
    return tuple(found)


def encode(schema: Schema, columns: Mapping[str, Column], task: str) -> npt.NDArray[np.float32]:
    """Turn columns into inputs in [-1, 1], (rows, inputs), by the declared schema alone.

    | value | becomes |
    |---|---|
    | number outside its declared bounds | the bound |
    | missing (NaN, or "" of a choice) | zeros, and 1 in its indicator |
    | missing where nothing may be, or an undeclared value of a choice | TaskError |

    Args:
        schema: of each column, in the order of the inputs.
        columns: float64 (rows,) of a number, text (rows,) of a choice.
        task: its name, for errors.
    """
    parts: list[npt.NDArray[Any]] = []
    for name, kind in schema.items():
        values = columns[name]
        missing = np.isnan(values) if isinstance(kind, Number) else values == ""
        if not kind.missing and missing.any():
            raise TaskError(f"{task}.{name} is missing in a row. Fetch the task's data again.")
        if isinstance(kind, Number):
            kept = np.clip(np.where(missing, kind.low, values), kind.low, kind.high)
            parts.append(np.where(missing, 0.0, kind.scaled(kept)))
            if kind.cuts:
                interval = np.searchsorted(np.array(kind.cuts), kept, side="right")
                parts += [(interval == i) & ~missing for i in range(len(kind.cuts) + 1)]
        else:
            unknown = set(values[~missing].tolist()) - set(kind.values)
            if unknown:
                raise TaskError(
                    f'{task}.{name} = "{min(unknown)}" is not one of {", ".join(kind.values)}. '
                    "Fetch the task's data again."
                )
            parts += [values == value for value in kind.values]
        parts += [missing] if kind.missing else []
    return np.stack([np.asarray(part, np.float32) for part in parts], axis=1)


def draw(schema: Schema, rows: int, rng: np.random.Generator) -> dict[str, Column]:
    """Draw made-up columns from the declared schema: uniform on its scale, or among its values.

    Where there are cut-points, an interval is drawn first, then a place in it. What may be missing
    is so in a quarter of the rows.
    """
    drawn: dict[str, Column] = {}
    for name, kind in schema.items():
        if isinstance(kind, Choice):
            values: Column = np.array(kind.values)[rng.integers(len(kind.values), size=rows)]
            nothing: Any = ""
        else:
            edges = kind.scaled(np.array([kind.low, *kind.cuts, kind.high]))
            interval = rng.integers(len(edges) - 1, size=rows)
            left, right = edges[interval], edges[interval + 1]
            values = kind.unscaled(left + (right - left) * rng.random(rows))
            nothing = np.nan
        if kind.missing:
            values = np.where(rng.random(rows) < 0.25, nothing, values)
        drawn[name] = values
    return drawn


def numbers(texts: Iterable[str]) -> npt.NDArray[np.float64]:
    """Read a column of numbers; an empty text is missing (NaN)."""
    return np.array([float(text) if text else np.nan for text in texts])


def read_csv(content: bytes, header: tuple[str, ...] = ()) -> dict[str, npt.NDArray[np.str_]]:
    """Read a CSV file into columns of text without surrounding blanks.

    Args:
        content: of the file.
        header: names of the columns where the file's first line does not have them.
    """
    rows = [row for row in csv.reader(io.StringIO(content.decode("utf-8"))) if row]
    titles = header or tuple(title.strip() for title in rows.pop(0))
    columns = zip(*rows, strict=True)
    return {
        name: np.array([text.strip() for text in texts])
        for name, texts in zip(titles, columns, strict=True)
    }


def held_out(subjects: npt.NDArray[np.int64], task: str) -> npt.NDArray[np.bool_]:
    """Mark the records of about one subject in three, held out from training.

    A subject's side depends on its own id alone (its SHA-256), so a subject with several records is
    on one side with all of them, and one more subject at a site moves no other to the other side.
    """
    return np.array([int(sha256(f"{task}/{i}"), 16) % TEST_SHARE == 0 for i in subjects], np.bool_)


def index(texts: Column, values: tuple[str, ...], what: str) -> npt.NDArray[np.int64]:
    """Give each text its place among the declared values: a label or a group.

    Raises:
        TaskError: a text that is none of them, which `what` names.
    """
    found = texts[:, None] == np.array(values)
    if not found.any(axis=1).all():
        unknown = texts[~found.any(axis=1)][0]
        raise TaskError(
            f'{what} = "{unknown}" is not one of {", ".join(values)}. Fetch the task\'s data again.'
        )
    return found.argmax(axis=1).astype(np.int64)


def rows_of(records: Records, chosen: npt.NDArray[np.bool_]) -> Records:
    """Keep the chosen records."""
    return Records(
        inputs=records.inputs[chosen],
        labels=records.labels[chosen],
        subjects=records.subjects[chosen],
        groups={name: groups[chosen] for name, groups in records.groups.items()},
    )
