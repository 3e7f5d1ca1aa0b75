"""Building a registered model: initial weights from the seed, errors that name the option."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fedaccord import registry
from fedaccord.accord import ModelSection
from fedaccord.errors import AccordError
from fedaccord.models.options import OptionFault
from fedaccord.models.pretrained import Pretrained, folder, load_file
from fedaccord.tasks import TaskSpec

_STAY = "weights_that_stay"  # in a model's __dict__, so that its copies have it too


def build(
    name: str,
    spec: TaskSpec,
    options: Mapping[str, int | float | bool | str],
    seed: int,
    pretrained: Pretrained | None = None,
) -> nn.Module:
    """Build a model with initial weights that depend on the seed and the pretrained ones alone.

    Torch's global generator is left as it was found. Weights that are not trained have
    `requires_grad` false from here on.

    | pretrained weights of | are |
    |---|---|
    | a model whose function has a parameter `pretrained` | a folder, which the function loads |
    | any other | a safetensors file of its state dict, loaded here |

    Args:
        name: a name in the registry of models.
        spec: the task, for the model's inputs and outputs.
        options: keyword arguments of the model's function.
        seed: of the initial weights.
        pretrained: weights to start from; checked against their SHA-256 before they are read.

    Raises:
        AccordError: an unknown name, options that the model does not have or cannot take, or
            pretrained weights that were not fetched, are altered, or are of another model.
    """
    make = registry.load("model", name)
    if "pretrained" in options:
        raise AccordError(
            f'model "{name}": pretrained is not an option. Give model.pretrained and model.sha256.'
        )
    given = dict(options)
    as_folder = pretrained is not None and _takes_folder(make)
    if pretrained is not None and as_folder:
        given["pretrained"] = folder(pretrained.name, pretrained.sha256)  # type: ignore[assignment]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone; others are left as they are
        try:
            model: nn.Module = make(spec, **given)
        except OptionFault as fault:
            raise AccordError(f'model "{name}": {fault}') from None
        except (TypeError, ValueError, RuntimeError) as fault:
            first = (str(fault) or type(fault).__name__).splitlines()[0]
            raise AccordError(f'model "{name}": {first}. Change its options.') from None
    if pretrained is not None and not as_folder:
        load_file(model, pretrained)
    return model


def agreed(model: ModelSection, spec: TaskSpec, seed: int) -> nn.Module:
    """Build the model that an accord agrees on: pretrained, frozen, and local where it says so.

    Raises:
        AccordError: as `build`, `freeze` and `keep`.
    """
    made = build(model.name, spec, model.options, seed, pretrained_of(model))
    freeze(made, model.frozen)
    keep(made, model.local)
    return made


def keep(model: nn.Module, starts: Sequence[str]) -> None:
    """Name the weights that are trained and stay at their site, by the start of their names.

    They are those of FedBN (Li et al. 2021) or of a personal head (Arivazhagan et al. 2019).

    Raises:
        AccordError: a start that no trained weight has, or nothing left to send.
    """
    names = list(trained(model))
    for start in starts:
        if not any(name.startswith(start) for name in names):
            raise AccordError(
                f'model.local: no trained weight\'s name starts with "{start}". They are '
                f"{', '.join(names[:8])}{' ...' if len(names) > 8 else ''}. Mend it."
            )
    model.__dict__[_STAY] = tuple(n for n in names if any(n.startswith(s) for s in starts))
    if not trained(model):
        raise AccordError("model.local leaves no weight to send. Leave a layer out of it.")


def freeze(model: nn.Module, starts: Sequence[str]) -> None:
    """Freeze the weights whose names start as given, so that they are neither trained nor sent.

    Raises:
        AccordError: a start that no weight has, or nothing left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for start in starts:
        if not any(name.startswith(start) for name in names):
            raise AccordError(
                f'model.frozen: no weight\'s name starts with "{start}". Its weights are '
                f"{', '.join(names[:8])}{' ...' if len(names) > 8 else ''}. Mend it."
            )
    for name, weight in model.named_parameters():
        if any(name.startswith(start) for start in starts):
            weight.requires_grad_(False)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise AccordError("model.frozen leaves no weight to train. Leave a layer out of it.")


def pretrained_of(model: ModelSection) -> Pretrained | None:
    """Return the pretrained weights that an accord names, or None."""
    if model.pretrained is None or model.sha256 is None:
        return None
    return Pretrained(model.pretrained, model.sha256)


def _takes_folder(make: object) -> bool:
    try:
        return callable(make) and "pretrained" in inspect.signature(make).parameters
    except ValueError:  # a function without a signature
        return False


def parameter_count(model: nn.Module) -> int:
    """Count a model's weights."""
    return sum(parameter.numel() for parameter in model.parameters())


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what training changes of a model, by name, in order: only this travels.

    That is all of its state but the weights that are frozen, which are the same at every site:
    they come from the seed and the pretrained weights, and those that stay at their site (`keep`).
    They are the model's own tensors, no copies.
    """
    every = model.named_parameters(remove_duplicate=False)
    left = {name for name, value in every if not value.requires_grad}
    left |= set(model.__dict__.get(_STAY, ()))
    return {name: value for name, value in model.state_dict().items() if name not in left}


def staying(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights that are trained and stay at their site, by name; the model's own."""
    names = set(model.__dict__.get(_STAY, ()))
    return {name: value for name, value in model.state_dict().items() if name in names}


def put(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Put weights that travelled into a model; its frozen weights stay.

    Raises:
        RuntimeError: other names or shapes than those of `trained`.
    """
    mine = trained(model)
    if mine.keys() != weights.keys():
        odd = sorted(mine.keys() ^ weights.keys())
        raise RuntimeError(f"weights by other names: {', '.join(odd[:5])}")
    model.load_state_dict(weights, strict=False)
