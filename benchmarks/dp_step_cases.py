"""The models of `benchmarks.dp_step`, with random records and the floors of their cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fedaccord.models.build import build
from fedaccord.simulations.credit import Credit
from fedaccord.tasks import TaskSpec


@dataclass(frozen=True)
class Case:
    """A model by its name and options in an accord, and a batch for it.

    Attributes:
        name: in the table and for `--only`.
        model: in the registry.
        spec: the shape of its records.
        options: of the model.
        batch: records in a step.
        floor: the highest ratio to a plain step that book-keeping should have; 0 for none.
    """

    name: str
    model: str
    spec: TaskSpec
    options: Mapping[str, int | float | bool | str]
    batch: int
    floor: float = 0.0

    def build(self) -> nn.Module:
        """Build the model in float32, with the same weights every time."""
        return build(self.model, self.spec, self.options, seed=1)

    def records(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw inputs (batch, ...) and labels (batch,), the same every time."""
        chance = torch.Generator().manual_seed(2)
        size = (self.batch, *self.spec.shape)
        labels = torch.randint(len(self.spec.classes), (self.batch,), generator=chance)
        if self.spec.vocabulary:  # 0 is no token
            return torch.randint(1, self.spec.vocabulary, size, generator=chance), labels
        return torch.rand(size, generator=chance), labels


def _spec(
    shape: tuple[int, ...],
    classes: int,
    vocabulary: int = 0,
    sequence: tuple[int, int] | None = None,
) -> TaskSpec:
    features = tuple(f"f{i}" for i in range(shape[0]))
    labels = tuple(f"class {i}" for i in range(classes))
    return TaskSpec("random", features, labels, {}, "drawn at random", shape, vocabulary, sequence)


TEXT = _spec((64,), 2, vocabulary=30_522)
Options = dict[str, int | float | bool | str]
MINILM: Options = {"width": 384, "layers": 6, "heads": 12, "ratio": 4.0}
FULL: Options = {"tuning": "full"}
FROZEN: Options = {"tuning": "frozen-embeddings"}
LORA: Options = {"tuning": "lora", "lora_rank": 8}
LONG: Options = {"tokens": "steps", "width": 128, "layers": 4, "heads": 4}

CASES = (
    Case("cnn", "cnn2d", _spec((1, 28, 28), 10), {}, 64, 1.40),
    Case("resnet18", "resnet18", _spec((3, 32, 32), 10), {}, 16, 1.50),
    Case("credit", "transformer", Credit.spec, {"tokens": "steps"}, 250, 1.30),  # as its accord's
    Case("long table", "transformer", _spec((260,), 2, sequence=(64, 4)), LONG, 64, 1.30),
    Case("minilm full", "text", TEXT, MINILM | FULL, 16, 1.45),
    Case("minilm frozen", "text", TEXT, MINILM | FROZEN, 16, 1.40),
    Case("minilm lora", "text", TEXT, MINILM | LORA, 16, 1.05),
)
