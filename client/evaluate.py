"""Evaluation at a site: group counts leave it, rows and scores do not."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from fedaccord.fairness import counts
from fedaccord.privacy import engines
from fedaccord.tasks import Inputs, Records, TaskSpec

BATCH = 256


def predict(model: nn.Module, inputs: Inputs) -> counts.Counts:
    """Predict the class of each record: (n, *shape) to int64 (n,)."""
    model.eval()
    device = next(model.parameters()).device
    parts = [np.zeros(0, np.int64)]
    with torch.no_grad():
        for start in range(0, len(inputs), BATCH):
            logits = model(torch.from_numpy(inputs[start : start + BATCH]).to(device))
            parts.append(logits.argmax(dim=1).cpu().numpy())
    return np.concatenate(parts)


def group_counts(
    model: nn.Module, records: Records | None, spec: TaskSpec, attributes: list[str]
) -> Mapping[str, counts.Counts]:
    """Count evaluation subjects by group, label and prediction, one record of each subject.

    Args:
        model: inputs (n, ...) to logits (n, classes).
        records: the site's evaluation records, or None where they cannot be read; of a subject with
            several the first one counts.
        spec: the task, for the groups of each attribute.
        attributes: the sensitive attributes that the accord audits.

    Returns:
        For each attribute int64 (groups, labels, predictions).
    """
    classes = len(spec.classes)
    if records is None:
        shapes = {name: (len(spec.attributes[name]), classes, classes) for name in attributes}
        return {name: np.zeros(shape, np.int64) for name, shape in shapes.items()}
    _, first = np.unique(records.subjects, return_index=True)
    predictions = predict(model, records.inputs[first])
    return {
        name: counts.count(
            records.groups[name][first],
            records.labels[first],
            predictions,
            n_groups=len(spec.attributes[name]),
            n_classes=classes,
        )
        for name in attributes
    }


def mean_loss(model: nn.Module, records: Records) -> float:
    """Average the cross-entropy in nats of a model over records; 0 for none."""
    model.eval()
    device = next(model.parameters()).device
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(records.labels), BATCH):
            inputs = torch.from_numpy(records.inputs[start : start + BATCH]).to(device)
            labels = torch.from_numpy(records.labels[start : start + BATCH]).to(device)
            total += float(engines.cross_entropy(model(inputs), labels).double().sum())
    return total / max(1, len(records.labels))
