"""The engine "ghost": Opacus' ghost clipping, norms in one backward pass, sums in a second one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from torch import nn

from fedaccord.errors import AccordError
from fedaccord.privacy.clipping import factors
from fedaccord.privacy.hooks import OpacusEngine
from fedaccord.privacy.passes import Keep, Page, kept_rows

ROUGHNESS = 2.0**-20  # below this share of what was summed, a norm is rounding


class GhostEngine(OpacusEngine):
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
            self._model.disable_hooks()
            if not torch.isfinite(norms).all():
                # Left in, such a row would turn the others into NaN (0 * inf). The second run has
                # the first one's dropout masks, or its gradients would not have these norms.
                masks()
                losses = self._losses(*kept_rows(*page, torch.isfinite(norms).cpu()))
            made = torch.autograd.grad((weights * losses).sum(), known, allow_unused=True)
            return self._laid_out(known, made)
        finally:
            self._model.enable_hooks()

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
