"""What is public of one's own table: made-up rows, or records from a file with a declared hash."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wards import own_accord

from fedaccord.accord import Accord
from fedaccord.errors import AccordError
from fedaccord.tasks import Labelled, task_of


def accord(**change: Any) -> Accord:
    task: dict[str, Any] = {
        "kind": "table",
        "dataset": "wards",
        "file": "{site}.csv",
        "label": {"column": "again", "classes": ["no", "yes"]},
        "attributes": {"sex": ["female", "male"]},
        "inputs": {"age": {"min": 18, "max": 110}, "smoker": {"values": ["no", "yes"]}},
    }
    return own_accord(task | change)


def test_made_up_rows_keep_to_the_declared_bounds_and_values() -> None:
    task = task_of(accord(), Path("nowhere"))
    drawn = task.public(4000, 0)
    assert drawn.shape == (4000, 5) and drawn.dtype == np.float32
    assert np.abs(drawn).max() <= 1 and np.array_equal(drawn, task.public(4000, 0))
    age, gone = drawn[:, 0], drawn[:, 1] == 1
    assert (age[gone] == 0).all() and 900 < gone.sum() < 1100
    assert abs(age[~gone].mean()) < 0.06 and age[~gone].min() < -0.99 < 0.99 < age.max()
    assert (drawn[:, 2:].sum(axis=1) == 1).all()


def test_public_records_come_from_the_file_with_the_declared_hash(tmp_path: Path) -> None:
    rows = [f"{20 + i},{['no', 'yes'][i % 2]},{['no', 'yes'][i // 2 % 2]}" for i in range(10)]
    text = "\n".join(["age,smoker,again", *rows]) + "\n"
    (tmp_path / "open.csv").write_text(text)
    named = {"public_file": "open.csv", "public_sha256": hashlib.sha256(text.encode()).hexdigest()}
    task = task_of(accord(**named), tmp_path)
    assert isinstance(task, Labelled) and not isinstance(task_of(accord(), tmp_path), Labelled)
    inputs, labels = task.labelled()
    assert labels.tolist() == [i // 2 % 2 for i in range(10)]
    drawn = task.public(10, 3)
    assert sorted(map(tuple, drawn)) == sorted(map(tuple, inputs)) and not (drawn == inputs).all()
    assert len(task.public(25, 3)) == 25
    (tmp_path / "open.csv").write_text(text.replace("29", "30"))
    with pytest.raises(AccordError, match=r"task\.public_sha256 = .* is not that of open\.csv"):
        task.public(1, 0)


def test_public_records_with_a_fault_are_refused_by_row(tmp_path: Path) -> None:
    text = "age,smoker\n20,no\n400,no\n"
    (tmp_path / "open.csv").write_text(text)
    named = {"public_file": "open.csv", "public_sha256": hashlib.sha256(text.encode()).hexdigest()}
    with pytest.raises(AccordError, match=r'open\.csv: row 3, column "age": 400 is outside 18'):
        task_of(accord(**named), tmp_path).public(1, 0)
