"""A user's own folder of images as inputs: decoded, brought to one size, scaled to [-1, 1]."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedaccord.accord_task import ImagesSection
from fedaccord.evidence import sha256
from fedaccord.faults import toml
from fedaccord.own_columns import Unusable, each
from fedaccord.own_files import Cell
from fedaccord.tasks import Inputs

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")  # no format whose reader starts other programs
EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
MOST_PIXELS = 100_000_000
Pixels = npt.NDArray[np.float32]


class ImageInputs:
    """How image files become inputs (channels, height, width).

    | a file that | the record |
    |---|---|
    | has 8 or 16 bits a channel | is scaled from 0..255 or 0..65535 to -1..1 |
    | has colours, and task.channels = 1 | is turned to grey; grey to three equal ones likewise |
    | has another size | is resized with antialiasing: stretched, or its middle cut out (task.fit) |
    | is missing, cut short, of another format or depth, above 100 million pixels | is left out |
    | lies outside the folder of the list, also by a link | is left out, without being opened |
    """

    vocabulary = 0
    features: tuple[str, ...] = ("pixels",)

    def __init__(self, section: ImagesSection) -> None:
        self._section = section
        self.shape: tuple[int, ...] = (section.channels, *section.size)

    def encode(
        self, columns: Mapping[str, Sequence[Cell]], folder: Path
    ) -> tuple[Inputs, dict[str, list[str]]]:
        """Decode the files (n, channels, height, width), and say for each "" or why not."""
        column = self._section.path
        empty = np.zeros(self.shape, np.float32)
        found, why = each(columns[column], lambda cell: self._read(cell, folder), empty)
        return np.array(found, np.float32).reshape(-1, *self.shape), {column: why}

    def _read(self, cell: Cell, folder: Path) -> Pixels:
        from PIL import Image

        path = inside(folder, cell)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what Pillow says of a record may not be printed
                with Image.open(path, formats=FORMATS) as image:
                    if image.width * image.height > MOST_PIXELS:
                        raise Unusable(f"{toml(cell)} has more than {MOST_PIXELS} pixels")
                    image.load()
                    return self._sized(_scaled(image, self._section.channels))
        except Unusable:
            raise
        except FileNotFoundError:
            raise Unusable(f"{toml(cell)}: there is no such file") from None
        except Exception as fault:  # whatever a decoder raises on a damaged file
            raise Unusable(
                f"{toml(cell)} cannot be decoded as {', '.join(FORMATS)}: {type(fault).__name__}"
            ) from None

    def _sized(self, pixels: Pixels) -> Pixels:
        import torch
        from torchvision.transforms import InterpolationMode, v2

        size = self._section.size
        how: dict[str, Any] = {"interpolation": InterpolationMode.BILINEAR, "antialias": True}
        if self._section.fit == "stretch":
            steps = [v2.Resize(size, **how)]
        else:  # as small as covers the wanted size, then its middle
            _, height, width = pixels.shape
            scale = max(size[0] / height, size[1] / width)
            steps = [
                v2.Resize(
                    [max(size[0], round(height * scale)), max(size[1], round(width * scale))], **how
                ),
                v2.CenterCrop(size),
            ]
        found = v2.Compose(steps)(torch.from_numpy(pixels))
        return np.asarray(found.clamp(-1, 1).numpy(), np.float32)

    def draw(self, rows: int, rng: np.random.Generator) -> Inputs:
        """Make up pixels (rows, channels, height, width), uniform in [-1, 1]."""
        return rng.uniform(-1, 1, (rows, *self.shape)).astype(np.float32)


def inside(folder: Path, cell: Cell) -> Path:
    """Find a listed file below the folder of its list; links are followed before it is judged.

    Raises:
        Unusable: no path, or one that leads elsewhere.
    """
    if not cell or "\0" in cell:
        raise Unusable("names no file")
    try:
        path, root = (folder / cell).resolve(), folder.resolve()
    except (OSError, RuntimeError):  # a link that leads to itself, a name that is too long
        raise Unusable(f"{toml(cell)} is no path of a file") from None
    if not path.is_relative_to(root):
        raise Unusable(f"{toml(cell)} lies outside the folder of the list")
    return path


def digest(folder: Path, cells: Sequence[Cell]) -> str:
    """Return one SHA-256 over the bytes of listed files; one that cannot be read counts as ""."""
    hashes = []
    for cell in cells:
        try:
            hashes.append(sha256(inside(folder, cell).read_bytes()))
        except (Unusable, OSError):
            hashes.append("")
    return sha256("\n".join(hashes))


def _scaled(image: Any, channels: int) -> Pixels:
    """Bring a decoded image to float32 (channels, height, width) in [-1, 1]."""
    if image.mode in SIXTEEN_BIT:
        grey = np.asarray(image).astype(np.float32) / np.float32(32767.5) - 1
        return np.repeat(grey[None], channels, axis=0)
    if image.mode not in EIGHT_BIT:
        raise Unusable(f'has pixels of the kind "{image.mode}". Save it with 8 or 16 bits')
    plain = np.asarray(image.convert("L" if channels == 1 else "RGB"), np.float32)
    plain = plain[None] if channels == 1 else plain.transpose(2, 0, 1)
    return np.ascontiguousarray(plain / np.float32(127.5) - 1)
