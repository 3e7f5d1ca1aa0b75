"""Training at a site: what a subject can change, what a fault can change, and what nothing can."""

import numpy as np
import pytest
import torch
import wards
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.nn import functional
from wards import SPEC, STEP, WIDTH, Silent, flat, some

from fedaccord.client import train
from fedaccord.errors import AccordError
from fedaccord.models.build import build
from fedaccord.privacy.clipping import clipped_sum
from fedaccord.tasks import Records

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
torch.set_num_threads(1)  # as a site does

MODELS = ["cnn1d", "mlp"]


def plan(**change):
    return wards.plan(**{"subjects": 1} | change)


def records(inputs, labels):
    n = len(labels)
    inputs = np.asarray(inputs, np.float32).reshape(n, WIDTH)
    return Records(inputs, np.asarray(labels, np.int64), np.arange(n), {})


def without(data, row):
    return records(np.delete(data.inputs, row, axis=0), np.delete(data.labels, row))


def step_sum(model, data, engine="bookkeeping", precision="float64", rows=256, **change):
    """What a private step (or several) sums before there is any noise; the model is trained."""
    agreed = plan(**change)
    how = train.How(engine, precision, rows)
    train.train_private(model, data, agreed, STEP, Silent, how)
    return torch.from_numpy(agreed.total)


def moved(name, data, row, weights=None):
    """How far the whole private step moves when one subject leaves."""
    sums = []
    for held in (data, without(data, row)):
        model = build(name, SPEC, {}, 0)
        if weights is not None:
            weights(model)
        sums.append(step_sum(model, held))
    return torch.linalg.vector_norm(sums[0] - sums[1]).item()


def adversarial(n, kind):
    data = some(n, n)
    inputs, labels = data.inputs.copy(), data.labels.copy()
    if kind == "alike":
        inputs[:], labels[:] = inputs[0], labels[0]
    if kind == "huge":
        inputs *= 1e30
    if kind == "not finite":
        inputs[::3, 0], inputs[1::3, 1] = np.inf, np.nan
    if kind == "labels that do not exist":
        labels[::101] = 7
    if kind == "cancelling":  # orthogonal to the perceptron's first layer, up to rounding
        first = next(build("mlp", SPEC, {}, 0).parameters()).detach().numpy()
        null = np.linalg.svd(first.astype(np.float64))[2][len(first) :]
        inputs = 1e7 * np.random.default_rng(n).standard_normal((n, len(null))) @ null
    return records(inputs, labels)


