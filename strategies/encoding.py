"""How an update travels: as it is, or coarser in a half or a quarter of the bytes.

The coarser forms are made after the noise, so they are post-processing and cost no privacy.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord
from safetensors import numpy as safetensors

from fedaccord.strategies.updates import Weights, to_arrays

Encoding = Literal["float32", "float16", "int8"]
Form = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]

ARRAYS, SCALES = "arrays", "scales"  # names of the records; the one array of the second is "scales"
HEADER = 256  # bytes at most that the .npy format may put before an array's numbers
FLOOR = 2.0**-100  # a tensor whose largest magnitude is below becomes zeros
# (2^-25 of it, float16's smallest error, is still far above the smallest float32)
FULL = {"float16": 1, "int8": 127}  # what a tensor's largest magnitude becomes
_MAGIC = b"\x93NUMPY\x01\x00"  # of the .npy format, version 1.0, which is what numpy writes


def encode(change: Weights, encoding: Encoding) -> Weights:
    """Write an update as the arrays that travel, by "record/name".

    A coded tensor has one scale s, its largest magnitude as a float32. Each value x becomes x / s
    as a float16, or 127 x / s as a whole number, ties to even; what is decoded differs from x by
    at most

    | encoding | bytes a value | difference |
    |---|---|---|
    | "float32" | those of the weight's own dtype | 0 |
    | "float16" | 2 | 2^-11 abs(x) + 2^-25 s |
    | "int8" | 1 | half a step, s / 254 |

    and by the rounding to the weight's own dtype: for float32 that is already within the bound of
    "float16", and adds at most 2^-24 s to that of "int8". To encode what was decoded gives the same
    arrays again. It fails on no value:

    | tensor | travels as | is decoded as |
    |---|---|---|
    | of zeros, without elements, or all below 2^-100 in magnitude | zeros, scale 0 | zeros |
    | with a NaN, an infinity, or a float64 beyond float32 | zeros, scale NaN | NaN everywhere |
    | of whole numbers | itself, without a scale | itself |

    Args:
        change: the update, arrays of any shape by the weights' names.
        encoding: what the accord says.
    """
    out: Weights = {}
    scales: list[np.float32] = []
    for name in sorted(change):
        value = np.asarray(change[name])
        if _coded(value.dtype, encoding):
            scale = _scale(value)
            scales.append(scale)
            value = _coarse(value, float(scale), encoding)
        out[f"{ARRAYS}/{name}"] = value
    if encoding != "float32":
        out[f"{SCALES}/{SCALES}"] = np.array(scales, np.float32)
    return out


def decode(wire: Weights, like: Weights, encoding: Encoding) -> Weights:
    """Read an update back from the arrays that `encode` made or `received` let through.

    Args:
        wire: arrays by "record/name", of the form that `form` describes.
        like: arrays of the weights' names, shapes and dtypes.
        encoding: what the accord says.

    Returns:
        The update, in the order and the dtypes of `like`; NaN or infinity where the scale is.
    """
    scales = dict(
        zip(_coded_names(like, encoding), wire.get(f"{SCALES}/{SCALES}", ()), strict=True)
    )
    out: Weights = {}
    for name, old in like.items():
        value = wire[f"{ARRAYS}/{name}"]
        if name in scales:
            with np.errstate(over="ignore", invalid="ignore"):  # becomes infinite or NaN
                wide = value.astype(np.float64) * float(scales[name]) / FULL[encoding]
                value = np.asarray(wide, old.dtype)
        out[name] = value
    return out


def form(like: Weights, encoding: Encoding) -> Form:
    """Return the dtype and shape of each array that travels, by "record/name"."""
    coded = _coded_names(like, encoding)
    out: Form = {
        f"{ARRAYS}/{name}": (np.dtype(encoding) if name in coded else value.dtype, value.shape)
        for name, value in like.items()
    }
    if encoding != "float32":
        out[f"{SCALES}/{SCALES}"] = (np.dtype(np.float32), (len(coded),))
    return out


def most_bytes(like: Weights, encoding: Encoding) -> int:
    """Return how many bytes an honest update can need in a message, names and headers included."""
    return sum(
        dtype.itemsize * math.prod(shape) + HEADER + len(name)
        for name, (dtype, shape) in form(like, encoding).items()
    )


def pack(change: Weights, encoding: Encoding) -> dict[str, ArrayRecord]:
    """Encode an update into the records of arrays that a reply carries, by name of the record."""
    return _records(encode(change, encoding))


def unpack(records: Mapping[str, ArrayRecord], like: Weights, encoding: Encoding) -> Weights | str:
    """Decode what `pack` made; of anything else say why it is none (see `received`).

    Args:
        records: records of arrays from anybody.
        like: arrays of the weights' names, shapes and dtypes.
        encoding: what the accord says.
    """
    wire = received(records, like, encoding)
    return wire if isinstance(wire, str) else decode(wire, like, encoding)


def received(
    records: Mapping[str, ArrayRecord], like: Weights, encoding: Encoding
) -> Weights | str:
    """Read the arrays of a stranger's update as they travelled, or say why they are none.

    Nothing is allocated for what a sender only says: the arrays lie in the bytes that came. Only
    what `encode` can make is let through, but that values may be NaN or infinite.

    Args:
        records: records of arrays from anybody.
        like: arrays of the weights' names, shapes and dtypes.
        encoding: what the accord says.

    Returns:
        Arrays by "record/name", read-only; or the reason, "form: ...".
    """
    expected = form(like, encoding)
    names = {ARRAYS} if encoding == "float32" else {ARRAYS, SCALES}
    if set(records) != names:
        words = " and ".join(f'"{name}"' for name in sorted(names))
        return f"form: {len(records)} records of arrays, not exactly {words}"
    if sum(map(len, records.values())) != len(expected) or any(
        name.partition("/")[2] not in records[name.partition("/")[0]] for name in expected
    ):
        return "form: names of the weights differ from the global model's"
    out: Weights = {}
    for name, (dtype, shape) in expected.items():
        record, _, key = name.partition("/")
        value = read(records[record][key], dtype, shape)
        if isinstance(value, str):
            return f"form: {key} {value}"
        out[name] = value
    reason = _unscaled(out, like, encoding)
    return f"form: {reason}" if reason else out


def read(array: Array, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any] | str:
    """Read an array of a known dtype and shape in place, or say why it cannot be one.

    What its sender says of it, what the header of its bytes says, and how many bytes there are must
    all be right. Only the header is parsed, and no more than 256 bytes of it.
    """
    if (array.dtype, tuple(array.shape)) != (_name(dtype), shape):
        return f"is {_words(array.dtype[:32], array.shape)}, not {dtype}{list(shape)}"
    if array.stype != "numpy.ndarray":
        return f"is written as {array.stype[:32]}, not as numpy.ndarray"
    data = array.data
    start = len(_MAGIC) + 2 + int.from_bytes(data[8:10], "little")
    if data[:8] != _MAGIC or start > min(HEADER, len(data)):
        return "cannot be read: its bytes do not begin as those of a numpy array"
    said = _header(data[:start])
    if said is None:
        return "cannot be read: its header says nothing of a numpy array"
    if said[0] != shape or said[2] != dtype:
        held = _words(str(said[2])[:32], said[0])
        return f"holds {held}, not the {dtype}{list(shape)} that it says"
    size = math.prod(shape)
    if len(data) - start != size * dtype.itemsize:
        return f"has {len(data) - start} bytes of numbers, not {size * dtype.itemsize}"
    if not size:
        return np.zeros(shape, dtype)
    row = np.frombuffer(data, dtype, size, start)
    return row.reshape(shape, order="F" if said[1] else "C")


def wire_bytes(records: Mapping[str, ArrayRecord], about: Mapping[str, str] | None = None) -> bytes:
    """Serialise records that this program made or let through, as safetensors by "record/name".

    Equal arrays and words give equal bytes at both ends: their SHA-256 names a site's release.

    Args:
        records: from `pack`, or let through by `received`.
        about: words that are stored beside the arrays and never sent.
    """
    return serialised(
        {
            f"{name}/{key}": a.numpy()
            for name, record in records.items()
            for key, a in record.items()
        },
        about,
    )


def serialised(wire: Weights, about: Mapping[str, str] | None = None) -> bytes:
    """Serialise arrays by "record/name", as `wire_bytes` does records."""
    # safetensors writes an array as it lies in memory, which for a transposed one is wrong.
    rows = {name: np.asarray(wire[name], order="C") for name in sorted(wire)}
    return safetensors.save(rows, metadata=dict(about) if about else None)


def records_of(payload: bytes) -> dict[str, ArrayRecord]:
    """Read back what `wire_bytes` made, to be sent or sent again."""
    return _records(safetensors.load(payload))


def _records(wire: Weights) -> dict[str, ArrayRecord]:
    parts: dict[str, Weights] = {ARRAYS: {}}
    for name in sorted(wire):  # so that the same bytes are the same message each time
        record, _, key = name.partition("/")
        parts.setdefault(record, {})[key] = wire[name]
    return {record: to_arrays(part) for record, part in parts.items()}


def _coded(dtype: np.dtype[Any], encoding: Encoding) -> bool:
    return encoding != "float32" and dtype.kind == "f"


def _coded_names(like: Weights, encoding: Encoding) -> list[str]:
    """Name the tensors that have a scale, in the order of the scales."""
    return [name for name in sorted(like) if _coded(like[name].dtype, encoding)]


def _scale(value: npt.NDArray[Any]) -> np.float32:
    """Return a tensor's largest magnitude; 0 for one below the floor, NaN for one without bound."""
    largest = float(np.abs(value).max(initial=0))
    if largest < FLOOR:
        return np.float32(0)
    with np.errstate(over="ignore"):
        scale = np.float32(largest)
    return scale if np.isfinite(scale) else np.float32(np.nan)


