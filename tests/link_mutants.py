"""Mutations of what travels over the link: records, objects and their heads, envelopes, pieces.

An object is bytes named by their hash; one that is changed gets a new name, and so do all objects
that name it, up to the message: what a site would sign that made such an object itself.
"""

from __future__ import annotations

import io
import json
import math
import random
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedaccord.evidence import canonical_json, sha256

Objects = dict[str, bytes]  # by name, what is inside before what it is inside of
WORDS = ["", "x", "x" * 70_000, "\x00", "../../policy.toml", "/dev/zero", "\u2028\U0001f600", "run"]
NUMBERS = [0, 1, -1, 2, 7, 2**31, 2**63 - 1, -(2**63), 2**63, 10**400]
FLOATS = [0.0, -0.0, 1.0, 1e-320, 1e308, math.nan, math.inf, -math.inf]
LISTS: list[Any] = [[], [0] * 100_000, [1.5], ["a", "b"], [b"\x00"], [True], [1, "a"]]
DTYPES = ["float32", "float64", "float16", "int64", "bool", "O", "|O", "V8", "<U4", "c16", "", "?!"]
HEADERS = [
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000,), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
    "{'descr': '<f4', 'fortran_order': True, 'shape': (2, 2), }",
    "{'descr': '>f4', 'fortran_order': False, 'shape': (4,), }",
    "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (4,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
    "__import__('os').abort()",
    "[" * 300,
    "{" + " " * 70_000 + "}",
]


def value(chance: random.Random) -> Any:
    """Something that a record might hold, or might not."""
    kind = chance.choice([WORDS, NUMBERS, FLOATS, LISTS, [True, False, b"", b"\xff" * 9, None]])
    return chance.choice(kind)