KINDS = ["bounded", "alike", "huge", "not finite", "labels that do not exist", "cancelling"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_one_subject_moves_a_step_by_at_most_the_sensitivity(name, kind):
    excess = 0.0
    for n in (1, 2, 9, 300):  # the last one takes more than one page
        data = adversarial(n, kind)
        excess = max(excess, *(moved(name, data, row) - 1 for row in {0, n // 2, n - 1}))
    print(f"largest excess of {name}, {kind}: {excess:.1e}")
    assert excess <= 1e-8 < plan().slack  # rounding in float64; the noise covers 1e-4


@st.composite
def neighbours(draw):
    special = st.sampled_from([0.0, 1.0, -1.0, 1e30, -1e30, np.inf, np.nan])
    row = st.lists(special, min_size=WIDTH, max_size=WIDTH)
    rows = draw(st.lists(row, min_size=1, max_size=6))
    labels = st.lists(st.sampled_from([0, 1, -1, 2, -100]), min_size=len(rows), max_size=len(rows))
    return records(rows, draw(labels)), draw(st.integers(0, len(rows) - 1))


@pytest.mark.parametrize("name", MODELS)
@given(drawn=neighbours())
@settings(deadline=None, max_examples=40)
def test_any_neighbouring_records_move_a_step_by_at_most_the_sensitivity(name, drawn):
    assert moved(name, *drawn) <= plan().sensitivity


def cancel(model):
    """Weights as a hostile coordinator would choose them: large terms that cancel for all-ones."""
    rng = np.random.default_rng(1)
    first, _, last, _ = model.parameters()
    halves = rng.uniform(0.3, 1, (len(first), WIDTH // 2)) * 1e7
    large = np.concatenate([halves, -halves, np.zeros((len(first), WIDTH % 2))], axis=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        first.copy_(torch.from_numpy(large[:, rng.permutation(WIDTH)]))
        last.copy_(torch.tensor([[-1e4], [1e4]]).expand_as(last))


def clipped(model, inputs, labels):
    """Each record's clipped gradient in the dtype of the model, by Opacus' hooks: (n, weights)."""
    hooked = GradSampleModule(model, loss_reduction="sum")
    functional.cross_entropy(hooked(inputs), labels, reduction="sum").backward()
    rows = torch.cat([p.grad_sample.flatten(1) for p in model.parameters()], dim=1).double()
    hooked.cleanup()
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp(min=1)


def test_weights_chosen_to_cancel_do_not_let_one_subject_change_the_others():
    n = 256
    model = build("mlp", SPEC, {}, 0)
    cancel(model)
    ones = torch.ones(n, WIDTH)
    # Labels such that, in float32, a record says most when it moves one place up.
    said = torch.stack([clipped(model, ones, torch.full((n,), label)) for label in (0, 1)])
    labels = torch.linalg.vector_norm(said[:, 1:] - said[:, :-1], dim=2).argmax(dim=0)
    data = records(np.ones((n, WIDTH)), np.concatenate([[0], labels.numpy()]))
    assert moved("mlp", data, 0, cancel) <= plan().sensitivity


@pytest.mark.parametrize("name", MODELS)
def test_even_in_float32_bounded_records_keep_within_the_slack(name):
    excess = 0.0
    for n in (2, 9, 257, 1024):
        data = some(n, n)
        sums = []
        for held in (data, without(data, 0)):
            model = build(name, SPEC, {}, 0)
            hooked = GradSampleModule(model, loss_reduction="sum")
            loss = functional.cross_entropy(
                hooked(torch.from_numpy(held.inputs)),
                torch.from_numpy(held.labels),
                reduction="sum",
            )
            loss.backward()
            sums.append(clipped_sum([p.grad_sample for p in model.parameters()], 0.01))
        excess = max(excess, torch.linalg.vector_norm(sums[0] - sums[1]).item() / 0.01 - 1)
    print(f"largest excess of {name} in float32: {excess:.1e}")
    assert excess <= plan().slack


class Fussy(nn.Module):
    """A model that cannot take a first input above 100: between its layers, or only backwards."""

    def __init__(self, backwards):
        super().__init__()
        self.one, self.two, self.backwards = nn.Linear(WIDTH, 4), nn.Linear(4, 2), backwards

    def forward(self, rows):
        hidden = self.one(rows)
        worst = rows[:, 0].max().item()
        if worst > 100 and not self.backwards:
            raise RuntimeError(f"patient with value {worst}")
        if worst > 100:
            hidden.register_hook(lambda _: 1 / 0)
        return self.two(torch.tanh(hidden))


def fussy(backwards):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Fussy(backwards)


@pytest.mark.parametrize("engine", ["bookkeeping", "hooks", "ghost"])
@pytest.mark.parametrize(
    ("fault", "row"), [("forwards", 0), ("backwards", 300), ("backwards", 599), ("label", 300)]
)
def test_a_record_that_makes_the_model_raise_removes_only_itself(fault, row, engine):
    data = some(600)
    if fault == "label":
        data.labels[row] = 7
    else:
        data.inputs[row, 0] = 123.4
    got = step_sum(fussy(fault == "backwards"), data, engine, steps=2)
    expected = step_sum(fussy(fault == "backwards"), without(data, row), engine, steps=2)
    assert torch.linalg.vector_norm(expected) > 100
    assert torch.allclose(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", MODELS)
def test_a_record_that_is_not_finite_contributes_zero_and_changes_no_other(name, bad):
    data = some(20)
    data.inputs[7, 3] = bad
    got = step_sum(build(name, SPEC, {}, 0), data)
    expected = step_sum(build(name, SPEC, {}, 0), without(data, 7))
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "data",
    [
        None,
        some(0),
        Records(np.full((2, WIDTH), np.nan, np.float32), np.zeros(2, int), np.arange(2), {}),
        Records(some(4).inputs, np.zeros(4, int), np.arange(4).reshape(4, 1), {}),
        Records(some(4).inputs, np.zeros(4, int), None, {}),
        Records(some(4).inputs[:, :2], np.zeros(4, int), np.arange(4), {}),
        Records(None, None, np.arange(4), {}),
    ],
    ids=["unreadable", "none", "NaN", "subjects 2-D", "no subjects", "columns", "no inputs"],
)
def test_without_usable_records_a_step_is_noise_alone(data):
    assert not step_sum(build("cnn1d", SPEC, {}, 0), data).any()
    model = build("cnn1d", SPEC, {}, 0)
    before = flat(model)
    train.train_private(model, data, plan(), STEP)
    size = torch.linalg.vector_norm(flat(model) - before) / len(before) ** 0.5
    assert 0.5 < size < 1.5


@pytest.mark.parametrize(("name", "bound"), [("cnn1d", 4.5), ("mlp", 1.5)])
def test_a_step_is_the_sum_over_micro_batches_of_one_clipped(name, bound):
    data = some(40)
    model = build(name, SPEC, {}, 0).double()
    expected = torch.zeros_like(flat(model))
    norms = []
    for inputs, label in zip(data.inputs, data.labels, strict=True):
        logits = model(torch.from_numpy(inputs[None]).double())
        loss = functional.cross_entropy(logits, torch.tensor([label]))
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])
        norms.append(torch.linalg.vector_norm(gradient).item())
        expected += gradient * min(1.0, bound / norms[-1])
    assert min(norms) < bound < max(norms)  # some are clipped and some are not
    got = step_sum(build(name, SPEC, {}, 0), data, max_grad_norm=bound)
    assert torch.allclose(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_opacus_own_clipped_sum(name):
    data = some(40)
    model = GradSampleModule(build(name, SPEC, {}, 0), loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        expected_batch_size=None,
        loss_reduction="sum",
    )
    logits = model(torch.from_numpy(data.inputs))
    functional.cross_entropy(logits, torch.from_numpy(data.labels), reduction="sum").backward()
    optimizer.clip_and_accumulate()
    opacus = torch.cat([p.summed_grad.flatten() for p in optimizer.params]).double()
    got = step_sum(build(name, SPEC, {}, 0), data)
    assert torch.linalg.vector_norm(opacus) > 1
    assert torch.allclose(got, opacus, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_does_not_depend_on_the_size_of_pages(name):
    data = some(30)
    sums = []
    for size in (256, 30, 7, 1):
        sums.append(step_sum(build(name, SPEC, {}, 0), data, rows=size))
    for other in sums[1:]:
        assert torch.allclose(sums[0], other, rtol=0, atol=1e-12)


def test_a_subject_with_many_records_moves_a_step_like_one_with_one():
    data = some(50)
    crowd = Records(data.inputs, data.labels, np.repeat([1, 2], [1, 49]), {})
    got = step_sum(build("mlp", SPEC, {}, 0), crowd, max_grad_norm=0.01)
    assert torch.linalg.vector_norm(got) <= 0.02 * (1 + 1e-9)


def test_the_weights_move_by_the_sum_over_the_declared_normaliser():
    model = build("mlp", SPEC, {}, 0)
    before = flat(model)
    total = step_sum(model, some(8), subjects=40, sampling_prob=0.5)
    assert torch.linalg.vector_norm(total) > 1
    assert torch.allclose(before - flat(model), total / 20, rtol=0, atol=1e-6)


def test_dropout_draws_from_the_steps_own_source_and_not_from_torchs():
    def model():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(WIDTH, 32), nn.Dropout(), nn.Linear(32, 2))

    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = step_sum(model(), some(8))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(step_sum(model(), some(8)), one)  # Silent is the same source again
    fresh = [flat(model()) for _ in range(2)]
    for weights in fresh:
        trained = model()
        train.train_private(trained, some(8), plan(), STEP)
        weights -= flat(trained)
    assert not torch.allclose(*fresh, atol=1e-3)


class Counting(nn.Module):
    """A layer that would release the mean of what it saw."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, rows):
        self.mean += rows.mean(dim=0)
        return rows


def test_layers_that_mix_subjects_or_keep_statistics_are_refused():
    for layer in (nn.BatchNorm1d(WIDTH), Counting()):
        with pytest.raises(AccordError, match=r"^model: .* Choose a model without it"):
            train.refuse_unsafe(nn.Sequential(layer, nn.Linear(WIDTH, 2)))
    for name in MODELS:
        train.refuse_unsafe(build(name, SPEC, {}, 0))


@pytest.mark.parametrize("weight", [100.5, -1e7, float("nan"), float("inf")])
def test_weights_that_rounding_would_not_bear_are_refused_by_name(weight):
    model = build("mlp", SPEC, {}, 0)
    train.refuse_weights(model)
    with torch.no_grad():
        model[2].weight[0, 0] = weight
    with pytest.raises(AccordError, match=r"2\.weight holds a weight that is not finite or above"):
        train.refuse_weights(model)
