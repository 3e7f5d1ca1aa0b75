"""The probe raises no false alarm: models that take each record by itself pass."""

import numpy as np
import pytest
import torch
from opacus.layers import DPMultiheadAttention
from torch import nn
from torch.nn import functional

from fedaccord.models.build import build
from fedaccord.privacy import engines, probe
from fedaccord.simulations.heart import Heart
from fedaccord.tasks import TaskSpec

torch.set_num_threads(1)
WIDTH = 12
SPEC = TaskSpec("ward", tuple(f"f{i}" for i in range(WIDTH)), ("a", "b"), {}, "made for tests")


def drawn(shape, words):
    rng = np.random.default_rng(0)
    size = (probe.ROWS, *shape)
    inputs = rng.integers(0, words, size) if words else rng.uniform(-1, 1, size).astype(np.float32)
    return torch.from_numpy(inputs), torch.arange(probe.ROWS) % 2


class Text(nn.Module):
    """A text model whose position ids are laid out for each record."""

    def __init__(self):
        super().__init__()
        self.word, self.place, self.last = nn.Embedding(9, 6), nn.Embedding(5, 6), nn.Linear(6, 2)

    def forward(self, words):
        ids = torch.arange(words.shape[1], device=words.device).expand_as(words)
        return self.last(torch.tanh(self.word(words) + self.place(ids)).mean(dim=1))


class Dropping(nn.Module):
    """A perceptron with dropout that is no layer of its own."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, 6), nn.Linear(6, 2)

    def forward(self, rows):
        return self.two(functional.dropout(torch.tanh(self.one(rows)), 0.3, self.training))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.see, self.last = DPMultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)

    def forward(self, rows):
        return self.last(self.see(rows, rows, rows)[0].mean(dim=1))


GOOD = {
    "cnn1d": (lambda: build("cnn1d", SPEC, {}, 0), (WIDTH,), 0),
    "mlp": (lambda: build("mlp", SPEC, {}, 0), (WIDTH,), 0),
    "image": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, padding=1),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, groups=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 2),
        ),
        (3, 8, 8),
        0,
    ),
    "layernorm": (
        lambda: nn.Sequential(nn.Linear(WIDTH, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 2)),
        (WIDTH,),
        0,
    ),
    "text": (Text, (5,), 9),
    "attention": (Attention, (5, 8), 0),
    "dropout": (
        lambda: nn.Sequential(
            nn.Linear(WIDTH, 20), nn.Dropout(0.4), nn.ReLU(), nn.Dropout(0.2), nn.Linear(20, 2)
        ),
        (WIDTH,),
        0,
    ),
    "functional dropout": (
        Dropping,
        (WIDTH,),
        0,
    ),
    "frozen first layer": (
        lambda: nn.Sequential(
            nn.Linear(WIDTH, 6).requires_grad_(False), nn.ReLU(), nn.Linear(6, 2)
        ),
        (WIDTH,),
        0,
    ),
}


@pytest.mark.parametrize(("make", "shape", "words"), GOOD.values(), ids=GOOD)
def test_models_that_take_each_record_by_itself_pass(make, shape, words):
    torch.manual_seed(0)
    model, (inputs, labels) = make(), drawn(shape, words)
    probe.probe(model, "bookkeeping", "float64", engines.cross_entropy, inputs, labels)
    plain = probe.Plain(model, engines.cross_entropy)
    plain.check_once(inputs if words else inputs.double(), labels)
    for engine in ("hooks", "ghost"):  # what a probe asks of the engine; the rest is the model's
        probe.refuse_by_name(model, engine)
        probe.check_gradients(plain, engine, inputs if words else inputs.double(), labels)
        probe.check_rounding(
            model, engine, "float64", engines.cross_entropy, (inputs, labels), None
        )


@pytest.mark.parametrize("engine", ["bookkeeping", "hooks"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("make", "shape", "words"), GOOD.values(), ids=GOOD)
def test_in_coarser_precisions_the_same_models_round_within_the_slack(
    make, shape, words, precision, engine
):
    torch.manual_seed(0)
    records = drawn(shape, words)
    probe.check_rounding(make(), engine, precision, engines.cross_entropy, records, None)


def test_heart_passes_from_its_public_records_alone():
    task = Heart()
    inputs, labels = probe.synthetic(task)
    assert set(labels.tolist()) == set(range(len(task.spec.classes)))
    model = build("cnn1d", task.spec, {}, 0)
    probe.probe(model, "bookkeeping", "float64", engines.cross_entropy, inputs, labels)
