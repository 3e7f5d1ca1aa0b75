"""The rules of a site's policy: each a sentence on what an accord or the moment breaks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, time
from typing import TYPE_CHECKING, Literal

from fedaccord.accord import Accord, SiteSection
from fedaccord.faults import toml

if TYPE_CHECKING:
    from fedaccord.client.policy import SitePolicy

KINDS = ("join", "reserve", "train", "evaluate")
Release = Literal["weights", "group counts", "training loss"]
WEIGH_BY_LOSS = ("qfedavg",)  # strategies that ask sites for their training loss


def needed(accord: Accord) -> list[Release]:
    """List what an accord has a site release: every one trains and audits."""
    by_loss = accord.strategy.name in WEIGH_BY_LOSS
    return ["weights", "group counts", *(["training loss"] if by_loss else [])]  # type: ignore[list-item]


@dataclass(frozen=True)
class Asked:
    """What a rule looks at: nothing here comes from records."""

    policy: SitePolicy
    accord: Accord
    here: SiteSection
    kind: str
    parameters: int | Callable[[], int]
    now: datetime  # in the policy's time zone

    @property
    def noise_multiplier(self) -> float:
        """Of the accord, which may only say which epsilon it is for."""
        from fedaccord.privacy.plan import plan_for

        given = self.accord.privacy.noise_multiplier
        plan = None if given else plan_for(self.accord, self.here.name)
        return given or (plan.noise_multiplier if plan else 0.0)


def _approved(asked: Asked) -> str:
    digest = asked.accord.digest
    if digest in asked.policy.approved:
        return ""
    return (
        f'accord "{asked.accord.name}" ({digest[:12]}) is not approved. Ask the site to read it '
        "with `fedaccord site approve`."
    )


def _expires(asked: Asked) -> str:
    last, today = asked.policy.expires, asked.now.date()
    if last is None or today <= last:
        return ""
    return f"it is {today}, after {last}, its last day. Ask the site to renew it."


def _hours(asked: Asked) -> str:
    start, end = (text.split(":") for text in asked.policy.hours.split("-"))
    first = time(int(start[0]), int(start[1]))
    last = None if end[0] == "24" else time(int(end[0]), int(end[1]))  # None: midnight
    now = asked.now.time()
    if last is None or first < last:
        open_now = first <= now and (last is None or now < last)
    else:
        open_now = now >= first or now < last
    if open_now or asked.kind in ("join", "reserve"):
        return ""
    return (
        f"it is {asked.now:%H:%M} in {asked.policy.timezone}, outside {asked.policy.hours}, when "
        "it trains and evaluates. Ask again then."
    )


def _max_epsilon(asked: Asked) -> str:
    if asked.accord.privacy.enabled or math.isinf(asked.policy.max_epsilon):
        return ""
    return (
        "privacy.enabled = false needs epsilon infinite, above its cap of "
        f"{asked.policy.max_epsilon:.2f}. Switch privacy on, or ask the site for inf."
    )


def _accords(asked: Asked) -> str:
    own = asked.policy.accords.get(asked.accord.digest)
    if asked.accord.privacy.enabled or own is None:
        return ""
    return (
        "privacy.enabled = false needs epsilon infinite, above its cap of "
        f"{own.max_epsilon:.2f} for this accord. Switch privacy on, or ask the site to remove it."
    )


def _delta(asked: Asked) -> str:
    theirs, own = asked.accord.privacy.delta, asked.policy.delta
    if not asked.accord.privacy.enabled or theirs <= own:
        return ""
    return (
        f"privacy.delta = {theirs:g} is above {own:g}. Lower it or ask the site to raise its own."
    )


def _units(asked: Asked) -> str:
    unit = asked.accord.privacy.unit
    if not asked.accord.privacy.enabled or unit in asked.policy.units:
        return ""
    return (
        f'privacy.unit = "{unit}" is not among {toml(asked.policy.units)}. Change it or ask the '
        "site to allow it."
    )


def _min_noise_multiplier(asked: Asked) -> str:
    bound = asked.policy.min_noise_multiplier
    if not asked.accord.privacy.enabled or asked.noise_multiplier >= bound:
        return ""
    return (
        f"the noise multiplier {asked.noise_multiplier:g} is below {bound:g}. Raise "
        "privacy.noise_multiplier (or lower privacy.target_epsilon), or ask the site to lower its "
        "bound."
    )


def _max_grad_norm(asked: Asked) -> str:
    theirs, bound = asked.accord.privacy.max_grad_norm, asked.policy.max_grad_norm
    clips_gradients = asked.accord.privacy.enabled and asked.accord.privacy.unit == "subject"
    if not clips_gradients or theirs <= bound:
        return ""
    return (
        f"privacy.max_grad_norm = {theirs:g} is above {bound:g}. Lower it or ask the site to raise "
        "its bound."
    )


def _declared(key: Literal["subjects", "records"]) -> Callable[[Asked], str]:
    """Make the rule for a size that the accord declares of this site."""

    def rule(asked: Asked) -> str:
        declared, bound = getattr(asked.here, key), getattr(asked.policy, f"min_{key}")
        if declared >= bound:
            return ""
        return (
            f"sites[{asked.here.name}].{key} = {declared} is below {bound}. Leave the site out or "
            "ask it to lower its bound."
        )

    return rule


def _models(asked: Asked) -> str:
    student = asked.accord.distillation
    used = {"model.name": asked.accord.model.name}
    used |= {"distillation.model": student.model} if student.enabled else {}
    others = [
        f"{key} = {toml(name)}" for key, name in used.items() if name not in asked.policy.models
    ]
    if not others:
        return ""
    return (
        f"{' and '.join(others)}: not among {toml(asked.policy.models)}. Choose another or ask the "
        "site to allow it."
    )


def _max_parameters(asked: Asked) -> str:
    count = asked.parameters if isinstance(asked.parameters, int) else asked.parameters()
    if count <= asked.policy.max_parameters:
        return ""
    return (
        f"the model has {count} parameters, above {asked.policy.max_parameters}. Choose "
        "a smaller one or ask the site to raise its bound."
    )


def _releases(asked: Asked) -> str:
    missing = [toml(what) for what in needed(asked.accord) if what not in asked.policy.releases]
    if not missing:
        return ""
    return (
        f"the accord releases {' and '.join(missing)}: not among {toml(asked.policy.releases)}. "
        "Ask the site to allow it."
    )


def _min_cell(asked: Asked) -> str:
    theirs, bound = asked.accord.fairness.min_group, asked.policy.min_cell
    if theirs >= bound:
        return ""
    return (
        f"fairness.min_group = {theirs} is below {bound}. Raise it or ask the site to lower its "
        "bound."
    )


# Each rule by the key of the policy that it holds; "" means that it lets pass.
RULES: dict[str, Callable[[Asked], str]] = {
    "approved": _approved,
    "expires": _expires,
    "hours": _hours,
    "max_epsilon": _max_epsilon,
    "accords": _accords,
    "delta": _delta,
    "units": _units,
    "min_noise_multiplier": _min_noise_multiplier,
    "max_grad_norm": _max_grad_norm,
    "min_subjects": _declared("subjects"),
    "min_records": _declared("records"),
    "models": _models,
    "max_parameters": _max_parameters,
    "releases": _releases,
    "min_cell": _min_cell,
}
