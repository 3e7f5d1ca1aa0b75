"""Checkpoints: all that a run goes on from, in one file that is whole or not there."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors import numpy as safetensors
from torch import nn

from fedaccord.errors import EvidenceError
from fedaccord.evidence import canonical_json, sha256, write_atomic
from fedaccord.models.build import trained
from fedaccord.strategies.updates import Weights

LATEST = "checkpoints/latest.safetensors"
PARTS = ("model", "averaged", "student", "strategy")


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stands after a round.

    What sites have used, and how often they were silent, is on the run's record and not here.

    Attributes:
        number: the round.
        model: the global model that the next round starts from.
        averaged: over rounds, where the accord wants it; else empty.
        student: its weights; empty if there is none.
        strategy: the arrays that the strategy keeps, by name.
        heads: of the sites' ledgers, as they were signed.
        record: the round's record, which is appended to the run only after this is on the disk.
    """

    number: int
    model: Weights
    averaged: Weights = field(default_factory=dict)
    student: Weights = field(default_factory=dict)
    strategy: Weights = field(default_factory=dict)
    heads: list[dict[str, Any]] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)


def weights_of(module: nn.Module) -> Weights:
    """Copy what training changes of a module into numpy arrays by name."""
    return {name: value.numpy().copy() for name, value in trained(module).items()}


def weights_bytes(weights: Weights, **about: str) -> bytes:
    """Serialise weights as safetensors; equal weights and words give equal bytes."""
    # safetensors writes an array as it lies in memory, which for a transposed one is wrong.
    rows = {name: np.asarray(weights[name], order="C") for name in sorted(weights)}
    return safetensors.save(rows, metadata=about or None)


def weights_digest(weights: Weights) -> str:
    """SHA-256 of weights as safetensors bytes without metadata; it names a model."""
    return sha256(weights_bytes(weights))


def save(folder: Path, state: Checkpoint) -> None:
    """Replace the latest checkpoint by that of a round, atomically and durably."""
    tensors = {f"{p}.{k}": v for p in PARTS for k, v in getattr(state, p).items()}
    about = canonical_json({"round": state.number, "heads": state.heads, "record": state.record})
    write_atomic(folder / LATEST, weights_bytes(tensors, about=about))


def load(folder: Path) -> Checkpoint:
    """Read the latest checkpoint.

    Raises:
        EvidenceError: no checkpoint, or one that cannot be read.
    """
    path = folder / LATEST
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        number, heads, record = int(about["round"]), list(about["heads"]), dict(about["record"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as fault:
        raise EvidenceError(
            f"{path}: {fault}. No round had finished, or restore the file."
        ) from None
    parts = {
        part: {
            k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")
        }
        for part in PARTS
    }
    return Checkpoint(number, heads=heads, record=record, **parts)
