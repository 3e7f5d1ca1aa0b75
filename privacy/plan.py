"""The privacy plan: one frozen object that couples sampler, clip, noise and the event they cost."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedaccord import evidence
from fedaccord.accord import Accord
from fedaccord.errors import AccordError
from fedaccord.privacy import accounting, noise, sampling
from fedaccord.privacy.client_level import ClientPlan, client_plan, whole

# Rounding lets one subject move a step's sum by a little more than max_grad_norm; the noise is
# scaled to cover it. By precision of the gradients; sums are always in float64. Measured by
# benchmarks/slack.py (1,024 records, weights up to 100 that cancel): at most 1e-13 in each, since a
# record's gradient does not depend on who else is on its page (`sampling.pages`). Without such
# pages a deep model in float32 reaches 1. The rest is margin, two units of each precision's last
# place or more, for machines where sums have no fixed order.
SLACK = {"float64": 1e-4, "float32": 1e-3, "bfloat16": 1e-2}
# Below it what a long gradient is multiplied by, down to max_grad_norm / 1.8e308, has so few bits
# left in float64 that it rounds to a longer one than the slack covers.
LEAST_CLIP = 1e-9
LEAST_NOISE = 0.3  # the least noise multiplier: below it no figure is a protection


@dataclass(frozen=True)
class PrivacyPlan:
    """What a site will do to its subjects' gradients, for all rounds that it reserves.

    Everything in it is declared or derived from what is declared; nothing is read from records.

    Attributes:
        site: whose plan it is.
        subjects: declared training subjects, for the normaliser; not a count of the records.
        rounds: rounds reserved, spare ones included.
        steps: steps a round.
        sampling_prob: Poisson inclusion of a subject per step, in (0, 1].
        noise_multiplier: noise stddev of the sum / its L2 sensitivity, at least `LEAST_NOISE`.
        max_grad_norm: L2 bound of one subject's gradient, at least `LEAST_CLIP`.
        delta: at which epsilon is stated, in (0, 1).
        slack: relative excess over max_grad_norm that rounding can cause, 0 or more.
        neighboring_relation: "add-or-remove-one".
        unit: "training subject".
        spare_rounds: how many of `rounds` are spare, for rounds that fail.
    """

    site: str
    subjects: int
    rounds: int
    steps: int
    sampling_prob: float
    noise_multiplier: float
    max_grad_norm: float
    delta: float
    slack: float = SLACK["float64"]
    neighboring_relation: str = "add-or-remove-one"
    unit: str = "training subject"
    spare_rounds: int = 0

    def __post_init__(self) -> None:
        """Refuse a plan that protects nobody or says nothing.

        Raises:
            ValueError: a value out of its bounds; NaN and infinity are out of all bounds.
        """
        for name in ("subjects", "rounds", "steps"):
            self._must(name, whole(getattr(self, name), 1), "a whole number of at least 1")
        spare = whole(self.spare_rounds, 0) and self.spare_rounds < self.rounds
        self._must("spare_rounds", spare, f"a whole number below rounds = {self.rounds}")
        self._must("sampling_prob", 0 < self.sampling_prob <= 1, "in (0, 1]")
        sigma = LEAST_NOISE <= self.noise_multiplier < math.inf
        self._must("noise_multiplier", sigma, f"finite and at least {LEAST_NOISE}")
        clip = LEAST_CLIP <= self.max_grad_norm < math.inf
        self._must("max_grad_norm", clip, f"finite and at least {LEAST_CLIP:g}")
        self._must("delta", 0 < self.delta < 1, "in (0, 1)")
        self._must("slack", 0 <= self.slack < math.inf, "finite and 0 or more")
        relation = self.neighboring_relation == "add-or-remove-one"
        self._must("neighboring_relation", relation, '"add-or-remove-one"')
        self._must("unit", self.unit == "training subject", '"training subject"')

    def _must(self, name: str, holds: bool, bound: str) -> None:
        if not holds:
            raise ValueError(f"{name} = {getattr(self, name)} must be {bound}.")

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

    def odometer(self, used: int) -> float:
        """Bound what the first rounds have spent, wherever the run may stop: delta / rounds each.

        Epsilon of `used` rounds at the plan's own delta holds for a run that was always going to be
        that long. A run that stops for what it has seen needs a bound that holds at every moment at
        once: each of the `rounds` possible moments gets delta / rounds, and by the union bound all
        of them together hold at delta. So this is more than `epsilon(used)`, and near the end more
        than the reserved `epsilon()`, which holds at delta whenever the run stops, since stopping
        only leaves out a part of what was reserved.

        Args:
            used: rounds used, 0 to `rounds`.

        Returns:
            Epsilon at delta / rounds; 0 where nothing was used.

        Raises:
            ValueError: another number of rounds.
        """
        if not 0 <= used <= self.rounds:
            raise ValueError(f"used = {used} must be 0 to rounds = {self.rounds}.")
        if used == 0:
            return 0.0
        return accounting.epsilon(self.event(used), self.delta / self.rounds)

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
            f"(epsilon={accounting.show(self.epsilon())}, delta={self.delta:g})-DP "
            f"per {self.unit}, {self.neighboring_relation}, PLD, {self.rounds - self.spare_rounds}"
            f"+{self.spare_rounds} rounds x {self.steps} steps, Poisson q={self.sampling_prob:g}, "
            f"noise multiplier {self.noise_multiplier:g}"
        )


def _calibrated(target: float, delta: float, q: float, steps: int) -> float:
    """Find the noise for an epsilon; refuse one that the least noise already keeps."""
    least = accounting.dp_sgd(LEAST_NOISE, q, steps)
    # RDP is never below PLD, and takes no time where little noise makes PLD slow.
    sigma = 0.0
    if accounting.epsilon(least, delta, accountant="RDP") > target:
        sigma = accounting.calibrate(target, delta, q, steps)
    if sigma < LEAST_NOISE:
        raise AccordError(
            f"privacy.target_epsilon = {target:g} needs a noise multiplier below the least, "
            f"{LEAST_NOISE}, over {steps} steps. Lower it, or give privacy.noise_multiplier = "
            f"{LEAST_NOISE} in its place."
        )
    return sigma


Plan = PrivacyPlan | ClientPlan  # under privacy.unit = "subject" and "client"


def plan_for(accord: Accord, site: str) -> Plan | None:
    """Work out a site's plan from the accord alone; None where privacy is switched off.

    `privacy.target_epsilon` becomes a noise multiplier over all reserved rounds.

    Raises:
        AccordError: an epsilon that no noise gives, or only so little that it protects nobody.
    """
    privacy = accord.privacy
    if not privacy.enabled:
        return None
    if privacy.unit == "client":
        return client_plan(accord, site)
    steps = accord.reserved_rounds * accord.training.steps
    sigma = privacy.noise_multiplier or _calibrated(
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
        slack=SLACK[privacy.precision],
        spare_rounds=accord.rounds.spare_rounds,
    )
