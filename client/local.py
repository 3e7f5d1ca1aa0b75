"""Layers that stay at a site (FedBN, a personal head): kept from round to round, never sent.

Under privacy they are trained by the same noised steps as the rest, so they are as private as what
leaves the site, and the next round's gradients may read them.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import torch as safetensors
from torch import nn

from fedaccord import evidence
from fedaccord.models.build import staying


def _files(folder: Path, run: str) -> dict[int, Path]:
    """Find the kept layers of a run, by round."""
    name = re.compile(re.escape(run) + r"-(\d+)\.safetensors")  # not those of a run "a-b" for "a"
    found = ((name.fullmatch(path.name), path) for path in (folder / "local").glob("*.safetensors"))
    return dict(sorted((int(said[1]), path) for said, path in found if said))


def put_back(model: nn.Module, folder: Path, run: str, before: int) -> None:
    """Put the layers into a model as they were after the last round before one.

    They stay as they come from the seed where there is none yet.

    Args:
        model: changed in place.
        folder: the site's.
        run: the run's id.
        before: the round that they are needed in; later ones are passed over.
    """
    rounds = {k: path for k, path in _files(folder, run).items() if k < before}
    if not staying(model) or not rounds:
        return
    kept = safetensors.load(rounds[max(rounds)].read_bytes())
    with torch.no_grad():
        for name, value in staying(model).items():
            value.copy_(kept[name])


def keep(model: nn.Module, folder: Path, run: str, number: int) -> None:
    """Store the layers as they are after a round; those of the round before it stay for a retry."""
    layers = {k: v.detach().cpu().clone().contiguous() for k, v in staying(model).items()}
    if not layers:
        return
    path = folder / "local" / f"{run}-{number:05d}.safetensors"
    evidence.write_atomic(path, safetensors.save(layers))
    for old, file in list(_files(folder, run).items())[:-2]:
        if old < number:
            file.unlink(missing_ok=True)
