"""One's own table: declared bounds alone make inputs, and a bad row removes only itself."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedaccord import accord as accords
from fedaccord.accord import Accord
from fedaccord.errors import AccordError, TaskError
from fedaccord.tasks import Records, SiteData, task_of

TASK: dict[str, Any] = {
    "kind": "table",
    "dataset": "wards",
    "file": "wards.csv",
    "site_column": "ward",
    "subject": "patient",
    "label": {"column": "again", "classes": ["no", "yes"]},
    "attributes": {"sex": ["female", "male"]},
    "inputs": {"age": {"min": 18, "max": 110}, "smoker": {"values": ["no", "yes"]}},
}
HEADER = "patient,ward,age,smoker,sex,again"


def accord(task: dict[str, Any] | None = None, **change: Any) -> Accord:
    return accords.parse(
        {
            "name": "ours",
            "purpose": "Test.",
            "task": {k: v for k, v in ((task or TASK) | change).items() if v is not None},
            "sites": [{"name": "north", "subjects": 10}, {"name": "south", "subjects": 10}],
            "model": {"name": "mlp"},
            "rounds": {"rounds": 1},
            "training": {"steps": 1, "learning_rate": 0.1},
            "privacy": {"noise_multiplier": 1.0, "sampling_prob": 0.5},
            "fairness": {"attributes": ["sex"]},
        }
    )


def good(n: int = 40) -> list[str]:
    """Rows of a CSV file, alternately of two sites."""
    return [
        f"p{i},{'North' if i % 2 else 'south'},{18 + i},{['no', 'yes', ''][i % 3]},"
        f"{['female', 'male'][i // 2 % 2]},{['no', 'yes'][i // 3 % 2]}"
        for i in range(n)
    ]


def write(folder: Path, lines: list[str | bytes], name: str = "wards.csv") -> Path:
    raw = [line if isinstance(line, bytes) else line.encode() for line in [HEADER, *lines]]
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"\n".join(raw) + b"\n")
    return folder


def site(folder: Path, name: str = "north", **change: Any) -> SiteData:
    return task_of(accord(**change), folder).site(name)


def same(one: SiteData, other: SiteData) -> bool:
    return all(
        np.array_equal(getattr(a, what), getattr(b, what))
        for a, b in ((one.train, other.train), (one.test, other.test))
        for what in ("inputs", "labels", "subjects")
    ) and all(
        np.array_equal(a.groups[name], b.groups[name])
        for a, b in ((one.train, other.train), (one.test, other.test))
        for name in a.groups
    )


def both(data: SiteData) -> Records:
    """All records of a site, training ones first."""
    one, other = data.train, data.test
    return replace(
        one,
        inputs=np.concatenate([one.inputs, other.inputs]),
        labels=np.concatenate([one.labels, other.labels]),
        subjects=np.concatenate([one.subjects, other.subjects]),
    )


# --- what a row becomes -------------------------------------------------------------------------

bounds = st.tuples(st.integers(-1000, 1000), st.integers(1, 5000)).map(lambda b: (b[0], sum(b)))
words = st.text("abcdefgh 0123456789é,;\"'", min_size=1, max_size=6).map(str.strip).filter(bool)


@st.composite
def tables(draw: st.DrawFn) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Declared inputs, and rows that keep to them."""
    inputs: dict[str, Any] = {}
    for at in range(draw(st.integers(1, 4))):
        missing = draw(st.booleans())
        if draw(st.booleans()):
            low, high = draw(bounds)
            inputs[f"x{at}"] = {"min": low, "max": high, "missing": missing}
        else:
            values = draw(st.lists(words, min_size=1, max_size=4, unique=True))
            inputs[f"x{at}"] = {"values": values, "missing": missing}
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        row: dict[str, Any] = {}
        for name, it in inputs.items():
            if it["missing"] and draw(st.booleans()):
                row[name] = None
            elif "values" in it:
                row[name] = draw(st.sampled_from(it["values"]))
            else:
                row[name] = draw(st.floats(it["min"], it["max"]))
        rows.append(row)
    return inputs, rows


