"""Encodings of updates: the stated error holds for every value, and nothing else is ever let in."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fedaccord.evidence import sha256
from fedaccord.strategies import encoding as encodings
from fedaccord.strategies.encoding import FLOOR, decode, encode, pack, read, unpack, wire_bytes
from fedaccord.strategies.updates import Weights

CODED = ("float16", "int8")
ALL = ("float32", *CODED)
SHAPES = npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
# Every finite float32, the subnormal ones too, and the same in a float64.
SINGLES = npst.arrays(np.float32, SHAPES, elements=st.floats(width=32, allow_nan=False))
FINITE = SINGLES.map(lambda a: np.where(np.isfinite(a), a, np.float32(3e38)))
DOUBLES = npst.arrays(np.float64, SHAPES, elements=st.floats(-1e30, 1e30))
ANY = npst.arrays(st.sampled_from([np.float16, np.float32, np.float64]), SHAPES)
NAMES = st.text(min_size=1, max_size=5)


def passed(change: Weights, encoding: Any) -> Weights:
    """What arrives of an update that was packed, sent and unpacked."""
    out = unpack(pack(change, encoding), change, encoding)
    assert isinstance(out, dict), out
    return out


def scale_of(value: np.ndarray[Any, Any]) -> float:
    """The largest magnitude, or 0 where a tensor becomes zeros."""
    largest = float(np.abs(value).max(initial=0))
    return 0.0 if largest < FLOOR else largest


# --- error --------------------------------------------------------------------------------------


@given(FINITE)
@example(np.float32([1, 0.5, 1e-8, -3e-5, 6e-8]))
@example(np.float32([FLOOR, 1e-38, 1e-45]))
@settings(deadline=None)
def test_float16_is_off_by_2_to_minus_11_of_a_value_and_2_to_minus_25_of_the_largest(
    value: np.ndarray[Any, Any],
) -> None:
    found = passed({"w": value}, "float16")["w"].astype(np.float64)
    exact, scale = value.astype(np.float64), scale_of(value)
    bound = 2.0**-11 * np.abs(exact) + 2.0**-25 * scale
    assert (np.abs(found - exact) <= (bound if scale else FLOOR)).all()


@given(FINITE)
@example(np.float32([127, 0.5, 1.5, -2.5]))
@example(np.float32([FLOOR, 1e-38, -FLOOR / 254]))
@settings(deadline=None)
def test_int8_is_off_by_half_a_step_of_a_127th_of_the_largest(value: np.ndarray[Any, Any]) -> None:
    found = passed({"w": value}, "int8")["w"].astype(np.float64)
    exact, scale = value.astype(np.float64), scale_of(value)
    bound = scale / 254 + 2.0**-24 * scale  # the second for rounding to float32
    assert (np.abs(found - exact) <= (bound if scale else FLOOR)).all()


@given(DOUBLES)
@settings(deadline=None, max_examples=40)
def test_weights_of_float64_keep_the_same_bounds_with_their_scale_in_float32(
    value: np.ndarray[Any, Any],
) -> None:
    scale = scale_of(value) * (1 + 2.0**-23)
    for encoding, bound in (
        ("float16", 2.0**-11 * np.abs(value) + 2.0**-25 * scale),
        ("int8", np.full(value.shape, scale / 254 * (1 + 1e-12))),
    ):
        found = passed({"w": value}, encoding)["w"]
        assert found.dtype == np.float64
        assert (np.abs(found - value) <= (bound if scale else FLOOR)).all()


def test_the_bounds_are_the_true_ones() -> None:
    # Half of a float16's last place at 1 + 2^-11, and half of its smallest step; half of an int8's.
    big = np.float32([1, (1 + 2.0**-10 + 2.0**-11) / 2])
    error = np.abs(passed({"w": big}, "float16")["w"] - big)
    assert error[1] == 2.0**-12 > 0.99 * 2.0**-11 * big[1]
    small = np.float32([1, 1.5 * 2.0**-24])
    assert np.abs(passed({"w": small}, "float16")["w"] - small)[1] == 2.0**-25
    half = np.float32([127, 62.5])
    assert np.abs(passed({"w": half}, "int8")["w"] - half)[1] == 0.5  # 127 / 254


def test_a_tiny_update_is_scaled_before_it_is_rounded() -> None:
    # As plain float16 these would be 0: its smallest number is 6e-8.
    value = np.float32([3e-12, -1e-12, 5e-13])
    assert (value.astype(np.float16) == 0).all()
    np.testing.assert_allclose(passed({"w": value}, "float16")["w"], value, rtol=2**-11)
    np.testing.assert_allclose(passed({"w": value}, "int8")["w"], value, atol=3e-12 / 253)


def test_int8_rounds_half_to_even() -> None:
    value = np.float32([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    sent = encode({"w": value}, "int8")["arrays/w"]
    assert sent.tolist() == [127, 0, 2, 2, 0, -2, -2]
    assert sent.dtype == np.int8


@given(st.dictionaries(NAMES, st.one_of(FINITE, DOUBLES), max_size=3), st.sampled_from(ALL))
@settings(deadline=None, max_examples=40)
def test_to_encode_what_was_decoded_gives_the_same_bytes_again(
    change: Weights, encoding: Any
) -> None:
    once = pack(change, encoding)
    again = pack(passed(change, encoding), encoding)
    assert wire_bytes(again) == wire_bytes(once)


# --- values that are not finite, shapes that are odd -----------------------------------------


@given(st.dictionaries(NAMES, ANY, max_size=3), st.sampled_from(ALL))
@settings(deadline=None, max_examples=40)
def test_every_update_arrives_whatever_its_values_and_not_finite_ones_as_not_finite(
    change: Weights, encoding: Any
) -> None:
    found = passed(change, encoding)
    assert list(found) == list(change)
    for name, value in change.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        if encoding == "float32":
            np.testing.assert_array_equal(found[name], value)
        elif np.isfinite(value).all() and float(np.abs(value).max(initial=0)) < 3e38:
            assert np.isfinite(found[name]).all()
        elif not np.isfinite(value).all():
            assert np.isnan(found[name]).all()


@pytest.mark.parametrize("encoding", CODED)
def test_a_tensor_of_zeros_has_scale_zero_and_one_without_elements_too(encoding: Any) -> None:
    change = {
        "0": np.zeros((2, 2), np.float32),
        "1": np.zeros((0, 3), np.float32),
        "2": np.array(-5.5, np.float32),
    }
    sent, found = encode(change, encoding), passed(change, encoding)
    assert sent["scales/scales"].tolist() == [0, 0, 5.5]
    assert [found[name].tolist() for name in "012"] == [[[0, 0], [0, 0]], [], -5.5]


@pytest.mark.parametrize("encoding", CODED)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_makes_its_tensor_nan_and_no_other(
    value: float, encoding: Any
) -> None:
    change = {"bad": np.float32([1, value]), "good": np.float32([1, 2])}
    found = passed(change, encoding)
    assert np.isnan(found["bad"]).all()
    assert np.isfinite(found["good"]).all()


@pytest.mark.parametrize("encoding", ALL)
def test_whole_numbers_travel_as_they_are(encoding: Any) -> None:
    change = {"count": np.array([3, -7]), "w": np.float32([1])}
    np.testing.assert_array_equal(passed(change, encoding)["count"], change["count"])


# --- the wire -----------------------------------------------------------------------------------


@given(st.dictionaries(NAMES, FINITE, max_size=3), st.sampled_from(ALL), st.randoms())
@settings(deadline=None, max_examples=40)
def test_both_ends_name_a_release_by_the_same_bytes(
    change: Weights, encoding: Any, rng: Any
) -> None:
    payload = wire_bytes(pack(change, encoding))
    assert wire_bytes(encodings.records_of(payload)) == payload
    order = list(change)
    rng.shuffle(order)
    turned = {name: np.asfortranarray(change[name]).reshape(change[name].shape) for name in order}
    assert wire_bytes(pack(turned, encoding)) == payload
    arrived = encodings.received(encodings.records_of(payload), change, encoding)
    assert isinstance(arrived, dict)
    assert encodings.serialised(arrived) == payload


def test_words_beside_the_arrays_change_the_hash_and_are_not_sent() -> None:
    records = pack({"w": np.float32([1, 2])}, "int8")
    plain, salted = wire_bytes(records), wire_bytes(records, {"salt": "ab"})
    assert sha256(plain) != sha256(salted)
    assert wire_bytes(encodings.records_of(salted)) == plain


@given(st.dictionaries(NAMES, ANY, max_size=3), st.sampled_from(ALL))
@settings(deadline=None, max_examples=40)
def test_an_honest_update_is_within_the_bytes_that_it_can_need(
    change: Weights, encoding: Any
) -> None:
    used = sum(record.count_bytes() for record in pack(change, encoding).values())
    assert used <= encodings.most_bytes(change, encoding)


@pytest.mark.parametrize(
    ("encoding", "bytes_a_value"), [("float32", 4), ("float16", 2), ("int8", 1)]
)
def test_a_value_takes_four_two_or_one_bytes(encoding: Any, bytes_a_value: int) -> None:
    change = {"w": np.ones((100, 100), np.float32)}
    assert abs(len(wire_bytes(pack(change, encoding))) - 10_000 * bytes_a_value) < 300


# --- hostile input ------------------------------------------------------------------------------

LIKE = {"a": np.zeros(4, np.float32), "b": np.zeros((2, 3), np.float32)}
SENT = {"a": np.float32([1, 2, -3, 4]), "b": np.float32([[1, 2, 3], [4, 5, 6]])}


def spoil(encoding: Any, record: str, key: str, value: np.ndarray[Any, Any]) -> Weights | str:
    records = pack(SENT, encoding)
    records[record][key] = Array(value)
    return unpack(records, LIKE, encoding)


def scales(*values: float) -> np.ndarray[Any, Any]:
    return np.array(values, np.float32)


BAD_SCALES: dict[str, tuple[np.ndarray[Any, Any], str]] = {
    "negative": (scales(-4, 6), "form: the scale -4 of a is no magnitude"),
    "minus zero": (scales(-0.0, 6), "form: the scale -0 of a is no magnitude"),
    "minus infinity": (scales(-np.inf, 6), "form: the scale -inf of a is no magnitude"),
    "below the floor": (scales(1e-44, 6), "form: the scale "),
    "zero for values": (scales(0, 6), "form: the largest magnitude of a is "),
    "one too few": (scales(4), "form: scales is float32[1], not float32[2]"),
    "one too many": (scales(4, 6, 8), "form: scales is float32[3], not float32[2]"),
    "float64": (np.array([4.0, 6.0]), "form: scales is float64[2], not float32[2]"),
}


@pytest.mark.parametrize("encoding", CODED)
@pytest.mark.parametrize("case", BAD_SCALES)
def test_scales_that_no_honest_site_sends_are_refused(case: str, encoding: Any) -> None:
    value, reason = BAD_SCALES[case]
    said = spoil(encoding, "scales", "scales", value)
    assert isinstance(said, str)
    assert said.startswith(reason)


@pytest.mark.parametrize("encoding", CODED)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_scale_that_is_not_finite_makes_values_that_are_not(value: float, encoding: Any) -> None:
    found = spoil(encoding, "scales", "scales", scales(value, 6))
    assert isinstance(found, dict)
    assert not np.isfinite(found["a"]).all()
    assert np.isfinite(found["b"]).all()


def test_a_huge_scale_gives_huge_values_and_no_crash() -> None:
    found = spoil("int8", "scales", "scales", scales(3e38, 6))
    assert isinstance(found, dict)
    assert found["a"].max() == np.float32(3e38)


@pytest.mark.parametrize(
    ("encoding", "values"),
    [
        ("int8", np.array([-128, 0, 0, 0], np.int8)),
        ("int8", np.array([64, 0, 0, 0], np.int8)),
        ("float16", np.array([2, 1, 0, 0], np.float16)),
        ("float16", np.array([0.5, 0, 0, 0], np.float16)),
    ],
)
def test_values_that_do_not_fill_their_scale_are_refused(
    encoding: Any, values: np.ndarray[Any, Any]
) -> None:
    said = spoil(encoding, "arrays", "a", values)
    assert isinstance(said, str)
    assert said.startswith("form: the largest magnitude of a is ")


@pytest.mark.parametrize("sent", ALL)
@pytest.mark.parametrize("agreed", ALL)
def test_another_encoding_than_the_agreed_one_is_refused(sent: Any, agreed: Any) -> None:
    said = unpack(pack(SENT, sent), LIKE, agreed)
    assert isinstance(said, str) == (sent != agreed)


def headed(header: str, version: bytes = b"\x01\x00", length: int | None = None) -> bytes:
    size = len(header) if length is None else length
    return b"\x93NUMPY" + version + size.to_bytes(2, "little") + header.encode()


def header(shape: str = "(4,)", descr: str = "'<f4'", order: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


UNREADABLE = "cannot be read: its "
HEADERS: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", UNREADABLE),
    "three bytes": (b"\x93NU", UNREADABLE),
    "no header": (b"\x93NUMPY\x01\x00", UNREADABLE),
    "a header that is cut off": (headed(header(), length=500), UNREADABLE),
    "a header of 64 KiB": (headed(header() + " " * 65_000), UNREADABLE),
    "a longer header than numpy writes": (
        headed(header().ljust(300)) + bytes(16),
        "cannot be read: its bytes do not begin",
    ),
    "version 2": (headed(header(), b"\x02\x00"), UNREADABLE),
    "words": (headed("hello\n"), UNREADABLE),
    "a call": (headed("__import__('os').abort()\n"), UNREADABLE),
    "many brackets": (headed("(" * 200), UNREADABLE),
    "a key too many": (headed(header()[:-2] + "'x': 1}\n"), UNREADABLE),
    "10 GB": (headed(header("(2684354560,)")) + bytes(16), "holds float32[2684354560], not"),
    "a negative axis": (headed(header("(-4,)")) + bytes(16), "holds float32[-4], not"),
    "an axis of 150 digits": (headed(header(f"({'9' * 150},)")), "holds float32[9223372036"),
    "a dtype of objects": (headed(header(descr="'|O'")) + bytes(16), "holds object[4], not"),
    "a dtype of fields": (headed(header(descr="[('x', '<f4')]")) + bytes(16), "holds [('x', '<"),
    "big-endian": (headed(header(descr="'>f4'")) + bytes(16), "holds >f4[4], not the float32[4]"),
    "12 bytes of numbers": (headed(header()) + bytes(12), "has 12 bytes of numbers, not 16"),
    "20 bytes of numbers": (headed(header()) + bytes(20), "has 20 bytes of numbers, not 16"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_bytes_that_are_no_array_of_the_agreed_form_are_refused(case: str) -> None:
    data, reason = HEADERS[case]
    said = read(Array("float32", (4,), "numpy.ndarray", data), np.dtype(np.float32), (4,))
    assert isinstance(said, str)
    assert said.startswith(reason)


def test_the_header_that_the_others_are_made_from_is_read() -> None:
    data = headed(header()) + np.float32([1, 2, 3, 4]).tobytes()
    found = read(Array("float32", (4,), "numpy.ndarray", data), np.dtype(np.float32), (4,))
    assert not isinstance(found, str)
    assert found.tolist() == [1, 2, 3, 4]


def test_an_array_lies_in_the_bytes_that_came_and_cannot_be_written_to() -> None:
    found = read(Array(SENT["b"]), np.dtype(np.float32), (2, 3))
    assert not isinstance(found, str)
    assert found.base is not None and not found.flags.writeable and not found.flags.owndata


@given(st.sampled_from(ALL), st.data())
@settings(deadline=None, max_examples=100)
def test_any_change_of_bytes_is_refused_or_still_a_form_that_encode_makes(
    encoding: Any, data: st.DataObject
) -> None:
    records = pack(SENT, encoding)
    record = data.draw(st.sampled_from(sorted(records)))
    key = data.draw(st.sampled_from(sorted(records[record])))
    old = records[record][key]
    raw = bytearray(old.data)
    change: Callable[[], None] = data.draw(
        st.sampled_from(
            [
                lambda: raw.__setitem__(data.draw(st.integers(0, len(raw) - 1)), data.draw(BYTES)),
                lambda: raw.insert(data.draw(st.integers(0, len(raw))), data.draw(BYTES)),
                lambda: raw.__delitem__(slice(data.draw(st.integers(0, len(raw) - 1)), None)),
            ]
        )
    )
    change()
    records[record] = ArrayRecord(
        dict(records[record]) | {key: Array(old.dtype, old.shape, old.stype, bytes(raw))}
    )
    found = unpack(records, LIKE, encoding)
    if isinstance(found, str):
        assert found.startswith("form: ")
        return
    assert {k: (v.dtype, v.shape) for k, v in found.items()} == {
        k: (v.dtype, v.shape) for k, v in LIKE.items()
    }
    if all(np.isfinite(v).all() for v in found.values()):
        arrived = encodings.received(records, LIKE, encoding)
        assert isinstance(arrived, dict)
        again = encode(found, encoding)
        for name, value in again.items():
            np.testing.assert_array_equal(value, arrived[name])
        assert decode(again, LIKE, encoding).keys() == found.keys()


BYTES = st.integers(0, 255)


def test_the_figures_of_the_docs_are_what_their_command_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (Path(__file__).parent.parent / "docs" / "gates.md").read_text(encoding="utf-8")
    code, printed = re.search(r"```python\n(.*?)```.*?```text\n(.*?)```", page, re.DOTALL).groups()
    exec(code, {})
    assert capsys.readouterr().out == printed
