"""The probe: models that would break the bound are refused by name, and no others."""

import copy
import inspect
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedaccord.errors import AccordError
from fedaccord.models.build import build
from fedaccord.privacy import engines, probe
from fedaccord.privacy.plan import PrivacyPlan
from fedaccord.simulations.heart import Heart
from fedaccord.tasks import TaskSpec

torch.set_num_threads(1)
WIDTH = 12
SPEC = TaskSpec("ward", tuple(f"f{i}" for i in range(WIDTH)), ("a", "b"), {}, "made for tests")
ENGINES = list(engines.ENGINES)


def synthetic(shape=(WIDTH,), words=0):
    """Records as a task's public ones: in [-1, 1], or whole numbers below `words`."""
    rng = np.random.default_rng(0)
    size = (probe.ROWS, *shape)
    inputs = rng.integers(0, words, size) if words else rng.uniform(-1, 1, size).astype(np.float32)
    return torch.from_numpy(inputs), torch.arange(probe.ROWS) % 2


def ask(model, engine="hooks", precision="float64", loss=engines.cross_entropy, **how):
    shape = how.pop("shape", (WIDTH,))
    inputs, labels = synthetic(shape, how.pop("words", 0))
    probe.probe(model, engine, precision, loss, inputs, labels, **how)


def refusal(model, engine="hooks", **how):
    with pytest.raises(AccordError) as caught:
        ask(model, engine, **how)
    message = str(caught.value)
    assert "\n" not in message
    return message


class Forward(nn.Module):
    """A perceptron around a given step between its layers."""

    def __init__(self, between, width=WIDTH):
        super().__init__()
        self.one, self.two, self.between = nn.Linear(width, 6), nn.Linear(6, 2), between

    def forward(self, rows):
        return self.two(torch.tanh(self.between(self, self.one(rows))))


def mixup(model, hidden):
    if not model.training:
        return hidden
    share = torch.rand(()).to(hidden)
    return share * hidden + (1 - share) * hidden[torch.randperm(len(hidden))]


COUPLED = {
    "a mean over the batch": lambda m, h: h - h.mean(dim=0),
    "a mean without gradient": lambda m, h: h - h.detach().mean(dim=0),
    "mixup in training mode": mixup,
    "batch statistics of a function": lambda m, h: functional.batch_norm(
        h, None, None, training=True
    ),
    "attention over the batch": lambda m, h: torch.softmax(h @ h.T, dim=1) @ h,
    "a largest value of the batch": lambda m, h: h / h.abs().max(),
    "a sum along the batch": lambda m, h: h.cumsum(dim=0),
    "a neighbour": lambda m, h: h + 1e-3 * h.roll(1, dims=0),
    "only a gradient": lambda m, h: h + (h - h.detach()).mean(dim=0),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("between", COUPLED.values(), ids=COUPLED)
def test_a_forward_pass_that_couples_records_is_refused(between, engine):
    assert "couples records" in refusal(Forward(between), engine)


LOSSES = {
    "centred": lambda o, y: (c := engines.cross_entropy(o, y)) - c.mean() / 2,
    "weighted by the batch": lambda o, y: engines.cross_entropy(o, y) / (1 + y.double().mean()),
    "contrastive": lambda o, y: engines.cross_entropy(functional.normalize(o) @ o.T, y * 0),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_loss_that_couples_records_is_refused(loss):
    message = refusal(build("mlp", SPEC, {}, 0), loss=loss)
    assert "the loss couples records" in message


def test_a_loss_that_is_one_figure_for_the_batch_is_refused():
    assert "the loss has shape []" in refusal(
        build("mlp", SPEC, {}, 0), loss=functional.cross_entropy
    )


def test_a_loss_that_is_divided_by_the_size_of_the_batch_is_refused():
    message = refusal(
        build("mlp", SPEC, {}, 0), loss=lambda o, y: engines.cross_entropy(o, y) / len(y)
    )
    assert "a size that depends on the batch" in message


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, 6), nn.Sequential(nn.BatchNorm1d(6), nn.ReLU()))
        self.head = nn.Linear(6, 2)

    def forward(self, rows):
        return self.head(self.body(rows))


