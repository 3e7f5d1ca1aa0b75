"""Book-keeping on whole models: right for every model of ours, and refused by name where not."""

from __future__ import annotations

import pytest
import torch
from opacus import GradSampleModule
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from wards import steep

from fedaccord.models.build import build
from fedaccord.privacy import engines
from fedaccord.privacy.plan import SLACK
from fedaccord.tasks import TaskSpec

torch.set_num_threads(1)
CLASSES = ("a", "b", "c")
TABLE = TaskSpec("ward", tuple(f"x{i}" for i in range(7)), CLASSES, {}, "", sequence=(3, 2))
IMAGES = TaskSpec("scans", ("pixels",), CLASSES, {}, "", shape=(2, 9, 8))
NOTES = TaskSpec("notes", ("text",), CLASSES, {}, "", shape=(6,), vocabulary=13)
TEXT = {"width": 8, "heads": 2, "layers": 1}
MODELS = {
    "mlp": (TABLE, {"hidden": 5}),
    "cnn1d": (TABLE, {"blocks": 2, "hidden": 4}),
    "transformer": (TABLE, {"width": 8, "heads": 2, "layers": 1, "pool": "cls"}),
    "transformer, steps": (TABLE, {"tokens": "steps", "width": 8, "heads": 2}),
    "cnn2d": (IMAGES, {"channels": 4, "hidden": 6, "activation": "tanh"}),
    "bag-of-words": (NOTES, {"width": 5}),
    "text": (NOTES, TEXT),
    "text, mean": (NOTES, TEXT | {"pooling": "mean"}),
    "text, frozen": (NOTES, TEXT | {"tuning": "frozen-embeddings"}),
    "text, lora": (NOTES, TEXT | {"tuning": "lora", "lora_rank": 2}),
    "text, head": (NOTES, TEXT | {"tuning": "head"}),
}


def records(spec, count):
    """Drawn records of a task and their labels."""
    generator = torch.Generator().manual_seed(count)
    labels = torch.arange(count) % len(spec.classes)
    if spec.vocabulary:
        tokens = torch.randint(1, spec.vocabulary, (count, *spec.shape), generator=generator)
        tokens[::2, 4:] = 0  # cut short
        return tokens, labels
    return torch.rand(count, *spec.shape, generator=generator) * 2 - 1, labels


def model_of(name, dtype=torch.float64):
    spec, options = MODELS[name]
    model = build(name.split(",")[0], spec, options, 0).to(dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in model.parameters():  # adapters begin with zeros, norms with ones
            with torch.no_grad():
                parameter += 0.1 * torch.randn_like(parameter)
    return model, spec


def one_by_one(model, inputs, labels):
    """Each record's gradient (n, d), float64, by plain autograd in batches of one."""
    trained = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(inputs)):
        loss = functional.cross_entropy(model(inputs[i : i + 1]).double(), labels[i : i + 1])
        found = torch.autograd.grad(loss, trained, allow_unused=True)
        parts = zip(found, trained, strict=True)
        rows.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in parts])
        )
    return torch.stack(rows).double()


def check(model, inputs, labels, bound, measured=False):
    rows = one_by_one(
        model,
        inputs.to(next(model.parameters()).dtype) if inputs.is_floating_point() else inputs,
        labels,
    )
    norms = torch.linalg.vector_norm(rows, dim=1)
    clip = norms.median().item()
    wanted = (rows * (clip / norms.clamp(min=clip))[:, None]).sum(0)
    engine = engines.make("bookkeeping", model, measured=measured)
    torch.testing.assert_close(engine.norms(inputs, labels), norms, rtol=bound, atol=0)
    apart = torch.linalg.vector_norm(engine.clipped_sum(inputs, labels, clip) - wanted)
    assert apart <= bound * torch.linalg.vector_norm(wanted)