def _coarse(value: npt.NDArray[Any], scale: float, encoding: Encoding) -> npt.NDArray[Any]:
    """Divide a tensor by its scale and round; zeros where there is no scale above 0."""
    if not scale > 0:
        return np.zeros(value.shape, encoding)
    wide = value.astype(np.float64) * FULL[encoding] / scale
    return np.asarray(np.rint(wide) if encoding == "int8" else wide, encoding)


def _unscaled(wire: Weights, like: Weights, encoding: Encoding) -> str:
    """Say what is wrong with a scale or with values that do not fill it, or ""."""
    scales = wire.get(f"{SCALES}/{SCALES}", np.zeros(0))
    for name, scale in zip(_coded_names(like, encoding), scales, strict=True):
        if np.signbit(scale) and not np.isnan(scale):
            return f"the scale {scale:g} of {name} is no magnitude"
        if 0 < scale < FLOOR:
            return f"the scale {scale:g} of {name} is below {FLOOR:g}"
        value = wire[f"{ARRAYS}/{name}"]
        if encoding == "float16":
            value = value.astype(np.float32)  # numpy is slow at float16
        largest = max(float(value.max(initial=0)), -float(value.min(initial=0)))
        full = FULL[encoding] if scale else 0
        if np.isfinite(scale) and math.isfinite(largest) and largest != full:
            return f"the largest magnitude of {name} is {largest:g}, not {full}, the full scale"
    return ""


def _words(dtype: str, shape: tuple[int, ...]) -> str:
    """Name a stranger's dtype and shape, neither at length."""
    return f"{dtype}{[min(int(n), 2**63) for n in shape[:8]]}"


_name = lru_cache(maxsize=64)(str)  # of a dtype, which numpy takes long to spell


@lru_cache(maxsize=4096)
def _header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]] | None:
    """Parse the header of an .npy file: shape, whether columns come first, dtype; or None."""
    file = BytesIO(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy speaks of old forms; those are refused below
            np.lib.format.read_magic(file)
            return np.lib.format.read_array_header_1_0(file)
    except Exception:  # numpy raises many kinds, and all mean the same here
        return None
