"""The task `heart`: 920 real patients, read by declared bounds alone, and a proxy set of nobody."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedaccord.errors import TaskError
from fedaccord.simulations import heart
from fedaccord.tasks import Records, load_task

TASK = load_task("heart")
SITES = ("cleveland", "hungary", "switzerland", "va")
FILE = json.loads(heart.FILE.read_text(encoding="utf-8"))
PATIENTS = [dict(zip(FILE["columns"], row, strict=True)) for row in FILE["rows"]]
INPUTS = np.concatenate(
    [part.inputs for s in SITES for part in (TASK.site(s).train, TASK.site(s).test)]
)
VA_INPUTS = TASK.site("va").train.inputs
PROXY = TASK.public(2048, 0)


# --- the records --------------------------------------------------------------------------------


def test_the_four_hospitals_have_303_294_123_and_200_patients() -> None:
    # UCI gives 303, 294, 123 and 200; common copies have 304 and 293, with row 304 mislabelled.
    assert Counter(p["site"] for p in PATIENTS) == dict(
        zip(SITES, (303, 294, 123, 200), strict=True)
    )
    sizes = {s: (len(TASK.site(s).train), len(TASK.site(s).test)) for s in SITES}
    assert sizes == {
        "cleveland": (202, 101),
        "hungary": (196, 98),
        "switzerland": (82, 41),
        "va": (134, 66),
    }


def test_the_patient_with_id_304_is_hungarian() -> None:
    (patient,) = [p for p in PATIENTS if p["id"] == 304]
    assert patient["site"] == "hungary"
    assert 304 in {*TASK.site("hungary").train.subjects, *TASK.site("hungary").test.subjects}
    assert 304 not in {
        *TASK.site("cleveland").train.subjects,
        *TASK.site("cleveland").test.subjects,
    }


def test_every_patient_is_one_subject_of_one_site() -> None:
    ids = [
        i for s in SITES for part in (TASK.site(s).train, TASK.site(s).test) for i in part.subjects
    ]
    assert sorted(ids) == sorted(p["id"] for p in PATIENTS)
    assert len(set(ids)) == 920


def test_counts_by_sex_and_label_are_those_of_the_file() -> None:
    # Read with a regular expression, not with the code that is tested (oracle).
    text = heart.FILE.read_text(encoding="utf-8")
    rows = re.findall(r'\[(\d+),"(\w+)",\d+,"(male|female)",.*?(\d)\]', text)
    assert len(rows) == 920
    expected = Counter((site, sex, int(num) > 0) for _, site, sex, num in rows)
    found: Counter[tuple[str, str, bool]] = Counter()
    for site in SITES:
        for part in (TASK.site(site).train, TASK.site(site).test):
            for sex, label in zip(part.groups["sex"], part.labels, strict=True):
                found[site, heart.GROUPS[sex], bool(label)] += 1
    assert found == expected


def test_509_of_920_have_the_disease() -> None:
    # Reference: 411 healthy in the four databases together (num = 0 at UCI: 164, 188, 8, 51).
    healthy = Counter(p["site"] for p in PATIENTS if p["num"] == 0)
    assert healthy == dict(zip(SITES, (164, 188, 8, 51), strict=True))
    labels = np.concatenate(
        [part.labels for s in SITES for part in (TASK.site(s).train, TASK.site(s).test)]
    )
    assert (len(labels), int(labels.sum())) == (920, 509)


def test_the_file_names_its_licence_and_the_four_principal_investigators() -> None:
    for text in (json.dumps(FILE), TASK.spec.source):
        assert "CC BY 4.0" in text
        for name in ("Janosi", "Steinbrunn", "Pfisterer", "Detrano"):
            assert name in text
    assert "10.24432/C52P4X" in FILE["source"]
    assert re.fullmatch(r"[0-9a-f]{64}", FILE["source_sha256"])


@pytest.mark.parametrize("edit", [("63,", "64,"), ('"male"', '"female"'), ("\n", "\n ")])
def test_an_edited_file_of_records_is_refused(edit: tuple[str, str], tmp_path: Path) -> None:
    # A copy of the two files that matter, so that nothing in this process is changed.
    shutil.copy(heart.__file__, tmp_path / "heart.py")
    text = heart.FILE.read_text(encoding="utf-8")
    (tmp_path / "heart.json").write_text(text.replace(*edit, 1), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", "import heart; heart.Heart().site('va')"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("fedaccord.errors.TaskError: heart: ") and last.endswith(
        "Restore it from the package."
    )


def test_an_unknown_site_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(TaskError, match=r'site "zurich" is not one of cleveland, hungary, swi'):
        TASK.site("zurich")


# --- the split ----------------------------------------------------------------------------------

SPLIT = {  # SHA-256 of the ids in order, as "1,2,3": train, test
    "cleveland": (
        "34960f154e70e08c06fc49f9717c06907b7b64973a30917cf874818c2a032174",
        "5c07b4d04f74e696e21b0643bfa2e58fb0d9f8f4b598c4191271671a148c0dc5",
    ),
    "hungary": (
        "71e487cb515bdec21a8cf2b9fff76875c032f3e93c549ce3d476f001429bc993",
        "0f93cc18636ea97a2dd61f270d405c8813b87cd6271c29df0cee64583fde2b0d",
    ),
    "switzerland": (
        "1a9e40e783fcc408988093b5e4ed0f062f0600fcd58d92142a551ce2e9ba59b1",
        "3857636e9914258506c9cda37e184edeccce055dd23096b47fa325e0f23eabae",
    ),
    "va": (
        "7aee6b5b587acd40277f6080fd03f0a2682a8693b0aeb48d43dbae8240b47648",
        "9e009a38424fc3e17f40db9dfc7d81fcac6cceb50e7f48e10c6684dac3043892",
    ),
}


def ids_hash(part: Records) -> str:
    return hashlib.sha256(",".join(map(str, part.subjects)).encode()).hexdigest()


@pytest.mark.parametrize("site", SITES)
def test_the_split_is_fixed(site: str) -> None:
    data = TASK.site(site)
    assert (ids_hash(data.train), ids_hash(data.test)) == SPLIT[site]


@pytest.mark.parametrize("site", SITES)
def test_nobody_is_both_in_training_and_in_evaluation(site: str) -> None:
    data = TASK.site(site)
    assert set(data.train.subjects).isdisjoint(data.test.subjects)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the task looks for its records in this test; there is no file yet."""
    path = tmp_path / "heart.json"
    heart._rows.cache_clear()
    monkeypatch.setattr(heart, "FILE", path)
    yield path
    heart._rows.cache_clear()


