"""Updates: what a site's training added to the weights, by name, and how they travel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

Weights = dict[str, npt.NDArray[Any]]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Update:
    """One site's accepted update.

    Attributes:
        site: whose it is.
        change: for each weight's name, what training added to it, in the weight's shape.
        weight: of the site in a mean, from the accord's roster; at least 1.
        metrics: numbers that the strategy asked for, such as the loss; none otherwise.
    """

    site: str
    change: Weights
    weight: int
    metrics: Mapping[str, float]


def to_weights(arrays: ArrayRecord) -> Weights:
    """Read an ArrayRecord into numpy arrays by name."""
    return {name: array.numpy() for name, array in arrays.items()}


def to_arrays(weights: Weights) -> ArrayRecord:
    """Pack numpy arrays for a message."""
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in weights.items()})


def arrays_of(content: RecordDict) -> dict[str, ArrayRecord]:
    """Return a message's records of arrays by name.

    Flower's own view of them refers to itself, so each use would keep the message, arrays and all,
    in memory until the garbage collector comes by.
    """
    return {name: record for name, record in content.items() if isinstance(record, ArrayRecord)}


def config_of(content: RecordDict) -> dict[str, Any]:
    """Return what a message's record "config" says; empty if it has none (see `arrays_of`)."""
    record = content.get("config")
    return dict(record) if isinstance(record, ConfigRecord) else {}


def metrics_of(content: RecordDict) -> dict[str, MetricRecord]:
    """Return a message's records of metrics by name (see `arrays_of`)."""
    return {name: record for name, record in content.items() if isinstance(record, MetricRecord)}


def flat(weights: Weights) -> Floats:
    """Put all weights into one float64 row (d,), in the order of their names in the dict."""
    return np.concatenate([np.zeros(0), *(v.astype(np.float64).ravel() for v in weights.values())])


def shaped(row: Floats, like: Weights) -> Weights:
    """Cut a row (d,) into float64 arrays of the names and shapes of others."""
    out, offset = {}, 0
    for name, value in like.items():
        out[name] = row[offset : offset + value.size].reshape(value.shape)
        offset += value.size
    return out


def zeros(like: Weights) -> Weights:
    """Return zeros of the names and shapes of others: float64, or whole numbers for such."""
    return {
        name: np.zeros(value.shape, np.float64 if _real(value) else value.dtype)
        for name, value in like.items()
    }


def moved(weights: Weights, change: Weights) -> Weights:
    """Add a change to weights in float64, and round once to the weights' own types."""
    out = {}
    for name, value in weights.items():
        exact = value.astype(np.float64) + change[name]
        out[name] = np.asarray(exact if _real(value) else np.rint(exact), value.dtype)
    return out


def _real(value: npt.NDArray[Any]) -> bool:
    return np.issubdtype(value.dtype, np.floating)
