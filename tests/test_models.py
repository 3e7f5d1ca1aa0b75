"""Models: trainable per subject, initial weights from the seed alone, options that are checked."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.validators import ModuleValidator
from torch import nn

from fedaccord import accord as accords
from fedaccord import registry
from fedaccord.accord import Accord
from fedaccord.errors import AccordError
from fedaccord.models.build import build, parameter_count
from fedaccord.server.app import initial
from fedaccord.tasks import load_task

HEART = load_task("heart")
NAMES = registry.known("model")
MIXERS = (nn.modules.batchnorm._BatchNorm, nn.SyncBatchNorm)


def make(name: str, seed: int = 0, **options: int) -> nn.Module:
    return build(name, HEART.spec, options, seed)


def weights(model: nn.Module) -> bytes:
    return b"".join(value.numpy().tobytes() for value in model.state_dict().values())


@pytest.mark.parametrize("name", NAMES)
def test_no_model_has_batch_norm_or_keeps_statistics_of_what_it_saw(name: str) -> None:
    model = make(name)
    assert not [layer for layer in model.modules() if isinstance(layer, MIXERS)]
    assert [key for key, _ in model.named_buffers()] == []


@pytest.mark.parametrize("name", NAMES)
def test_opacus_takes_every_model(name: str) -> None:
    assert ModuleValidator.validate(make(name).train(), strict=False) == []


def test_opacus_would_not_take_batch_norm() -> None:
    # The other direction: the validator that the test above relies on does find it.
    assert ModuleValidator.validate(nn.Sequential(nn.BatchNorm1d(3)).train(), strict=False) != []


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 2**63 - 1), place=st.integers(0, 5))
@settings(max_examples=20)
def test_a_records_answer_does_not_change_with_its_neighbours(
    name: str, seed: int, place: int
) -> None:
    model = make(name, seed).train()
    batch = torch.from_numpy(HEART.public(6, seed))
    with torch.no_grad():
        alone, together = model(batch[place : place + 1])[0], model(batch)[place]
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_initial_weights_depend_on_the_seed_alone(name: str) -> None:
    torch.manual_seed(1)
    one = weights(make(name, 7))
    torch.manual_seed(2)
    torch.rand(100)
    assert weights(make(name, 7)) == one
    assert weights(make(name, 8)) != one


@pytest.mark.parametrize("name", NAMES)
def test_building_a_model_leaves_every_global_generator_as_it_was(name: str) -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()
    make(name, 4)
    with pytest.raises(AccordError):
        make(name, 4, nonsense=1)
    after = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


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


def with_model(name: str, options: dict[str, int | float | bool | str]) -> Accord:
    data = accords.load("heart").model_dump(mode="json")
    return accords.parse(data | {"model": {"name": name, "options": options}})


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("cnn1d", {"chanels": 4}, "unexpected keyword argument 'chanels'"),
        ("cnn1d", {"channels": 5, "groups": 2}, "num_channels (5) must be divisible by num_groups"),
        ("cnn1d", {"channels": -4}, "negative"),
        ("cnn1d", {"groups": 0}, "zero"),
        ("cnn1d", {"kernel": 4}, "shapes cannot be multiplied"),
        ("mlp", {"hidden": "many"}, "must be tuple of ints"),
        ("mlp", {"hidden": 2.5}, "must be tuple of ints"),
        ("mlp", {"spec": 1}, "multiple values for argument 'spec'"),
    ],
)
def test_options_that_a_model_cannot_take_are_refused_in_one_line_before_the_run(
    name: str, options: dict[str, int | float | bool | str], said: str
) -> None:
    with pytest.raises(AccordError) as caught:
        initial(with_model(name, options), HEART)
    text = str(caught.value)
    assert text.startswith(f'model "{name}"')
    assert "\n" not in text
    assert said in text
    assert text.endswith("Change its options.")


def test_a_model_for_another_number_of_classes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.MODELS, "copycat", "torch.nn:Identity")
    with pytest.raises(AccordError, match=r"gives shape \[2, \d+\] for 2 records, not \[2, 2\]"):
        initial(with_model("copycat", {}), HEART)


def test_an_unknown_model_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(AccordError, match=r'model "mpl" is not known\. Did you mean "mlp"\?'):
        make("mpl")
