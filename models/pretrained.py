"""Pretrained weights: found by name, and held to the SHA-256 that the accord gives them."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fedaccord import data
from fedaccord.errors import AccordError, TaskError

WEIGHTS = "model.safetensors"
FILES = (WEIGHTS, "config.json")  # of a hub's folder; its tokenizer is the task's matter
HUB = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"


@dataclass(frozen=True)
class Pretrained:
    """Weights to start from, as an accord names them.

    Attributes:
        name: an item of `fedaccord data list`, a path on this machine, or "owner/name" of a hub.
        sha256: of the safetensors file, in hex.
    """

    name: str
    sha256: str

    def file(self) -> Path:
        """Find the safetensors file: the one named, or model.safetensors in the folder named.

        Raises:
            AccordError: nothing of that name, data that was not fetched, or another SHA-256.
        """
        found = place(self.name)
        file = found / WEIGHTS if found.is_dir() else found
        if file.suffix != ".safetensors" or not file.is_file():
            raise AccordError(
                f'model.pretrained = "{self.name}": there is no {file}. Weights are read from '
                f"one safetensors file; save them as {WEIGHTS}."
            )
        check(file, self.name, self.sha256)
        return file


def folder(name: str, sha256: str) -> Path:
    """Find a model's folder, config.json and model.safetensors in it.

    Raises:
        AccordError: as `Pretrained.file`, or a folder without config.json.
    """
    here = Pretrained(name, sha256).file().parent
    if not (here / "config.json").is_file():
        raise AccordError(
            f'model.pretrained = "{name}": there is no {here / "config.json"}, which says what the '
            "weights are of. Give a folder that has both, as Hugging Face's save_pretrained does."
        )
    return here


def check(file: Path, name: str, sha256: str) -> None:
    """Hold a file to a SHA-256.

    Raises:
        AccordError: it has another; the line gives both.
    """
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != sha256:
        raise AccordError(
            f'model.pretrained = "{name}" has SHA-256 {found}, not model.sha256 = {sha256}. '
            "Get the weights that were agreed on, or agree on these."
        )


def place(name: str) -> Path:
    """Find what a name stands for: a path first, then fetched data, then a hub's model.

    Only a hub's name, and only where the model is not in the hub's cache, uses the network.

    Raises:
        AccordError: nothing of that name, data that was not fetched, or a hub out of reach.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name in {item.name for item in data.items()}:
        try:
            return data.path(name)
        except TaskError as fault:  # says how to fetch it
            raise AccordError(f'model.pretrained = "{name}": {fault}') from None
    if re.fullmatch(HUB, name):
        return _hub(name)
    raise AccordError(
        f'model.pretrained = "{name}" is no path on this machine, no data that FedAccord knows '
        "(fedaccord data list) and no name of a hub (owner/name). Mend it."
    )


def _hub(name: str) -> Path:
    """Find a model of the Hugging Face hub in its cache, or download it."""
    from transformers.utils.hub import cached_file

    for only_here in (True, False):
        try:
            places = [cached_file(name, file, local_files_only=only_here) for file in FILES]
            return Path(str(places[0])).parent
        except OSError as fault:  # no connection, no such model, one that asks for a licence
            said = str(fault).splitlines()[0][:200]
    raise AccordError(
        f'model.pretrained = "{name}" is not in the hub\'s cache and cannot be fetched: {said} '
        "Mend the name or the connection, or give a folder that holds the model."
    )


def load_file(model: nn.Module, pretrained: Pretrained) -> None:
    """Load a model's whole state dict from a safetensors file.

    Raises:
        AccordError: weights that are missing, too many or of another shape; the first one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file as read

    file = pretrained.file()
    said = f'model.pretrained = "{pretrained.name}"'
    remedy = "Choose the model and the options that the weights are of."
    try:
        weights = read(file)
    except (SafetensorError, OSError):
        raise AccordError(f"{said}: {file} is no safetensors file. Save it again.") from None
    held = model.state_dict()
    for name in [*held, *weights]:
        if name not in weights or name not in held:
            whose = "the file" if name in held else "the model"
            raise AccordError(f"{said}: {whose} has no {name}. {remedy}")
        ours, theirs = list(held[name].shape), list(weights[name].shape)
        if ours != theirs:
            raise AccordError(f"{said}: {name} has shape {theirs}, not {ours}. {remedy}")
    model.load_state_dict(weights)