def npy(chance: random.Random) -> bytes:
    """Bytes of an array with a header that is not what it should be."""
    words = chance.choice(HEADERS).encode()
    version = chance.choice([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x09"])
    width = 2 if version[0] == 1 else 4
    length = chance.choice([len(words), 0, 2 ** (8 * width) - 1, len(words) - 1]) % 2 ** (8 * width)
    return b"\x93NUMPY" + version + length.to_bytes(width, "little") + words + b"\x00" * 16


def noise(chance: random.Random, data: bytes) -> bytes:
    """Bytes with a few of them changed, cut off, put in or taken out."""
    place, some = chance.randrange(len(data) + 1), chance.randbytes(chance.randrange(1, 9))
    match chance.randrange(6):
        case 0:
            return data[:place]
        case 1:
            return data[:place] + some + data[place:]
        case 2:
            return data[:place] + data[place + len(some) :]
        case 3:
            return b""
        case 4:
            return data + some
        case _:
            return data[:place] + some + data[place + len(some) :]


def _array(chance: random.Random, array: Array) -> Array:
    dtype, shape, stype, data = array.dtype, tuple(array.shape), array.stype, array.data
    match chance.randrange(8):
        case 0:
            dtype = chance.choice(DTYPES)
        case 1:
            shape = chance.choice([(), (0,), (10**9, 10**9), (-1,), (1,) * 40, (2, 2)])
        case 2:
            stype = chance.choice(["numpy.ndarray", "pickle", "torch.tensor", ""])
        case 3:
            data = npy(chance)
        case 4:
            values = np.load(io.BytesIO(data)).copy()
            values.reshape(-1)[:1] = np.float32(chance.choice([*FLOATS[5:], 1e-42, 1e30, -3.0]))
            return Array(values)
        case 5:
            values = np.load(io.BytesIO(data))
            odd = [values.astype(">f4"), values.T.copy(), values.astype("f8"), values.reshape(-1)]
            return Array(chance.choice(odd))
        case 6:
            data = np.zeros(chance.choice([0, 1, 300_000]), np.float32).tobytes()
        case _:
            data = noise(chance, data)
    return Array(dtype, shape, stype, data)


def content(chance: random.Random, records: RecordDict) -> RecordDict:
    """Change a message's records: one thing, anywhere in them."""
    out = RecordDict(dict(records.items()))
    name = chance.choice(list(out))
    record: Any = out[name].copy()
    key = chance.choice(list(record) or [""])
    match chance.randrange(7):
        case 0:
            del out[name]
            return out
        case 1:
            out[chance.choice(["config", "arrays", "model", *WORDS])] = record
            return out
        case 2:
            for number in range(chance.choice([1, 7, 30])):
                out[f"more-{number}"] = ConfigRecord({"a": 1})
            return out
        case 3:
            kinds = [ConfigRecord({"a": 1}), MetricRecord({"a": 1.5}), ArrayRecord({})]
            out[name] = chance.choice(kinds)
            return out
        case 4:
            record.pop(key, None)
        case 5:
            held = record.get(key)
            record[chance.choice(["w", "loss", *WORDS])] = 1 if held is None else held
        case _:
            if isinstance(record, ArrayRecord):
                record[key] = _array(chance, record[key])
            elif chance.random() < 0.5 and isinstance(record[key], int):
                record[key] += chance.choice([-1, 1, 2**40])
            else:
                record[key] = value(chance)
    out[name] = record
    return out


def _json(chance: random.Random, said: Any) -> Any:
    """Change one place of a JSON value."""
    if isinstance(said, dict) and said and chance.random() < 0.9:
        key = chance.choice(list(said))
        if chance.random() < 0.2:
            return {k: v for k, v in said.items() if k != key}
        if chance.random() < 0.2:
            return said | {chance.choice(WORDS): said[key]}
        return said | {key: _json(chance, said[key])}
    if isinstance(said, list) and said and chance.random() < 0.6:
        place = chance.randrange(len(said))
        return [_json(chance, x) if n == place else x for n, x in enumerate(said)]
    found = [*WORDS, *NUMBERS, *FLOATS, [], {}, None, [0] * 50_000, [-1], [0.0], [True], [[0]]]
    return chance.choice(found)


def _body(chance: random.Random, data: bytes) -> bytes:
    try:
        said = json.loads(data)
    except ValueError:
        return noise(chance, data)
    match chance.randrange(8):
        case 0:
            return noise(chance, data)
        case 1:
            return b"[" * 100_000
        case 2:
            return data[:-1] + b', "dtype": 1}'
        case _:
            return json.dumps(_json(chance, said)).encode()


def _head(chance: random.Random, data: bytes) -> bytes:
    kind, inside, size = data.decode().split(" ")
    names = inside.split(",") if inside else []
    match chance.randrange(8):
        case 0:
            kinds = ["Message", "RecordDict", "ArrayRecord", "Array", "ArrayChunk", "ConfigRecord"]
            kind = chance.choice([*kinds, "MetricRecord", "Context", "", "x" * 5_000])
        case 1:
            size = str(chance.choice([*NUMBERS[:-1], "1_0", "x", "", "9" * 5_000]))
        case 2:
            names = names[1:]
        case 3:
            names = names * chance.choice([2, 1_000])
        case 4:
            names = names[::-1]
        case 5:
            odd = ["/dev/zero", "..", ".", "", "/etc/passwd", "../run.json", "0" * 64, "x" * 300]
            names = [*names, chance.choice(odd)]
        case 6:
            odd = ["/dev/zero", "..", ".", "\x01", "../../coordinator.toml", "0" * 64]
            names = [*names[:-1], chance.choice(odd)]
        case _:
            return noise(chance, data)
    return f"{kind} {','.join(names)} {size}".encode()


def changed(objects: Objects, name: str, data: bytes) -> Objects:
    """Put other bytes in an object's place, and give new names to all that name it."""
    names, out = {name: sha256(data)}, Objects()
    for old, held in objects.items():
        if old == name:
            held = data
        else:
            for before, after in names.items():
                held = held.replace(before.encode(), after.encode())
        names[old] = sha256(held)
        out[names[old]] = held
    return out


def objects(chance: random.Random, held: Objects) -> Objects:
    """Change one object of a message: its head, its body, or its bytes."""
    name = chance.choice(list(held))
    data = held[name]
    head, divider, body = data.partition(b"\x00")
    match chance.randrange(5):
        case 0:
            data = noise(chance, data)
        case 1 | 2:
            data = _head(chance, head) + divider + body
        case _:
            body = _body(chance, body)
            kind, inside, _ = head.decode().split(" ")
            data = f"{kind} {inside} {len(body)}".encode() + divider + body
    return changed(held, name, data)


def bomb(chance: random.Random, held: Objects) -> Objects:
    """Have one array say that its chunk stands in it very often, or grow the chunk."""
    name = next(k for k, data in held.items() if data.startswith(b"Array "))
    head, _, body = held[name].partition(b"\x00")
    said = json.loads(body)
    said["arraychunk_ids"] = [0] * chance.choice([2, 1_000, 200_000])
    body = json.dumps(said).encode()
    out = changed(held, name, head.rsplit(b" ", 1)[0] + b" %d\x00" % len(body) + body)
    if chance.random() < 0.3:
        chunk = next(k for k, data in out.items() if data.startswith(b"ArrayChunk"))
        size = chance.choice([1 << 20, 1 << 23])
        out = changed(out, chunk, b"ArrayChunk  %d\x00" % size + bytes(size))
    return out


def envelope(chance: random.Random, text: str) -> str:
    """Change an envelope's text before it is signed."""
    said = json.loads(text)
    key = chance.choice(list(said))
    match chance.randrange(6):
        case 0:
            del said[key]
        case 1:
            said[chance.choice(WORDS)] = value(chance) if chance.random() < 0.5 else ""
        case 2:
            return chance.choice([text + " ", text[:-1], "[]", "null", "1", "[" * 4_000, "{}", ""])
        case 3 if isinstance(said[key], int | float):
            said[key] += chance.choice([-1, 1, -1_000, 10**6, 0.5])
        case _:
            said[key] = value(chance)
    try:
        return canonical_json(said)
    except (ValueError, TypeError):
        return json.dumps(said, default=str)


def flipped(chance: random.Random, text: str) -> str:
    """Change one character of a text."""
    place = chance.randrange(len(text))
    other = chance.choice([sign for sign in "0a}\x00é " if sign != text[place]])
    return text[:place] + other + text[place + 1 :]


def pieces(chance: random.Random, stream: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """Change what is pushed of a reply's objects."""
    out, place = list(stream), chance.randrange(len(stream))
    name, data = out[place]
    match chance.randrange(8):
        case 0:
            out[place] = (name, noise(chance, data))
        case 1:
            del out[place]
        case 2:
            out[place : place + 1] = [(name, data[:3]), out[0], (name, data[3:])]
        case 3:
            out[place] = (chance.choice(["", "00", "/dev/zero", "0" * 64, "..", "ff" * 40]), data)
        case 4:
            out[place : place + 1] = [(name, b"")] * 50 + [(name, data)]
        case 5:
            out.append((name, data))
        case 6:
            chance.shuffle(out)
        case _:
            out[place : place + 1] = [(name, data[n : n + 1]) for n in range(len(data))]
    return out


def listing(chance: random.Random, listed: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Change the list of a reply's objects."""
    out, place = list(listed), chance.randrange(len(listed))
    name, size = out[place]
    match chance.randrange(6):
        case 0:
            del out[place]
        case 1:
            out[place] = (name, chance.choice([0, 1, size - 1, size + 1, 2**40, 2**64 - 1]))
        case 2:
            odd = ["", "00", "ff" * 32, "ff" * 40, sha256(b"")]
            out.insert(chance.randrange(len(out)), (chance.choice(odd), chance.choice([0, 5])))
        case 3:
            out = out[::-1]
        case 4:
            out = [*out[:-1]] * 20 + out
        case _:
            out[-1:] = [("", 0), out[-1]]
    return out
