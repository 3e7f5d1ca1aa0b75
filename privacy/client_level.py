"""Client-level privacy: the unit is the whole site, the coordinator clips and adds the noise."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fedaccord import evidence, units
from fedaccord.accord import Accord
from fedaccord.errors import AccordError
from fedaccord.privacy import accounting, noise

# What the RELEASE of an update without noise says in the site's ledger.
COVERS = (
    "not covered against the coordinator, who sees the update without noise; towards everybody "
    "else the reserved plan, whose noise the coordinator adds"
)
# What float64 rounding can add to the change that one site makes in the sum, relative to the
# clipping norm: below n^2 * 2^-53 for n sites, so below this for 90,000 of them.
ROUNDING = 1e-6
# An adaptive norm stays within this factor of the first one, so that it never becomes 0 or
# infinite where all updates are zero or grow without end.
FARTHEST = 2.0**40
LEAST_NOISE = 0.3  # the least noise multiplier, as for a subject's plan
_LEAST, _HALF = f"finite and at least {LEAST_NOISE}", "above half of noise_multiplier"


@dataclass(frozen=True)
class ClientPlan:
    """What the coordinator will do to a site's updates, for all rounds that the site reserves.

    It protects the site as a whole, and so each of its subjects at the same epsilon, towards
    everybody but the coordinator, who sees the update as it is. Everything in it comes from the
    accord; nothing is read from records or updates.

    Attributes:
        site: whose plan it is.
        cohort: sites that the accord asks in a full round.
        rounds: rounds reserved, spare ones included.
        spare_rounds: how many of them are spare.
        noise_multiplier: of all that a round releases together: noise stddev / L2 sensitivity.
        clipping_norm: L2 bound of a site's update in the first round.
        delta: at which epsilon is stated.
        target_quantile: share of updates that adaptive clipping leaves whole; None: fixed clipping.
        clipping_learning_rate: of adaptive clipping, else None.
        count_noise: noise stddev of the count of updates that were not clipped, else None.
        slack: relative excess over the clipping norm that rounding can cause.
        unit: "client".
        neighboring_relation: "add-or-remove-one" site.
    """

    site: str
    cohort: int
    rounds: int
    spare_rounds: int
    noise_multiplier: float
    clipping_norm: float
    delta: float
    target_quantile: float | None = None
    clipping_learning_rate: float | None = None
    count_noise: float | None = None
    slack: float = ROUNDING
    unit: str = "client"
    neighboring_relation: str = "add-or-remove-one"

    def __post_init__(self) -> None:
        """Refuse a plan that protects nobody or says nothing.

        Raises:
            ValueError: a value out of its bounds; NaN and infinity are out of all bounds.
        """
        adaptive = (self.target_quantile, self.clipping_learning_rate, self.count_noise)
        count = self.count_noise
        for name, holds, bound in (
            ("cohort", whole(self.cohort, 1), "a whole number of at least 1"),
            ("rounds", whole(self.rounds, 1), "a whole number of at least 1"),
            ("spare_rounds", whole(self.spare_rounds, 0), "a whole number of 0 or more"),
            ("rounds", self.rounds > self.spare_rounds, "more than spare_rounds"),
            ("noise_multiplier", LEAST_NOISE <= self.noise_multiplier < math.inf, _LEAST),
            ("clipping_norm", 0 < self.clipping_norm < math.inf, "finite and above 0"),
            ("delta", 0 < self.delta < 1, "in (0, 1)"),
            ("slack", 0 <= self.slack < math.inf, "finite and 0 or more"),
            ("target_quantile", adaptive.count(None) in (0, 3), "with all of its keys or none"),
            ("count_noise", count is None or 2 * count > self.noise_multiplier, _HALF),
            ("unit", self.unit == "client", '"client"'),
            (
                "neighboring_relation",
                self.neighboring_relation == "add-or-remove-one",
                '"add-or-remove-one"',
            ),
        ):
            if not holds:
                raise ValueError(f"{name} = {getattr(self, name)} must be {bound}.")

    @property
    def steps(self) -> int:
        """Uses of the mechanism in a round: one, however many steps the sites take."""
        return 1

    @property
    def normaliser(self) -> float:
        """What a full round's noisy sum is divided by: the sites that were asked."""
        return float(self.cohort)

    @property
    def mean_multiplier(self) -> float:
        """Noise multiplier of the sum alone, so that sum and count together cost noise_multiplier.

        (z^-2 - (2 s)^-2)^(-1/2) for z = noise_multiplier and s = count_noise: Andrew et al. 2021,
        Theorem 1. One site moves the count by at most 1/2, hence 2 s.
        """
        if self.count_noise is None:
            return self.noise_multiplier
        return float((self.noise_multiplier**-2 - (2 * self.count_noise) ** -2) ** -0.5)

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of the noise on each coordinate of the first round's sum."""
        return self.stddev(self.clipping_norm)

    def stddev(self, clipping_norm: float) -> float:
        """Standard deviation of the noise on each coordinate of a sum clipped at a norm."""
        return self.mean_multiplier * clipping_norm * (1 + self.slack)

    def next_norm(self, clipping_norm: float, unclipped: float) -> float:
        """Move the clipping norm towards the quantile: C * exp(-lr * (b - gamma)).

        Andrew et al. 2021, section 2.2. b is the noised share of updates that were NOT clipped:
        too many of them, and the norm falls.

        Args:
            clipping_norm: of the round that has been.
            unclipped: b; noise can carry it out of [0, 1].
        """
        assert self.target_quantile is not None and self.clipping_learning_rate is not None
        step = -self.clipping_learning_rate * (unclipped - self.target_quantile)
        moved = clipping_norm * math.exp(min(max(step, -30.0), 30.0))
        return min(max(moved, self.clipping_norm / FARTHEST), self.clipping_norm * FARTHEST)

    @property
    def digest(self) -> str:
        """SHA-256 that names the plan in every release made under it."""
        return evidence.digest(self.to_json())

    def event(self, rounds: int | None = None) -> accounting.Event:
        """Describe the first `rounds` rounds (all reserved ones by default) for the accountant.

        A plain Gaussian a round: the choice of sites amplifies nothing, since the invitations are
        on record.
        """
        return {
            "type": "SelfComposed",
            "count": self.rounds if rounds is None else rounds,
            "event": {"type": "Gaussian", "noise_multiplier": self.noise_multiplier},
        }

    def epsilon(self, rounds: int | None = None, **how: str) -> float:
        """Compute epsilon at the plan's delta (see `accounting.epsilon`)."""
        return accounting.epsilon(self.event(rounds), self.delta, **how)

    def odometer(self, used: int) -> float:
        """Bound what `used` rounds have spent, wherever the run may stop: delta / rounds a round.

        Every value holds at once at the plan's delta (a union bound over the rounds), so the run
        may stop for what it has seen.

        Args:
            used: rounds used, 0 to `rounds`.

        Raises:
            ValueError: another number of rounds.
        """
        if not 0 <= used <= self.rounds:
            raise ValueError(f"used = {used} must be 0 to rounds = {self.rounds}.")
        if used == 0:
            return 0.0
        return accounting.epsilon(self.event(used), self.delta / self.rounds)

    def to_json(self) -> dict[str, Any]:
        """Return the declared values, as the ledger keeps them."""
        return asdict(self)

    def statement(self) -> str:
        """Say the guarantee in full; epsilon is never printed alone."""
        clip = f"clipping norm {self.clipping_norm:g}"
        if self.target_quantile is not None:
            clip += f", then adapted to quantile {self.target_quantile:g}"
        return (
            f"(epsilon={accounting.show(self.epsilon())}, delta={self.delta:g})-DP per client "
            f"(whole site), {self.neighboring_relation}, PLD, {self.rounds - self.spare_rounds}"
            f"+{self.spare_rounds} rounds, Gaussian, noise multiplier {self.noise_multiplier:g}, "
            f"{clip}; the coordinator sees un-noised updates"
        )


