"""Centred clipping: updates are cut to a ball around the last round's aggregate, then averaged."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedaccord.strategies import bounds
from fedaccord.strategies.driver import Driver
from fedaccord.strategies.kept import Kept, State, heard
from fedaccord.strategies.mixing import mix
from fedaccord.strategies.seam import SHOWN, Setting
from fedaccord.strategies.updates import (
    Floats,
    Update,
    Weights,
    flat,
    shaped,
    to_arrays,
    to_weights,
)


def centred_clip(updates: Floats, centre: Floats, radius: float | None, iterations: int) -> Floats:
    """Return the centre, moved `iterations` times by the mean of the clipped differences to it.

    v <- v + mean_i (x_i - v) min(1, radius / |x_i - v|): Karimireddy, He and Jaggi 2021, "Learning
    from History for Byzantine Robust Optimization", ICML, CenteredClip. Whatever f of the n updates
    are, they move the centre by at most f/n radius in an iteration, and all updates together by at
    most one radius.

    The paper's radius depends on the honest updates' variance, which nobody knows. Without one, the
    median distance |x_i - v| is taken, anew in each iteration. It follows any scale, and with
    f < n/2 it lies between honest updates' distances. A centre far away is then no trap, as it
    would be for a fixed radius: if the honest updates agree, an iteration leaves at most 2 f/n of
    the distance to them.

    | case | result |
    |---|---|
    | more than half of the updates equal the centre, no radius given | the centre |
    | an update too long for float64 to hold its norm | counts as zero |
    | radius larger than every distance | the mean |

    Args:
        updates: a row for each site, (n, d), finite; each counts the same.
        centre: (d,).
        radius: above 0, in the updates' unit; None for the median distance.
        iterations: 1 or more.

    Returns:
        (d,).
    """
    n = len(updates)
    with np.errstate(over="ignore"):
        for _ in range(iterations):
            distances = np.array([np.linalg.norm(row - centre) for row in updates])
            reach = float(np.median(distances)) if radius is None else radius
            factors = np.minimum(1.0, reach / np.maximum(distances, np.finfo(float).tiny))
            step = np.zeros_like(centre)
            for row, factor in zip(updates, factors, strict=True):
                step += factor * (row - centre)
            centre = centre + step / n
    return centre


class CentredClipping(FedAvg):
    """Centred clipping around the last round's aggregate, of mixed updates where that is asked for.

    The centre is the last aggregate as it is; nothing decays. In the paper, history enters twice:
    as the centre, and as momentum that each worker keeps. A site's momentum would have to outlive a
    round and be un-noised state under privacy, so the coordinator can form the same average of what
    each site released: m_i <- momentum m_i + (1 - momentum) x_i, with m_i = x_i the first time.

    Every site counts the same, whatever the roster's weights: a robust rule that weighs would let
    one hostile site with a large weight count as many.
    """

    def __init__(
        self, f: int, radius: float | None, iterations: int, momentum: float, mixing: bool
    ) -> None:
        """Take f, the hostile sites to tolerate, for the mixing; the rest as in `centred_clip`."""
        super().__init__(**SHOWN)  # type: ignore[arg-type]
        self._f, self._radius, self._iterations = f, radius, iterations
        self._momentum, self._mixing = momentum, mixing
        self._averages = Kept()
        self._centre: Weights = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every site that is shown."""
        self._centre = self._centre or to_weights(arrays)  # the driver shows zeros
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the moved centre."""
        updates = heard(replies)
        if not updates:
            return None, None
        like = updates[0].change
        rows = np.stack([flat(self._average(update)) for update in updates])
        if self._mixing:
            rows = mix(rows, self._f)
        centre = flat({name: self._centre[name] for name in like})
        centre = centred_clip(rows, centre, self._radius, self._iterations)
        self._centre = shaped(centre, like)
        return to_arrays(self._centre), None

    def _average(self, update: Update) -> Weights:
        """Return the site's update, averaged over the rounds that it took part in."""
        if self._momentum == 0:
            return update.change
        new = update.change
        if update.site in self._averages:
            old, part = self._averages.of(update.site, new), self._momentum
            new = {name: part * old[name] + (1 - part) * new[name] for name in new}
        self._averages.put(update.site, new, update.weight)
        return new

    def state(self) -> State:
        """Return the centre, and the sites' averages where there are any."""
        centre: State = {f"centre/{name}": np.asarray(v) for name, v in self._centre.items()}
        return centre | self._averages.state()

    def restore(self, state: State) -> None:
        """Take both back."""
        start = "centre/"
        found = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
        self._centre = {name: np.asarray(value, float) for name, value in found.items()}
        self._averages.restore(state)


def centred_clipping(
    setting: Setting,
    *,
    num_malicious_nodes: int = 1,
    mixing: bool = False,
    radius: float | None = None,
    iterations: int = 5,
    momentum: float = 0.0,
) -> Driver:
    """Centred clipping; without a radius the median distance to the centre.

    Raises:
        StrategyFault: an option out of its bounds, or rounds.min_sites below 2 f + 1.
    """
    f = bounds.tolerated(setting, num_malicious_nodes, 2, 1)
    mixing = bounds.mixed(mixing, f)
    if radius is not None:
        radius = bounds.number("radius", radius, 0.0, 1e9, above=True)
    iterations = bounds.whole("iterations", iterations, 1, 100)
    momentum = bounds.number("momentum", momentum, 0.0, 1.0, below=True)
    return Driver(CentredClipping(f, radius, iterations, momentum, mixing), "updates")
