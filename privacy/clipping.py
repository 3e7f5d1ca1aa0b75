"""Per-subject clipping in float64, inside Opacus' optimiser."""

from __future__ import annotations

import numpy as np
import torch
from opacus.optimizers import DPOptimizer
from torch.optim import Optimizer

from fedaccord.privacy.noise import Source
from fedaccord.privacy.plan import PrivacyPlan


def clipped_sum(gradients: list[torch.Tensor], max_grad_norm: float) -> torch.Tensor:
    """Sum per-subject gradients, each scaled to an L2 norm of at most `max_grad_norm`.

    One subject moves the result by at most `max_grad_norm` up to float64 rounding, whatever the
    gradients hold (DP-SGD: Abadi et al. 2016, algorithm 1).

    | a subject's gradient | contributes |
    |---|---|
    | any coordinate infinite or NaN | zero |
    | norm above the bound | itself, scaled to the bound |
    | norm at most the bound | itself |
    | (no subjects) | a sum of zeros |

    Args:
        gradients: one tensor a parameter, each (batch, *shape of the parameter), any float dtype.
        max_grad_norm: L2 bound over all parameters together, above 0.

    Returns:
        float64 (d,), d the number of weights, in the order of `gradients`.
    """
    flat = torch.cat([g.reshape(len(g), _width(g)) for g in gradients], dim=1)
    flat = flat.to(torch.float64)  # (batch, d); float32's largest square still fits
    finite = torch.isfinite(flat).all(dim=1, keepdim=True)
    flat = torch.where(finite, flat, torch.zeros_like(flat))  # 0 * inf would be NaN
    norms = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    factor = max_grad_norm / torch.clamp(norms, min=max_grad_norm)
    return (flat * factor).sum(dim=0)


def _width(gradient: torch.Tensor) -> int:
    """Count the weights of one parameter, also when the batch is empty."""
    return int(np.prod(gradient.shape[1:], dtype=np.int64))


class SubjectOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' optimiser with the plan's clip, noise and normaliser in the plan's order.

    Gradient of each subject -> non-finite to zero -> clip -> sum -> noise on the finished sum ->
    grid -> divide by the declared normaliser -> the wrapped optimiser. Each step takes its own
    `Source`; torch's generators are not used.
    """

    def __init__(self, optimizer: Optimizer, plan: PrivacyPlan) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.max_grad_norm,
            expected_batch_size=None,
            loss_reduction="sum",
        )
        self._plan = plan
        self._total = self._zeros()

    def _zeros(self) -> torch.Tensor:
        return torch.zeros(sum(p.numel() for p in self.params), dtype=torch.float64)

    def accumulate(self, records: int) -> None:
        """Add the clipped gradients of one micro-batch to the step's sum and forget them.

        Raises:
            ValueError: a parameter without one gradient for each of the `records`, as where a layer
                folds a second axis into the batch; clipping would bound parts of a record.
        """
        gradients = self.grad_samples
        if any(len(gradient) != records for gradient in gradients):
            raise ValueError("a layer does not have one gradient for each record")
        self._total += clipped_sum(gradients, self.max_grad_norm).cpu()
        self.forget()

    def forget(self) -> None:
        """Drop per-subject gradients that were not added, e.g. after a data error."""
        for parameter in self.params:
            parameter.grad_sample = None
            parameter.grad = None

    def discard(self) -> None:
        """Drop the step's sum: what follows is a step of noise alone."""
        self.forget()
        self._total = self._zeros()

    def noisy_step(self, source: Source) -> None:
        """Release the step's sum under the plan and let the wrapped optimiser use it."""
        mean = torch.from_numpy(self._plan.release(self._total.numpy(), source))
        self._total = self._zeros()
        offset = 0
        for parameter in self.params:
            part = mean[offset : offset + parameter.numel()]
            offset += parameter.numel()
            parameter.grad = part.view_as(parameter).to(parameter.device, parameter.dtype)
        self.original_optimizer.step()
        self.original_optimizer.zero_grad()
