"""What a plan lets a membership test achieve, from its whole trade-off curve, not one epsilon."""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any

from scipy.optimize import minimize_scalar

from fedaccord.evidence import canonical_json
from fedaccord.privacy import accounting
from fedaccord.privacy.accounting import Event

FALSE_POSITIVES = {"tpr_at_1_in_100": 0.01, "tpr_at_1_in_1000": 0.001}
_TAIL = 1e-13  # epsilons whose delta is smaller do not matter; the curve is searched below them


def true_positive_rate(
    event: Event, false_positive_rate: float, relation: str = "add-or-remove-one"
) -> float:
    """Bound the true-positive rate of any membership test at a false-positive rate.

    The test may use everything that was released, and all records but the subject's. Each epsilon
    with its delta bounds the rate from two sides, TPR <= exp(epsilon) FPR + delta and
    1 - FPR <= exp(epsilon) (1 - TPR) + delta; the least over all of them is the trade-off curve
    (Kairouz, Oh and Viswanath 2015, theorem 2.1; Dong, Roth and Su 2022, proposition 2.12). The
    deltas are PLD's, which are never too small, so neither is the bound.

    | event | bound |
    |---|---|
    | not private | 1 |
    | nothing | the false-positive rate |

    Args:
        event: what is released.
        false_positive_rate: in [0, 1].
        relation: between data with and without the subject.

    Returns:
        The bound, in [false_positive_rate, 1].

    Raises:
        ValueError: a false-positive rate outside [0, 1].
    """
    if not 0 <= false_positive_rate <= 1:
        raise ValueError(f"false_positive_rate = {false_positive_rate} must be in [0, 1].")
    plain = accounting.normalised(event)
    if plain == accounting.NON_PRIVATE:
        return 1.0
    return _rate(canonical_json(plain), false_positive_rate, relation)


@cache
def _rate(event_json: str, alarm: float, relation: str) -> float:
    curve = accounting.loss(json.loads(event_json), relation)
    largest = curve.get_epsilon_for_delta(_TAIL)
    if not math.isfinite(largest):  # mass at an infinite loss: search as far as is of use
        largest = 50.0

    def near(epsilon: float) -> float:
        return math.exp(epsilon) * alarm + float(curve.get_delta_for_epsilon(epsilon))

    def far(epsilon: float) -> float:
        delta = float(curve.get_delta_for_epsilon(epsilon))
        return 1 - math.exp(-epsilon) * (1 - delta - alarm)

    # Each has one minimum, since delta is convex in exp(epsilon). Any epsilon gives a valid bound,
    # so a search that stops early is only less tight.
    found = [min(side(0.0), side(largest), _least(side, largest)) for side in (near, far)]
    return min(max(min(found), alarm), 1.0)


def _least(side: Any, largest: float) -> float:
    if largest <= 0:
        return float(side(0.0))
    options = {"xatol": 1e-5 * max(1.0, largest)}
    return float(minimize_scalar(side, bounds=(0, largest), method="bounded", options=options).fun)


def advantage(event: Event, relation: str = "add-or-remove-one") -> float:
    """Bound true-positive less false-positive rate of any membership test: delta at epsilon 0.

    It is the total variation distance (Kairouz, Oh and Viswanath 2015); 1 where the event is not
    private, 0 where nothing is released.
    """
    if accounting.normalised(event) == accounting.NON_PRIVATE:
        return 1.0
    value = float(accounting.loss(event, relation).get_delta_for_epsilon(0.0))
    return min(max(value, 0.0), 1.0)


def membership(event: Event) -> dict[str, float]:
    """Gather what records and reports say of membership tests, as numbers by name.

    Returns:
        "tpr_at_1_in_100" and "tpr_at_1_in_1000" (largest true-positive rates at these
        false-positive rates), "advantage" (largest true-positive less false-positive rate).
    """
    rates = {name: true_positive_rate(event, alarm) for name, alarm in FALSE_POSITIVES.items()}
    return rates | {"advantage": advantage(event)}
