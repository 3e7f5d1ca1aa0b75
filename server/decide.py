"""Step 8: whether a run goes on, from what its rounds have on record."""

from __future__ import annotations

from itertools import product
from typing import Any

from fedaccord.accord import Accord


def breach(accord: Accord, audit: dict[str, Any] | None) -> str:
    """Say which fairness rule the accord stops for, or "" if none."""
    rule = accord.fairness
    if audit is None or rule.max_parity_difference is None or not rule.stop_on_breach:
        return ""
    for section, name in product(("model", "student"), rule.attributes):
        if section not in audit:
            continue
        figure = audit[section]["figures"]["attributes"][name]["all"]
        value = figure["demographic_parity_difference"]["value"]
        if value is not None and value > rule.max_parity_difference:
            return (
                f"fairness rule: the demographic parity difference of the {section} by {name}, "
                f"{value:.3f}, is above {rule.max_parity_difference:g}"
            )
    return ""


def reached(accord: Accord, audit: dict[str, Any] | None) -> str:
    """Say that the model is as accurate as the accord asked, or "" if not."""
    target = accord.rounds.target_accuracy
    mean = None if audit is None else audit["model"]["figures"]["accuracy"]["mean"]
    if target is None or mean is None or mean < target:
        return ""
    return f"target reached: mean accuracy {mean:.3f} is at least {target:g}"


def ended(accord: Accord, finished: int, able: int, missing: int) -> str:
    """Say why there is no further round, or "" if there is one.

    Args:
        accord: what was agreed.
        finished: rounds that count.
        able: sites that have a reserved round left.
        missing: rounds in a row in which too few sites were there to be asked.
    """
    planned, fewest = accord.rounds.rounds, accord.rounds.min_sites
    if finished >= planned:
        return f"rounds done: {planned} of {planned}"
    if able < fewest:
        return (
            f"budget: {able} sites have a reserved round left, after {finished} of {planned} rounds"
        )
    if missing >= accord.rounds.max_misses:
        return (
            f"sites: fewer than {fewest} have answered in {missing} rounds in a row, after "
            f"{finished} of {planned} rounds"
        )
    return ""
