"""Epsilon from the events of a plan: dp-accounting's arithmetic, never our own, never torch."""

from __future__ import annotations

import json
import logging
import math
from decimal import ROUND_CEILING, Context, Decimal
from functools import cache
from typing import Any

import dp_accounting
from dp_accounting import NeighboringRelation
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from fedaccord.errors import AccordError
from fedaccord.evidence import canonical_json

Event = dict[str, Any]

# RDP leaves out an order whose series does not converge and says so once an order. The bound is
# then the least over the other orders: no smaller than with it, so nothing is under-counted.
logging.getLogger("absl").addFilter(lambda record: "failed to converge" not in record.getMessage())

RELATIONS = {
    "add-or-remove-one": NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace-one": NeighboringRelation.REPLACE_ONE,
}
NON_PRIVATE: Event = {"type": "NonPrivate"}


def dp_sgd(noise_multiplier: float, sampling_prob: float, steps: int) -> Event:
    """Describe `steps` steps of Poisson-sampled DP-SGD (Abadi et al. 2016) as an event."""
    return {
        "type": "SelfComposed",
        "count": steps,
        "event": {
            "type": "PoissonSampled",
            "sampling_prob": sampling_prob,
            "event": {"type": "Gaussian", "noise_multiplier": noise_multiplier},
        },
    }


def compose(events: list[Event]) -> Event:
    """Describe mechanisms that were run one after another on the same subjects."""
    return {"type": "Composed", "events": events}


def dp_event(event: Event) -> dp_accounting.DpEvent:
    """Turn a recorded event into dp-accounting's.

    Raises:
        ValueError: an event of a kind that FedAccord never writes.
    """
    kind = event.get("type")
    if kind == "Gaussian":
        return dp_accounting.GaussianDpEvent(event["noise_multiplier"])
    if kind == "PoissonSampled":
        inner = dp_event(event["event"])
        return dp_accounting.PoissonSampledDpEvent(event["sampling_prob"], inner)
    if kind == "SelfComposed":
        return dp_accounting.SelfComposedDpEvent(dp_event(event["event"]), event["count"])
    if kind == "Composed":
        return dp_accounting.ComposedDpEvent([dp_event(inner) for inner in event["events"]])
    if kind == "NonPrivate":
        return dp_accounting.NonPrivateDpEvent()
    raise ValueError(f'event type "{kind}" is not one that FedAccord accounts for.')


def epsilon(
    event: Event, delta: float, relation: str = "add-or-remove-one", accountant: str = "PLD"
) -> float:
    """Compute the epsilon of an event at a delta with dp-accounting.

    The official figure is that of privacy loss distributions with pessimistic rounding (Doroshenko
    et al. 2022); "RDP" (Mironov 2017) is the cross-check and is never smaller by more than
    rounding. The GDP approximation under-counts and is not offered.

    Args:
        event: what was or will be run.
        delta: in (0, 1).
        relation: "add-or-remove-one" or "replace-one".
        accountant: "PLD" or "RDP".

    Returns:
        Epsilon; infinity if anything in the event is not private.
    """
    return _epsilon(canonical_json(event), delta, relation, accountant)


@cache
def _epsilon(event_json: str, delta: float, relation: str, accountant: str) -> float:
    make = {"PLD": PLDAccountant, "RDP": RdpAccountant}[accountant]
    book = make(neighboring_relation=RELATIONS[relation])
    book.compose(dp_event(json.loads(event_json)))
    return float(book.get_epsilon(delta))


@cache
def calibrate(target_epsilon: float, delta: float, sampling_prob: float, steps: int) -> float:
    """Find the smallest noise multiplier, to 1e-4, whose PLD epsilon is at most the target.

    Args:
        target_epsilon: epsilon asked for over all steps, above 0.
        delta: in (0, 1).
        sampling_prob: Poisson inclusion per step, in (0, 1].
        steps: all steps of all reserved rounds.

    Returns:
        The noise multiplier, a multiple of 1e-4.

    Raises:
        AccordError: no noise multiplier from 0.01 to 100,000 has such an epsilon.
    """

    def search(accountant: Any, low: float, high: float, tolerance: float) -> float:
        return float(
            dp_accounting.calibrate_dp_mechanism(
                accountant,
                lambda sigma: dp_event(dp_sgd(sigma, sampling_prob, steps)),
                target_epsilon,
                delta,
                dp_accounting.ExplicitBracketInterval(low, high),
                tol=tolerance,
            )
        )

    def fits(ticks: int) -> bool:
        return epsilon(dp_sgd(ticks / 1e4, sampling_prob, steps), delta) <= target_epsilon

    # RDP is fast and never below PLD, so its answer bounds the slow search from above.
    try:
        guess = search(RdpAccountant, 1e-2, 1e5, 1e-3)
        ticks = math.ceil(search(PLDAccountant, guess / 2, guess * 1.01, 5e-5) * 1e4)
    except ValueError:
        raise AccordError(
            f"privacy.target_epsilon = {target_epsilon:g} at delta {delta:g}: no noise multiplier "
            f"from 0.01 to 100000 gives it over {steps} steps. Raise it or plan fewer steps."
        ) from None
    while not fits(ticks):
        ticks += 1
    while ticks > 1 and fits(ticks - 1):
        ticks -= 1
    return ticks / 1e4


def round_up(value: float, digits: int = 2) -> float:
    """Round an epsilon up, so that no printed figure is below the true one.

    The arithmetic is decimal: 1.1 stays 1.1, although 1.1 * 100 is above 110 in binary.
    """
    if math.isinf(value):
        return value
    step = Decimal(1).scaleb(-digits)
    return float(Decimal(repr(value)).quantize(step, ROUND_CEILING, Context(prec=400)))


def show(value: float, digits: int = 2) -> str:
    """Format an epsilon rounded up, or the word "infinite"."""
    return "infinite" if math.isinf(value) else f"{round_up(value, digits):.{digits}f}"
