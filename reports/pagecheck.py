"""Checking a written report: report.json against the evidence, report.html against that."""

from __future__ import annotations

import json
import re
from decimal import Decimal, InvalidOperation
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from fedaccord.reports.checks import Check, show
from fedaccord.reports.facts import HTML, JSON, facts, to_json

SILENT = {"style", "svg", "script"}  # their text is drawn or not shown, and carries no figure
VOID = {"meta", "br", "link", "img", "hr", "input"}


class Number(str):
    """A JSON number as it is written, so that a changed last digit shows."""


def as_written(text: str) -> Any:
    """Read JSON with its numbers as they are written."""
    return json.loads(text, parse_float=Number, parse_int=Number)


def check_json(check: Check, run: Path) -> None:
    """Build the report's content again and compare it with report.json, leaf by leaf."""
    said = as_written((run / JSON).read_text(encoding="utf-8"))
    right = as_written(to_json(facts(run)))
    check.equal(f"{JSON}: ", said, right, "the evidence gives")


class Page(HTMLParser):
    """A page's tied numbers and texts, and the digits that are tied to nothing.

    Attributes:
        tied: (tag, attributes, text) of every element with `data-ref`.
        loose: texts with a digit outside such elements, pictures and styles.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tied: list[tuple[str, dict[str, str], str]] = []
        self.loose: list[str] = []
        self._open: list[tuple[str, dict[str, str]]] = []
        self._text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open an element."""
        if tag in VOID:
            return
        self._open.append((tag, {key: value or "" for key, value in attrs}))
        if "data-ref" in self._open[-1][1]:
            self._text = ""

    def handle_endtag(self, tag: str) -> None:
        """Close an element, with those inside it that were left open."""
        while self._open:
            name, attributes = self._open.pop()
            if "data-ref" in attributes:
                self.tied.append((name, attributes, self._text))
            if name == tag:
                return

    def handle_data(self, data: str) -> None:
        """Take text."""
        if any(tag in SILENT for tag, _ in self._open):
            return
        if any("data-ref" in attributes for _, attributes in self._open):
            self._text += data
        elif re.search(r"\d", data):
            self.loose.append(data.strip())


def resolve(content: Any, pointer: str) -> tuple[Any, str]:
    """Follow a JSON pointer; return the value and the record of the nearest object around it.

    Raises:
        LookupError: a pointer that leads nowhere.
    """
    record = ""
    for step in pointer.split("/")[1:]:
        if isinstance(content, dict):
            record = content.get("record", record)
            content = content[step.replace("~1", "/").replace("~0", "~")]
        elif isinstance(content, list) and step.isdigit():
            content = content[int(step)]
        else:
            raise LookupError(pointer)
    if isinstance(content, dict):
        record = content.get("record", record)
    return content, str(record)


def rounds_to(full: str, shown: str, up: bool) -> bool:
    """Say whether a shown number is a rounding of the full one (upwards where it has to be)."""
    if full == "infinite":
        return shown == full
    try:
        number, exact = Decimal(shown.replace(",", "")), Decimal(full)
    except InvalidOperation:
        return False
    exponent = number.as_tuple().exponent
    if not isinstance(exponent, int):
        return False
    step = Decimal(1).scaleb(exponent)
    # The half step has room for binary numbers that lie a hair from a decimal half.
    return 0 <= number - exact < step if up else abs(number - exact) <= step * Decimal("0.500001")


def check_html(check: Check, run: Path) -> None:
    """Compare every number and quoted text of report.html with report.json."""
    content = as_written((run / JSON).read_text(encoding="utf-8"))
    page = Page((run / HTML).read_text(encoding="utf-8"))
    for tag, attributes, text in page.tied:
        pointer = attributes["data-ref"]
        try:
            right, record = resolve(content, pointer)
        except LookupError:
            check.holds(False, f"{HTML}: {show(text)} refers to {pointer}, which is not in {JSON}")
            continue
        if tag == "data":
            full, said = attributes.get("value", ""), attributes.get("data-record", "")
            check.equal(f"{HTML}: value of {pointer}", full, str(right), f"{JSON} has")
            check.equal(f"{HTML}: record of {pointer}", said, record, f"{JSON} has")
            wrong = f"{HTML}: {pointer} is shown as {show(text)}, {JSON} has {right}"
            check.holds(rounds_to(str(right), text, attributes.get("data-rounded") == "up"), wrong)
        elif tag == "code":
            wrong = f"{HTML}: {pointer} is shown as {show(text)}, {JSON} has {show(right)}"
            check.holds(bool(text) and str(right).startswith(text), wrong)
        else:
            check.equal(f"{HTML}: text of {pointer}", text, right, f"{JSON} has")
    for text in page.loose:
        check.holds(False, f"{HTML}: {show(text)} holds a number that is tied to no record")
    quoted = {attributes["data-ref"] for _, attributes, _ in page.tied}
    for key in ("stamps", "not_protected"):
        for place, line in enumerate(content[key]):
            missing = f"{HTML}: /{key}/{place} is missing from the page: {show(line)}"
            check.holds(f"/{key}/{place}" in quoted, missing)
