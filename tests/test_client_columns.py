"""A record that turns a column into another type removes itself and nobody else."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from wards import Silent, Watched

from fedaccord.accord import TrainingSection
from fedaccord.client import train
from fedaccord.client.columns import usable, whole
from fedaccord.models.build import build
from fedaccord.tasks import Records, TaskSpec

torch.set_num_threads(1)
SPEC = TaskSpec("ward", ("a", "b", "c", "d"), ("healthy", "ill"), {}, "made for tests")


def columns(n=30):
    rng = np.random.default_rng(0)
    inputs = rng.uniform(-1, 1, (n, 4)).astype(np.float32)
    return {"inputs": inputs, "labels": np.arange(n) % 2, "subjects": np.arange(n)}


def step_sum(found):
    agreed = Watched("ward", 40, 1, 1, 1.0, 1.0, 1.0, 1e-5)
    rate = TrainingSection(steps=1, learning_rate=0.1)
    train.train_private(
        build("mlp", SPEC, {}, 0), Records(**found, groups={}), agreed, rate, Silent
    )
    return agreed.total


ODD = [
    ("subjects", np.float64, np.nan),
    ("subjects", np.float64, 2.5),
    ("subjects", object, None),
    ("subjects", object, "29"),
    ("subjects", object, True),
    ("subjects", object, 2**80),
    ("subjects", object, [1, 2]),
    ("labels", np.float64, np.nan),
    ("labels", np.float64, np.inf),
    ("labels", np.int32, -1),
    ("labels", np.uint8, 200),
    ("labels", object, None),
    ("labels", object, "ill"),
    ("inputs", object, "?"),
    ("inputs", object, None),
    ("inputs", object, 10**400),
    ("inputs", object, 1j),
]


@pytest.mark.parametrize(("name", "dtype", "value"), ODD)
def test_an_odd_record_leaves_a_step_to_the_others_whatever_type_its_column_becomes(
    name, dtype, value
):
    without = step_sum({key: column[:29] for key, column in columns().items()})
    found = columns()
    found[name] = found[name].astype(dtype)
    if name == "inputs":
        found[name][29, 1] = value
    else:
        found[name][29] = value
    assert np.linalg.norm(without) > 1
    np.testing.assert_allclose(step_sum(found), without, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.float64, object])
def test_whole_numbers_of_any_type_are_the_same_labels_and_subjects(dtype):
    found = columns()
    expected = step_sum(found)
    for name in ("labels", "subjects"):
        found[name] = found[name].astype(dtype)
    np.testing.assert_allclose(step_sum(found), expected, rtol=0, atol=1e-9)


@given(st.lists(st.one_of(st.integers(), st.floats(), st.none(), st.text(), st.booleans())))
def test_a_value_counts_if_it_is_a_whole_number_whoever_else_is_in_the_column(values):
    column = np.empty(len(values), object)
    column[:] = values
    found, good = whole(column)
    assert found.dtype == np.int64
    for place, value in enumerate(values):
        alone = np.empty(1, object)
        alone[0] = value
        (number,), (said,) = whole(alone)
        assert (number, said) == (found[place], good[place])
        if said:
            assert number == value
            assert not isinstance(value, bool | str)


@pytest.mark.parametrize("subjects", [np.array(["1", "2"]), np.zeros((2, 1), int), None])
def test_a_column_in_which_nobody_can_be_told_apart_raises(subjects):
    with pytest.raises((ValueError, AttributeError)):
        usable(Records(np.zeros((2, 4)), np.zeros(2, int), subjects, {}))


def test_inputs_that_are_all_of_use_are_not_copied():
    found = Records(**columns(), groups={})
    assert usable(found).inputs is found.inputs
