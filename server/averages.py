"""The average of a model over rounds: computed from releases alone, so it costs no epsilon."""

from __future__ import annotations

import numpy as np

from fedaccord.strategies.updates import Weights


def follow(average: Weights | None, model: Weights, share: float, rounds: int) -> Weights:
    """Move an exponential moving average towards a round's model.

    In early rounds the share is smaller, min(share, (1 + rounds) / (10 + rounds)), so that the
    initial weights are soon forgotten (De et al. 2022, section 3.2, and TensorFlow's EMA).

    Args:
        average: over the rounds before; None: there was none.
        model: the round's.
        share: of the average that stays, in (0, 1).
        rounds: that have finished, with this one.

    Returns:
        The new average, of the model's types; whole numbers are the model's own.
    """
    if average is None:
        return {name: value.copy() for name, value in model.items()}
    stays = min(share, (1 + rounds) / (10 + rounds))
    return {
        name: value.copy()
        if not np.issubdtype(value.dtype, np.floating)
        else (stays * average[name].astype(np.float64) + (1 - stays) * value).astype(value.dtype)
        for name, value in model.items()
    }
