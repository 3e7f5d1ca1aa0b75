"""A site's budget: what all its reservations add up to, and what a further plan would need.

Two rules, since a site reserves more than one plan:

* `first`: reserved before any result had left the site. Nothing about them depends on the records,
  so they are fixed in advance and PLD composition is a theorem. (That their steps may alternate
  does not matter: Vadhan and Zhang 2023, concurrent composition.)
* `later`: reserved after results had left the site. Who asked for them may have chosen their noise
  and length for what the results said, and then PLD composition is NOT a theorem: a natural filter
  on privacy loss distributions under-counts. Renyi DP of ONE fixed order does add up under such
  choices (Feldman and Zrnic 2021, the filter of section 4; Haney et al. 2023 for plans that run at
  the same time), so everything, the first ones included, is counted at an order that the cap alone
  fixes.

Why each rule may use the cap's whole delta: whether the first reservations fit under the cap at
that order is settled before any record is read. If they do not, nothing later is ever admitted, so
the site releases the first ones alone, and PLD holds at the cap's delta. If they do, then whatever
is admitted later the sum at that order stays within the cap, and the filter's theorem covers the
whole, again at the cap's delta. No outcome of the mechanisms chooses between the two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from dp_accounting.rdp import RdpAccountant

from fedaccord.privacy import accounting
from fedaccord.privacy.accounting import Event

_LARGEST_ORDER = 1024
_OF_NO_CAP = 10.0
_SHARE = 0.9  # of what the best order for a Gaussian admits; see `order`


@dataclass(frozen=True)
class Cap:
    """The most that a site lets its subjects lose: epsilon at a delta.

    It is the site's own and is set without looking at results. One that is changed after results
    have left is counted as if it had been this one from the start.
    """

    epsilon: float
    delta: float


def spent(first: list[Event], later: list[Event], cap: Cap) -> float:
    """Bound the epsilon of everything that a site has reserved, at the cap's delta.

    A site that admits a plan only while this is at most `cap.epsilon` is (cap.epsilon,
    cap.delta)-DP per training subject over all its plans, also where later plans were chosen for
    what earlier ones released.

    | reservations | figure |
    |---|---|
    | none | 0 |
    | `later` empty | PLD of `first` |
    | any in `later` | Renyi filter over `first` and `later`, at `order(cap)` |
    | anything NonPrivate | infinite |

    Args:
        first: events reserved before any result had left the site.
        later: events reserved after that.
        cap: the site's; its epsilon and delta fix the filter's order.

    Raises:
        ValueError: an event that FedAccord does not account for, or a delta outside (0, 1).
    """
    if not 0 < cap.delta < 1:
        raise ValueError(f"cap.delta = {cap.delta} must be in (0, 1).")
    if not later:
        return accounting.epsilon(accounting.compose(first), cap.delta)
    event = accounting.normalised(accounting.compose([*first, *later]))
    if event == accounting.NON_PRIVATE:
        return math.inf
    book = RdpAccountant([order(cap)])
    book.compose(accounting.dp_event(event))
    return float(book.get_epsilon(cap.delta))


def needs(
    event: Event,
    cap: Cap,
    first: list[Event] | None = None,
    later: list[Event] | None = None,
    *,
    seen: bool = False,
) -> float:
    """Say what a plan needs of a cap: its own epsilon there, or what it adds, if that is more.

    Epsilons do not add up: a second plan adds less than its own. What a refused plan needs by this
    figure is always more than what `left` gives, so that a refusal explains itself.

    Args:
        event: the plan's.
        cap: the site's.
        first: as in `spent`, what is held already.
        later: as in `spent`.
        seen: whether a result has left the site by now, so that the plan counts as a later one.
    """
    held, after = list(first or ()), list(later or ())
    alone = spent([event], [], cap)
    with_it = spent(held, [*after, event], cap) if seen else spent([*held, event], after, cap)
    before = spent(held, after, cap)
    return alone if math.isinf(before) else max(alone, with_it - before)


def left(first: list[Event], later: list[Event], cap: Cap) -> float:
    """Say how much of a cap's epsilon is not spent, at least 0; print it with `show_left`."""
    return max(0.0, cap.epsilon - spent(first, later, cap))


def show_left(value: float, digits: int = 2) -> str:
    """Format what is left of a cap rounded down, or the words "no end"."""
    if math.isinf(value):
        return "no end"
    return f"{accounting.round_down(value, digits):.{digits}f}"


@lru_cache(maxsize=64)
def order(cap: Cap) -> int:
    """Choose the filter's order from the cap alone.

    The smallest whole order at which a Gaussian mechanism may run at least 9 tenths as often as at
    its best order. Small orders lose little there and suit sampled steps far better.

    | cap | order |
    |---|---|
    | epsilon infinite | that of epsilon 10: any order fixed in advance gives a true figure |
    | epsilon so small that no order admits anything | the largest, 1024 |

    Returns:
        A whole number from 2 to 1024.
    """
    if math.isinf(cap.epsilon):
        return order(Cap(_OF_NO_CAP, cap.delta))
    orders = range(2, _LARGEST_ORDER + 1)
    uses = {a: _budget(a, cap) / a for a in orders}
    best = max(uses.values())
    if not best > 0:
        return _LARGEST_ORDER
    return min(a for a in orders if uses[a] >= _SHARE * best)


def _budget(alpha: int, cap: Cap) -> float:
    """Largest Renyi DP of an order that converts to the cap: Canonne et al. 2020, Proposition 12.

    It only chooses the order; the conversion that counts is dp-accounting's, by the same formula.
    """
    return cap.epsilon - math.log1p(-1 / alpha) + math.log(cap.delta * alpha) / (alpha - 1)
