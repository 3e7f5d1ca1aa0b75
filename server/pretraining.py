"""Pre-training on a task's public records, before any site takes part; it costs no epsilon."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional


def pretrain(
    model: nn.Module,
    records: tuple[torch.Tensor, torch.Tensor],
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> float:
    """Train a model in place on public records with Adam.

    Args:
        model: changed in place.
        records: public inputs (n, ...) and labels int64 (n,).
        steps: of the optimiser.
        learning_rate: of Adam.
        batch_size: records a step, drawn with replacement.
        seed: of the draws, and of dropout.
        on_step: called after every step.

    Returns:
        Share of the public records that it then classifies right, 0 to 1.
    """
    inputs, labels = records
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, learning_rate)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model.train()
        for _ in range(steps):
            rows = torch.randint(len(labels), (batch_size,), generator=generator)
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimizer.step()
            on_step()
    with torch.no_grad():
        guesses = [model.eval()(part).argmax(1) for part in inputs.split(256)]
    return float((torch.cat(guesses) == labels).double().mean())