@pytest.mark.parametrize("engine", ENGINES)
def test_batch_normalisation_is_refused_by_name_however_deep_it_is(engine):
    assert "body.1.0 is a BatchNorm1d" in refusal(Inner(), engine)


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
@pytest.mark.parametrize("engine", ENGINES)
def test_padding_with_other_than_zeros_is_refused_by_name(mode, engine):
    conv = nn.Conv1d(1, 4, 3, padding=1, padding_mode=mode)
    model = nn.Sequential(nn.Unflatten(1, (1, WIDTH)), conv, nn.Flatten(), nn.Linear(4 * WIDTH, 2))
    assert f'1 has padding_mode "{mode}"' in refusal(model, engine)


class Tied(nn.Module):
    """A decoder with the encoder's weight."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.two.weight, self.last = self.one.weight, nn.Linear(WIDTH, 2)

    def forward(self, rows):
        return self.last(torch.tanh(self.two(torch.tanh(self.one(rows)))))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, rows):
        return self.last(torch.tanh(self.one(torch.tanh(self.one(rows)))))


class Borrowed(nn.Module):
    """A layer's weight that is used without the layer: Opacus does not see it."""

    def __init__(self):
        super().__init__()
        self.one, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, rows):
        return self.last(torch.tanh(self.one(rows) @ self.one.weight))


@pytest.mark.parametrize("engine", ["hooks", "bookkeeping"])
def test_tied_weights_and_a_layer_used_twice_are_refused_under_ghost_and_right_else(engine):
    assert "one.weight and two.weight are one tied parameter" in refusal(Tied(), "ghost")
    assert "one is used 2 times" in refusal(Twice(), "ghost")
    ask(Tied(), engine)
    ask(Twice(), engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_weight_that_is_used_outside_its_layer_is_refused(engine):
    message = refusal(Borrowed(), engine)
    if engine == "bookkeeping":
        assert "one.weight is used by torch.Tensor.matmul" in message
        return
    assert "A layer is used in a way that Opacus does not see" in message
    assert engine == "ghost" or "most of all of one.weight" in message


class Positions(nn.Module):
    """A text model; position ids are laid out for each record, or broadcast over the batch."""

    def __init__(self, ids):
        super().__init__()
        self.word, self.place, self.last = nn.Embedding(9, 6), nn.Embedding(5, 6), nn.Linear(6, 2)
        self.ids = ids

    def forward(self, words):
        ids = torch.arange(words.shape[1], device=words.device)
        ids = {"each": ids.expand_as(words), "one row": ids[None], "none": ids}[self.ids]
        return self.last(torch.tanh(self.word(words) + self.place(ids)).mean(dim=1))


@pytest.mark.parametrize("engine", ["hooks", "ghost"])
@pytest.mark.parametrize("ids", ["one row", "none"])
def test_position_ids_that_broadcast_over_the_batch_are_refused_by_opacus_engines(ids, engine):
    message = refusal(Positions(ids), engine, shape=(5,), words=9)
    assert "place.weight has" in message
    assert "not one gradient for each record" in message


def test_under_bookkeeping_one_row_of_position_ids_is_right_and_none_is_refused():
    ask(Positions("one row"), "bookkeeping", shape=(5,), words=9)
    message = refusal(Positions("none"), "bookkeeping", shape=(5,), words=9)
    assert "a layer is fed [5] for" in message
    assert "without the batch axis" in message


class Folded(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.last = nn.Linear(3, 2), nn.Linear(8, 2)

    def forward(self, rows):
        return self.last(self.one(rows.reshape(-1, 3)).reshape(len(rows), 8))


def test_a_layer_that_folds_an_axis_into_the_batch_is_right_under_bookkeeping_alone():
    ask(Folded(), "bookkeeping")
    for engine in ("hooks", "ghost"):
        assert "folds another into it" in refusal(Folded(), engine)


def test_ghost_names_the_layer_whose_norms_it_does_not_know():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(WIDTH))

        def forward(self, rows):
            return rows * self.scale

    model = nn.Sequential(Scale(), nn.Linear(WIDTH, 2))
    assert "0 is a Scale, whose norms it does not know" in refusal(model, "ghost")
    ask(model, "hooks")
    ask(model, "bookkeeping")


def test_a_forward_pass_that_draws_elsewhere_or_keeps_a_state_is_refused():
    drawn = Forward(lambda m, h: h * random.random())
    assert "a generator that is not torch's" in refusal(drawn)

    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(WIDTH), persistent=False)

        def forward(self, rows):
            self.seen += rows.mean(dim=0).detach()
            return rows

    assert "0.seen is a buffer" in refusal(nn.Sequential(Memory(), nn.Linear(WIDTH, 2)))


