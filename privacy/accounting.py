"""Epsilon from the events of a plan: dp-accounting's arithmetic, never our own, never torch."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from functools import cache, lru_cache
from typing import Any

import dp_accounting
from dp_accounting import NeighboringRelation
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld import privacy_loss_distribution as pld
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
INTERVAL = 1e-4  # grid of the privacy losses, to which they are rounded so that epsilon grows


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


def tries(event: Event, count: int) -> Event:
    """Describe as many runs of the same plan, each of which the coordinator sees.

    Choosing the best of them is free then, since all were paid for. Cheaper rules for the best of
    many runs (Papernot and Steinke 2022) hold only where nobody sees the others, and do not apply.

    Raises:
        ValueError: a count below 1.
    """
    if count < 1:
        raise ValueError(f"tries = {count} must be at least 1.")
    return {"type": "SelfComposed", "count": count, "event": event}


def normalised(event: Event) -> Event:
    """Merge what is equal in an event, so that equal costs are one event and are computed once.

    | part | becomes |
    |---|---|
    | the same mechanism in several places | one, with the sum of the counts |
    | PoissonSampled with probability 1 | the plain Gaussian |
    | PoissonSampled with probability 0 | nothing |
    | NonPrivate, or a noise multiplier of 0 | all of it NonPrivate |

    Raises:
        ValueError: an event of a kind that FedAccord never writes, or a count below 1.
    """
    parts: Counter[tuple[float, float]] = Counter()
    if not _collect(event, 1, parts):
        return NON_PRIVATE
    composed: list[Event] = []
    for (sigma, q), count in sorted(parts.items()):
        inner: Event = {"type": "Gaussian", "noise_multiplier": sigma}
        if q < 1:
            inner = {"type": "PoissonSampled", "sampling_prob": q, "event": inner}
        composed.append({"type": "SelfComposed", "count": count, "event": inner})
    return composed[0] if len(composed) == 1 else compose(composed)


def _collect(event: Event, count: int, parts: Counter[tuple[float, float]]) -> bool:
    """Count mechanisms by (noise multiplier, sampling probability); False: not private."""
    kind = event.get("type")
    if kind == "NonPrivate":
        return False
    if kind == "Composed":
        return all(_collect(inner, count, parts) for inner in event["events"])
    if kind == "SelfComposed":
        times = event["count"]
        if not isinstance(times, int) or times < 1:
            raise ValueError(f"event count = {times} must be a whole number of at least 1.")
        return _collect(event["event"], count * times, parts)
    if kind == "PoissonSampled" and event["event"].get("type") == "Gaussian":
        sigma, q = float(event["event"]["noise_multiplier"]), float(event["sampling_prob"])
    elif kind == "Gaussian":
        sigma, q = float(event["noise_multiplier"]), 1.0
    else:
        dp_event(event)  # says what is wrong with a kind that FedAccord never writes
        raise ValueError(f"event {kind} of {event['event'].get('type')} is not accounted for.")
    if not (0 <= sigma < math.inf and 0 <= q <= 1):
        raise ValueError(
            f"event noise_multiplier = {sigma:g}, sampling_prob = {q:g}: must be 0 or more, and "
            "in [0, 1]."
        )
    if q > 0:
        parts[sigma, q] += count
    return q == 0 or sigma > 0


def dp_event(event: Event) -> dp_accounting.DpEvent:
    """Turn a recorded event into dp-accounting's.

    Raises:
        ValueError: an event of a kind that FedAccord never writes. Of these, RepeatAndSelect is
            refused for a reason of its own: it prices the best of many runs on the condition that
            nobody sees the others, and the coordinator sees them all.
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
    if str(kind).startswith("RepeatAndSelect"):
        raise ValueError(
            f'event type "{kind}" is refused: it holds only where nobody sees the runs that were '
            "not selected, and the coordinator sees every one. Compose all tries."
        )
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
    return _epsilon(canonical_json(normalised(event)), delta, relation, accountant)


@cache
def _epsilon(event_json: str, delta: float, relation: str, accountant: str) -> float:
    event = json.loads(event_json)
    if event == NON_PRIVATE:
        return math.inf
    if accountant == "PLD":
        return float(_loss(event_json, relation).get_epsilon_for_delta(delta))
    if accountant != "RDP":
        raise ValueError(f'accountant = "{accountant}" must be "PLD" or "RDP".')
    book = RdpAccountant(neighboring_relation=RELATIONS[relation])
    book.compose(dp_event(event))
    return float(book.get_epsilon(delta))


