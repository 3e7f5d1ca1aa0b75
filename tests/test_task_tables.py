"""Laws of the bundled tables: inputs by declared bounds alone, and a split by each id alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedaccord.errors import TaskError
from fedaccord.simulations import adult, credit, declared, thyroid
from fedaccord.simulations.declared import Choice, Number

SCHEMA = {
    "dose": Number(0.1, 100, "log", cuts=(1, 10), missing=True),
    "balance": Number(-500, 1000, "signed-log", unit=10),
    "age": Number(20, 90),
    "ward": Choice(("a", "b", "c"), missing=True),
}
SCHEMAS = [SCHEMA, thyroid.SCHEMA, credit.SCHEMA, adult.SCHEMA]
NUMBERS = st.floats(-1e9, 1e9)
ROWS = st.lists(
    st.tuples(NUMBERS | st.just(math.nan), NUMBERS, NUMBERS, st.sampled_from(["a", "b", "c", ""])),
    min_size=1,
    max_size=6,
)


def columns(rows: list[tuple[float, float, float, str]]) -> dict[str, declared.Column]:
    return dict(zip(SCHEMA, map(np.array, zip(*rows, strict=True)), strict=True))


def encode(rows: list[tuple[float, float, float, str]]) -> np.ndarray:
    return declared.encode(SCHEMA, columns(rows), "made-up")


@given(ROWS)
def test_every_input_is_a_finite_float32_between_minus_one_and_one(rows: list) -> None:
    inputs = encode(rows)
    assert inputs.shape == (len(rows), len(declared.names(SCHEMA)))
    assert inputs.dtype == np.float32
    assert np.abs(inputs).max() <= 1  # a NaN fails this too


@given(ROWS)
def test_a_row_is_encoded_as_if_it_were_alone(rows: list) -> None:
    assert np.array_equal(encode(rows), np.concatenate([encode([row]) for row in rows]))


def test_a_row_becomes_the_inputs_that_are_worked_out_by_hand() -> None:
    # log: 10 lies two thirds from 0.1 to 100; signed-log: 10 log(1 + 1) of log(1 + 50), log(101).
    low, high = -math.log1p(50), math.log1p(100)
    expected = [1 / 3, 0, 0, 1, 0, 2 * (math.log(2) - low) / (high - low) - 1, 0, 0, 1, 0, 0]
    assert declared.names(SCHEMA) == (
        "dose", "dose<1", "dose=1-10", "dose>=10", "dose:missing",
        "balance", "age", "ward=a", "ward=b", "ward=c", "ward:missing",
    )  # fmt: skip
    assert encode([(10.0, 10.0, 55.0, "b")])[0] == pytest.approx(expected, abs=1e-6)
    gone = encode([(math.nan, -1e9, 1e9, "")])[0]
    assert gone.tolist() == [0, 0, 0, 0, 1, -1, 1, 0, 0, 0, 1]


def test_a_value_outside_its_bounds_counts_as_the_bound() -> None:
    far, bound = (-7.0, 1e6, 1e3, "a"), (0.1, 1000.0, 90.0, "a")
    assert np.array_equal(encode([far]), encode([bound]))


@pytest.mark.parametrize("kind", [SCHEMA["dose"], SCHEMA["balance"], SCHEMA["age"]])
@given(st.floats(0, 1), st.floats(0, 1))
def test_scaling_keeps_order_and_can_be_undone(kind: Number, one: float, two: float) -> None:
    values = kind.low + (kind.high - kind.low) * np.array([one, two])
    places = kind.scaled(values)
    assert np.all(np.abs(places) <= 1 + 1e-12)
    assert (values[0] - values[1]) * (places[0] - places[1]) >= 0
    assert kind.unscaled(places) == pytest.approx(values, rel=1e-9, abs=1e-6)


def test_an_undeclared_value_and_a_missing_one_that_may_not_be_are_named() -> None:
    with pytest.raises(TaskError, match=r'made-up\.ward = "d" is not one of a, b, c\. Fetch'):
        encode([(1.0, 1.0, 50.0, "d")])
    with pytest.raises(TaskError, match=r"made-up\.age is missing in a row"):
        encode([(1.0, 1.0, math.nan, "a")])


@pytest.mark.parametrize("schema", SCHEMAS)
def test_made_up_rows_reach_every_input_and_stay_inside_the_bounds(schema: dict) -> None:
    drawn = declared.draw(schema, 4096, np.random.default_rng(0))
    for name, kind in schema.items():
        if isinstance(kind, Number):
            known = drawn[name][~np.isnan(drawn[name])]
            span = kind.high - kind.low
            assert kind.low - 1e-9 * span <= known.min() < known.max() <= kind.high + 1e-9 * span
    inputs = declared.encode(schema, drawn, "made-up")
    assert np.abs(inputs).max() <= 1
    assert np.all(inputs.std(axis=0) > 0.01)  # no input is idle


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_input_has_a_name_of_its_own(schema: dict) -> None:
    names = declared.names(schema)
    drawn = declared.draw(schema, 2, np.random.default_rng(0))
    assert len(set(names)) == len(names) == declared.encode(schema, drawn, "made-up").shape[1]


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=30), st.integers(0, 10**9))
def test_a_subject_is_on_one_side_whoever_else_is_there(ids: list[int], other: int) -> None:
    alone = {i: bool(declared.held_out(np.array([i]), "t")[0]) for i in ids}
    together = declared.held_out(np.array([*ids, other, *ids]), "t")
    assert together.tolist() == [
        *(alone[i] for i in ids),
        bool(declared.held_out(np.array([other]), "t")[0]),
        *(alone[i] for i in ids),
    ]


def test_one_subject_in_three_is_held_out_and_another_task_holds_out_others() -> None:
    ids = np.arange(30_000)
    held = declared.held_out(ids, "t")
    # Binomial(30000, 1/3): standard deviation 81.6; five of them.
    assert abs(int(held.sum()) - 10_000) < 408
    assert 0.5 < (held == declared.held_out(ids, "u")).mean() < 0.6


def test_a_label_or_group_that_was_not_declared_is_refused() -> None:
    assert declared.index(np.array(["M", "", "F"]), ("F", "M", ""), "x.sex").tolist() == [1, 2, 0]
    with pytest.raises(TaskError, match=r'x\.sex = "D" is not one of F, M\. Fetch'):
        declared.index(np.array(["M", "D"]), ("F", "M"), "x.sex")


def test_a_csv_file_is_read_as_text_with_or_without_a_line_of_titles() -> None:
    with_titles = declared.read_csv(b"a, b\n1, x y\n,\n")
    without = declared.read_csv(b"1, x y\n,\n\n", ("a", "b"))
    assert {k: v.tolist() for k, v in with_titles.items()} == {"a": ["1", ""], "b": ["x y", ""]}
    assert without["a"].tolist() == ["1", ""] and without["b"].tolist() == ["x y", ""]
    assert np.array_equal(declared.numbers(without["a"]), [1.0, math.nan], equal_nan=True)
