"""Checks of a strategy's options: each fault names the parameter, value, bound and remedy."""

from __future__ import annotations

from fedaccord.strategies.seam import Setting, StrategyFault


def number(
    name: str, value: object, low: float, high: float, *, above: bool = False, below: bool = False
) -> float:
    """Return an option as a float within bounds.

    Args:
        name: of the option.
        value: as the accord has it.
        low: smallest value; not itself allowed if `above`.
        high: largest value; not itself allowed if `below`.
        above: the value must be above `low`.
        below: the value must be below `high`.

    Raises:
        StrategyFault: no number, or out of bounds.
    """
    bounds = f"{'above' if above else 'at least'} {low:g} and {'below' if below else 'at most'}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise StrategyFault(f"{name} = {value!r} is no number. Give one {bounds} {high:g}.")
    good = (low < value if above else low <= value) and (value < high if below else value <= high)
    if not good:
        raise StrategyFault(f"{name} = {value!r} is out of bounds. Give one {bounds} {high:g}.")
    return float(value)


def whole(name: str, value: object, low: int, high: int) -> int:
    """Return an option as a whole number within bounds, both allowed.

    Raises:
        StrategyFault: no whole number, or out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise StrategyFault(
            f"{name} = {value!r} is out of bounds. Give a whole number from {low} to {high}."
        )
    return value


def flag(name: str, value: object) -> bool:
    """Return an option that is true or false.

    Raises:
        StrategyFault: anything else.
    """
    if not isinstance(value, bool):
        raise StrategyFault(f"{name} = {value!r} is out of bounds. Give true or false.")
    return value


def tolerated(setting: Setting, value: object, times: int, more: int) -> int:
    """Return how many hostile sites f a rule is to stand, if a round always has enough replies.

    A round may go on with as few replies as `rounds.min_sites`, so that is what must suffice.

    Args:
        setting: of the run.
        value: the option num_malicious_nodes, f.
        times: the rule needs `times * f + more` replies.
        more: see `times`.

    Raises:
        StrategyFault: no whole number from 0, or more than min_sites replies would be needed.
    """
    f = whole("num_malicious_nodes", value, 0, 10_000)
    needed = times * f + more
    if setting.quorum < needed:
        raise StrategyFault(
            f"num_malicious_nodes = {f} needs at least {needed} replies in a round "
            f"({times} x {f} + {more}), and rounds.min_sites = {setting.quorum} lets a round go on "
            f"with fewer. Set rounds.min_sites to {needed} or more, or lower num_malicious_nodes."
        )
    return f


def mixed(value: object, f: int) -> bool:
    """Return whether updates are to be mixed, which takes someone to tolerate.

    Raises:
        StrategyFault: not true or false, or true with f = 0.
    """
    mixing = flag("mixing", value)
    if mixing and f == 0:
        raise StrategyFault(
            "mixing = true with num_malicious_nodes = 0 would replace every update by the mean of "
            "all. Set num_malicious_nodes to 1 or more, or mixing = false."
        )
    return mixing


def pulled(setting: Setting, name: str, value: object) -> float:
    """Return the factor of a proximal term, if a site's steps can follow it.

    One step of gradient descent moves a weight by learning_rate x factor of its distance to the
    global model; above 1 it lands on the other side, above 2 further away than it was. A site
    refuses what is above 1, so this says it before the run.

    Raises:
        StrategyFault: no number from 0, or too large for the learning rate.
    """
    factor, rate = number(name, value, 0.0, 1e6), setting.learning_rate
    if factor * rate > 1:
        most = next(t for t in (f"{1 / rate:.6g}", f"{0.9999 / rate:.5g}") if float(t) * rate <= 1)
        raise StrategyFault(
            f"{name} = {factor:g} times training.learning_rate = {rate:g} is {factor * rate:g}, "
            f"above 1: a site's step would jump past the global model. Set {name} to {most} or "
            "less, or lower training.learning_rate."
        )
    return factor
