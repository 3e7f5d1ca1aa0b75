"""Models: trainable per subject, initial weights from the seed alone, options that are checked."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from functools import cache, partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.validators import ModuleValidator
from torch import nn
from torch.nn import functional
from torchvision.models import resnet18

from fedaccord import accord as accords
from fedaccord import registry
from fedaccord.accord import Accord
from fedaccord.client.train import refuse_unsafe
from fedaccord.errors import AccordError
from fedaccord.models import tabular
from fedaccord.models.build import build, parameter_count, trained
from fedaccord.models.transformer import Block
from fedaccord.privacy import engines
from fedaccord.server.app import initial
from fedaccord.tasks import TaskSpec, load_task

HEART = load_task("heart")
Options = dict[str, int | float | bool | str]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are faster on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def spec_of(shape: tuple[int, ...], vocabulary: int = 0, **more: object) -> TaskSpec:
    names = tuple(f"c{i}" for i in range(shape[0]))
    return TaskSpec(
        "made", names, ("a", "b", "c"), {}, "made up", shape, vocabulary=vocabulary, **more
    )


IMAGE, ROW, TEXT = spec_of((2, 7, 5)), spec_of((8,)), spec_of((6,), 12)
SERIES, ALL = spec_of((8,), sequence=(3, 2)), spec_of((6,), sequence=(3, 2))
CASES: dict[str, tuple[str, TaskSpec, Options]] = {
    "bag-of-words": ("bag-of-words", TEXT, {"width": 4}),
    "cnn1d": ("cnn1d", HEART.spec, {}),
    "cnn1d, deep": ("cnn1d", ROW, {"blocks": 2, "hidden": 5, "kernel": 3}),
    "cnn1d, series": ("cnn1d", SERIES, {"hidden": 3}),
    "cnn1d, series alone": ("cnn1d", ALL, {"groups": 1}),
    "cnn2d": ("cnn2d", IMAGE, {"channels": 4, "hidden": 6}),
    "cnn2d, mean": ("cnn2d", IMAGE, {"pool": "mean", "blocks": 4, "channels": 2, "groups": 2}),
    "cnn2d, tanh": ("cnn2d", IMAGE, {"activation": "tanh", "hidden": 0, "blocks": 1, "kernel": 5}),
    "mlp": ("mlp", HEART.spec, {}),
    "mlp, image": ("mlp", IMAGE, {"hidden": 3}),
    "resnet18": ("resnet18", spec_of((1, 3, 2)), {}),
    "text": ("text", TEXT, {"width": 8, "heads": 2}),
    "text, mean": ("text", TEXT, {"width": 8, "heads": 2, "layers": 1, "pooling": "mean"}),
    "text, lora": ("text", TEXT, {"tuning": "lora", "width": 8, "heads": 2, "lora_rank": 2}),
    "transformer": ("transformer", ROW, {"width": 8, "heads": 2}),
    "transformer, cls": ("transformer", SERIES, {"width": 6, "heads": 3, "pool": "cls"}),
    "transformer, steps": ("transformer", SERIES, {"tokens": "steps", "width": 8, "layers": 1}),
    "transformer, steps alone": ("transformer", ALL, {"tokens": "steps", "width": 4, "heads": 1}),
}
MIXERS = (nn.modules.batchnorm._BatchNorm, nn.SyncBatchNorm)
every_case = pytest.mark.parametrize("case", CASES)


def make(case: str, seed: int = 0) -> nn.Module:
    name, spec, options = CASES[case]
    return build(name, spec, options, seed)


@cache
def made(case: str) -> nn.Module:
    """For those that change nothing in it."""
    return make(case)


def batch(case: str, rows: int, seed: int = 0) -> torch.Tensor:
    spec, made_up = CASES[case][1], torch.Generator().manual_seed(seed)
    if not spec.vocabulary:
        return torch.randn(rows, *spec.shape, generator=made_up)
    tokens = torch.randint(1, spec.vocabulary, (rows, *spec.shape), generator=made_up)
    ends = torch.randint(0, spec.shape[0] + 1, (rows, 1), generator=made_up)  # 0: an empty text
    return torch.where(torch.arange(spec.shape[0]) < ends, tokens, 0)


def weights(model: nn.Module) -> bytes:
    return b"".join(value.numpy().tobytes() for value in model.state_dict().values())


def test_every_registered_model_is_among_the_cases() -> None:
    assert {name for name, *_ in CASES.values()} == set(registry.MODELS)


@every_case
def test_a_model_gives_a_figure_for_each_class_of_each_record(case: str) -> None:
    for rows in (1, 3):
        assert made(case)(batch(case, rows)).shape == (rows, len(CASES[case][1].classes))


@every_case
def test_no_model_has_batch_norm_or_keeps_statistics_of_what_it_saw(case: str) -> None:
    model = made(case)
    assert not [layer for layer in model.modules() if isinstance(layer, MIXERS)]
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    before = [(name, buffer.clone()) for name, buffer in model.named_buffers()]
    model(batch(case, 2))
    for (name, old), (_, new) in zip(before, model.named_buffers(), strict=True):
        assert torch.equal(old, new), name


@every_case
def test_opacus_takes_every_model(case: str) -> None:
    assert ModuleValidator.validate(made(case).train(), strict=False) == []
    refuse_unsafe(made(case))


def test_opacus_would_not_take_batch_norm() -> None:
    # The other direction: the validator that the test above relies on does find it.
    assert ModuleValidator.validate(nn.Sequential(nn.BatchNorm1d(3)).train(), strict=False) != []


def plain_norms(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Norms by autograd alone, a record at a time."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms = []
    for record, label in zip(inputs, labels, strict=True):
        loss = functional.cross_entropy(model(record[None]), label[None])
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        parts = [part.flatten() for part in found if part is not None]
        norms.append(torch.linalg.vector_norm(torch.cat(parts)))
    return torch.stack(norms)


@every_case
def test_gradients_of_a_batch_are_those_of_its_records_one_by_one(case: str) -> None:
    rows = 2 if "resnet" in case else 4
    inputs, labels = batch(case, rows, seed=1), torch.arange(rows) % len(CASES[case][1].classes)
    model = copy.deepcopy(made(case)).double().train()
    double = inputs if CASES[case][1].vocabulary else inputs.double()
    expected = plain_norms(model, double, labels)
    assert (expected > 0).all()
    for name in ("hooks", "bookkeeping"):
        engine = engines.make(name, copy.deepcopy(model))
        torch.testing.assert_close(engine.norms(double, labels), expected, rtol=1e-9, atol=0)


@every_case
def test_a_records_answer_does_not_change_with_its_neighbours(case: str) -> None:
    inputs, others = batch(case, 4, 1), batch(case, 4, 2)
    with torch.no_grad():
        together = made(case)(inputs)
        for place in (0, 3):
            others[place] = inputs[place]
            for answer in (made(case)(inputs[[place]])[0], made(case)(others)[place]):
                torch.testing.assert_close(answer, together[place], rtol=1e-4, atol=1e-5)


@every_case
def test_initial_weights_depend_on_the_seed_alone(case: str) -> None:
    torch.manual_seed(1)
    one = weights(make(case, 7))
    torch.manual_seed(2)
    torch.rand(100)
    assert weights(make(case, 7)) == one
    assert weights(make(case, 8)) != one


@every_case
def test_building_a_model_leaves_every_global_generator_as_it_was(case: str) -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()
    name, spec, _ = CASES[case]
    make(case, 4)
    with pytest.raises(AccordError):
        build(name, spec, {"nonsense": 1}, 4)
    after = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@every_case
def test_only_weights_that_training_changes_are_said_to_be_trained(case: str) -> None:
    model = make(case)
    held = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert list(trained(model)) == list(held)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert bool(frozen) == ("lora" in case)
    assert not frozen & set(trained(model))


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 20)),
    blocks=st.integers(1, 6),
    pool=st.sampled_from(["flatten", "mean"]),
)
@settings(max_examples=10, deadline=None)
def test_cnn2d_reads_images_of_any_size_and_number_of_channels(
    shape: tuple[int, int, int], blocks: int, pool: str
) -> None:
    options: Options = {"channels": 2, "groups": 2, "blocks": blocks, "pool": pool}
    model = build("cnn2d", spec_of(shape), options, 0)
    assert model(torch.zeros(2, *shape)).shape == (2, 3)


@pytest.mark.parametrize(
    ("side", "stem", "filters"), [(63, "auto", 3), (64, "auto", 7), (64, "small", 3)]
)
def test_resnet18_keeps_the_size_of_a_small_image(side: int, stem: str, filters: int) -> None:
    model = build("resnet18", spec_of((1, side, side)), {"stem": stem}, 0)
    first = model.conv1
    assert first.kernel_size == (filters, filters)
    assert first.stride == (1 if filters == 3 else 2,) * 2
    assert isinstance(model.maxpool, nn.Identity) == (filters == 3)


def test_under_a_mean_the_weights_of_cnn2d_do_not_depend_on_the_images_size() -> None:
    sizes = [spec_of((1, side, side)) for side in (8, 30)]
    same = {parameter_count(build("cnn2d", spec, {"pool": "mean"}, 0)) for spec in sizes}
    other = {parameter_count(build("cnn2d", spec, {"pool": "flatten"}, 0)) for spec in sizes}
    assert (len(same), len(other)) == (1, 2)


@pytest.mark.parametrize(
    ("name", "options"), [("cnn2d", {"groups": 8}), ("resnet18", {"groups": 8})]
)
def test_every_group_norm_has_the_groups_that_were_asked_for(name: str, options: Options) -> None:
    found = [m for m in build(name, IMAGE, options, 0).modules() if isinstance(m, nn.GroupNorm)]
    assert found
    assert {layer.num_groups for layer in found} == {8}


def test_resnet18_computes_what_torchvisions_own_does_from_the_same_weights() -> None:
    spec = spec_of((3, 9, 12))
    ours = build("resnet18", spec, {"stem": "large", "groups": 16}, 0)
    theirs = resnet18(num_classes=3, norm_layer=partial(nn.GroupNorm, 16))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    image = torch.randn(2, 3, 9, 12)
    torch.testing.assert_close(ours(image), theirs(image), rtol=1e-5, atol=1e-5)


def test_a_layer_of_the_transformer_computes_what_torchs_own_does_from_the_same_weights() -> None:
    ours = Block(8, 2, 12, 0.0).double()
    theirs = nn.TransformerEncoderLayer(
        8, 2, 12, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    parts = (ours.attention.query, ours.attention.key, ours.attention.value)
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        theirs.self_attn.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    for own, other in (
        (ours.attention.out, theirs.self_attn.out_proj),
        (ours.first, theirs.norm1),
        (ours.second, theirs.norm2),
        (ours.up, theirs.linear1),
        (ours.down, theirs.linear2),
    ):
        other.load_state_dict(own.state_dict())
    tokens = torch.randn(3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(tokens), theirs(tokens))


def test_a_feature_is_a_token_of_its_value_times_a_direction_plus_a_bias() -> None:
    tokens = build("transformer", ROW, {"width": 4, "heads": 1}, 0).tokens
    rows = torch.randn(3, 8)
    direction, bias = tokens.direction.weight, tokens.bias.weight
    for record in range(3):
        for column in range(8):
            expected = rows[record, column] * direction[column] + bias[column]
            torch.testing.assert_close(tokens(rows)[record, column], expected)


@given(steps=st.integers(1, 5), channels=st.integers(1, 4), rest=st.integers(0, 3))
@settings(max_examples=30)
def test_a_row_is_split_into_the_channels_of_each_step_and_the_rest(
    steps: int, channels: int, rest: int
) -> None:
    rows = torch.arange(2.0 * (steps * channels + rest)).reshape(2, -1)
    series, others = tabular.split(rows, steps, channels)
    assert series.shape == (2, steps, channels)
    for step in range(steps):
        for channel in range(channels):
            assert torch.equal(series[:, step, channel], rows[:, step * channels + channel])
    assert torch.equal(others, rows[:, steps * channels :])


def test_the_heart_models_draw_the_weights_that_they_always_drew() -> None:
    width = len(HEART.spec.features)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        cnn = nn.Sequential(
            nn.Unflatten(1, (1, width)),
            nn.Conv1d(1, 4, 5, padding=2),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * width, 2),
        )
        torch.manual_seed(5)
        mlp = nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 2))
    ours: list[tuple[nn.Module, Callable[[], nn.Module]]] = [
        (cnn, lambda: build("cnn1d", HEART.spec, {"channels": 4}, 5)),
        (mlp, lambda: build("mlp", HEART.spec, {}, 5)),
    ]
    for expected, now in ours:
        assert list(now().state_dict()) == list(expected.state_dict())
        assert weights(now()) == weights(expected)


def test_the_heart_models_have_the_parameters_that_their_layers_add_up_to() -> None:
    agreed = accords.load("heart")
    columns, classes = len(HEART.spec.features), 2
    channels, kernel = (int(agreed.model.options[key]) for key in ("channels", "kernel"))
    cnn = build(agreed.model.name, HEART.spec, agreed.model.options, 0)
    # filters and their biases, GroupNorm's scale and shift, the last layer and its biases
    expected = channels * (kernel + 1) + 2 * channels + classes * (channels * columns + 1)
    assert parameter_count(cnn) == expected
    hidden = int(agreed.distillation.options["hidden"])
    student = build(agreed.distillation.model, HEART.spec, agreed.distillation.options, 0)
    assert parameter_count(student) == hidden * (columns + 1) + classes * (hidden + 1)


def with_model(name: str, options: Options) -> Accord:
    data = accords.load("heart").model_dump(mode="json")
    return accords.parse(data | {"model": {"name": name, "options": options}})


def test_a_model_for_another_number_of_classes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tabular, "mlp", lambda spec: nn.Linear(len(spec.features), 5))
    with pytest.raises(AccordError, match=r"gives shape \[2, 5\] for 2 records, not \[2, 2\]"):
        initial(with_model("mlp", {}), HEART)


def test_an_unknown_model_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(AccordError, match=r'model "mpl" is not known\. Did you mean "mlp"\?'):
        build("mpl", HEART.spec, {}, 0)
