"""The report's page: every number and every quoted text is tied to its place in report.json."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fedaccord.errors import EvidenceError
from fedaccord.privacy import accounting

Row = dict[str, Any]
TEMPLATES = Path(__file__).resolve().parent / "templates"


class Html(str):
    """Text that is HTML already; jinja2 prints it as it is and escapes everything else."""

    __slots__ = ()

    def __html__(self) -> Html:
        return self


def fill(pattern: str, *values: object) -> Html:
    """Put values into HTML, escaped unless they are HTML themselves."""
    return Html(
        pattern.format(*(v if isinstance(v, Html) else html.escape(str(v)) for v in values))
    )


class Node:
    """A value of report.json that knows its JSON pointer and the record that it came from.

    A template reaches inside as it would with plain dicts and lists. A text prints as itself
    inside `<span data-ref="POINTER">`; a number prints only through one of the filters below.
    """

    __slots__ = ("_at", "_record", "_value")

    def __init__(self, value: Any, at: str = "", record: str = "") -> None:
        inside = value.get("record", record) if isinstance(value, dict) else record
        self._value, self._at, self._record = value, at, inside

    def __getitem__(self, key: str | int) -> Node:
        if isinstance(key, int):
            key = key % len(self._value)
        step = str(key).replace("~", "~0").replace("/", "~1")
        return Node(self._value[key], f"{self._at}/{step}", self._record)

    def __iter__(self) -> Iterator[Node]:
        return (self[place] for place in range(len(self._value)))

    def __len__(self) -> int:
        return len(self._value)

    def __bool__(self) -> bool:
        number = isinstance(self._value, int | float) and not isinstance(self._value, bool)
        return number or bool(self._value)  # 0 is a figure, and is there

    def __eq__(self, other: object) -> bool:
        return bool(self._value == (other._value if isinstance(other, Node) else other))

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        return str(self.__html__())

    def __html__(self) -> Html:
        """Print a text, tied to its place.

        Raises:
            EvidenceError: a number, which has to name how it is rounded.
        """
        if not isinstance(self._value, str):
            raise EvidenceError(f"report: {self._at} is no text. Give the template a filter.")
        return fill('<span data-ref="{}">{}</span>', self._at, self._value)


NOTHING = Html("&ndash;")


def _data(node: Node, shown: str, up: bool = False) -> Html:
    """Print a number as it is shown, with the whole number, its place and its record.

    Raises:
        EvidenceError: a number that names no record.
    """
    if not node._record:
        raise EvidenceError(f"report: {node._at} names no record.")
    full = node._value if isinstance(node._value, str) else json.dumps(node._value)
    rounded = Html(' data-rounded="up"' if up else "")
    pattern = '<data value="{}" data-ref="{}" data-record="{}" title="from record {}"{}>{}</data>'
    return fill(pattern, full, node._at, node._record, node._record, rounded, shown)


def fixed(node: Node, digits: int = 3) -> Html:
    """Show a number with so many decimals; a dash where there is none."""
    return NOTHING if node._value is None else _data(node, f"{node._value:.{digits}f}")


def whole(node: Node) -> Html:
    """Show a whole number, thousands apart; a dash where there is none."""
    return NOTHING if node._value is None else _data(node, f"{node._value:,d}")


def short(node: Node) -> Html:
    """Show a number in its shortest exact form; a dash where there is none."""
    return NOTHING if node._value is None else _data(node, f"{node._value:.12g}")


def epsilon(node: Node, digits: int = 2) -> Html:
    """Show an epsilon, or another bound, rounded up, or "infinite"; a dash where there is none."""
    value = node._value
    if value is None:
        return NOTHING
    shown = value if isinstance(value, str) else accounting.show(value, digits)
    return _data(node, shown, up=True)


def anything(node: Node) -> Html:
    """Show a value of the accord: a text, a number, yes or no, or "not set"."""
    value = node._value
    if value is None or value == "":
        return Html("not set")
    if isinstance(value, bool):
        return Html("yes" if value else "no")
    return node.__html__() if isinstance(value, str) else short(node)


def figure(node: Node, digits: int = 2) -> Html:
    """Show a figure with its interval, or that it is not assessable and why."""
    if node["value"]._value is None:
        return fill('<span class="none">not assessable: {}</span>', node["reason"].__html__())
    parts = (fixed(node[key], digits) for key in ("value", "low", "high"))
    return fill('<span class="figure">{} <span class="interval">[{}, {}]</span></span>', *parts)


def code(node: Node, length: int = 0) -> Html:
    """Show a digest, or its first characters, tied to its place."""
    shown = node._value[:length] if length else node._value
    return fill('<code data-ref="{}" title="{}">{}</code>', node._at, node._value, shown)


FILTERS = {
    "fixed": fixed,
    "whole": whole,
    "short": short,
    "epsilon": epsilon,
    "anything": anything,
    "figure": figure,
    "code": code,
}


def render(content: Row, figures: dict[str, str]) -> str:
    """Render the page: one HTML file that asks for nothing from outside.

    Args:
        content: what `facts` returned.
        figures: SVG elements by name, as `figures.draw` returns them.
    """
    files = FileSystemLoader(TEMPLATES)
    environment = Environment(
        loader=files,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    pictures = {name: Html(svg) for name, svg in figures.items()}
    return environment.get_template("report.html").render(f=Node(content), figures=pictures)
