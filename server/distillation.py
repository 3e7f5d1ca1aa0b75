"""Distillation: a student learns what the round's site models agree on, from public inputs."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedaccord.accord import DistillationSection
from fedaccord.models.build import put
from fedaccord.server.gates import Weights

ROWS = 256  # of the proxy set that pass at once


def teach(teacher: nn.Module, weights: list[Weights], proxy: torch.Tensor) -> torch.Tensor:
    """Average the class probabilities of the site models on the proxy set (FedDF, Lin et al. 2020).

    Args:
        teacher: a model of the global architecture; its weights are overwritten.
        weights: one set per accepted site; each was released under its site's plan.
        proxy: public inputs (n, ...).

    Returns:
        float32 (n, classes), rows sum to 1.
    """
    total = torch.zeros(())
    with torch.no_grad():
        for site in weights:
            put(teacher, {k: torch.from_numpy(np.array(v)) for k, v in site.items()})
            logits = [teacher.eval()(part) for part in proxy.split(ROWS)]
            total = total + functional.softmax(torch.cat(logits), dim=1)
    return total / len(weights)


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
