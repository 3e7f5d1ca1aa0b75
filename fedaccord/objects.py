"""Messages as the link carries them: Flower's own objects, named by hash, checked before use."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_head_values_from_object_content,
    no_object_id_recompute,
)

from fedaccord.envelope import Refused
from fedaccord.evidence import digest

PIECE = 1 << 20  # bytes of an object that travel at once
MOST_OBJECTS = 100_000  # of one message
MOST_WORDS = 64 << 20  # bytes of all of a message but the data of its arrays
NAME = re.compile("[0-9a-f]{64}")
MODEL = ("arrays", "model", "student")  # records that hold a global model

DIVIDER = b"\x00"  # between an object's head and its body

Load = Callable[[str], bytes]

# What may stand in what: so no tree of objects is deeper than this table.
INSIDE: dict[type[InflatableObject], tuple[type[InflatableObject], ...]] = {
    Message: (RecordDict,),
    RecordDict: (ArrayRecord, ConfigRecord, MetricRecord),
    ArrayRecord: (Array,),
    Array: (ArrayChunk,),
    ConfigRecord: (),
    MetricRecord: (),
    ArrayChunk: (),
}
KINDS = {kind.__qualname__: kind for kind in INSIDE}


class Part(NamedTuple):
    """An object of a message that is to be sent.

    Attributes:
        size: bytes, with its header.
        load: gives them.
    """

    size: int
    load: Callable[[], bytes]


class Parcel(NamedTuple):
    """A message taken apart.

    Attributes:
        root: id of the message itself; the last of the parts.
        parts: by id, what is inside before what it is inside of.
        model: digest of the global model in it, "" if there is none.
    """

    root: str
    parts: dict[str, Part]
    model: str

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(part.size for part in self.parts.values())


def take_apart(message: Message, known: dict[int, dict[str, Part]] | None = None) -> Parcel:
    """Take a message apart into objects that are named by the hash of their bytes.

    Nothing is copied: each object's bytes are made when they are sent. Who keeps the parcel must
    not change the message.

    Args:
        message: a request or a reply.
        known: parts of contents that were taken apart before, by `id()`; strategies put one
            content into the messages to all sites.
    """
    known = {} if known is None else known
    parts: dict[str, Part] = {}
    with no_object_id_recompute():
        model = ""
        if message.has_content():
            content = message.content
            if id(content) not in known:
                known[id(content)] = {}
                _walk(content, known[id(content)])
            parts |= known[id(content)]
            model = model_digest({name: record.object_id for name, record in content.items()})
        root = message.object_id
        parts[root] = _part(message)
    return Parcel(root, parts, model)


def _walk(part: InflatableObject, parts: dict[str, Part]) -> None:
    for child in (part.children or {}).values():
        if child.object_id not in parts:
            _walk(child, parts)
    parts[part.object_id] = _part(part)


def _part(part: InflatableObject) -> Part:
    return Part(len(part.deflate()), part.deflate)


def model_digest(records: Mapping[str, str]) -> str:
    """Digest of the global model among a message's records, from their ids by name."""
    held = {name: records[name] for name in MODEL if name in records}
    return digest(held) if held else ""


def pieces(data: bytes) -> Iterator[bytes]:
    """Cut an object's bytes into pieces; an empty object is one empty piece."""
    view = memoryview(data)
    for start in range(0, max(1, len(data)), PIECE):
        yield bytes(view[start : start + PIECE])


def bundles(parts: Iterable[tuple[str, Part]]) -> Iterator[list[tuple[str, bytes]]]:
    """Cut parts into pieces and put these together to what travels at once, about `PIECE` bytes.

    Args:
        parts: name and part, in the order in which they are to travel.
    """
    held, size = list[tuple[str, bytes]](), 0
    for name, part in parts:
        for data in pieces(part.load()):
            if held and size + len(data) > PIECE:
                yield held
                held, size = [], 0
            held.append((name, data))
            size += len(data) + len(name)
    if held:
        yield held


