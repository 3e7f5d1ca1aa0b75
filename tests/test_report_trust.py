"""The trust table: the same in docs and report, and the run's own mode is marked."""

from __future__ import annotations

import dataclasses
import html
from pathlib import Path

import pytest

from fedaccord import accord as accords
from fedaccord.reports import trust
from fedaccord.reports.facts import facts
from fedaccord.reports.page import render
from fedaccord.reports.reading import Evidence, read

ROOT = Path(__file__).resolve().parent.parent


def test_the_documentation_has_the_table_of_the_code() -> None:
    assert trust.markdown() in (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")


def changed(evidence: Evidence, engine: str, **privacy: object) -> Evidence:
    said = evidence.accord.model_dump()
    said["privacy"] |= privacy
    start = evidence.start | {"engine": engine}
    return dataclasses.replace(evidence, accord=accords.parse(said), records=[start])


@pytest.mark.parametrize(
    ("engine", "privacy", "here"),
    [
        ("InProcessGrid", {}, ["simulated"]),
        ("GrpcGrid", {}, ["stock"]),
        ("LinkGrid", {}, ["link"]),
        ("LinkGrid", {"enabled": False}, ["plain"]),
        ("GrpcGrid", {"enabled": False}, ["plain"]),
        ("InProcessGrid", {"enabled": False}, ["simulated", "plain"]),
        ("GrpcGrid", {"unit": "client", "clipping_norm": 1.0}, ["client"]),
        ("InProcessGrid", {"unit": "client", "clipping_norm": 1.0}, ["simulated", "client"]),
    ],
)
def test_the_modes_of_a_run_are_marked(
    engine: str, privacy: dict[str, object], here: list[str], heart_run: Path
) -> None:
    rows = trust.table(changed(read(heart_run), engine, **privacy))
    marked = [row.key for row, said in zip(trust.MODES, rows, strict=True) if said["here"]]
    assert marked == here


def test_the_page_shows_every_mode_and_says_which_is_the_runs(heart_run: Path) -> None:
    text = html.unescape(render(facts(heart_run), {}))
    for row in trust.MODES:
        for cell in (row.name, row.curious, row.malicious, row.colluding, row.others):
            assert cell in text
    assert text.count("(this run)") == 1
