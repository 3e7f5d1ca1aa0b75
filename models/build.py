"""Building a registered model: initial weights from the seed, errors that name the option."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fedaccord import registry
from fedaccord.errors import AccordError
from fedaccord.tasks import TaskSpec


def build(
    name: str, spec: TaskSpec, options: Mapping[str, int | float | bool | str], seed: int
) -> nn.Module:
    """Build a model with initial weights that depend on the seed alone.

    Torch's global generator is left as it was found.

    Args:
        name: a name in the registry of models.
        spec: the task, for the model's inputs and outputs.
        options: keyword arguments of the model's function.
        seed: of the initial weights.

    Raises:
        AccordError: an unknown name, or options that the model does not have or cannot take.
    """
    make = registry.load("model", name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone; others are left as they are
        try:
            model: nn.Module = make(spec, **options)
        except (TypeError, ValueError, RuntimeError) as fault:
            first = (str(fault) or type(fault).__name__).splitlines()[0]
            raise AccordError(f'model "{name}": {first}. Change its options.') from None
    return model


def parameter_count(model: nn.Module) -> int:
    """Count a model's weights."""
    return sum(parameter.numel() for parameter in model.parameters())
