"""The privacy plan: one frozen object that couples sampler, clip, noise and the event they cost."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedaccord import evidence
from fedaccord.accord import Accord
from fedaccord.privacy import accounting, noise, sampling

# Rounding lets one subject move a step's sum by a little more than max_grad_norm: its neighbours'
# gradients change in their last digits with their place in the batch. The noise is scaled to cover
# it. Measured with 256 records of norm max_grad_norm: at most 1e-11 in float64, in which subjects'
# gradients are computed; in float32 1e-7 by chance, but 145 with weights that the coordinator chose
# so that large terms cancel.
ROUNDING = 1e-4


@dataclass(frozen=True)
class PrivacyPlan:
    """What a site will do to its subjects' gradients, for all rounds that it reserves.

    Everything in it is declared or derived from what is declared; nothing is read from records.

    Attributes:
        site: whose plan it is.
        subjects: declared training subjects, for the normaliser; not a count of the records.
        rounds: rounds reserved, spare ones included.
        steps: steps a round.
        sampling_prob: Poisson inclusion of a subject per step.
        noise_multiplier: noise stddev of the sum / its L2 sensitivity.
        max_grad_norm: L2 bound of one subject's gradient.
        delta: at which epsilon is stated.
        slack: relative excess over max_grad_norm that rounding can cause.
        neighboring_relation: "add-or-remove-one".
    """

    site: str
    subjects: int
    rounds: int
    steps: int
    sampling_prob: float
    noise_multiplier: float
    max_grad_norm: float
    delta: float
    slack: float = ROUNDING
    neighboring_relation: str = "add-or-remove-one"

    @property
    def sensitivity(self) -> float:
        """L2 bound of what one subject adds to a step's sum, arithmetic slack included."""
        return self.max_grad_norm * (1 + self.slack)

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of the noise on each coordinate of a step's sum."""
        return self.noise_multiplier * self.sensitivity

    @property
    def grid(self) -> float:
        """Power of two to whose multiples a noisy sum is rounded: 2^-20 of the noise, or less."""
        return 2.0 ** (math.floor(math.log2(self.noise_stddev)) - 20)

    @property
    def normaliser(self) -> float:
        """What a noisy sum is divided by: the declared expected batch."""
        return self.sampling_prob * self.subjects

    @property
    def digest(self) -> str:
        """SHA-256 that names the plan in every release made under it."""
        return evidence.digest(self.to_json())

    def event(self, rounds: int | None = None) -> accounting.Event:
        """Describe the first `rounds` rounds (all reserved ones by default) for the accountant."""
        count = self.steps * (self.rounds if rounds is None else rounds)
        return accounting.dp_sgd(self.noise_multiplier, self.sampling_prob, count)

    def epsilon(self, rounds: int | None = None, **how: str) -> float:
        """Compute epsilon at the plan's delta (see `accounting.epsilon`)."""
        return accounting.epsilon(self.event(rounds), self.delta, **how)

    def sampler(self, subjects: npt.NDArray[np.int64]) -> sampling.SubjectSampler:
        """Make the sampler that the event describes."""
        return sampling.SubjectSampler(subjects, self.sampling_prob)

    def release(self, total: noise.Floats, source: noise.Source) -> noise.Floats:
        """Turn a step's sum of clipped gradients, float64 (d,), into its private mean (d,)."""
        return noise.add_noise(total, self.noise_stddev, self.grid, source) / self.normaliser

    def to_json(self) -> dict[str, Any]:
        """Return the declared values, as the ledger keeps them."""
        return asdict(self)

    def statement(self) -> str:
        """Say the guarantee in full; epsilon is never printed alone."""
        return (
            f"(epsilon={accounting.show(self.epsilon())}, delta={self.delta:g})-DP per training "
            f"subject, {self.neighboring_relation}, PLD, {self.rounds} rounds x {self.steps} "
            f"steps, Poisson q={self.sampling_prob:g}, noise multiplier {self.noise_multiplier:g}"
        )


def plan_for(accord: Accord, site: str) -> PrivacyPlan | None:
    """Work out a site's plan from the accord alone; None where privacy is switched off.

    `privacy.target_epsilon` becomes a noise multiplier over all reserved rounds.
    """
    privacy = accord.privacy
    if not privacy.enabled:
        return None
    steps = accord.reserved_rounds * accord.training.steps
    sigma = privacy.noise_multiplier or accounting.calibrate(
        privacy.target_epsilon or math.nan, privacy.delta, privacy.sampling_prob, steps
    )
    return PrivacyPlan(
        site=site,
        subjects=accord.roster[site],
        rounds=accord.reserved_rounds,
        steps=accord.training.steps,
        sampling_prob=privacy.sampling_prob,
        noise_multiplier=sigma,
        max_grad_norm=privacy.max_grad_norm,
        delta=privacy.delta,
        neighboring_relation=privacy.neighboring_relation,
    )
