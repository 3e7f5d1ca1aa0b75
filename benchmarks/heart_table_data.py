"""The published set-up of four heart hospitals, and the figures that were published with it.

Ogier du Terrail et al. 2022, "FLamby: Datasets and Benchmarks for Cross-Silo Federated Learning in
Realistic Healthcare Settings", Fed-Heart-Disease. Written anew from the paper and from what the
authors' repository (github.com/owkin/FLamby) says of data set, split and settings; its result
files flamby/results/results_benchmark_fed_heart_disease/heart_seed42.csv to heart_seed46.csv are
the source of RIGHT. The statistics of a hospital's records that this set-up normalises by are
released without any noise: it is for comparison with the published table alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import train_test_split

from fedaccord.simulations.heart import CATEGORICAL, FILE, SITES

Floats = npt.NDArray[np.float64]
SEEDS = (42, 43, 44, 45, 46)
NUMBERS = ("age", "sex", "trestbps", "chol", "fbs", "thalach", "exang", "oldpeak")
DUMMIES = ("cp", "restecg")  # one 0/1 input a category, but for the first
INPUTS = (*NUMBERS, *(f"{name}={value}" for name in DUMMIES for value in CATEGORICAL[name][1:]))
SPLIT = {"train_size": 0.66, "test_size": 1 - 0.66, "random_state": 43, "shuffle": True}
TINY = 1e-9  # added to a standard deviation, so that a constant column becomes 0

# Test patients that the published runs got right: a row a seed, of TESTED patients a hospital.
TESTED = (104, 89, 16, 45)
_FEDAVG = ((79, 62, 11, 28), (75, 66, 12, 30), (77, 67, 8, 26), (76, 60, 12, 28), (73, 65, 9, 32))
_YOGI = ((79, 68, 12, 28), (76, 65, 12, 30), (80, 67, 12, 33), (79, 66, 12, 31), (81, 69, 11, 30))
RIGHT = {
    "FedAvg": _FEDAVG,
    "FedProx": _FEDAVG,  # in every cell, as published
    "SCAFFOLD": (
        (78, 62, 11, 28), (75, 66, 12, 30), (77, 67, 8, 26), (75, 60, 12, 28), (73, 65, 9, 32),
    ),
    "FedAdam": (
        (79, 67, 12, 28), (75, 65, 12, 29), (79, 66, 12, 33), (79, 65, 12, 31), (79, 69, 11, 29),
    ),
    "FedYogi": _YOGI,
    "FedAdagrad": _YOGI,  # in every cell, as published
    "pooled": (
        (83, 68, 12, 29), (81, 68, 12, 29), (82, 68, 12, 29), (81, 68, 12, 29), (80, 68, 12, 29),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Some of a hospital's patients.

    Attributes:
        inputs: (n, 13), in the order of INPUTS.
        labels: (n,), 1.0 for disease.
    """

    inputs: Floats
    labels: Floats

    def normalised(self, by: Floats) -> Part:
        """Shift and scale every column by the mean and standard deviation of other rows (n, 13)."""
        inputs = (self.inputs - by.mean(axis=0)) / (by.std(axis=0, ddof=1) + TINY)
        return Part(inputs, self.labels)


@dataclass(frozen=True)
class Hospital:
    """A hospital's patients with every input measured, split as published, not normalised."""

    name: str
    train: Part
    test: Part


def hospitals() -> list[Hospital]:
    """Read the four hospitals in the published order, with the published split.

    Rows stand in the order of the original files, which is that of the ids; the split depends on
    it. Columns slope, ca and thal are left out, then patients with a value missing; a cholesterol
    of 0 counts as measured, as published.
    """
    data = json.loads(FILE.read_text(encoding="utf-8"))
    rows = [dict(zip(data["columns"], row, strict=True)) for row in data["rows"]]
    rows.sort(key=lambda row: row["id"])
    return [_hospital(name, [row for row in rows if row["site"] == name]) for name in SITES]


def _hospital(name: str, rows: Sequence[dict[str, Any]]) -> Hospital:
    needed = (*NUMBERS, *DUMMIES)
    whole = [row for row in rows if all(row[column] is not None for column in needed)]
    inputs = np.array([_inputs(row) for row in whole])
    labels = np.array([float(row["num"] > 0) for row in whole])
    fewest = min(int(labels.sum()), len(labels) - int(labels.sum()))
    train, test = train_test_split(
        np.arange(len(whole)), stratify=labels if fewest > 2 else None, **SPLIT
    )
    train, test = np.sort(train), np.sort(test)
    return Hospital(name, Part(inputs[train], labels[train]), Part(inputs[test], labels[test]))


def _inputs(row: dict[str, Any]) -> list[float]:
    out = [float(row["sex"] == "male" if name == "sex" else row[name]) for name in NUMBERS]
    for name in DUMMIES:
        out += [float(row[name] == value) for value in CATEGORICAL[name][1:]]
    return out


def own_statistics(hospital: Hospital) -> Hospital:
    """Normalise a hospital's patients by its own training patients."""
    by = hospital.train.inputs
    return Hospital(hospital.name, hospital.train.normalised(by), hospital.test.normalised(by))


def published(name: str) -> Floats:
    """Give the published accuracies of a row: (seeds, hospitals)."""
    return np.array(RIGHT[name]) / np.array(TESTED)