def loss(event: Event, relation: str = "add-or-remove-one") -> pld.PrivacyLossDistribution:
    """Return the privacy loss distribution of an event, rounded so that it under-counts nothing.

    Raises:
        ValueError: an event that is not private, which has none.
    """
    plain = normalised(event)
    if plain == NON_PRIVATE:
        raise ValueError("an event that is not private has no privacy loss distribution.")
    return _loss(canonical_json(plain), relation)


@lru_cache(maxsize=16)
def _loss(event_json: str, relation: str) -> pld.PrivacyLossDistribution:
    """Compose as dp-accounting's PLDAccountant does, from steps that are kept."""
    event = json.loads(event_json)
    total = pld.identity(value_discretization_interval=INTERVAL)
    for part in event["events"] if event["type"] == "Composed" else [event]:
        step, count = part["event"], part["count"]
        if step["type"] == "Gaussian":  # many are one with less noise, exactly
            sigma = step["noise_multiplier"] / math.sqrt(count)
            composed = _step(sigma, 1.0, relation)
        else:
            sigma = step["event"]["noise_multiplier"]
            composed = _step(sigma, step["sampling_prob"], relation).self_compose(count)
        total = total.compose(composed)
    return total


@lru_cache(maxsize=32)
def _step(sigma: float, q: float, relation: str) -> pld.PrivacyLossDistribution:
    """One step's distribution, which takes longer to build than to compose thousands of times."""
    return pld.from_gaussian_mechanism(
        sigma,
        sampling_prob=q,
        value_discretization_interval=INTERVAL,
        neighboring_relation=RELATIONS[relation],
    )


def would_exceed(held: Sequence[Event], event: Event, bound: float, delta: float) -> bool:
    """Tell whether one event more passes a bound on epsilon, all of them fixed in advance (PLD).

    Args:
        held: what is reserved already.
        event: what is asked for.
        bound: the largest epsilon; NaN is passed by everything.
        delta: in (0, 1).
    """
    return not epsilon(compose([*held, event]), delta) <= bound


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

    # RDP is fast and never below PLD, so its answer bounds the search from above; a coarse PLD is
    # ten times faster than the official one and finds it up to a few ticks.
    try:
        guess = search(RdpAccountant, 1e-2, 1e5, 1e-3)
        near = search(_coarse, guess / 2, guess * 1.01, 1e-5)
        ticks = math.ceil(_corrected(near, target_epsilon, delta, sampling_prob, steps) * 1e4)
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


def _coarse() -> Any:
    """Make an accountant whose losses are rounded up to steps ten times the usual."""
    return PLDAccountant(value_discretization_interval=1e-3)


def _corrected(sigma: float, target: float, delta: float, q: float, steps: int) -> float:
    """Move a noise multiplier, by one step of Newton's method, to where PLD meets a target."""
    here, beside = (epsilon(dp_sgd(s, q, steps), delta) for s in (sigma, sigma * 1.002))
    slope = (beside - here) / (0.002 * sigma)
    return sigma + (target - here) / slope if slope < 0 else sigma


def round_up(value: float, digits: int = 2) -> float:
    """Round an epsilon up, so that no printed figure is below the true one.

    The arithmetic is decimal: 1.1 stays 1.1, although 1.1 * 100 is above 110 in binary.
    """
    if math.isinf(value):
        return value
    step = Decimal(1).scaleb(-digits)
    return float(Decimal(repr(value)).quantize(step, ROUND_CEILING, Context(prec=400)))


def round_down(value: float, digits: int = 2) -> float:
    """Round what is left of a cap down, so that it is never printed above the true figure."""
    if math.isinf(value):
        return value
    step = Decimal(1).scaleb(-digits)
    return float(Decimal(repr(value)).quantize(step, ROUND_FLOOR, Context(prec=400)))


def show(value: float, digits: int = 2) -> str:
    """Format an epsilon rounded up, or the word "infinite"."""
    return "infinite" if math.isinf(value) else f"{round_up(value, digits):.{digits}f}"
