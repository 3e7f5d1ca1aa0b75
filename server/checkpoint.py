"""Checkpoints: the round, the model and the student in one file that is whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors import numpy as safetensors
from torch import nn

from fedaccord.errors import EvidenceError
from fedaccord.evidence import canonical_json, sha256, write_atomic
from fedaccord.models.build import trained
from fedaccord.server.gates import Weights

LATEST = "checkpoints/latest.safetensors"


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


def save(folder: Path, number: int, model: Weights, student: Weights | None) -> None:
    """Replace the latest checkpoint by that of a finished round, atomically and durably."""
    tensors = {f"model.{k}": v for k, v in model.items()}
    tensors |= {f"student.{k}": v for k, v in (student or {}).items()}
    about = canonical_json({"round": number, "student": student is not None})
    write_atomic(folder / LATEST, weights_bytes(tensors, about=about))


def load(folder: Path) -> tuple[int, Weights, Weights]:
    """Read the latest checkpoint: its round, the model, the student (empty if there is none).

    Raises:
        EvidenceError: no checkpoint, or one that cannot be read.
    """
    path = folder / LATEST
    try:
        with safe_open(path, framework="numpy") as file:
            number = int(json.loads(file.metadata()["about"])["round"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as fault:
        raise EvidenceError(
            f"{path}: {fault}. No round had finished, or restore the file."
        ) from None
    parts = {
        part: {
            k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")
        }
        for part in ("model", "student")
    }
    return number, parts["model"], parts["student"]