def refuse_oversized(objects: Iterable[tuple[str, int]], root: str, most: int) -> dict[str, int]:
    """Hold a list of objects to its bounds, before one byte of them is taken.

    Args:
        objects: id and size of each, the root last.
        root: what the envelope says.
        most: bytes of all.

    Returns:
        The sizes by id.

    Raises:
        Refused: "size"; "body" for a name that is no hash, which could lead elsewhere on the disk,
            for an object that is listed twice, or if the last one is not the root.
    """
    sizes: dict[str, int] = {}
    total, last = 0, ""
    for name, size in objects:
        if not NAME.fullmatch(name) or name in sizes:
            raise Refused("body", "The list of objects has a name twice, or one that is no hash.")
        total, last = total + size, name
        sizes[name] = size
        if total > most or len(sizes) > MOST_OBJECTS:
            raise Refused(
                "size",
                f"The message has more than {most} bytes or {MOST_OBJECTS} objects; nothing of it "
                "was read.",
            )
    if last != root:
        raise Refused("body", "The list of objects does not end with what the envelope names.")
    return sizes


class Store:
    """Objects on disk by the hash of their bytes, so that a message needs no memory while it waits.

    | what arrives | what happens |
    |---|---|
    | bytes whose hash is not the object's name, or of another length | refused, nothing is kept |
    | a part of an object, then the connection breaks | the part is dropped; whole objects stay |
    | an object that is there | is not asked for again |
    | an object that nobody holds any longer when it is whole | refused, nothing is kept |

    Several threads may use it; no more than a piece of an object is in memory.
    """

    def __init__(self, folder: Path) -> None:
        """Begin empty: what another process left there is of no use to this one."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._folder = folder
        self._uses: dict[str, int] = {}
        self._lock = threading.Lock()

    def __contains__(self, name: str) -> bool:
        return (self._folder / name).exists()

    def hold(self, names: Iterable[str]) -> None:
        """Keep objects, there already or still to come, until they are let go of."""
        with self._lock:
            for name in names:
                self._uses[name] = self._uses.get(name, 0) + 1

    def let_go(self, names: Iterable[str]) -> None:
        """Remove objects that nobody holds any longer."""
        with self._lock:
            for name in names:
                left = self._uses.pop(name, 1) - 1
                if left > 0:
                    self._uses[name] = left
                else:
                    (self._folder / name).unlink(missing_ok=True)

    def read(self, name: str) -> bytes:
        """Return an object's bytes.

        Raises:
            Refused: "body": it is not there.
        """
        try:
            return (self._folder / name).read_bytes()
        except FileNotFoundError:
            raise Refused("body", "An object of the message is missing.") from None

    def take(self, sizes: Mapping[str, int], stream: Iterable[tuple[str, bytes]], me: str) -> None:
        """Write objects as their pieces arrive.

        Args:
            sizes: of the objects that may come, by name; each must be held.
            stream: name and piece; the pieces of an object stand together, and it comes once.
            me: names this stream; of two that bring the same object both may finish.

        Raises:
            Refused: "body" or "size" for an object that is not what its name and size say.
        """
        pieces_, came = iter(stream), set[str]()
        part = self._folder / f"part.{me}"
        try:
            while (first := next(pieces_, None)) is not None:
                name = first[0]
                if name not in sizes or name in came:
                    raise Refused("body", "An object came that is not lacking.")
                came.add(name)
                self._write(part, name, sizes[name], chain([first], pieces_))
                self._settle(part, name)
        finally:
            part.unlink(missing_ok=True)

    def _write(self, part: Path, name: str, left: int, stream: Iterator[tuple[str, bytes]]) -> None:
        """Write one object's pieces into a file, and hold their hash to its name."""
        mark = hashlib.sha256()
        with open(part, "wb") as file:
            for said, data in stream:
                left -= len(data)
                if said != name or left < 0 or (left and not data):
                    raise Refused("size", "An object is longer than was said, or cut short.")
                mark.update(data)
                file.write(data)
                if not left:
                    break
        if left:
            raise Refused("size", "An object was cut short.")
        if mark.hexdigest() != name:
            raise Refused("body", "An object's bytes are not what its name says.")

    def _settle(self, part: Path, name: str) -> None:
        """Let a whole object in, unless nobody waits for it any longer."""
        with self._lock:
            if name not in self._uses:
                raise Refused("body", "An object came that nobody waits for any longer.")
            part.replace(self._folder / name)


