"""The report of a run over the link: its incidents, who signed for which model, its limits."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from linked_run import MODEL, OTHER, SITES, Row, Signers, rewrite, rounds_of, sealed_with

from fedaccord import accord as accords
from fedaccord.reports import carried, limits, trust
from fedaccord.reports.reading import read
from fedaccord.reports.report import write_report
from fedaccord.reports.verify import verify


@pytest.fixture
def run(linked: Path, tmp_path: Path) -> Path:
    return shutil.copytree(linked, tmp_path / linked.name)


def incident(site: str, what: str, count: int) -> Row:
    return {"site": site, "what": what, "count": count}


@pytest.fixture(scope="module")
def troubled(linked: Path, tmp_path_factory: pytest.TempPathFactory, signers: Signers) -> Path:
    """The run with incidents on the link, a silent site, and a site that was sent another model."""
    run = shutil.copytree(linked, tmp_path_factory.mktemp("troubled") / linked.name)

    def change(records: list[Row]) -> None:
        first, second = rounds_of(records)
        first["link"] = [
            incident("", "A caller with no certificate of this accord was refused.", 7),
            incident("va", "The connection broke and came back.", 2),
        ]
        second["link"] = [
            incident("hungary", "The connection broke and came back.", 1),
            incident("va", "The connection broke and came back.", 3),
        ]
        del first["envelopes"]["switzerland"]
        first["replies"]["switzerland"] = {"accepted": False, "reason": "no answer"}
        first["aggregated"].remove("switzerland")
        del first["weights"]["switzerland"]
        sealed_with("hungary", model=OTHER)(records, signers)

    rewrite(run, change)
    write_report(run)
    return run


def test_incidents_of_the_link_are_grouped_and_counted_and_name_their_records(
    troubled: Path,
) -> None:
    found = carried.incidents(read(troubled))
    assert found[0] == {
        "what": "A caller with no certificate of this accord was refused.",
        "sites": ["no site that is known"],
        "count": 7,
        "rounds": [{"round": 1, "count": 7, "record": "round-1"}],
        "record": "round-1",
    }
    assert found[1]["sites"] == ["hungary", "va"]
    assert (found[1]["count"], found[1]["record"]) == (6, "round-2")
    assert [(row["round"], row["count"]) for row in found[1]["rounds"]] == [(1, 2), (2, 4)]


def test_the_report_says_who_was_silent_about_which_model_and_who_signed_for_another(
    troubled: Path, linked: Path
) -> None:
    evidence = read(troubled)
    about = {"round": 1, "record": "round-1"}
    assert carried.silent(evidence) == [about | {"sites": ["switzerland"], "model": MODEL}]
    (row,) = carried.differing(evidence)
    others = [site for site in SITES if site != "hungary"]
    assert row["models"] == [
        {"model": MODEL, "sites": others},
        {"model": OTHER, "sites": ["hungary"]},
    ]
    whole = read(linked)
    assert carried.silent(whole) == carried.differing(whole) == carried.incidents(whole) == []


def records_in(value: Any) -> list[Row]:
    """Every object that names a record."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    mine = [value] if isinstance(value, dict) and "record" in value else []
    return [*mine, *(row for part in inner for row in records_in(part))]


def test_the_page_of_a_troubled_run_agrees_with_its_records_and_shows_them(troubled: Path) -> None:
    checks = {check.name: check.faults for check in verify(troubled)}
    assert checks["report.json"] == checks["report.html"] == []
    assert any("different global models" in fault for fault in checks["signed replies"])
    text = (troubled / "report.html").read_text(encoding="utf-8")
    content = json.loads((troubled / "report.json").read_text(encoding="utf-8"))
    about = [content["carried"]["link"], *content["incidents"]["link"]]
    assert {row["record"] for row in records_in(about)} <= read(troubled).ids
    for words in ("A caller with no certificate", "no site that is known", "different models",
                  "Silent sites, by round", "mutual TLS", "a new key since then for"):  # fmt: skip
        assert words in text


def test_a_whole_run_over_the_link_says_that_all_signed_for_one_model(run: Path) -> None:
    text = write_report(run).read_text(encoding="utf-8")
    assert "all of a round signed for the same one" in text
    assert "Silent sites" not in text
    assert [fault for check in verify(run) for fault in check.faults] == []
    about = carried.carried(read(run))["link"]
    assert about["pinned"]["sites"] == about["sites"]["count"] == len(SITES)
    assert (about["signed"]["replies"], about["rotated"]) == (2 * len(SITES), ["va"])


@pytest.mark.parametrize(
    ("privacy", "here"),
    [
        ({"enabled": True, "target_epsilon": 3.0}, ["link"]),
        ({"enabled": True, "unit": "client", "clipping_norm": 1.0}, ["client"]),
        ({}, ["plain"]),
    ],
)
def test_what_the_link_does_not_change_stays_on_the_report(
    linked: Path, privacy: Row, here: list[str]
) -> None:
    evidence = read(linked)
    said = evidence.accord.model_dump()
    said["privacy"] |= privacy
    evidence = dataclasses.replace(evidence, accord=accords.parse(said))
    marked = [row.key for row, out in zip(trust.MODES, trust.table(evidence), strict=True)
              if out["here"]]  # fmt: skip
    assert marked == here
    lines = " ".join(limits.not_protected(evidence, limits.releases(evidence)))
    for words in ("its administrator can change it", "listed as silence", "draws the sites",
                  "with the key that the accord pins", "how much it sends"):  # fmt: skip
        assert words in lines
    assert "Which key is whose was not" not in lines
    assert ("sees every site's update" in lines) == (here == ["client"])
