"""The seam for strategies: by a name of ours, by an entry point, or as "package.module:Name"."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from flwr.serverapp.strategy import Strategy

from fedaccord import registry, units
from fedaccord.accord import Accord
from fedaccord.errors import AccordError
from fedaccord.registry import nearest
from fedaccord.strategies.driver import Driver, Takes

# Options that FedAccord sets itself where a strategy has them: it asks every site that it is shown.
SHOWN = {
    "fraction_train": 1.0,
    "min_train_nodes": 1,
    "min_available_nodes": 1,
}


@dataclass(frozen=True)
class Setting:
    """What a strategy of ours may know of the run that it is made for.

    Attributes:
        sites: all sites of the roster, in order of name.
        cohort: sites that a full round asks.
        quorum: accepted updates without which a round has failed.
        steps: optimiser steps of a site in a round.
        learning_rate: of the sites.
        momentum: of the sites' optimiser.
        optimizer: of the sites, "sgd" or "adam".
        private: whether the sites train under a privacy plan.
    """

    sites: tuple[str, ...]
    cohort: int
    quorum: int
    steps: int
    learning_rate: float
    momentum: float
    optimizer: str
    private: bool


class StrategyFault(ValueError):
    """Why a strategy cannot be made; the message is whole: parameter, value, bound, remedy."""


def setting_of(accord: Accord) -> Setting:
    """Read from an accord what its strategy may know."""
    training = accord.training
    return Setting(
        sites=tuple(accord.roster),
        cohort=units.cohort(accord),
        quorum=accord.rounds.min_sites,
        steps=training.steps,
        learning_rate=training.learning_rate,
        momentum=training.momentum,
        optimizer=training.optimizer,
        private=accord.privacy.enabled,
    )


def driver_for(accord: Accord) -> Driver:
    """Make the strategy of an accord, ready to be driven.

    Raises:
        AccordError: an unknown strategy or option, or one that does not go with the accord.
    """
    return make(accord.strategy.name, accord.strategy.options, setting_of(accord))


def make(name: str, options: Mapping[str, Any], setting: Setting) -> Driver:
    """Make a strategy by name.

    A name of ours stands for a function of a Setting and options, which gives a Driver. Any other
    (an entry point, or "package.module:Name") stands for a class or function of options that
    gives a Flower Strategy. It is driven with whole weights, as Flower does; if it says
    `takes = "updates"` or `"mean"` of itself, with those (see `Driver`).

    Raises:
        AccordError: as `driver_for`.
    """
    made = registry.load("strategy", name)
    ours = name in registry.STRATEGIES
    options = _checked(name, made, options, ours)
    try:
        found = made(setting, **options) if ours else made(**_shown(made), **options)
    except StrategyFault as fault:
        raise AccordError(f"strategy.options of {name}: {fault}") from None
    except AccordError:
        raise
    except Exception as fault:  # whatever another's code raises for such options
        raise AccordError(
            f'strategy "{name}" cannot be made with options {dict(options)}: '
            f"{type(fault).__name__}: {fault}. Change strategy.options."
        ) from None
    if isinstance(found, Driver):
        return found
    if not isinstance(found, Strategy):
        raise AccordError(
            f'strategy "{name}" is a {type(found).__name__}, not a Flower Strategy '
            "(flwr.serverapp.strategy.Strategy). Name a class of those."
        )
    takes: Any = getattr(found, "takes", "weights")
    if takes not in get_args(Takes):
        raise AccordError(
            f'strategy "{name}" says takes = {takes!r} of itself. Have it say one of '
            f"{', '.join(map(repr, get_args(Takes)))}."
        )
    return Driver(found, takes)


def _checked(
    name: str, made: Callable[..., Any], options: Mapping[str, Any], ours: bool
) -> Mapping[str, Any]:
    """Refuse an option that a strategy does not have, naming those that it has."""
    try:
        parameters = dict(inspect.signature(made).parameters)
    except (TypeError, ValueError):
        raise AccordError(
            f'strategy "{name}" is {made!r:.60}, no class or function whose options can be read. '
            "Name a class of Flower Strategies."
        ) from None
    if ours:
        parameters.pop("setting")
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return options
    for option in options:
        if option not in parameters:
            known = ", ".join(sorted(set(parameters) - set(SHOWN))) or "none"
            raise AccordError(
                f"strategy.options.{option} is not an option of {name}."
                f"{nearest(option, parameters)} Known: {known}. Change or remove it."
            )
    return options


def _shown(made: Callable[..., Any]) -> dict[str, Any]:
    """Have another's strategy ask every site that it is shown, where it has Flower's options."""
    try:
        parameters = inspect.signature(made).parameters
    except (TypeError, ValueError):
        return {}
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return {k: v for k, v in SHOWN.items() if anything or k in parameters}
