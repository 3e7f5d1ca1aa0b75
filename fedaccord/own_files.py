"""Files of a user's own records: where a site's file lies, and its rows, each read by itself."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedaccord.accord_task import OwnSection
from fedaccord.errors import TaskError
from fedaccord.faults import toml

Cell = str | None  # as the file has it; None: the file has nothing there


@dataclass(frozen=True, order=True)
class Found:
    """A record that is left out: its row in the file, the column, and why.

    What it says holds values of the record: it is for the site's own console and diary.
    """

    file: str
    row: int
    column: str
    words: str

    def __str__(self) -> str:
        """Write it on one line."""
        column = f", column {toml(self.column)}" if self.column else ""
        return f"{self.file}: row {self.row}{column}: {self.words}"


@dataclass(frozen=True)
class Rows:
    """Rows of a file by column; the same place in each column is the same record.

    Attributes:
        file: its name, for messages.
        columns: the cells of each declared column.
        numbers: where each row stands in its file; the header of a CSV file is row 1.
        found: rows that cannot be read, which are not in the columns.
    """

    file: str
    columns: Mapping[str, Sequence[Cell]]
    numbers: Sequence[int]
    found: tuple[Found, ...] = field(default=())

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.numbers)

    def take(self, places: Sequence[int]) -> Rows:
        """Keep the rows at some places, in that order."""
        columns = {name: [cells[i] for i in places] for name, cells in self.columns.items()}
        return Rows(self.file, columns, [self.numbers[i] for i in places], self.found)

    def fault(self, place: int, column: str, words: str) -> Found:
        """Make a fault of the row at a place."""
        return Found(self.file, self.numbers[place], column, words)


def site_file(section: OwnSection, site: str, home: Path, data: Path | None) -> Path:
    """Find a site's file of records.

    | `data` | the file is |
    |---|---|
    | the site's own folder of data sets | `data`/task.dataset/task.file: the accord names no other place |
    | None: a simulation | task.file, seen from the folder of the accord |

    Args:
        section: the accord's [task].
        site: takes the place of {site} in task.file.
        home: the folder of the accord.
        data: named by the site (its node config, or `data` in its folder), never by an accord.
    """  # noqa: E501  (a table row cannot be broken)
    name = section.file.replace("{site}", site)
    return (home if data is None else data / section.dataset) / name


def stamp(path: Path) -> tuple[int, int]:
    """Tell one version of a file from another, without reading it.

    Raises:
        TaskError: a file that is not there.
    """
    try:
        about = path.stat()
    except OSError as fault:
        raise TaskError(
            f"file {path}: {fault.strerror or 'cannot be found'}. Put the records there, or change "
            "task.file."
        ) from None
    return about.st_mtime_ns, about.st_size


def read(path: Path, columns: Iterable[str], delimiter: str = ",", name: str = "") -> Rows:
    """Read some columns of a CSV or Parquet file.

    Every row is judged by itself, so that an odd one removes only itself.

    | a CSV file's line | it is |
    |---|---|
    | empty | passed over |
    | has more or fewer cells than the header | left out |
    | is not UTF-8, or has a quote that does not close on the line | left out |
    | has a line break inside quotes | two lines, both left out: keep such texts in Parquet |

    Args:
        path: ends in .csv or .parquet.
        columns: names; others are not kept.
        delimiter: between a CSV file's cells.
        name: of the file in messages; its own by default.

    Raises:
        TaskError: a file that cannot be read at all, or that lacks a column.
    """
    stamp(path)
    wanted, name = list(dict.fromkeys(columns)), name or path.name
    try:
        if path.suffix.lower() == ".parquet":
            return _parquet(path, wanted, name)
        return _csv(path, wanted, delimiter, name)
    except OSError as fault:
        raise TaskError(
            f"file {path}: {fault.strerror or fault}. Mend it or name another."
        ) from None


def _missing(wanted: Sequence[str], there: Sequence[str], name: str) -> None:
    for column in wanted:
        if there.count(column) != 1:
            has = "has no column" if column not in there else "has twice the column"
            shown = ", ".join(there[:20]) + (", ..." if len(there) > 20 else "")
            raise TaskError(
                f"{name}: {has} {toml(column)}. Its columns: {shown}. Rename it there or in the "
                "accord."
            )


def _csv(path: Path, wanted: Sequence[str], delimiter: str, name: str) -> Rows:
    lines = path.read_bytes().split(b"\n")
    if lines[0].startswith(b"\xef\xbb\xbf"):
        lines[0] = lines[0][3:]
    header, why = _cells(lines[0], delimiter)
    if why:
        raise TaskError(f"{name}: its header (row 1) {why}. Mend that line.")
    there = [cell.strip() for cell in header]
    _missing(wanted, there, name)
    places = [there.index(column) for column in wanted]
    kept: list[list[str]] = [[] for _ in wanted]
    numbers, found = [], []
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        cells, why = _cells(line, delimiter)
        if not why and len(cells) != len(there):
            why = f"has {len(cells)} cells, and the header {len(there)}"
        if why:
            found.append(Found(name, number, "", why))
            continue
        numbers.append(number)
        for column, place in zip(kept, places, strict=True):
            column.append(cells[place].strip())
    return Rows(name, dict(zip(wanted, kept, strict=True)), numbers, tuple(found))


def _cells(line: bytes, delimiter: str) -> tuple[list[str], str]:
    """Cut one line into cells; or say why it cannot be cut."""
    try:
        text = line.rstrip(b"\r").decode("utf-8")
    except UnicodeDecodeError:
        return [], "is not UTF-8 text"
    if '"' not in text:
        return text.split(delimiter), ""
    cut = re.escape(delimiter)
    cell = rf'(?:"(?:[^"]|"")*"|[^"{cut}]*)'
    if not re.fullmatch(f"{cell}(?:{cut}{cell})*", text):
        return [], "has a quote that does not close on its line, or that stands inside a cell"
    try:
        (cells,) = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    except (csv.Error, ValueError):  # a lone carriage return, a cell of more than 128 KiB
        return [], "cannot be cut into cells"
    return cells, ""


def _parquet(path: Path, wanted: Sequence[str], name: str) -> Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            _missing(wanted, file.schema_arrow.names, name)
            table = file.read(columns=list(wanted))
    except pyarrow.ArrowException as fault:
        first = (str(fault) or type(fault).__name__).splitlines()[0]
        raise TaskError(f"{name}: is no Parquet file that can be read: {first}. Mend it.") from None
    columns = {column: [_cell(v) for v in table[column].to_pylist()] for column in wanted}
    return Rows(name, columns, range(1, table.num_rows + 1))


def _cell(value: Any) -> Cell:
    """Write a value of a Parquet file as a CSV file would have it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, float) else str(value).strip()
