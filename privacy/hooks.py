"""The engine "hooks": Opacus makes each record's gradient; float64 clips and sums them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from opacus import GradSampleModule
from torch import nn

from fedaccord.privacy.clipping import clipped_sum
from fedaccord.privacy.passes import Keep, Page, PageEngine

# Inputs need no gradient, which Opacus' hooks are told by torch at every step; they are right.
warnings.filterwarnings("ignore", message="Full backward hook is firing")


class OpacusEngine(PageEngine):
    """An engine on Opacus' hooks, which it takes off again."""

    def _forget(self) -> None:
        """Take off the model what a pass left there, also one that was cut short.

        Opacus keeps activations on each layer and a count of forward passes on each parameter.
        Left there, they make every later page raise as well: one record would silence all others.
        """
        for module in self._model.modules():
            for mark in ("activations", "max_batch_len"):
                vars(module).pop(mark, None)
        for parameter in self._model.parameters():
            parameter.grad = None
            if not parameter.requires_grad:
                continue
            vars(parameter).update(grad_sample=None, _forward_counter=0)
            for mark in ("_current_grad_sample", "_norm_sample"):
                vars(parameter).pop(mark, None)

    def close(self) -> None:
        """See `Engine.close`."""
        self._forget()
        self._model.cleanup()


class HooksEngine(OpacusEngine):
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
