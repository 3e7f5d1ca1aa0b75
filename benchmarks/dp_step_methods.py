"""The ways of one training step that `benchmarks.dp_step` compares, and what they should give.

A step is forward pass, backward pass, clip, sum and an update by SGD; nothing adds noise. Every way
has a model of its own, with the same weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from opacus.grad_sample.utils import wrap_model
from opacus.optimizers import get_optimizer_class
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn
from torch.nn import functional

from benchmarks.dp_step_cases import Case
from fedaccord.privacy import engines

LEARNING_RATE = 1e-3
warnings.filterwarnings("ignore", module=r"opacus|torch\.nn")  # of Opacus about its own hooks


class Way(Protocol):
    """One way of a step."""

    def step(self) -> None:
        """Take a step."""
        ...

    def total(self) -> torch.Tensor:
        """Compute what the update is made of, float64 (d,), without an update."""
        ...

    def clear(self) -> None:
        """Free what a step leaves behind; it is not timed."""
        ...


def trained(model: nn.Module) -> list[nn.Parameter]:
    """List the weights that train."""
    return [p for p in model.parameters() if p.requires_grad]


def _flat(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.detach().flatten().double() for part in parts])


class Plain:
    """Training without privacy: the mean loss, in float32."""

    def __init__(self, case: Case, _: float) -> None:
        self._model = case.build().train()
        self._inputs, self._labels = case.records()
        self._trained = trained(self._model)
        self._sgd = torch.optim.SGD(self._trained, LEARNING_RATE)

    def _backward(self) -> None:
        self._sgd.zero_grad()
        functional.cross_entropy(self._model(self._inputs), self._labels).backward()

    def step(self) -> None:
        """See `Way.step`."""
        self._backward()
        self._sgd.step()

    def total(self) -> torch.Tensor:
        """See `Way.total`."""
        self._backward()
        return _flat([p.grad for p in self._trained if p.grad is not None]) * len(self._inputs)

    def clear(self) -> None:
        """See `Way.clear`."""
        self._sgd.zero_grad()


class Opacus:
    """A mode of Opacus with its own optimiser, in float32, noise_multiplier 0."""

    def __init__(self, case: Case, clip: float, mode: str) -> None:
        model = case.build().train()
        self._trained = trained(model)
        self._inputs, self._labels = case.records()
        self._model: Any = wrap_model(
            model,
            grad_sample_mode=mode,
            loss_reduction="mean",
            **({"use_ghost_clipping": True, "max_grad_norm": clip} if mode == "ghost" else {}),
        )
        kind: Any = get_optimizer_class("flat", False, grad_sample_mode=mode)
        self._optimizer = kind(
            torch.optim.SGD(self._trained, LEARNING_RATE),
            noise_multiplier=0.0,
            max_grad_norm=clip,
            expected_batch_size=case.batch,
        )
        self._loss: Any = nn.CrossEntropyLoss()
        if mode == "ghost":
            self._loss = DPLossFastGradientClipping(self._model, self._optimizer, self._loss)

    def _backward(self) -> None:
        self._optimizer.zero_grad()
        self._loss(self._model(self._inputs), self._labels).backward()

    def step(self) -> None:
        """See `Way.step`."""
        self._backward()
        self._optimizer.step()

    def total(self) -> torch.Tensor:
        """See `Way.total`."""
        self._backward()
        self._optimizer.pre_step()
        made: list[Any] = [vars(p)["summed_grad"] for p in self._trained]
        return _flat(made)

    def clear(self) -> None:
        """See `Way.clear`."""
        self._optimizer.zero_grad(set_to_none=True)


class Ours:
    """An engine of FedAccord over a full page, and the update from its float64 sum."""

    def __init__(self, case: Case, clip: float, engine: str, precision: str = "float32") -> None:
        self._model = case.build().to(engines.PRECISIONS[precision])
        self._trained = trained(self._model)
        self._inputs, self._labels = case.records()
        self._keep = torch.ones(case.batch, dtype=torch.bool)
        self._engine, self._clip = engines.make(engine, self._model), clip
        self._sgd = torch.optim.SGD(self._trained, LEARNING_RATE)

    def step(self) -> None:
        """See `Way.step`."""
        mean, offset = self.total().div_(len(self._inputs)).to(self._trained[0].dtype), 0
        for parameter in self._trained:
            part = mean[offset : offset + parameter.numel()]
            offset += parameter.numel()
            parameter.grad = part.view_as(parameter)
        self._sgd.step()
        self._sgd.zero_grad()

    def total(self) -> torch.Tensor:
        """See `Way.total`."""
        return self._engine.clipped_sum(self._inputs, self._labels, self._clip, self._keep)

    def clear(self) -> None:
        """See `Way.clear`; an engine leaves nothing behind."""


PLAIN, BOOKKEEPING = "plain", "bookkeeping"
WAYS: dict[str, Callable[[Case, float], Way]] = {
    PLAIN: Plain,
    "Opacus hooks": lambda case, clip: Opacus(case, clip, "hooks"),
    "Opacus functorch": lambda case, clip: Opacus(case, clip, "functorch"),
    "Opacus ew": lambda case, clip: Opacus(case, clip, "ew"),
    "Opacus ghost": lambda case, clip: Opacus(case, clip, "ghost"),
    "hooks": lambda case, clip: Ours(case, clip, "hooks"),
    "ghost (float64)": lambda case, clip: Ours(case, clip, "ghost", "float64"),
    BOOKKEEPING: lambda case, clip: Ours(case, clip, "bookkeeping"),
    "bookkeeping (float64)": lambda case, clip: Ours(case, clip, "bookkeeping", "float64"),
}


def make(way: str, case: Case, clip: float) -> Way:
    """Set up a way of a step."""
    return WAYS[way](case, clip)


def one_by_one(case: Case) -> tuple[float, torch.Tensor]:
    """Compute the clipped sum in float64 by plain autograd, one record at a time.

    Returns:
        The clip, which is the median norm, so that half of the records are clipped; and the sum.
    """
    model = case.build().double().train()
    inputs, labels = case.records()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    weights = trained(model)

    def gradient(row: int) -> torch.Tensor:
        loss = functional.cross_entropy(model(inputs[row : row + 1]), labels[row : row + 1])
        return _flat(list(torch.autograd.grad(loss, weights)))

    norms = torch.stack([gradient(i).norm() for i in range(case.batch)])
    clip = float(norms.median())
    total = torch.zeros(sum(p.numel() for p in weights), dtype=torch.float64)
    for row in range(case.batch):
        total += gradient(row) * min(1.0, clip / float(norms[row]))
    return clip, total
