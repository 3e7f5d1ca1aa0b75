"""Two simulated scanners: images without a sensitive attribute get one that is made here.

No public set of images that installs without an account names sex or age of anybody. The tasks
`digits` and `fashion` therefore audit by the scanner that an image passed through, and this file is
that scanner. It says nothing about people.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

SCANNERS = ("scanner a", "scanner b")
CONTRAST = 0.6  # scanner b: black and white lie this much of the full distance apart, around grey
NOISE = 0.3  # scanner b: each pixel is off by up to this, of a full distance of 2

Pixels = npt.NDArray[np.float32]


def scan(images: Pixels, scanners: npt.NDArray[np.int64], noise: npt.NDArray[np.uint8]) -> Pixels:
    """Pass images through their scanners; the result stays within -1 and 1.

    | scanner | does |
    |---|---|
    | a | nothing |
    | b | lowers the contrast to CONTRAST and adds noise, uniform within NOISE of 0 |

    Args:
        images: (n, ...), from -1 (black) to 1 (white).
        scanners: (n,), index of SCANNERS.
        noise: (n, ...) random bytes, one a pixel; those of images of scanner a are not used.
    """
    out = images.astype(np.float32, copy=True)
    chosen = scanners == 1
    offsets = (noise[chosen].astype(np.float32) / 127.5 - 1) * np.float32(NOISE)
    out[chosen] = np.clip(out[chosen] * np.float32(CONTRAST) + offsets, -1, 1)
    return out


def noise_of(task: str, numbers: Sequence[int], shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Make each image's noise from its number alone (SHAKE-256): bytes (n, *shape).

    An image looks the same whoever else is there, on every machine and with every library.
    """
    size = int(np.prod(shape))
    made = [hashlib.shake_256(f"{task}/noise/{number}".encode()).digest(size) for number in numbers]
    return np.frombuffer(b"".join(made), np.uint8).reshape(len(numbers), *shape)


def draw(images: Pixels, rows: int, seed: int, salt: int) -> Pixels:
    """Draw public images with repetition, each through a scanner of its own.

    The first rows of a longer draw are those of a shorter one.

    Args:
        images: (n, ...) public images, from -1 to 1, not scanned.
        rows: how many to draw.
        seed: of the draw.
        salt: of the task.
    """
    shape, size = images.shape[1:], int(np.prod(images.shape[1:]))
    rng = np.random.default_rng([seed, salt])
    drawn = rng.random((rows, 2 + size))
    places = (drawn[:, 0] * len(images)).astype(np.int64)
    scanners = (drawn[:, 1] * len(SCANNERS)).astype(np.int64)
    noise = (drawn[:, 2:] * 256).astype(np.uint8).reshape(rows, *shape)
    return scan(images[places], scanners, noise)


def share(text: str) -> float:
    """Turn a text into a number in [0, 1) by its SHA-256 (53 bits)."""
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 11) / 2.0**53
