"""Columns of a user's own records, cell by cell: labels, groups, subjects, splits."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from functools import cache, lru_cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from fedaccord.accord_task import AttributeSection, Grouping, LabelSection
from fedaccord.evidence import canonical_json, sha256
from fedaccord.faults import toml
from fedaccord.own_files import Cell, Rows

T = TypeVar("T")
Ints = npt.NDArray[np.int64]
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_WHOLE = re.compile(r"[+-]?\d+\.0+")


class Unusable(Exception):
    """A cell that a record cannot have; its words are for the site alone."""


def each(cells: Sequence[Cell], read: Callable[[Cell], T], fill: T) -> tuple[list[T], list[str]]:
    """Read every cell of a column by itself; equal cells once.

    Returns:
        What was read, `fill` where it cannot be, and for each cell "" or why not.
    """
    known: dict[Cell, tuple[T, str]] = {}
    for cell in cells:
        if cell not in known:
            try:
                known[cell] = (read(cell), "")
            except Unusable as why:
                known[cell] = (fill, str(why))
    return [known[cell][0] for cell in cells], [known[cell][1] for cell in cells]


def is_missing(cell: Cell, missing: Collection[str]) -> bool:
    """Tell whether a cell holds nothing, or a word for it."""
    return cell is None or cell in missing


def number(cell: str) -> float:
    """Read a number as files have it (1, -2.5, 1e3); no thousands, no words like inf.

    Raises:
        Unusable: any other text.
    """
    if not _NUMBER.fullmatch(cell):
        raise Unusable(f"{toml(cell)} is no number")
    return float(cell)


def place(cell: str, values: Sequence[str]) -> int:
    """Find a cell among declared values; 1.0 is taken for a declared 1, as pandas writes it.

    Raises:
        Unusable: a value that was not declared.
    """
    if cell in values:
        return values.index(cell)
    whole = cell.split(".")[0]
    if _WHOLE.fullmatch(cell) and whole in values:
        return values.index(whole)
    raise Unusable(f"{toml(cell)} is not one of the declared {toml(list(values))}")


def code(cell: Cell, section: Grouping, values: Sequence[str], missing: Collection[str]) -> int:
    """Say which class or group a cell stands for.

    | cell | index |
    |---|---|
    | one of the values | its place |
    | a number, where bands are declared | of its band: [1, 5] makes three, and 1 is in the second |
    | missing, and the attribute names a group for that | the last one |
    | missing, undeclared or no number | Unusable |
    """
    if cell is None or (cell not in values and cell in missing):
        if isinstance(section, AttributeSection) and section.missing:
            return len(section.names) - 1
        raise Unusable("is missing")
    if section.bands is None:
        return place(cell, values)
    return int(np.searchsorted(section.bands, number(cell), side="right"))


def codes(cells: Sequence[Cell], section: Grouping, missing: Collection[str]) -> tuple[
    Ints, list[str]
]:  # fmt: skip
    """Read a column of labels or of groups: int64 (n,), and for each cell "" or why not."""
    values = section.values or []
    if isinstance(section, LabelSection) and section.bands is None:
        values = section.values or section.classes
    found, why = each(cells, lambda cell: code(cell, section, values, missing), 0)
    return np.array(found, np.int64), why


def subjects(
    rows: Rows, column: str | None, missing: Collection[str]
) -> tuple[list[str], list[str]]:
    """Name the subject of each row, and say where there is none.

    Without a column each row is a subject of its own, named by what stands in it, so that a row
    more or less changes no other row's name. Rows that are equal are numbered among themselves.
    """
    if column is not None:
        cells = rows.columns[column]
        why = ["is missing" if is_missing(cell, missing) else "" for cell in cells]
        return [cell or "" for cell in cells], why
    seen: dict[str, int] = {}
    names = []
    for at in range(len(rows)):
        text = canonical_json({name: cells[at] for name, cells in sorted(rows.columns.items())})
        seen[text] = seen.get(text, 0) + 1
        names.append(f"{text}#{seen[text]}")
    return names, [""] * len(rows)


def identities(names: Sequence[str], dataset: str) -> Ints:
    """Make a number of each subject's name, the same in every file: 63 bits of a SHA-256."""

    @cache
    def one(name: str) -> int:
        return int(sha256(f"{dataset}/subject/{name}")[:16], 16) >> 1

    return np.array([one(name) for name in names], np.int64)


def held_out(names: Sequence[str], dataset: str, share: float) -> list[bool]:
    """Hold a share of the subjects out for evaluation, each by the SHA-256 of its own name.

    It depends on no other subject, and on no library's random numbers; every accord on the data
    set holds the same subjects out.
    """

    @cache
    def one(name: str) -> bool:
        return int(sha256(f"{dataset}/split/{name}")[:13], 16) / 2**52 < share

    return [one(name) for name in names]


def split(cells: Sequence[Cell]) -> tuple[list[bool], list[str]]:
    """Read a column that says "train" or "test": whether it is test, and why it is neither."""

    def one(cell: Cell) -> bool:
        word = (cell or "").lower()
        if word not in ("train", "test"):
            raise Unusable(f'{toml(cell or "")} is neither "train" nor "test"')
        return word == "test"

    return each(cells, one, False)


@lru_cache(maxsize=65_536)
def site_name(cell: Cell) -> str:
    """Write a cell as sites are named: "Ward A" is the site ward-a."""
    return re.sub(r"[^a-z0-9]+", "-", (cell or "").lower()).strip("-")
