"""Distillation: a student learns what the round's site models agree on, from public inputs."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedaccord.accord import DistillationSection
from fedaccord.models.build import put
from fedaccord.strategies.sums import OrderFreeSum
from fedaccord.strategies.updates import Weights

ROWS = 256  # of the proxy set that pass at once


class Lesson:
    """What the round's site models agree on: their class probabilities, averaged (FedDF).

    Models are heard one by one, as they arrive, and none is kept. The average has the same bits in
    whatever order they came (Lin et al. 2020, Ensemble Distillation, section 3).
    """

    def __init__(self, teacher: nn.Module, proxy: torch.Tensor, most: int) -> None:
        """Prepare for a round.

        Args:
            teacher: a model of the global architecture; its weights are overwritten.
            proxy: public inputs (n, ...).
            most: models that may be heard.
        """
        self._teacher, self.proxy, self._most = teacher, proxy, most
        self._sum: OrderFreeSum | None = None
        self._shape: tuple[int, ...] = ()
        self.heard = 0

    def hear(self, weights: Weights) -> None:
        """Take in one model, which was released under its site's plan.

        A model whose answers are not finite says nothing.
        """
        with torch.no_grad():
            put(self._teacher, {k: torch.from_numpy(np.array(v)) for k, v in weights.items()})
            logits = [self._teacher.eval()(part) for part in self.proxy.split(ROWS)]
            shares = functional.softmax(torch.cat(logits), dim=1)
        if not bool(torch.isfinite(shares).all()):
            return
        self._shape = tuple(shares.shape)
        self._sum = self._sum or OrderFreeSum(shares.numel(), 1.0, self._most)
        self._sum.add(shares.double().numpy().ravel())
        self.heard += 1

    def targets(self) -> torch.Tensor:
        """Return the average, float32 (n, classes), rows sum to 1; at least one was heard."""
        assert self._sum is not None
        mean = self._sum.total().reshape(self._shape) / self.heard
        return torch.from_numpy(mean.astype(np.float32))


def distil(
    student: nn.Module,
    proxy: torch.Tensor,
    targets: torch.Tensor,
    settings: DistillationSection,
    seed: int,
) -> tuple[float, float]:
    """Train the student in place to give the teachers' probabilities on the proxy set.

    It reads no private record, and teachers that were released under a plan, so what it learns is
    post-processing and costs no epsilon.

    Args:
        student: the compact model.
        proxy: public inputs (n, ...).
        targets: float32 (n, classes), the teachers' probabilities.
        settings: steps, batch size, learning rate.
        seed: of the order in which the proxy set is read.

    Returns:
        Kullback-Leibler divergence from the teachers in nats, mean over the proxy set, before and
        after.
    """

    def divergence() -> float:
        with torch.no_grad():
            logs = functional.log_softmax(student(proxy), dim=1)
            return float(functional.kl_div(logs, targets, reduction="batchmean"))

    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(student.parameters(), lr=settings.learning_rate)
    before = divergence()
    for _ in range(settings.steps):
        rows = torch.randint(len(proxy), (settings.batch_size,), generator=generator)
        optimizer.zero_grad()
        logs = functional.log_softmax(student(proxy[rows]), dim=1)
        functional.kl_div(logs, targets[rows], reduction="batchmean").backward()
        optimizer.step()
    return before, divergence()


def to_onnx(student: nn.Module, blank: torch.Tensor) -> bytes:
    """Export the student for whoever deploys it: "inputs" (batch, ...) to "logits".

    Args:
        student: the compact model.
        blank: inputs of the task's shape and dtype, (2, ...).

    Returns:
        An ONNX file's bytes, the batch size left open.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(
            student.eval(),
            (blank,),
            input_names=["inputs"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return program.model_proto.SerializeToString()