def test_a_model_that_raises_on_public_inputs_is_refused_with_its_words():
    def fail(model, hidden):
        raise RuntimeError("no such feature")

    assert "raised RuntimeError: no such feature" in refusal(Forward(fail))
    assert "a probe needs" in refusal_of_few()


def refusal_of_few():
    inputs, labels = synthetic()
    with pytest.raises(AccordError) as caught:
        probe.probe(
            build("mlp", SPEC, {}, 0),
            "hooks",
            "float64",
            engines.cross_entropy,
            inputs[:3],
            labels[:3],
        )
    return str(caught.value)


def plan(**change):
    declared = {
        "site": "ward",
        "subjects": 100,
        "rounds": 1,
        "steps": 1,
        "sampling_prob": 0.1,
        "noise_multiplier": 1.0,
        "max_grad_norm": 0.5,
        "delta": 1e-5,
    }
    return PrivacyPlan(**declared | change)


class Loud(engines.HooksEngine):
    """A fault that shows in the plan's precision alone: a clip that is one per cent too wide."""

    def clipped_sum(self, inputs, labels, max_grad_norm, keep=None):
        wide = 1.01 if self._place["dtype"] == torch.float32 else 1.0
        return super().clipped_sum(inputs, labels, wide * max_grad_norm, keep)


class Crowded(engines.HooksEngine):
    """A fault that shows in the plan's precision alone: a sum that depends on its length."""

    def clipped_sum(self, inputs, labels, max_grad_norm, keep=None):
        total = super().clipped_sum(inputs, labels, max_grad_norm, keep)
        if self._place["dtype"] == torch.float32 and keep is not None:
            total *= 1 - 0.001 * keep.sum().item()
        return total


@pytest.mark.parametrize("fault", [Loud, Crowded])
def test_a_sum_that_moves_by_more_than_the_slack_is_refused_with_both_figures(fault, monkeypatch):
    model = build("mlp", SPEC, {}, 0)
    ask(model, precision="float32", plan=plan(slack=1e-3))
    monkeypatch.setitem(engines.ENGINES, "hooks", fault)
    ask(model, precision="float64", plan=plan())
    message = refusal(model, precision="float32", plan=plan(slack=1e-3))
    assert "times max_grad_norm" in message
    assert "covers 0.001" in message
    if fault is Loud:
        ask(model, precision="float32", plan=plan(slack=0.02))


class Seventy(nn.Module):
    """Couples the records of a batch of more than 70 rows, and of no smaller one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, 2)

    def forward(self, x):
        return self.layer(x * (1 + x.abs().sum()) if len(x) > 70 else x)


def test_a_model_is_probed_on_a_page_of_the_size_that_training_has():
    ask(Seventy(), plan=plan(subjects=100))  # pages of 65 rows
    assert "the others' part by" in refusal(Seventy(), plan=plan(subjects=200))  # of 91


def test_a_precision_without_a_finite_gradient_is_refused():
    model = build("mlp", SPEC, {}, 0).double()
    with torch.no_grad():
        model[2].weight *= 1e42  # beyond float32 and bfloat16
    assert "no synthetic record has a finite gradient" in refusal(model, precision="bfloat16")


def snapshot(model):
    marks = [sorted(vars(p)) for p in model.parameters()] + [
        sorted(vars(m)) for m in model.modules()
    ]
    hooks = [(len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    return marks, hooks, modes, [p.grad is None for p in model.parameters()]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("good", [True, False])
def test_a_probe_leaves_the_model_and_torchs_generator_as_they_were(engine, good):
    model = build("mlp", SPEC, {}, 0)
    if not good:
        model = nn.Sequential(nn.Dropout(), Forward(COUPLED["a neighbour"]))
    model.register_buffer("kept", torch.arange(3.0), persistent=False)
    model.eval()
    before, weights = snapshot(model), copy.deepcopy(list(model.state_dict().values()))
    state = torch.get_rng_state()
    if good:
        ask(model, engine)
    else:
        refusal(model, engine)
    assert snapshot(model) == before
    now = list(model.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(weights, now, strict=True))
    assert torch.equal(model.kept, torch.arange(3.0))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_probe_cannot_be_given_a_sites_records():
    names = set(inspect.signature(probe.probe).parameters)
    assert names == {
        "model",
        "engine",
        "precision",
        "loss",
        "inputs",
        "labels",
        "plan",
        "page_rows",
    }

    class Shut(Heart):
        def site(self, name):
            raise AssertionError("private records were read")

    probe.synthetic(Shut())