def whole(value: object, least: int) -> bool:
    """Tell whether a value of a plan is a whole number of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def client_plan(accord: Accord, site: str) -> ClientPlan:
    """Work out a site's plan under `privacy.unit = "client"` from the accord alone.

    `privacy.target_epsilon` becomes a noise multiplier over all reserved rounds.

    Raises:
        AccordError: an epsilon that no noise gives, or only so little that it protects nobody; or
            a count that alone costs more than a round may.
    """
    privacy = accord.privacy
    sigma = privacy.noise_multiplier or accounting.calibrate(
        privacy.target_epsilon or math.nan, privacy.delta, 1.0, accord.reserved_rounds
    )
    if sigma < LEAST_NOISE:
        raise AccordError(
            f"privacy.target_epsilon = {privacy.target_epsilon:g} needs only noise multiplier "
            f"{sigma:g} over {accord.reserved_rounds} rounds, below the least, {LEAST_NOISE}. "
            f"Lower it, or give privacy.noise_multiplier = {LEAST_NOISE} in its place."
        )
    if words := units.count_fault(accord, sigma):
        raise AccordError(f"accord: {words}")
    assert privacy.clipping_norm is not None
    adaptive = privacy.target_quantile is not None
    return ClientPlan(
        site=site,
        cohort=units.cohort(accord),
        rounds=accord.reserved_rounds,
        spare_rounds=accord.rounds.spare_rounds,
        noise_multiplier=sigma,
        clipping_norm=privacy.clipping_norm,
        delta=privacy.delta,
        target_quantile=privacy.target_quantile,
        clipping_learning_rate=privacy.clipping_learning_rate if adaptive else None,
        count_noise=units.count_noise(accord) if adaptive else None,
        neighboring_relation=privacy.neighboring_relation,
    )


@dataclass(frozen=True)
class Released:
    """What a round lets out of the coordinator; nothing in it is of one site.

    Attributes:
        mean: float64 (d,), the noised mean of the clipped updates.
        asked: sites that were asked, by which the sum was divided.
        clipping_norm: at which this round's updates were clipped.
        noise_stddev: of the noise on each coordinate of the sum.
        unclipped: noised share of the updates that were not clipped; None without adaptation.
        next_clipping_norm: of the next round.
    """

    mean: noise.Floats
    asked: int
    clipping_norm: float
    noise_stddev: float
    unclipped: float | None
    next_clipping_norm: float


def clip(update: noise.Floats, clipping_norm: float) -> tuple[noise.Floats, float]:
    """Clip one site's update to an L2 norm, and say whether it was short enough as it came.

    | update | contributes | vote |
    |---|---|---|
    | any coordinate NaN or infinite | zero | 0, as one that is missing |
    | norm above the bound | itself, scaled to the bound | -1/2 |
    | norm at most the bound, zero included | itself | +1/2 |

    Args:
        update: float64 (d,).
        clipping_norm: L2 bound, above 0.

    Returns:
        float64 (d,) of norm at most `clipping_norm` up to rounding, and the vote.
    """
    largest = float(np.abs(update).max(initial=0.0))  # NaN, if there is one
    if not math.isfinite(largest):
        return np.zeros_like(update), 0.0
    scale = max(largest, float(np.finfo(np.float64).tiny))  # so that no square overflows
    scaled = update / scale  # of norm 1 to sqrt(d), unless the update is zero
    length = float(np.linalg.norm(scaled))
    if length <= clipping_norm / scale:
        return update, 0.5
    return scaled * (clipping_norm / length), -0.5


def clipped_sum(
    updates: Iterable[noise.Floats], width: int, clipping_norm: float
) -> tuple[noise.Floats, float]:
    """Sum clipped updates and their votes.

    One site more or less moves the sum by at most `clipping_norm` up to float64 rounding (see
    `ROUNDING`), and the votes by at most 1/2, whatever its update holds.

    Args:
        updates: float64 (d,) each.
        width: d.
        clipping_norm: L2 bound, above 0.

    Returns:
        The sum, float64 (d,), and the sum of the votes (see `clip`).
    """
    total, votes = np.zeros(width), 0.0
    for update in updates:
        clipped, vote = clip(update, clipping_norm)
        total += clipped
        votes += vote
    return total, votes


def release(
    plan: ClientPlan,
    updates: Iterable[noise.Floats],
    width: int,
    asked: int,
    clipping_norm: float,
    source: noise.Source,
) -> Released:
    """Turn a round's updates into the noised mean that may leave the coordinator.

    One use of the plan's event: clip -> sum -> noise in float64 on the finished sum -> public grid
    -> divide by the sites that were asked. Every site counts the same. An update that is missing
    contributes zero and does not change what the sum is divided by (McMahan et al. 2018, the
    estimator with a fixed denominator; adaptive clipping: Andrew et al. 2021, algorithm 1).

    Args:
        plan: any site's plan of the run; they differ in `site` alone.
        updates: float64 (d,) of each site that replied.
        width: d.
        asked: sites that were asked in this round, at least 1.
        clipping_norm: of this round.
        source: where the draws come from.
    """
    total, votes = clipped_sum(updates, width, clipping_norm)
    stddev = plan.stddev(clipping_norm)
    mean = noise.add_noise(total, stddev, grid(stddev), source) / asked
    unclipped, following = None, clipping_norm
    if plan.count_noise is not None:
        noisy = noise.add_noise(np.array([votes]), plan.count_noise, grid(plan.count_noise), source)
        unclipped = float(noisy[0]) / asked + 0.5
        following = plan.next_norm(clipping_norm, unclipped)
    return Released(mean, asked, clipping_norm, stddev, unclipped, following)


def grid(stddev: float) -> float:
    """Power of two to whose multiples a noisy sum is rounded: 2^-20 of the noise, or less."""
    return 2.0 ** (math.floor(math.log2(stddev)) - 20)