@pytest.mark.parametrize("form", ["csv", "parquet"])
@settings(deadline=None, max_examples=30)
@given(table=tables())
def test_any_declared_table_can_be_read_back_from_its_inputs(
    form: str,
    table: tuple[dict[str, Any], list[dict[str, Any]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    tmp_path = tmp_path_factory.mktemp("own")  # a folder of its own for each example
    inputs, rows = table
    columns = {name: [row[name] for row in rows] for name in inputs}
    frame = pd.DataFrame(columns | {"id": range(len(rows)), "sex": "male", "again": "no"})
    if form == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(frame.columns)
        names = list(columns)
        for at, row in enumerate(rows):
            cells = [repr(v) if isinstance(v, float) else v for v in map(row.get, names)]
            writer.writerow([*cells, at, "male", "no"])
        (tmp_path / "north.csv").write_text(text.getvalue(), encoding="utf-8")
    else:
        frame.to_parquet(tmp_path / "north.parquet")
    agreed = accord(file="{site}." + form, site_column=None, subject="id", inputs=inputs)
    task = task_of(agreed, tmp_path)
    data = task.site("north")
    found = both(data)
    assert len(found) == len(rows)
    assert np.abs(found.inputs).max() <= 1
    ids = {int(s): at for at, s in enumerate(identities(len(rows)))}
    place = {name: at for at, name in enumerate(task.spec.features)}
    for inputs_of, subject in zip(found.inputs, found.subjects, strict=True):
        row = rows[ids[int(subject)]]
        for name, it in inputs.items():
            if it["missing"]:
                assert inputs_of[place[f"{name}:missing"]] == (row[name] is None)
            if "values" in it:
                held = [value for value in it["values"] if inputs_of[place[f"{name}={value}"]]]
                assert held == ([] if row[name] is None else [row[name]])
            elif row[name] is not None:
                back = (float(inputs_of[place[name]]) + 1) / 2 * (it["max"] - it["min"]) + it["min"]
                assert back == pytest.approx(row[name], abs=1e-6 * (it["max"] - it["min"]))


def identities(count: int) -> list[int]:
    """The subjects' numbers as the docs define them: 63 bits of a SHA-256."""
    names = [f"wards/subject/{at}".encode() for at in range(count)]
    return [int.from_bytes(hashlib.sha256(name).digest()[:8]) >> 1 for name in names]


def test_a_logarithmic_column_is_scaled_by_its_logarithm(tmp_path: Path) -> None:
    inputs = {"age": {"min": 1, "max": 10_000, "log": True, "missing": False}}
    rows = [f"p{i},north,{10**i},no,male,no" for i in range(5)]
    found = both(site(write(tmp_path, rows), inputs=inputs))
    assert sorted(found.inputs[:, 0]) == pytest.approx([-1, -0.5, 0, 0.5, 1])


def test_a_number_out_of_bounds_leaves_its_record_out_unless_it_is_clipped(tmp_path: Path) -> None:
    write(tmp_path, ["p1,north,17.9,no,male,no", "p2,north,1e999,no,male,no", *good(4)])
    assert len(both(site(tmp_path))) == 2
    clipped = both(site(tmp_path, outside="clip"))
    assert len(clipped) == 4
    place = list(task_of(accord(), tmp_path).spec.features).index("age")
    assert {-1.0, 1.0} <= set(clipped.inputs[:, place].tolist())


def test_a_whole_number_that_pandas_wrote_as_a_decimal_is_the_declared_value(
    tmp_path: Path,
) -> None:
    inputs = {"age": {"min": 18, "max": 110}, "smoker": {"values": [0, 1]}}
    frame = pd.DataFrame(
        {"patient": range(3), "ward": "north", "age": 40, "smoker": [0, 1, None]}
        | {"sex": "male", "again": "no"}
    )
    frame.to_csv(tmp_path / "wards.csv", index=False)
    assert "1.0" in (tmp_path / "wards.csv").read_text()
    from_csv = site(tmp_path, inputs=inputs)
    frame.to_parquet(tmp_path / "wards.parquet")
    assert len(both(from_csv)) == 3
    assert same(from_csv, site(tmp_path, inputs=inputs, file="wards.parquet"))


def test_label_and_groups_can_be_bands_other_values_and_a_group_of_the_unknown(
    tmp_path: Path,
) -> None:
    task = TASK | {
        "label": {"column": "again", "classes": ["none", "some"], "bands": [1]},
        "attributes": {
            "sex": {"values": ["f", "m"], "groups": ["female", "male"], "missing": "unknown"},
            "age group": {"column": "age", "bands": [40, 60.5]},
        },
    }
    cells = [("40", "f", "0"), ("60.5", "", "1"), ("39.9", "m", "7")]
    rows = [f"p{i},north,{age},no,{sex},{again}" for i, (age, sex, again) in enumerate(cells)]
    loaded = task_of(accord(task), write(tmp_path, rows))
    assert loaded.spec.attributes == {
        "sex": ("female", "male", "unknown"),
        "age group": ("below 40", "40 to below 60.5", "60.5 and above"),
    }
    data = loaded.site("north")
    found = {
        int(s): (int(label), int(sex), int(age))
        for half in (data.train, data.test)
        for s, label, sex, age in zip(
            half.subjects, half.labels, half.groups["sex"], half.groups["age group"], strict=True
        )
    }
    names = [f"wards/subject/p{i}".encode() for i in range(3)]
    ids = [int.from_bytes(hashlib.sha256(name).digest()[:8]) >> 1 for name in names]
    assert [found[i] for i in ids] == [(0, 0, 1), (1, 2, 2), (1, 1, 0)]


def test_inputs_stand_in_order_of_name_since_the_digest_does_not_see_another() -> None:
    turned = dict(reversed(list(TASK["inputs"].items())))
    assert list(turned) != list(TASK["inputs"])
    assert accord(inputs=turned).digest == accord().digest
    one, other = (task_of(accord(inputs=i), Path()) for i in (turned, TASK["inputs"]))
    assert one.spec.features == other.spec.features
    assert one.spec.features == ("age", "age:missing", "smoker=no", "smoker=yes", "smoker:missing")


# --- a bad row removes only itself --------------------------------------------------------------

ANONYMOUS = ",north,40,no,female,yes"
BAD: list[str | bytes] = [
    "p90,north,40,no,female",
    "p90,north,40,no,female,yes,more",
    'p90,north,40,"no,female,yes',
    'p90,north,40,"no"x,female,yes',
    'p90,north,40,n"o,female,yes',
    'p90,north,40,no\r,"fe\rmale",yes',
    b"p90,north,40,no,f\xffmale,yes",
    ANONYMOUS,
    "p90,,40,no,female,yes",
    "p90,nowhere,40,no,female,yes",
    "p90,north,400,no,female,yes",
    "p90,north,nan5,no,female,yes",
    "p90,north,inf,no,female,yes",
    "p90,north,1_0,no,female,yes",
    "p90,north,40,maybe,female,yes",
    "p90,north,40,no,other,yes",
    "p90,north,40,no,,yes",
    "p90,north,40,no,female,NaN",
    "p90,north,40,no,female,perhaps",
    b"\x00\x00",
]


@settings(deadline=None, max_examples=40)
@given(
    bad=st.lists(st.tuples(st.integers(0, 40), st.sampled_from(BAD)), min_size=1, max_size=8),
    subject=st.sampled_from(["patient", None]),
)
def test_a_table_with_bad_rows_gives_the_records_of_the_table_without_them(
    bad: list[tuple[int, str | bytes]],
    subject: str | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    tmp_path = tmp_path_factory.mktemp("own")  # a folder of its own for each example
    if subject is None:  # then a row without one is no fault
        bad = [(at, line) for at, line in bad if line != ANONYMOUS]
    lines: list[str | bytes] = [*good()]
    for at, line in sorted(bad, key=lambda b: -b[0]):
        lines.insert(at, line)
    whole = site(write(tmp_path, [*good()]), subject=subject)
    assert len(whole.train) > 5 < len(whole.train) + len(whole.test)
    assert same(site(write(tmp_path / "other", lines), subject=subject), whole)


@pytest.mark.parametrize("subject", ["patient", None])
def test_one_subject_more_or_less_moves_no_other_between_the_splits(
    subject: str | None, tmp_path: Path
) -> None:
    lines = good(60)
    lines += lines[10:13] if subject is None else []  # equal rows are subjects of their own
    whole = site(write(tmp_path, [*lines]), subject=subject)
    train, test = set(whole.train.subjects.tolist()), set(whole.test.subjects.tolist())
    assert len(test) > 3
    for gone in range(0, len(lines), 2):
        less = write(tmp_path / str(gone), [*lines[:gone], *lines[gone + 1 :]])
        assert same(site(less, subject=subject), whole)  # the row was of the other site
    for gone in range(1, len(lines), 2):
        less = write(tmp_path / str(gone), [*lines[:gone], *lines[gone + 1 :]])
        rest = site(less, subject=subject)
        found, held = set(rest.train.subjects.tolist()), set(rest.test.subjects.tolist())
        assert found <= train and held <= test
        assert len(found) + len(held) == len(train) + len(test) - 1


@given(share=st.floats(0.05, 0.95))
@settings(deadline=None, max_examples=10)
def test_about_the_declared_share_of_subjects_is_held_out(
    share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tmp_path = tmp_path_factory.mktemp("own")  # a folder of its own for each example
    lines = [f"p{i % 3000},north,40,no,male,no" for i in range(4000)]
    data = site(write(tmp_path, [*lines]), test_share=share)
    held = len(set(data.test.subjects.tolist()))
    assert not set(data.test.subjects.tolist()) & set(data.train.subjects.tolist())
    # 3,000 subjects, each by a hash of its own: six standard deviations
    assert abs(held - 3000 * share) < 6 * math.sqrt(3000 * share * (1 - share)) + 1


def test_a_subject_in_both_splits_is_trained_on_and_not_evaluated(tmp_path: Path) -> None:
    header = HEADER + ",split"
    rows = ["p1,north,40,no,male,no,train", "p1,north,41,no,male,no,test"]
    rows += ["p2,north,40,no,male,no,Test", "p3,north,40,no,male,no,later"]
    (tmp_path / "wards.csv").write_text("\n".join([header, *rows]) + "\n")
    task = task_of(accord(split="split"), tmp_path)
    data = task.site("north")
    assert (len(data.train), len(data.test)) == (1, 1)
    assert [str(fault) for fault in task.load("north").found] == [  # type: ignore[attr-defined]
        'wards.csv: row 3, column "split": is of a subject that is also trained on',
        'wards.csv: row 5, column "split": "later" is neither "train" nor "test"',
    ]


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    assert len(both(site(write(tmp_path, [*good(10)])))) == 5
    assert len(both(site(write(tmp_path, [*good(20)])))) == 10


# --- where a file lies --------------------------------------------------------------------------


def test_a_site_reads_its_own_folder_of_the_data_set_and_no_other(tmp_path: Path) -> None:
    own = tmp_path / "data"
    (own / "wards").mkdir(parents=True)
    write(tmp_path, [*good(8)])
    write(own / "wards", [*good(20)])
    assert len(both(task_of(accord(), tmp_path).site("north"))) == 4
    assert len(both(task_of(accord(), tmp_path, own).site("north"))) == 10
    with pytest.raises(TaskError, match=r"labs/wards\.csv: No such file.*task\.file"):
        task_of(accord(dataset="labs"), tmp_path, own).site("north")


@pytest.mark.parametrize(
    "path",
    ["/etc/wards.csv", "../wards.csv", "a/../../w.csv", "C:/w.csv", "a\\..\\w.csv", "~/../x.csv"],
)
def test_an_accord_cannot_name_a_file_outside_the_folder_of_the_data(path: str) -> None:
    with pytest.raises(AccordError, match=r"must lead down from the folder of the data"):
        accord(file=path)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["a,b", "1,2"], r'wards\.csv: has no column "age"\. Its columns: a, b'),
        ([HEADER + ",age"], r'wards\.csv: has twice the column "age"'),
        (['"a,b', "1,2"], r"wards\.csv: its header \(row 1\) has a quote"),
    ],
)
def test_a_file_without_a_declared_column_is_one_line(
    lines: list[str], said: str, tmp_path: Path
) -> None:
    (tmp_path / "wards.csv").write_text("\n".join(lines))
    with pytest.raises(TaskError, match=said) as caught:
        site(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_that_is_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "wards.parquet").write_bytes(b"PAR1 and nothing more PAR1")
    with pytest.raises(TaskError, match=r"wards\.parquet: is no Parquet file") as caught:
        site(tmp_path, file="wards.parquet")
    assert "\n" not in str(caught.value)
