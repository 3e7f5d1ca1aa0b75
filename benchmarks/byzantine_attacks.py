"""Attacks of hostile sites: pure functions of the honest sites' updates, which they all know.

Each takes honest updates (h, d), the number f of hostile sites and a generator, and returns what
the hostile sites send, (f, d): finite, and no longer than REACH, so that every gate lets it in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Attack = Callable[[Floats, int, np.random.Generator], Floats]

BOUND = 100.0  # the accord's default strategy.max_update_norm
REACH = 0.99 * BOUND  # float32 on the way may not lift an update over the bound


def alie(honest: Floats, f: int, rng: np.random.Generator, z: float = 1.5) -> Floats:
    """Send the mean less z standard deviations of each coordinate ("a little is enough").

    Each coordinate stays within what honest sites send, so no rule that looks at single coordinates
    sees anything odd, while all of them are moved to one side (Baruch, Baruch and Goldberg 2019, A
    Little Is Enough, section 3). The paper's own z is 0.14 for f = 2 of 11, and harmless here; 1.5
    is what Karimireddy, He and Jaggi 2022 (section 6) and others take.
    """
    return inside(_all_send(honest.mean(axis=0) - z * honest.std(axis=0), f))


def inner_product(honest: Floats, f: int, rng: np.random.Generator, factor: float = 0.5) -> Floats:
    """Send the honest mean times -factor: learning is slowed, or turned round.

    A factor below 1 hides near zero, where skewed honest updates are not (Xie, Koyejo and Gupta
    2020, Fall of Empires, section 4).
    """
    return inside(_all_send(-factor * honest.mean(axis=0), f))


def inner_product_far(honest: Floats, f: int, rng: np.random.Generator) -> Floats:
    """Send the honest mean turned round, as long as the gates permit."""
    return stretched(_all_send(-honest.mean(axis=0), f))


def sign_flip(honest: Floats, f: int, rng: np.random.Generator) -> Floats:
    """Send an honest site's update turned round, as long as the gates permit."""
    return stretched(-honest[rng.choice(len(honest), f)])


def random(honest: Floats, f: int, rng: np.random.Generator) -> Floats:
    """Send a random direction, as long as the gates permit."""
    return stretched(rng.standard_normal((f, honest.shape[1])))


def mimic(honest: Floats, f: int, rng: np.random.Generator) -> Floats:
    """Send what one honest site sends, which then counts f + 1 times (Karimireddy 2022)."""
    return inside(_all_send(honest[0], f))


# Label flipping, the last one in the benchmark's table, is in the data: hostile sites train
# honestly on labels turned round.
ATTACKS: dict[str, Attack] = {
    "ALIE": alie,
    "IPM x 0.5": inner_product,
    "IPM x 3": partial(inner_product, factor=3.0),
    "IPM far": inner_product_far,
    "sign flip": sign_flip,
    "random": random,
    "mimic": mimic,
}


def inside(updates: Floats) -> Floats:
    """Shorten rows that are longer than REACH."""
    lengths = np.linalg.norm(updates, axis=1, keepdims=True)
    return updates * np.minimum(1.0, REACH / np.maximum(lengths, REACH))


def stretched(updates: Floats) -> Floats:
    """Make rows REACH long; a row of zeros stays."""
    lengths = np.linalg.norm(updates, axis=1, keepdims=True)
    return updates * (REACH / np.where(lengths > 0, lengths, 1.0))


def _all_send(update: Floats, f: int) -> Floats:
    return np.repeat(update[None], f, axis=0)
