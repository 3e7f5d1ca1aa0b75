"""Draws from the operating system's entropy, and how noise is added to a finished sum."""

from __future__ import annotations

import os
from typing import Protocol

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

Floats = npt.NDArray[np.float64]


class Source(Protocol):
    """Where a mechanism's randomness comes from."""

    def uniform(self, count: int) -> Floats:
        """Draw `count` independent numbers, uniform on the multiples of 2^-53 in [0, 1)."""
        ...

    def normal(self, count: int) -> Floats:
        """Draw `count` independent standard normal numbers."""
        ...


class OsSource:
    """An AES-256-CTR keystream under a fresh key from the operating system.

    It reads no seed and no state of torch, numpy or `random`, and no accord can set it: a test
    that wants known draws passes its own `Source` in code. Make a new one for every step.

    | claimed | not claimed |
    |---|---|
    | draws are unpredictable without the key, which is never stored or sent | a proof about floating-point arithmetic: the sampler is Box-Muller in float64 |
    | no relation between steps, rounds, sites or runs | resistance to somebody who reads this process's memory |
    """  # noqa: E501  (a table row cannot be broken)

    def __init__(self) -> None:
        key, nonce = os.urandom(32), os.urandom(16)
        self._stream = Cipher(algorithms.AES(key), modes.CTR(nonce)).encryptor()

    def uniform(self, count: int) -> Floats:
        """Draw uniform numbers with 53 random bits each."""
        words = np.frombuffer(self._stream.update(bytes(8 * count)), np.uint64)
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normal(self, count: int) -> Floats:
        """Draw standard normal numbers by Box and Muller's transform (1958).

        With 53-bit uniforms no draw exceeds 8.58 in magnitude; the missing tail has probability
        below 1e-17.
        """
        half = (count + 1) // 2
        radius = np.sqrt(-2.0 * np.log1p(-self.uniform(half)))  # log of a number in (0, 1]
        angle = 2.0 * np.pi * self.uniform(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def add_noise(total: Floats, stddev: float, grid: float, source: Source) -> Floats:
    """Add Gaussian noise to a finished sum, then round the result to a public grid.

    The order matters: noise that is itself rounded to a grid and then added leaves the low bits
    of the sum readable in the result. Rounding afterwards is post-processing.

    Args:
        total: float64 (d,), the sum of clipped gradients.
        stddev: standard deviation of the noise of each coordinate, in the units of `total`.
        grid: a power of two; every coordinate of the result is a multiple of it.
        source: where the draws come from.

    Returns:
        float64 (d,).
    """
    noisy = total + stddev * source.normal(total.size)
    rounded: Floats = np.round(noisy / grid) * grid
    return rounded
