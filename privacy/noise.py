"""Draws from the operating system's entropy, and how noise is added to a finished sum."""

from __future__ import annotations

import os
from typing import Any, Protocol, SupportsIndex

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

Floats = npt.NDArray[np.float64]
CHUNK = 2**14  # numbers made at a time: what is in work stays in the processor's cache


class Source(Protocol):
    """Where a mechanism's randomness comes from."""

    def uniform(self, count: int) -> Floats:
        """Draw `count` independent numbers, uniform on the multiples of 2^-53 in [0, 1)."""
        ...

    def normal(self, count: int) -> Floats:
        """Draw `count` independent standard normal numbers."""
        ...


_forks = [0]  # how many forks lie between this process and the first of its family


def _count_fork() -> None:
    _forks[0] += 1


os.register_at_fork(after_in_child=_count_fork)


class OsSource:
    """An AES-256-CTR keystream under a fresh key from the operating system.

    It reads no seed and no state of torch, numpy or `random`, and no accord can set it: a test
    that wants known draws passes its own `Source` in code. Make a new one for every step.

    | what happens | draws |
    |---|---|
    | the process forks | the child takes a new key before its next draw; the parent goes on |
    | the process ends and starts again | a new key; nothing was stored that could be read again |
    | it is copied or pickled | `TypeError`: two holders would draw the same numbers |
    | a snapshot of the whole machine is taken within a step and started twice | both finish that step with the same draws (not covered); the next step takes a new key |

    | claimed | not claimed |
    |---|---|
    | draws are unpredictable without the key, which is never stored or sent | a proof about floating-point arithmetic: the sampler is Box-Muller in float64 |
    | no relation between steps, rounds, sites or runs | resistance to somebody who reads this process's memory |
    | keys as good as the operating system's entropy | entropy of a machine whose system has none, as of a restored snapshot whose system does not notice |
    """  # noqa: E501  (a table row cannot be broken)

    def __init__(self) -> None:
        self._rekey()

    def _rekey(self) -> None:
        key, nonce = os.urandom(32), os.urandom(16)
        self._stream = Cipher(algorithms.AES(key), modes.CTR(nonce)).encryptor()
        self._owner = (os.getpid(), _forks[0])

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Refuse to be copied, pickled or checkpointed."""
        raise TypeError("a source of noise is never copied or stored: its draws would repeat")

    def uniform(self, count: int) -> Floats:
        """Draw uniform numbers with 53 random bits each."""
        if self._owner != (os.getpid(), _forks[0]):
            self._rekey()
        words = np.frombuffer(self._stream.update(bytes(8 * count)), np.uint64)
        numbers = (words >> np.uint64(11)).view(np.int64).astype(np.float64)  # quicker from signed
        numbers *= 2.0**-53
        return numbers

    def normal(self, count: int) -> Floats:
        """Draw standard normal numbers by Box and Muller's transform (1958).

        With 53-bit uniforms no draw exceeds 8.58 in magnitude; the missing tail has probability
        below 1e-17.
        """
        import torch  # not needed to read a plan, which verify does without it

        out = np.empty(count)
        for start in range(0, count, CHUNK):
            part = out[start : start + CHUNK]
            half = (len(part) + 1) // 2
            radius, angle = self.uniform(half), self.uniform(half)
            np.negative(radius, out=radius)
            np.log1p(radius, out=radius)  # log of a number in (0, 1]
            radius *= -2.0
            np.sqrt(radius, out=radius)
            angle *= 2.0 * np.pi
            turn = torch.from_numpy(angle)  # five times quicker than numpy's, as exact
            np.multiply(radius, torch.cos(turn).numpy(), out=part[:half])
            torch.sin(turn, out=turn)
            np.multiply(radius[: len(part) - half], angle[: len(part) - half], out=part[half:])
        return out


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
    noisy = np.empty(total.size)
    for start in range(0, total.size, CHUNK):
        part, true = noisy[start : start + CHUNK], total[start : start + CHUNK]
        np.multiply(source.normal(len(part)), stddev, out=part)
        part += true  # the finished sum, before any rounding to the grid
        part /= grid  # exact: a power of two
        np.rint(part, out=part)
        part *= grid
    return noisy
