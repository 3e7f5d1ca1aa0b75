"""Engines: how the clipped sum of a page of records is computed, by Opacus' two methods.

A page is a batch of fixed, public shape. Records that are not kept leave their rows empty (zeros,
class 0), so that what a row computes depends on the row's record and place alone, to the last bit:
it does not depend on how many others there are. `privacy.sampling.pages` draws the places.

| engine | how | pages in |
|---|---|---|
| "hooks" | makes each record's gradient, then clips and sums in float64 | all of PRECISIONS |
| "ghost" | finds norms in a first backward pass, sums in a second one | float64 |
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from torch import nn
from torch.nn import functional

from fedaccord.errors import AccordError
from fedaccord.privacy.clipping import clipped_sum, factors

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Page = tuple[torch.Tensor, torch.Tensor]  # inputs and labels, a row a place
Keep = torch.Tensor | None  # bool (n,): which rows hold a record; None: all
PRECISIONS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
ROUGHNESS = 2.0**-20  # of ghost norms: below this share of what was summed, a norm is rounding

# Inputs need no gradient, which Opacus' hooks are told by torch at every step; they are right.
warnings.filterwarnings("ignore", message="Full backward hook is firing")


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


class _Engine(ABC):
    """What the two engines share: a pass over a page, and a model left clean after it."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self._hooked = self._hook(model).train()
        self._loss = loss
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        first = next(model.parameters())
        self._place: dict[str, Any] = {"device": first.device, "dtype": first.dtype}

    @abstractmethod
    def _hook(self, model: nn.Module) -> Any:
        """Put Opacus' hooks on the model."""

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
            return self._page_sum(_rows(inputs, labels, keep), max_grad_norm, keep).cpu()
        finally:
            self._forget()

    def _losses(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Run the model forwards; each record's loss, float64 (n,)."""
        place = self._place if inputs.is_floating_point() else {"device": self._place["device"]}
        outputs = self._hooked(inputs.to(**place))
        losses = self._loss(outputs.to(torch.float64), labels.to(self._place["device"]))
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

    def _forget(self) -> None:
        """Take off the model what a pass left there, also one that was cut short.

        Opacus keeps activations on each layer and a count of forward passes on each parameter.
        Left there, they make every later page raise as well: one record would silence all others.
        """
        for module in self._hooked.modules():
            for mark in ("activations", "max_batch_len"):
                vars(module).pop(mark, None)
        for parameter in self._hooked.parameters():
            parameter.grad = None
            if not parameter.requires_grad:
                continue
            vars(parameter).update(grad_sample=None, _forward_counter=0)
            for mark in ("_current_grad_sample", "_norm_sample"):
                vars(parameter).pop(mark, None)

    def close(self) -> None:
        """See `Engine.close`."""
        self._forget()
        self._hooked.cleanup()


class HooksEngine(_Engine):
    """Opacus' GradSampleModule: a gradient for each record, as large as the page."""

    def _hook(self, model: nn.Module) -> Any:
        return GradSampleModule(model, loss_reduction="sum")

    def _gradients(self, inputs: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
        """Each record's gradient, one tensor (n, ...) a parameter; zeros where none arrived."""
        self._losses(inputs, labels).sum().backward()
        found = []
        for name, parameter in self._trained.items():
            made: Any = vars(parameter).get("grad_sample")
            if made is None:
                made = parameter.new_zeros((len(inputs), *parameter.shape))
            if isinstance(made, list):
                raise ValueError(f"{name} has {len(made)} gradients for one pass")
            self._each(name, made, len(inputs))
            found.append(made)
        return found

    def _page_norms(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows = [g.flatten(1).double() for g in self._gradients(inputs, labels)]
        return torch.linalg.vector_norm(torch.cat(rows, dim=1), dim=1)

    def _page_sum(self, page: Page, max_grad_norm: float, keep: Keep) -> torch.Tensor:
        return clipped_sum(self._gradients(*page), max_grad_norm, keep)


class GhostEngine(_Engine):
    """Opacus' ghost clipping: norms first, then one backward pass over weighted losses."""

    def _hook(self, model: nn.Module) -> Any:
        for name, module in model.named_modules():
            own = [p for p in module.parameters(recurse=False) if p.requires_grad]
            if own and type(module) not in _GhostModule.NORM_SAMPLERS:
                known = ", ".join(sorted(kind.__name__ for kind in _GhostModule.NORM_SAMPLERS))
                raise AccordError(
                    f'privacy.engine = "ghost": {name or "the model"} is a '
                    f"{type(module).__name__}, whose norms it does not know (it knows {known}). "
                    'Choose the engine "hooks".'
                )
        return _GhostModule(model, loss_reduction="sum", use_ghost_clipping=True)

    def _norms(self, losses: torch.Tensor, graph: bool) -> torch.Tensor:
        """Run backwards once; the norm of each record's gradient, float64 (n,)."""
        losses.sum().backward(retain_graph=graph)
        squares = torch.zeros_like(losses)
        for name, parameter in self._trained.items():
            made: Any = vars(parameter).get("_norm_sample")
            if made is not None:
                self._each(name, made, len(losses))
                squares += made.square()
        return squares.sqrt().detach()

    def _page_norms(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self._norms(self._losses(inputs, labels), graph=False)

    def _page_sum(self, page: Page, max_grad_norm: float, keep: Keep) -> torch.Tensor:
        try:
            masks = _generators(self._place["device"])
            losses = self._losses(*page)
            norms = self._norms(losses, graph=True)
            weights = factors(norms, max_grad_norm, keep)
            known = [p for p in self._trained.values() if "_norm_sample" in vars(p)]
            self._hooked.disable_hooks()
            if not torch.isfinite(norms).all():
                # Left in, such a row would turn the others into NaN (0 * inf). The second run has
                # the first one's dropout masks, or its gradients would not have these norms.
                masks()
                losses = self._losses(*_rows(*page, torch.isfinite(norms).cpu()))
            made = torch.autograd.grad((weights * losses).sum(), known, allow_unused=True)
            return self._laid_out(known, made)
        finally:
            self._hooked.enable_hooks()

    def _laid_out(self, known: Sequence[nn.Parameter], made: Any) -> torch.Tensor:
        """Put gradients one after another; zero for a parameter whose norms nobody bounded."""
        total, offset = self._zeros(), 0
        by_parameter = dict(zip(map(id, known), made, strict=True))
        for parameter in self._trained.values():
            part = by_parameter.get(id(parameter))
            if part is not None:
                total[offset : offset + parameter.numel()] = part.detach().flatten().cpu()
            offset += parameter.numel()
        if not torch.isfinite(total).all():
            raise ValueError("the clipped sum is not finite")
        return total


def _rows(
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


def _generators(device: torch.device) -> Callable[[], None]:
    """Note torch's generators; the result puts them back."""
    cpu = torch.get_rng_state()
    other = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def back() -> None:
        torch.set_rng_state(cpu)
        if other is not None:
            torch.cuda.set_rng_state(other, device)

    return back


Norms = dict[torch.Tensor, torch.Tensor]  # by parameter


def _norm_sampler(layer: nn.Module, activations: list[torch.Tensor], backprops: Any) -> Norms:
    """Norm of each record's gradient of a layer's parameters, never below what rounding may hide.

    Where terms cancel, a norm that is small against them is rounding, and the second pass rounds
    otherwise: its gradient could be any number of times longer. There the bound
    `ROUGHNESS x |activations| |backprops|` (Cauchy and Schwarz) stands in for the norm.
    """
    records = len(backprops)
    back = torch.linalg.vector_norm(backprops.reshape(records, -1), dim=1)
    first = activations[0]
    summed = backprops[0].numel() if records else 0
    if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        size = torch.linalg.vector_norm(first.reshape(records, -1), dim=1)
    else:  # an embedding's is a one, a normalised input is of this size
        size = torch.full_like(back, float(summed) ** 0.5)
    if isinstance(layer, nn.Linear) and backprops.dim() == 2:
        exact: Norms = {layer.weight: size * back}
        if layer.bias is not None:
            exact[layer.bias] = back
        return exact
    floor = ROUGHNESS * torch.maximum(size, torch.ones_like(size)) * back
    sampler = GradSampleModule.GRAD_SAMPLERS[type(layer)]
    if isinstance(layer, nn.Linear) and _gram_is_smaller(layer, backprops):
        made = _gram(layer, first, backprops)
    elif isinstance(layer, nn.Embedding):
        made = GradSampleModuleFastGradientClipping.NORM_SAMPLERS[nn.Embedding](
            layer, [first.contiguous()], backprops
        )
    else:
        made = {
            parameter: torch.linalg.vector_norm(gradient.reshape(records, -1), dim=1)
            for parameter, gradient in sampler(layer, activations, backprops).items()
        }
    return {parameter: torch.maximum(norm, floor) for parameter, norm in made.items()}


def _gram_is_smaller(layer: nn.Linear, backprops: torch.Tensor) -> bool:
    """Whether positions squared are fewer numbers than the layer has weights."""
    positions = int(np.prod(backprops.shape[1:-1], dtype=np.int64))
    return positions**2 < layer.weight.numel()


def _gram(layer: nn.Linear, activations: torch.Tensor, backprops: torch.Tensor) -> Norms:
    """Norms of a linear layer over positions, from products of positions (Li et al. 2022, 3)."""
    records = len(backprops)
    a = activations.reshape(records, -1, activations.shape[-1])
    b = backprops.reshape(records, -1, backprops.shape[-1])
    products = torch.einsum("nik,njk->nij", b, b)
    weight = (products * torch.einsum("nik,njk->nij", a, a)).sum(dim=(1, 2))
    found = {layer.weight: weight.clamp(min=0).sqrt()}
    if layer.bias is not None:
        found[layer.bias] = products.sum(dim=(1, 2)).clamp(min=0).sqrt()
    return found


class _GhostModule(GradSampleModuleFastGradientClipping):  # type: ignore[misc]
    """Opacus' module with our norms, so that every layer refuses to be used twice."""

    NORM_SAMPLERS: ClassVar[dict[type[nn.Module], Any]] = dict.fromkeys(
        (
            nn.Linear,
            nn.Conv1d,
            nn.Conv2d,
            nn.Conv3d,
            nn.GroupNorm,
            nn.LayerNorm,
            nn.Embedding,
        ),
        _norm_sampler,
    )


ENGINES: dict[str, type[HooksEngine] | type[GhostEngine]] = {
    "auto": HooksEngine,
    "hooks": HooksEngine,
    "ghost": GhostEngine,
}


def make(engine: str, model: nn.Module, loss: Loss = cross_entropy) -> Engine:
    """Hook an engine to a model; the model's dtype is the precision of its passes.

    Args:
        engine: "hooks" or "ghost".
        model: of any of PRECISIONS; put into training mode.
        loss: from outputs, as float64, and labels to each record's loss (n,).

    Raises:
        AccordError: a layer that the engine cannot take apart.
    """
    try:
        return ENGINES[engine](model, loss)
    except NotImplementedError as fault:  # Opacus' word for a layer that it cannot take apart
        first = str(fault).splitlines()[0]
        raise AccordError(f"model: {first} Choose a model without it.") from None
