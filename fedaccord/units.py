"""Units of privacy: which keys of an accord belong to which, and what does not go together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedaccord.faults import toml

if TYPE_CHECKING:
    from fedaccord.accord import Accord

# unit -> keys that mean something under it alone, as (table, key)
KEYS = {
    "subject": (
        ("privacy", "max_grad_norm"),
        ("privacy", "engine"),
        ("privacy", "precision"),
        ("strategy", "max_update_norm"),
    ),
    "client": (
        ("privacy", "clipping_norm"),
        ("privacy", "target_quantile"),
        ("privacy", "clipping_learning_rate"),
        ("privacy", "count_noise"),
    ),
}


def fault(accord: Accord) -> str:
    """Say in one line what in an accord does not fit its unit of privacy, or return "".

    A key of the other unit is refused where it differs from its default: written out, a default
    gives the same digest as one that is left out.
    """
    privacy = accord.privacy
    other = "client" if privacy.unit == "subject" else "subject"
    for table, key in KEYS[other]:
        if _is_set(getattr(accord, table), key):
            value = getattr(getattr(accord, table), key)
            shown = f'"{value}"' if isinstance(value, str) else f"{value:g}"
            return (
                f'{table}.{key} = {shown} belongs to privacy.unit = "{other}", not to '
                f'"{privacy.unit}". Remove it or change the unit.'
            )
    if privacy.unit == "subject":
        return ""
    if accord.strategy.name != "fedavg":
        return (
            f'strategy.name = "{accord.strategy.name}" does not go with privacy.unit = "client": '
            'only a mean has a sensitivity that noise can cover. Set it to "fedavg".'
        )
    if privacy.enabled and accord.model.local:
        return (
            f'model.local = {toml(accord.model.local)} does not go with privacy.unit = "client": '
            "layers that stay are trained without noise there. Remove it or change the unit."
        )
    if privacy.enabled and privacy.clipping_norm is None:
        return (
            'key "privacy.clipping_norm" is missing: under privacy.unit = "client" it bounds the '
            "L2 norm of a site's update. Add it."
        )
    for key in ("clipping_learning_rate", "count_noise"):
        if privacy.target_quantile is None and _is_set(privacy, key):
            return (
                f"privacy.{key} = {getattr(privacy, key):g} belongs to adaptive clipping. Add "
                f"privacy.target_quantile or remove it."
            )
    return count_fault(accord, privacy.noise_multiplier or 0.0)


def cohort(accord: Accord) -> int:
    """Count the sites that a full round asks."""
    return accord.rounds.sites_per_round or len(accord.sites)


def count_noise(accord: Accord) -> float:
    """Take the noise stddev on the count of unclipped updates.

    Where the accord sets none it is a twentieth of the cohort, which is what Andrew et al. 2021 use
    in their experiments.
    """
    return accord.privacy.count_noise or cohort(accord) / 20


def count_fault(accord: Accord, noise_multiplier: float) -> str:
    """Say that the noised count would cost all that a round may, or return ""."""
    if accord.privacy.target_quantile is None or noise_multiplier < 2 * count_noise(accord):
        return ""
    return (
        f"privacy.count_noise = {count_noise(accord):g} must be above half of the noise multiplier "
        f"{noise_multiplier:g}, or the count alone costs more than the round may. Raise it, ask "
        "more sites, or clip at a fixed norm (no privacy.target_quantile)."
    )


def _is_set(section: Any, key: str) -> bool:
    """Whether a key differs from its default."""
    return bool(getattr(section, key) != type(section).model_fields[key].default)
