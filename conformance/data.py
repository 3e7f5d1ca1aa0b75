"""Made-up records of the conformance suite: neighbours, loud, broken and missing ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from fedaccord.conformance import site
from fedaccord.privacy.noise import Floats
from fedaccord.tasks import Records

LOUD = 1000.0  # inputs so large that every gradient is clipped to the bound
REPEATS = 5  # records of a subject that has several


def unit_rows(count: int) -> npt.NDArray[np.float64]:
    """Make one loud record for each subject, each along an input of its own."""
    return np.eye(count) * LOUD


def crowd_of(count: int, features: int) -> Records:
    """Make subjects with made-up records inside the bounds; every fifth one is loud."""
    rng = np.random.default_rng(count)
    inputs = rng.uniform(-1, 1, (count, features))
    inputs[::5] *= LOUD
    return site.records(inputs, rng.integers(0, 2, count))


def clipped_sum_in_closed_form(data: Records, bound: float) -> Floats:
    """Sum the clipped gradients of a linear model at zero weights, by the formula.

    With cross-entropy and two classes a record's gradient is (1/2 - [class = label]) times its
    inputs with a one appended for the bias.
    """
    inputs = np.hstack([data.inputs.astype(np.float64), np.ones((len(data), 1))])
    side = 0.5 - (np.arange(2)[None, :] == data.labels[:, None])  # (n, 2)
    gradients = (side[:, :, None] * inputs[:, None, :]).reshape(len(data), -1)
    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
    total = (gradients * np.minimum(1.0, bound / norms)).sum(axis=0).reshape(2, -1)
    return np.concatenate([total[:, :-1].ravel(), total[:, -1]])


def neighbours(features: int) -> Iterator[tuple[str, Records, Records]]:
    """List pairs of data sets that differ in one subject, the loud, the broken and the empty."""
    crowd, empty = crowd_of(20, features), site.nobody(features)
    ones = np.ones((1, features))

    def newcomer(inputs: Any, label: int = 0, copies: int = 1) -> Records:
        rows = np.repeat(np.atleast_2d(inputs), copies, axis=0)
        return site.records(rows, [label] * copies, [99] * copies)

    special = {
        "an ordinary subject": newcomer(ones * 0.3),
        "a loud subject": newcomer(ones * 1e6),
        "inputs of 1e30": newcomer(ones * 1e30),
        "NaN": newcomer(ones * np.nan),
        "infinity": newcomer(ones * np.inf),
        "one infinite input": newcomer(np.where(np.arange(features) == 0, np.inf, 0.5)),
        "a label out of range": newcomer(ones, label=7),
        "five loud records of one subject": newcomer(ones * LOUD, copies=REPEATS),
    }
    for name, one in special.items():
        yield f"crowd with and without {name}", crowd, site.joined(crowd, one)
    yield "nobody and one loud subject", empty, newcomer(ones * LOUD)
    yield "nobody and one with NaN", empty, newcomer(ones * np.nan)
    against = site.records(ones * LOUD, [1], [0])
    yield "one loud subject, and its opposite", against, site.joined(against, newcomer(ones * 1e6))


def interfering(features: int) -> Iterator[tuple[str, Records | Exception]]:
    """List data sets that are neighbours of the first, and ways to fail to read it."""
    crowd = crowd_of(20, features)
    keep = np.arange(20) != 5
    yield "20 subjects", crowd
    yield (
        "a subject less",
        site.records(crowd.inputs[keep], crowd.labels[keep], crowd.subjects[keep]),
    )
    ones = np.ones((1, features))
    for name, inputs, label in (
        ("a subject more", ones, 1),
        ("a subject with NaN", ones * np.nan, 1),
        ("a subject with infinity", ones * np.inf, 0),
        ("a subject whose record raises", ones, 7),
    ):
        yield name, site.joined(crowd, site.records(inputs, [label], [99]))
    yield "no subject", site.nobody(features)
    yield "records that cannot be read", ValueError("row 17: cholesterol of A. Smith is 'high'")
