"""The task `heart`: UCI Heart Disease, four real hospitals, sex as the sensitive attribute.

The records are public and lie beside this file (heart.json: source, licence, citation). They are
treated as private here: pre-processing uses bounds declared below from what the measurements
can be, and no statistic of the records.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedaccord.errors import TaskError
from fedaccord.evidence import sha256
from fedaccord.tasks import Records, SiteData, TaskSpec

FILE = Path(__file__).with_name("heart.json")
SHA256 = "9503bc8ba84f5b6f24a6cf3d67394dfc7a97ef2843f963350be96096d5f6299b"
SITES = ("cleveland", "hungary", "switzerland", "va")
GROUPS = ("female", "male")

# Declared bounds: what an adult cardiology ward can measure, fixed before looking at any record.
# Values outside are clipped to them; (low, high, whether 0 is how the source writes "missing").
NUMERIC = {
    "age": (20.0, 90.0, False),
    "trestbps": (80.0, 220.0, True),
    "chol": (100.0, 500.0, True),
    "thalach": (60.0, 220.0, False),
    "oldpeak": (-3.0, 6.0, False),
    "ca": (0.0, 3.0, False),
}
CATEGORICAL: dict[str, tuple[Any, ...]] = {
    "sex": GROUPS,
    "cp": ("typical angina", "atypical angina", "non-anginal", "asymptomatic"),
    "fbs": (0, 1),
    "restecg": ("normal", "st-t abnormality", "lv hypertrophy"),
    "exang": (0, 1),
    "slope": ("upsloping", "flat", "downsloping"),
    "thal": ("normal", "fixed defect", "reversable defect"),
}
# A column that is always there needs no indicator of its absence.
COMPLETE = ("age", "sex", "cp")
TEST_SHARE = 3  # one patient in three is held out


def _columns() -> tuple[str, ...]:
    """Name the inputs in order: numbers with indicators, then one-hot categories with theirs."""
    names: list[str] = []
    for name in NUMERIC:
        names += [name] if name in COMPLETE else [name, f"{name}:missing"]
    for name, values in CATEGORICAL.items():
        names += [f"{name}={value}" for value in values]
        names += [] if name in COMPLETE else [f"{name}:missing"]
    return tuple(names)


COLUMNS = _columns()


def encode(row: dict[str, Any]) -> list[float]:
    """Turn one patient's row into inputs in [-1, 1], by the declared bounds alone.

    | value | becomes |
    |---|---|
    | missing (null, or 0 where 0 stands for missing) | 0, and 1 in its indicator |
    | number outside its declared bounds | the bound |
    | undeclared category | TaskError |
    """
    out: list[float] = []
    for name, (low, high, zero_is_missing) in NUMERIC.items():
        value = row[name]
        missing = value is None or (zero_is_missing and value == 0)
        scaled = 0.0 if missing else 2 * (min(max(value, low), high) - low) / (high - low) - 1
        out += [scaled] if name in COMPLETE else [scaled, float(missing)]
    for name, values in CATEGORICAL.items():
        value = row[name]
        if value is not None and value not in values:
            raise TaskError(f'heart.{name} = "{value}" is not one of {values}. Restore heart.json.')
        out += [float(value == known) for known in values]
        out += [] if name in COMPLETE else [float(value is None)]
    return out


@cache
def _rows() -> list[dict[str, Any]]:
    """Read the bundled records once and check that they are the ones that were declared."""
    text = FILE.read_text(encoding="utf-8")
    if sha256(text) != SHA256:
        raise TaskError(
            f"heart: {FILE} has SHA-256 {sha256(text)[:12]}..., not {SHA256[:12]}... as published. "
            "Restore it from the package."
        )
    data = json.loads(text)
    return [dict(zip(data["columns"], row, strict=True)) for row in data["rows"]]


def _records(rows: list[dict[str, Any]]) -> Records:
    return Records(
        inputs=np.array([encode(row) for row in rows], np.float32).reshape(-1, len(COLUMNS)),
        labels=np.array([int(row["num"] > 0) for row in rows], np.int64),
        subjects=np.array([row["id"] for row in rows], np.int64),
        groups={"sex": np.array([GROUPS.index(row["sex"]) for row in rows], np.int64)},
    )


class Heart:
    """Four hospitals, 920 patients, one record each; the label is any coronary disease (num > 0).

    Citation: Janosi, Steinbrunn, Pfisterer and Detrano, Heart Disease, UCI Machine Learning
    Repository, 1988, doi 10.24432/C52P4X, CC BY 4.0.
    """

    sites = SITES
    spec = TaskSpec(
        name="heart",
        features=COLUMNS,
        classes=("healthy", "disease"),
        attributes={"sex": GROUPS},
        source=(
            "UCI Heart Disease (doi 10.24432/C52P4X), CC BY 4.0. Principal investigators: Andras "
            "Janosi (Budapest), William Steinbrunn (Zurich), Matthias Pfisterer (Basel), Robert "
            "Detrano (Long Beach and Cleveland)."
        ),
    )

    def site(self, name: str) -> SiteData:
        """Read a hospital's patients: two in three to train on, one in three to evaluate on.

        The split is fixed by the patients' ids alone: by the SHA-256 of each id, so it depends on
        no value and no library's random numbers.

        Raises:
            TaskError: an unknown hospital, or a file that is not the published one.
        """
        if name not in SITES:
            raise TaskError(f'heart: site "{name}" is not one of {", ".join(SITES)}. Rename it.')
        rows = [row for row in _rows() if row["site"] == name]
        rows.sort(key=lambda row: sha256(f"heart/{row['id']}"))
        cut = len(rows) // TEST_SHARE
        return SiteData(train=_records(rows[cut:]), test=_records(rows[:cut]))

    def public(self, rows: int, seed: int) -> npt.NDArray[np.float32]:
        """Draw proxy patients uniformly from the declared bounds; each value may be missing."""
        rng = np.random.default_rng([seed, 0x9E0])
        drawn: list[dict[str, Any]] = []
        for _ in range(rows):
            row: dict[str, Any] = {
                name: rng.uniform(low, high) for name, (low, high, _) in NUMERIC.items()
            }
            row |= {name: values[rng.integers(len(values))] for name, values in CATEGORICAL.items()}
            drawn.append(
                {
                    k: None if k not in COMPLETE and rng.random() < 0.25 else v
                    for k, v in row.items()
                }
            )
        return np.array([encode(row) for row in drawn], np.float32).reshape(-1, len(COLUMNS))