def test_the_split_depends_on_ids_alone(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The same ids at the same sites, everybody with another's findings, rows in another order.
    rows = [
        [*mine[:2], *other[2:]]
        for mine, other in zip(FILE["rows"], FILE["rows"][::-1], strict=True)
    ]
    text = json.dumps(FILE | {"rows": rows[::-1]})
    elsewhere.write_text(text, encoding="utf-8")
    monkeypatch.setattr(heart, "SHA256", hashlib.sha256(text.encode()).hexdigest())
    for site, (train, test) in SPLIT.items():
        data = TASK.site(site)
        assert (ids_hash(data.train), ids_hash(data.test)) == (train, test)
    assert not np.array_equal(TASK.site("va").train.inputs, VA_INPUTS)


# --- pre-processing -----------------------------------------------------------------------------


def test_every_input_of_every_patient_is_within_minus_one_and_one() -> None:
    assert INPUTS.dtype == np.float32
    assert INPUTS.shape == (920, len(TASK.spec.features))
    assert np.isfinite(INPUTS).all()
    assert np.abs(INPUTS).max() <= 1


def patients() -> st.SearchStrategy[dict[str, Any]]:
    """Rows that a ward could write, and some that none could."""
    number = st.none() | st.integers(-(10**6), 10**6) | st.floats(-1e300, 1e300)
    row = {name: number for name in heart.NUMERIC if name != "age"}
    row |= {
        name: (
            st.sampled_from(values)
            if name in heart.COMPLETE
            else st.none() | st.sampled_from(values)
        )
        for name, values in heart.CATEGORICAL.items()
    }
    return st.fixed_dictionaries(row | {"age": st.floats(-1e300, 1e300)})


@given(patients())
def test_whatever_is_measured_becomes_inputs_within_minus_one_and_one(row: dict[str, Any]) -> None:
    inputs = heart.encode(row)
    assert len(inputs) == len(heart.COLUMNS)
    assert all(math.isfinite(x) and -1 <= x <= 1 for x in inputs)


@given(st.lists(st.integers(0, 919), min_size=1, max_size=8, unique=True))
@settings(max_examples=30)
def test_a_patient_is_encoded_the_same_whoever_else_is_there(places: list[int]) -> None:
    together = heart._records([PATIENTS[place] for place in places])
    for row, place in enumerate(places):
        alone = heart._records([PATIENTS[place]])
        assert (together.inputs[row] == alone.inputs[0]).all()
        assert (together.labels[row], together.subjects[row]) == (
            alone.labels[0],
            alone.subjects[0],
        )


@pytest.mark.parametrize("name", ["chol", "trestbps"])
def test_a_zero_cholesterol_or_blood_pressure_is_missing(name: str) -> None:
    value, missing = heart.COLUMNS.index(name), heart.COLUMNS.index(f"{name}:missing")
    base = PATIENTS[0]
    for absent in (0, None):
        inputs = heart.encode({**base, name: absent})
        assert (inputs[value], inputs[missing]) == (0.0, 1.0)
    assert heart.encode(base)[missing] == 0.0
    zeros = sum(p[name] in (0, None) for p in PATIENTS)
    assert zeros == {"chol": 202, "trestbps": 60}[name]  # counted at UCI: 172 + 30, 1 + 59
    assert int(INPUTS[:, missing].sum()) == zeros


def test_a_zero_is_a_measurement_where_the_source_does_not_say_missing() -> None:
    base = PATIENTS[0]
    for name in ("oldpeak", "ca", "fbs", "exang"):
        missing = heart.COLUMNS.index(f"{name}:missing")
        assert heart.encode({**base, name: 0})[missing] == 0.0
        assert heart.encode({**base, name: None})[missing] == 1.0


@pytest.mark.parametrize(
    ("name", "value", "scaled"),
    [  # 2 (value - low) / (high - low) - 1, worked out by hand from the declared bounds
        ("age", 20, -1.0),
        ("age", 55, 0.0),
        ("age", 200, 1.0),
        ("chol", 300, 0.0),
        ("chol", 603, 1.0),
        ("trestbps", 45, -1.0),
        ("thalach", 180, 0.5),
        ("oldpeak", -3, -1.0),
        ("oldpeak", 1.5, 0.0),
        ("ca", 3, 1.0),
    ],
)
def test_a_number_is_scaled_by_its_declared_bounds(name: str, value: float, scaled: float) -> None:
    inputs = heart.encode({**PATIENTS[0], name: value})
    assert inputs[heart.COLUMNS.index(name)] == pytest.approx(scaled, abs=1e-12)


def test_an_undeclared_category_is_refused() -> None:
    with pytest.raises(TaskError, match=r'heart\.thal = "unknown" is not one of'):
        heart.encode({**PATIENTS[0], "thal": "unknown"})


def test_the_sensitive_attribute_and_the_input_name_the_same_sex() -> None:
    female = heart.COLUMNS.index("sex=female")
    data = TASK.site("hungary").train
    assert ((data.inputs[:, female] == 1) == (data.groups["sex"] == 0)).all()


# --- the proxy set ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_no_patient_is_in_the_proxy_set(seed: int) -> None:
    proxy = TASK.public(2048, seed)
    private = {row.tobytes() for row in INPUTS}
    assert private.isdisjoint(row.tobytes() for row in proxy)
    # Nor anybody like one: the nearest pair is further apart than float32 could blur.
    nearest = min(float(np.abs(INPUTS - row).max(axis=1).min()) for row in proxy)
    assert nearest > 1e-4


def test_the_proxy_set_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    assert (TASK.public(64, 3) == TASK.public(64, 3)).all()
    assert (TASK.public(64, 3) != TASK.public(64, 4)).any()
    assert (TASK.public(64, 3) == TASK.public(128, 3)[:64]).all()


def test_the_proxy_set_is_drawn_without_reading_a_record(elsewhere: Path) -> None:
    assert (load_task("heart").public(2048, 0) == PROXY).all()
    with pytest.raises(FileNotFoundError):
        TASK.site("va")


@pytest.mark.parametrize("rows", [0, 1, 1000])
def test_the_proxy_set_has_the_form_of_the_inputs(rows: int) -> None:
    proxy = TASK.public(rows, 0)
    assert proxy.shape == (rows, len(TASK.spec.features))
    assert proxy.dtype == np.float32
    assert rows == 0 or np.abs(proxy).max() <= 1
