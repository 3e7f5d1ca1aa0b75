"""Plain autograd, without any engine: what the probe holds engines to."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fedaccord.errors import AccordError
from fedaccord.privacy.passes import Loss

SEEDS = (1, 2, 3)  # of dropout's masks and other draws in a forward pass


class Plain:
    """A copy of the model in float64 and training mode, run by plain autograd."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self.model = copy.deepcopy(model).double().train()
        self.loss = loss
        self.trained = [p for p in self.model.parameters() if p.requires_grad]

    def run(
        self, inputs: torch.Tensor, labels: torch.Tensor, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute outputs and each record's loss (n,) with the draws of a seed."""
        torch.manual_seed(seed)
        try:
            outputs = self.model(inputs)
            losses = self.loss(outputs.double(), labels)
        except Exception as fault:
            raise raised(fault) from None
        if losses.shape != (len(inputs),):
            raise AccordError(
                f"model: the loss has shape {list(losses.shape)} for {len(inputs)} records, so it "
                "couples them. Give each record its own (reduction none)."
            )
        return outputs, losses

    def gradient(self, total: torch.Tensor, again: bool = False) -> torch.Tensor:
        """Flatten the gradient (d,) of a scalar; zero for parameters that it does not reach."""
        if not total.requires_grad:
            raise AccordError(
                "model: the loss does not depend on any trained parameter. Train one."
            )
        found = torch.autograd.grad(total, self.trained, retain_graph=again, allow_unused=True)
        parts = zip(found, self.trained, strict=True)
        return torch.cat(
            [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in parts]
        )

    def gradients(self, inputs: torch.Tensor, labels: torch.Tensor, seed: int) -> torch.Tensor:
        """Compute each record's gradient (n, d), in one batch."""
        losses = self.run(inputs, labels, seed)[1]
        return torch.stack([self.gradient(loss, again=True) for loss in losses])

    def draws(self, inputs: torch.Tensor, labels: torch.Tensor) -> bool:
        """Tell whether a forward pass draws random numbers."""
        with torch.no_grad():
            runs = [self.run(inputs[:8], labels[:8], seed)[1] for seed in SEEDS]
        return any(not torch.equal(runs[0], other) for other in runs[1:])

    def without_dropout(self) -> Plain:
        """Copy it with every dropout layer at rate 0."""
        other = Plain(self.model, self.loss)
        for module in other.model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
        return other

    def check_repeats(self, inputs: torch.Tensor, labels: torch.Tensor) -> None:
        """Refuse a pass that keeps a state, or draws from a generator that is not torch's."""
        kept = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        with torch.no_grad():
            one, other = (self.run(inputs[:8], labels[:8], 1)[1] for _ in range(2))
        for name, buffer in self.model.named_buffers():
            if not torch.equal(buffer, kept[name]):
                raise AccordError(
                    f"model: {name} is a buffer that a forward pass changes, so it would carry "
                    "records from step to step. Choose a model without it."
                )
        if not torch.equal(one, other):
            raise AccordError(
                "model: two equal passes differ: it keeps a state, or draws from a generator that "
                "is not torch's. Use torch's alone."
            )

    def check_once(self, inputs: torch.Tensor, labels: torch.Tensor) -> None:
        """Refuse a layer that a forward pass uses twice."""
        uses: dict[str, int] = {}

        def count(name: str) -> None:
            uses[name] = uses.get(name, 0) + 1

        hooks = [
            module.register_forward_hook(lambda *_, name=name: count(name))
            for name, module in self.model.named_modules()
            if any(p.requires_grad for p in module.parameters(recurse=False))
        ]
        with torch.no_grad():
            self.run(inputs[:2], labels[:2], 1)
        for hook in hooks:
            hook.remove()
        for name, times in uses.items():
            if times > 1:
                raise AccordError(
                    f'privacy.engine = "ghost": {name} is used {times} times in a forward pass, '
                    'and its norm is then not known. Choose the engine "hooks".'
                )


def raised(fault: Exception) -> AccordError:
    """Say that the model or the loss raised on synthetic records, which are nobody's."""
    first = (str(fault) or "nothing said").splitlines()[0][:200]
    return AccordError(
        f"model: a pass over synthetic records raised {type(fault).__name__}: {first}. "
        "Mend the model, or the task's public inputs."
    )
