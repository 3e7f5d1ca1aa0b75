"""Per-subject clipping in float64, and the optimiser that releases a step's clipped sum."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from fedaccord.privacy.noise import Source
from fedaccord.privacy.plan import PrivacyPlan


def clipped_sum(
    gradients: list[torch.Tensor], max_grad_norm: float, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum per-subject gradients, each scaled to an L2 norm of at most `max_grad_norm`.

    One subject moves the result by at most `max_grad_norm` up to float64 rounding, whatever the
    gradients hold (DP-SGD: Abadi et al. 2016, algorithm 1).

    | a subject's gradient | contributes |
    |---|---|
    | any coordinate infinite or NaN | zero |
    | norm above the bound | itself, scaled to the bound |
    | norm at most the bound | itself |
    | of a row that is not kept | zero |
    | (no subjects) | a sum of zeros |

    Args:
        gradients: one tensor a parameter, each (batch, *shape of the parameter), any float dtype.
        max_grad_norm: L2 bound over all parameters together, above 0.
        keep: bool (batch,), which rows are a subject's; all by default.

    Returns:
        float64 (d,), d the number of weights, in the order of `gradients`.
    """
    rows = [gradient.reshape(len(gradient), _width(gradient)) for gradient in gradients]
    norms = torch.stack([torch.linalg.vector_norm(r, dim=1, dtype=torch.float64) for r in rows])
    factor = factors(torch.linalg.vector_norm(norms, dim=0), max_grad_norm, keep)[:, None]
    return torch.cat(  # `where` and not times 0, since 0 * inf is NaN
        [(torch.where(factor > 0, r, torch.zeros_like(r)).double() * factor).sum(0) for r in rows]
    )


def factors(
    norms: torch.Tensor, max_grad_norm: float, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """Work out what each gradient is multiplied by, from its norm (batch,): at most 1.

    Zero where the norm is not finite, as where any coordinate is not, or the row is not kept.
    """
    scale = max_grad_norm / torch.clamp(norms, min=max_grad_norm)
    used = torch.isfinite(norms) if keep is None else torch.isfinite(norms) & keep.to(norms.device)
    return torch.where(used, scale, torch.zeros_like(scale))


def _width(gradient: torch.Tensor) -> int:
    """Count the weights of one parameter, also when the batch is empty."""
    return int(np.prod(gradient.shape[1:], dtype=np.int64))


class SubjectOptimizer:
    """A torch optimiser that is fed by the plan alone, in the plan's order.

    Clipped sum over a step's pages -> noise on the finished sum -> grid -> divide by the declared
    normaliser -> the wrapped optimiser. Each step takes its own `Source`; torch's generators are
    not used, and there is no dynamic scale between clip and noise.
    """

    def __init__(self, optimizer: Optimizer, plan: PrivacyPlan) -> None:
        self._optimizer = optimizer
        self._plan = plan
        self._parameters: list[nn.Parameter] = [
            p for group in optimizer.param_groups for p in group["params"]
        ]
        self.discard()

    def add(self, total: torch.Tensor) -> None:
        """Add one page's clipped sum, float64 (d,), to the step's."""
        self._total += total

    def discard(self) -> None:
        """Drop the step's sum: what follows is a step of noise alone."""
        self._total = torch.zeros(sum(p.numel() for p in self._parameters), dtype=torch.float64)

    def noisy_step(self, source: Source, then: Callable[[], None] | None = None) -> torch.Tensor:
        """Release the step's sum under the plan and let the wrapped optimiser use it.

        Args:
            source: of the step's noise.
            then: called when the released mean stands in the gradients; it may add to them what
                does not depend on records that are not released.

        Returns:
            What was released: the private mean, float64 (d,).
        """
        mean = torch.from_numpy(self._plan.release(self._total.numpy(), source))
        self.discard()
        offset = 0
        for parameter in self._parameters:
            part = mean[offset : offset + parameter.numel()]
            offset += parameter.numel()
            parameter.grad = part.view_as(parameter).to(parameter.device, parameter.dtype)
        if then is not None:
            then()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return mean