def put_together(root: str, load: Load, most: int) -> tuple[Message, str]:
    """Make a message of objects whose hashes were checked.

    Args:
        root: id of the message.
        load: returns an object's bytes.
        most: bytes that the data of all arrays may have when it is put together; one chunk can
            stand in many places.

    Returns:
        The message, and the digest of the global model in it.

    Raises:
        Refused: "message" for whatever is no message of Flower's, "size" for one that is larger
            once put together.
    """
    budget = _Budget(most)
    try:
        message = _made(root, (Message,), load, budget, {})
        assert isinstance(message, Message)
        return message, model_digest(budget.records)
    except Refused:
        raise
    except Exception as fault:  # whatever Flower's parsers raise on what is none of theirs
        raise Refused("message", f"It is no message: {type(fault).__name__}.") from None


class _Budget:
    """What may still be put together, and the ids of the records that were found."""

    def __init__(self, most: int) -> None:
        self.arrays, self.words, self.objects = most, MOST_WORDS, MOST_OBJECTS
        self.records: dict[str, str] = {}

    def spend(self, kind: type[InflatableObject], data: bytes) -> None:
        self.objects -= 1
        if kind is ArrayChunk:
            self.arrays -= len(data)
        else:
            self.words -= len(data)
        if min(self.arrays, self.words, self.objects) < 0:
            raise Refused("size", "The message is larger than may be put together.")


def _opened(
    name: str, kinds: tuple[type[InflatableObject], ...], load: Load, budget: _Budget
) -> tuple[type[InflatableObject], list[str], bytes]:
    """Read an object that must be of one of some kinds: its kind, what is inside, its bytes."""
    if not NAME.fullmatch(name):  # an object's head may say anything, such as /dev/zero
        raise Refused("message", "What stands in an object is named by no hash.")
    data = load(name)
    said, inside, _ = get_object_head_values_from_object_content(data)
    kind = KINDS[said]
    if kind not in kinds:
        raise Refused("message", f"{said} stands where it may not.")
    budget.spend(kind, data)
    return kind, inside, data


def _made(
    name: str,
    kinds: tuple[type[InflatableObject], ...],
    load: Load,
    budget: _Budget,
    made: dict[str, InflatableObject],
) -> InflatableObject:
    kind, inside, data = _opened(name, kinds, load, budget)
    if kind is Array:
        return _array(inside, data, load, budget)
    if kind is RecordDict:
        budget.records |= json.loads(data[data.index(DIVIDER) + 1 :])
    for child in inside:
        if child not in made:
            made[child] = _made(child, INSIDE[kind], load, budget, made)
        if type(made[child]) not in INSIDE[kind]:
            raise Refused("message", "An object stands where it may not.")
    return kind.inflate(data, {child: made[child] for child in inside})


def _array(inside: list[str], data: bytes, load: Load, budget: _Budget) -> Array:
    """Make an array of its chunks, of which one is in memory at a time; Flower's own needs three
    times the array.
    """  # noqa: D205
    said = json.loads(data[data.index(DIVIDER) + 1 :])
    dtype, shape, stype = said["dtype"], tuple(said["shape"]), said["stype"]
    if not (isinstance(dtype, str) and isinstance(stype, str)):
        raise Refused("message", "An array's words are no words.")
    if not all(type(length) is int for length in shape):
        raise Refused("message", "An array's shape is no shape.")
    places = said["arraychunk_ids"]
    known = isinstance(places, list) and all(type(place) is int for place in places)
    if not known or set(places) != set(range(len(inside))):
        raise Refused("message", "An array's chunks are not those that are inside of it.")
    if len(places) > 16 + budget.arrays // PIECE:  # Flower cuts five times as large ones
        raise Refused("size", "An array is cut into more chunks than it may be.")
    buffer = BytesIO()
    for place in places:
        _, none, chunk = _opened(inside[place], (ArrayChunk,), load, budget)
        if none:
            raise Refused("message", "A chunk has something inside.")
        buffer.write(memoryview(chunk)[chunk.index(DIVIDER) + 1 :])
    return Array(dtype, shape, stype, buffer.getvalue())
