"""Checks of a model's options: one line with the parameter, its value, its bound and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedaccord.registry import nearest
from fedaccord.tasks import TaskSpec


class OptionFault(ValueError):
    """An option that a model cannot take; the message is whole, remedy included."""


def whole(name: str, value: Any, low: int = 1, high: int = 65_536) -> int:
    """Return a whole number from `low` to `high`.

    Raises:
        OptionFault: another type (true and false are no numbers), or outside the bounds.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise OptionFault(
            f"{name} = {_toml(value)} must be a whole number from {low} to {high}. Change it."
        )
    return value


def share(name: str, value: Any) -> float:
    """Return a number from 0 to below 1.

    Raises:
        OptionFault: another type, or outside the bounds.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise OptionFault(f"{name} = {_toml(value)} must be from 0 to below 1. Change it.")
    return float(value)


def positive(name: str, value: Any) -> float:
    """Return a finite number above 0.

    Raises:
        OptionFault: another type, or outside the bounds.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e9:
        raise OptionFault(f"{name} = {_toml(value)} must be above 0 and below 1e9. Change it.")
    return float(value)


def switch(name: str, value: Any) -> bool:
    """Return true or false.

    Raises:
        OptionFault: another type.
    """
    if not isinstance(value, bool):
        raise OptionFault(f"{name} = {_toml(value)} must be true or false. Change it.")
    return value


def choice(name: str, value: Any, known: Sequence[str]) -> str:
    """Return one of the known words.

    Raises:
        OptionFault: any other; the message lists the known ones.
    """
    if value not in known:
        hint = nearest(value, known) if isinstance(value, str) else ""
        words = ", ".join(f'"{word}"' for word in known)
        raise OptionFault(f"{name} = {_toml(value)} must be one of {words}.{hint} Change it.")
    return str(value)


def multiple(name: str, value: int, of: str, divisor: int) -> int:
    """Return a value that a divisor divides.

    Raises:
        OptionFault: it does not.
    """
    if value % divisor:
        raise OptionFault(
            f"{name} = {value} must be a multiple of {of} = {divisor}. Change one of them."
        )
    return value


def groups(name: str, channels: Any, parts: Any, most: int = 4096) -> int:
    """Return a number of feature maps that GroupNorm's `groups` divide.

    Raises:
        OptionFault: either is no whole number above 0, or they do not divide.
    """
    options = whole(name, channels, 1, most), whole("groups", parts, 1, most)
    return multiple(name, options[0], "groups", options[1])


def odd(name: str, value: Any, high: int) -> int:
    """Return an odd number from 1 to `high`.

    Raises:
        OptionFault: any other.
    """
    if whole(name, value, 1, high) % 2 == 0:
        raise OptionFault(f"{name} = {value} must be odd. Change it.")
    return int(value)


def numbers(spec: TaskSpec, model: str) -> TaskSpec:
    """Return a task whose inputs are numbers.

    Raises:
        OptionFault: its inputs are tokens.
    """
    if spec.vocabulary:
        raise OptionFault(
            f"task {spec.name} gives tokens of text, and {model} reads numbers. "
            'Choose the model "text" or "bag-of-words".'
        )
    return spec


def row(spec: TaskSpec, model: str) -> int:
    """Return the number of columns of a task whose inputs are rows of a table.

    Raises:
        OptionFault: its inputs are tokens, or of another shape.
    """
    if len(numbers(spec, model).shape) != 1:
        raise OptionFault(
            f"task {spec.name} gives inputs of shape {list(spec.shape)}, and {model} reads rows of "
            'a table. Choose the model "cnn2d", "resnet18" or "mlp".'
        )
    return spec.shape[0]


def image(spec: TaskSpec, model: str) -> tuple[int, int, int]:
    """Return channels, height and width of a task whose inputs are images.

    Raises:
        OptionFault: its inputs are of another shape.
    """
    if spec.vocabulary or len(spec.shape) != 3 or min(spec.shape) < 1:
        raise OptionFault(
            f"task {spec.name} gives inputs of shape {list(spec.shape)}, and {model} reads images "
            "[channels, height, width]. Choose a model that reads the task's inputs."
        )
    channels, height, width = spec.shape
    return channels, height, width


def text(spec: TaskSpec, model: str) -> tuple[int, int]:
    """Return the vocabulary and the positions of a task whose inputs are tokens.

    Raises:
        OptionFault: its inputs are numbers.
    """
    if not spec.vocabulary or len(spec.shape) != 1:
        raise OptionFault(
            f"task {spec.name} gives numbers of shape {list(spec.shape)}, and {model} reads tokens "
            "of text. Choose a model that reads the task's inputs."
        )
    return spec.vocabulary, spec.shape[0]


def _toml(value: Any) -> str:
    """Write a value as an accord does."""
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
