"""What every engine is: a way to clip and sum the gradients of a page of records.

A page is a batch of fixed, public shape. Records that are not kept leave their rows empty (zeros,
class 0), so that what a row computes depends on the row's record and place alone, to the last bit:
it does not depend on how many others there are. `privacy.sampling.pages` draws the places.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from fedaccord.privacy.parts import wide

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Page = tuple[torch.Tensor, torch.Tensor]  # inputs and labels, a row a place
Keep = torch.Tensor | None  # bool (n,): which rows hold a record; None: all
PRECISIONS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def cross_entropy(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute each record's loss: logits (n, classes), labels int64 (n,), to (n,).

    Raises:
        ValueError: a label that is no class; left to a GPU, it would end every later pass.
    """
    if bool(((labels < 0) | (labels >= outputs.shape[1])).any()):
        raise ValueError("a label is no class of the model")
    return functional.cross_entropy(outputs, labels, reduction="none")


class Engine(Protocol):
    """Norms and clipped sums of the gradients of a page's records."""

    def norms(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Compute the L2 norm of each record's gradient, float64 (n,); not finite where it is not.

        For checks on synthetic records: norms of private ones are not released.
        """
        ...

    def clipped_sum(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        max_grad_norm: float,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum the gradients of the records kept, each clipped; nothing is left on the model.

        | records | the sum |
        |---|---|
        | none, or none kept | zeros |
        | one whose gradient is not finite | without it, the others as ever |
        | one that makes the model raise | raises; the caller leaves records out till it passes |

        Args:
            inputs: (n, ...), floats of any dtype or whole numbers.
            labels: (n,).
            max_grad_norm: L2 bound of one record's gradient, above 0.
            keep: bool (n,), which rows hold a record; all by default.

        Returns:
            float64 (d,) on the CPU, d the number of trained weights.

        Raises:
            ValueError: a layer without one gradient for each record.
            Exception: whatever the model raises.
        """
        ...

    def close(self) -> None:
        """Take every hook and mark off the model."""
        ...


class PageEngine(ABC):
    """What the engines share: a pass over a page, and a model left clean after it."""

    def __init__(self, model: nn.Module, loss: Loss, measured: bool = True) -> None:
        self._measured = measured
        self._model = self._hook(model).train()
        self._loss = loss
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        first = next(model.parameters())
        self._place: dict[str, Any] = {"device": first.device, "dtype": first.dtype}

    @abstractmethod
    def _hook(self, model: nn.Module) -> Any:
        """Put hooks on the model, if any; what is returned runs it."""

    @abstractmethod
    def _page_norms(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Each record's norm on a page, float64 (n,)."""

    @abstractmethod
    def _page_sum(self, page: Page, max_grad_norm: float, keep: Keep) -> torch.Tensor:
        """Sum a page's clipped gradients, float64 (d,); rows that are not kept are empty."""

    def norms(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """See `Engine.norms`."""
        try:
            return self._page_norms(inputs, labels).cpu()
        finally:
            self._forget()

    def clipped_sum(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        max_grad_norm: float,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Engine.clipped_sum`."""
        if len(inputs) == 0:
            return self._zeros()
        try:
            return self._page_sum(kept_rows(inputs, labels, keep), max_grad_norm, keep).cpu()
        finally:
            self._forget()

    def _losses(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Run the model forwards; each record's loss, float64 (n,)."""
        place = self._place if inputs.is_floating_point() else {"device": self._place["device"]}
        outputs = self._model(inputs.to(**place))
        where = wide(outputs.device)
        losses = self._loss(outputs.to(where).to(torch.float64), labels.to(where))
        if losses.shape != (len(inputs),):
            raise ValueError(f"the loss has shape {list(losses.shape)}, not one figure a record")
        return losses

    def _zeros(self) -> torch.Tensor:
        return torch.zeros(sum(p.numel() for p in self._trained.values()), dtype=torch.float64)

    def _each(self, name: str, made: torch.Tensor, records: int) -> None:
        """Raise where a parameter does not have one gradient for each record."""
        if len(made) != records:
            raise ValueError(
                f"{name} has {len(made)} gradients for {records} records, not one gradient for "
                "each record: its layer is fed without the batch axis or folds another into it"
            )

    @abstractmethod
    def _forget(self) -> None:
        """Take off the model what a pass left there, also one that was cut short."""

    def close(self) -> None:
        """See `Engine.close`."""
        self._forget()


def kept_rows(
    inputs: torch.Tensor, labels: torch.Tensor, keep: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty the rows that are not kept; the shape stays."""
    if keep is None:
        return inputs, labels
    wide = keep.to(inputs.device).reshape(-1, *[1] * (inputs.dim() - 1))
    empty = torch.zeros_like(labels)
    return (
        torch.where(wide, inputs, torch.zeros_like(inputs)),
        torch.where(keep.to(labels.device), labels, empty),
    )