@pytest.mark.parametrize("count", [1, 2, 17])
@pytest.mark.parametrize("name", MODELS)
def test_every_models_norms_and_clipped_sums_are_those_of_batches_of_one(name, count):
    model, spec = model_of(name)
    check(model, *records(spec, count), 1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_in_float32_they_are_so_within_its_rounding(name):
    model, spec = model_of(name, torch.float32)
    check(model, *records(spec, 9), 1e-4, measured=True)


@pytest.mark.parametrize("size", [8, 33])
def test_a_residual_network_with_group_norm_is_right_too(size):
    spec = TaskSpec("scans", ("pixels",), CLASSES, {}, "", shape=(1, size, size))
    with pytest.MonkeyPatch.context() as patch:  # an eighth as wide: the same code in a second
        patch.setattr("fedaccord.models.resnet.STAGES", [1, 1, 1, 1])
        model = build("resnet18", spec, {"stem": "small" if size < 10 else "large"}, 0).double()
    check(model, *records(spec, 2), 1e-9)


@pytest.mark.parametrize("name", ["mlp", "cnn2d", "text, frozen"])
def test_norms_are_those_of_opacus(name):
    model, spec = model_of(name)
    inputs, labels = records(spec, 5)
    place = inputs.double() if inputs.is_floating_point() else inputs
    found = engines.make("bookkeeping", model).norms(inputs, labels)
    opacus = GradSampleModule(model.train(), loss_reduction="sum")
    functional.cross_entropy(opacus(place), labels, reduction="sum").backward()
    made = [
        p.grad_sample for p in model.parameters() if getattr(p, "grad_sample", None) is not None
    ]
    norms = torch.linalg.vector_norm(torch.cat([g.flatten(1) for g in made], dim=1), dim=1)
    torch.testing.assert_close(found, norms, rtol=1e-9, atol=0)


class Reads(nn.Module):
    """A layer, and a given way to use it."""

    def __init__(self, layer, run, words=False):
        super().__init__()
        self.layer, self.run, self.words = layer, run, words
        self.last = nn.Linear(4, 3)

    def forward(self, rows):
        return self.last(torch.tanh(self.run(self.layer, rows)).reshape(len(rows), 4))


def unseen(layer, rows):
    """Use a layer while torch's mechanism for functions is off, as code outside Python would."""
    with torch._C.DisableTorchFunction():
        return layer(rows)


def table(**how):
    return nn.Embedding(9, 4, **how)


UNKNOWN = {
    "transposed": (nn.Linear(4, 4), lambda m, x: x @ m.weight.t(), "layer.weight is used by"),
    "viewed": (
        nn.Linear(4, 4),
        lambda m, x: functional.linear(x, m.weight.view(4, 4)),
        "layer.weight is used by .*view",
    ),
    "multiplied": (nn.Linear(4, 4), lambda m, x: torch.matmul(x, m.weight), "used by .*matmul"),
    "in einsum": (
        nn.Linear(4, 4),
        lambda m, x: torch.einsum("ni,oi->no", x, m.weight),
        "layer.weight is used by .*einsum",
    ),
    "in a list": (
        nn.Linear(4, 4),
        lambda m, x: functional.linear(x, torch.cat([m.weight, m.weight])[:4]),
        "layer.weight is used by .*cat",
    ),
    "its data": (
        nn.Linear(4, 4),
        lambda m, x: functional.linear(x, m.weight.data) + 0 * m(x),
        "layer.weight is used by .*data",
    ),
    "normalised": (
        nn.Linear(4, 4),
        lambda m, x: functional.linear(x, m.weight / m.weight.norm()),
        "layer.weight is used by .*norm",
    ),
    "a transposed convolution": (
        nn.ConvTranspose1d(1, 1, 1),
        lambda m, x: m(x[:, None])[:, 0],
        "layer.weight is used by .*conv_transpose1d",
    ),
    "a bilinear layer": (
        nn.Bilinear(4, 4, 4),
        lambda m, x: m(x, x),
        "layer.weight is used by .*bilinear",
    ),
    "attention": (
        nn.MultiheadAttention(4, 2, batch_first=True),
        lambda m, x: m(x[:, None], x[:, None], x[:, None])[0][:, 0],
        "layer.* is used by",
    ),
    "a recurrent layer": (
        nn.LSTM(4, 4, batch_first=True),
        lambda m, x: m(x[:, None])[0][:, 0],
        "layer.* is used by",
    ),
    "a parameter of two": (
        nn.Linear(4, 4),
        lambda m, x: x * (m.bias + m.bias),
        "a bare parameter is used with another",
    ),
    "a parameter without the batch": (
        nn.Linear(4, 4),
        lambda m, x: x * (m.bias * torch.ones(4).to(x)),
        "without the batch axis",
    ),
    "a convolution without the batch": (
        nn.Conv1d(1, 1, 1),
        lambda m, x: torch.stack([m(row[None])[0] for row in x]),
        "without the batch axis",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_weight_that_is_used_in_an_unknown_way_is_refused_by_name(name):
    layer, run, words = UNKNOWN[name]
    model, inputs = Reads(layer, run).double(), torch.rand(5, 4).double()
    labels = torch.arange(5) % 3
    with pytest.raises(NotImplementedError, match=words):
        engines.make("bookkeeping", model).clipped_sum(inputs, labels, 1.0)
    engine, why = engines.resolve("auto", model, engines.cross_entropy, inputs, labels)
    assert (engine, why.splitlines()) == ("hooks", [why])
    assert 'of which the engine "bookkeeping" does not know' in why


@pytest.mark.parametrize(
    "how", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str
)
def test_an_embedding_that_shortens_or_weighs_its_rows_is_refused(how):
    model = Reads(table(**how), lambda m, words: m(words).sum(1)).double()
    with pytest.raises(NotImplementedError, match="max_norm, scale_grad_by_freq or sparse"):
        engines.make("bookkeeping", model).norms(torch.arange(6).view(3, 2), torch.zeros(3).long())


def test_a_weight_that_is_reached_in_a_way_that_is_not_seen_raises():
    model = Reads(nn.Linear(4, 4), unseen).double()
    inputs, labels = torch.rand(5, 4).double(), torch.arange(5) % 3
    with pytest.raises(ValueError, match=r"layer\.weight is reached by a way that .* not see"):
        engines.make("bookkeeping", model).clipped_sum(inputs, labels, 1.0)
    assert all(parameter.grad is None for parameter in model.parameters())
    engine, why = engines.resolve("auto", model, engines.cross_entropy, inputs, labels)
    assert engine == "hooks" and "layer.weight is reached" in why


@pytest.mark.parametrize(
    ("reentrant", "words"),
    [(True, "is reached by a way that .* does not see"), (False, "checkpoint: Recomputed values")],
)
def test_a_part_that_is_run_again_in_the_backward_pass_is_refused(reentrant, words):
    def run(layer, rows):
        seen = rows * torch.ones(4, requires_grad=True).to(rows)
        return checkpoint(layer, seen, use_reentrant=reentrant)

    model = Reads(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)), run).double()
    inputs, labels = torch.rand(5, 4).double(), torch.arange(5) % 3
    with pytest.raises(Exception, match=words):
        engines.make("bookkeeping", model).clipped_sum(inputs, labels, 0.1)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("precision", list(engines.PRECISIONS))
@pytest.mark.parametrize("positions", [1, 7])
def test_a_record_that_leaves_moves_the_others_sum_by_no_more_than_a_folds_rounding(
    precision, positions
):
    model = steep()
    if positions > 1:
        model.append(nn.Flatten()).append(nn.Linear(2 * positions, 2))
    engine = engines.make("bookkeeping", model.to(engines.PRECISIONS[precision]))
    inputs, labels = torch.ones(100, positions, 16), (torch.arange(100) % 3 == 0).long()
    inputs += 0.01 * torch.arange(100)[:, None, None] * (torch.arange(16) == 3)  # not all cancel
    inputs = inputs if positions > 1 else inputs[:, 0]
    keep = torch.ones(100, dtype=torch.bool)
    keep[37] = False
    whole, rest, own = (
        engine.clipped_sum(inputs, labels, 1.0, k) for k in (keep | True, keep, ~keep)
    )
    assert torch.linalg.vector_norm(whole) > 0.5
    moved = torch.linalg.vector_norm(whole - rest - own).item()
    assert moved <= min(2.5e-4, SLACK[precision])
    assert torch.linalg.vector_norm(own) <= 1 + SLACK[precision]
