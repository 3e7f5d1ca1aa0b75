"""Nearest-neighbour mixing: each update becomes the mean of those nearest to it, before a rule."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedaccord.strategies.updates import Floats, arrays_of, flat, shaped, to_arrays, to_weights


def mix(updates: Floats, f: int) -> Floats:
    """Replace each update by the mean of its n - f nearest, itself among them.

    On skewed data honest updates lie far apart, and a robust rule that is given them as they are
    drops honest ones or lets in what hides between them. Mixed updates lie close together. A robust
    rule on them has an error of the order of f/n times the honest updates' variance, which is the
    best that there is (Allouah, Farhadkhani, Guerraoui, Gupta, Pinot and Stephan 2023, "Fixing by
    Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity", AISTATS).

    Distances come from one product of matrices, n^2 d operations and n^2 + 2 n d numbers. The
    updates are first taken relative to their coordinate-wise median, which f < n/2 hostile ones
    cannot move out of the honest ones' range: so an update of any length cannot make the digits
    cancel in which two honest ones differ.

    | case | result |
    |---|---|
    | all updates identical | the same update, the same bits |
    | several equally near | those of the lower rows |
    | f = 0 | the mean of all, in every row |

    Args:
        updates: a row for each site, (n, d), finite.
        f: hostile sites that are to be tolerated, 0 <= f < n / 2.

    Returns:
        (n, d).

    Raises:
        ValueError: f outside its bounds.
    """
    n = len(updates)
    if not 0 <= 2 * f < n:
        raise ValueError(f"f = {f} of n = {n}: mixing takes 0 <= f < n / 2")
    middle: Floats = np.median(updates, axis=0)
    apart = updates - middle
    nearest = np.argsort(_distances(apart), axis=1, kind="stable")[:, : n - f]
    among = np.zeros((n, n))
    np.put_along_axis(among, nearest, 1.0, axis=1)
    means: Floats = middle + among @ apart / (n - f)
    return means


def _distances(rows: Floats) -> Floats:
    """Return the squares of all distances, (n, n); each row's own comes before all others."""
    with np.errstate(over="ignore", invalid="ignore"):  # beyond float64 is far enough
        products = rows @ rows.T
        squares = np.diagonal(products)
        found: Floats = squares[:, None] + squares[None, :] - 2 * products
    found = np.where(np.isnan(found), np.inf, found)
    np.fill_diagonal(found, -np.inf)
    return found


class Mixed(Strategy):
    """Any strategy, shown the mixed updates in place of those that came."""

    def __init__(self, rule: Strategy, f: int) -> None:
        """Take the rule, and the number of hostile sites to tolerate, below half of any round's."""
        self.rule, self.f = rule, f

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Leave it to the rule."""
        return self.rule.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Mix the updates, then leave it to the rule."""
        kept = list(replies)
        if kept:
            updates = [to_weights(arrays_of(reply.content)["arrays"]) for reply in kept]
            rows = mix(np.stack([flat(update) for update in updates]), self.f)
            for reply, row in zip(kept, rows, strict=True):
                reply.content["arrays"] = to_arrays(shaped(row, updates[0]))
        return self.rule.aggregate_train(server_round, kept)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Leave it to the rule."""
        return self.rule.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Leave it to the rule."""
        return self.rule.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Leave it to the rule."""
        self.rule.summary()
