"""Messages taken apart and put together: Flower's own objects, the same bytes, nothing else."""

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as CHUNK
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import (
    inflatable_class_registry,
    inflate_object_from_contents,
    validate_object_content,
)
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fedaccord.envelope import Refused
from fedaccord.objects import (
    DIVIDER,
    INSIDE,
    KINDS,
    MOST_OBJECTS,
    PIECE,
    Parcel,
    Store,
    pieces,
    put_together,
    refuse_oversized,
    take_apart,
)

MOST = 50_000_000
names = st.text(max_size=8)
scalars = (
    st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.booleans()
)
numbers = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)
arrays = npst.arrays(
    st.sampled_from(["?", "i1", "u2", "i8", "f2", "f4", "f8"]),
    npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
).map(Array)
records = st.one_of(
    st.dictionaries(names, arrays, max_size=3).map(ArrayRecord),
    st.dictionaries(names, numbers | st.lists(st.integers(-9, 9)), max_size=3).map(MetricRecord),
    st.dictionaries(names, scalars | st.lists(st.booleans()), max_size=3).map(ConfigRecord),
)
contents = st.dictionaries(names | st.sampled_from(["arrays", "model"]), records, max_size=4)
errors = st.builds(Error, st.integers(0, 9), st.none() | st.text(min_size=1, max_size=20))


@pytest.fixture(autouse=True)
def _somebody() -> None:
    """Flower's messages say whose they are."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1


def asking(content: RecordDict) -> Message:
    return Message(content, 1000, "train")


def of(**given: object) -> Message:
    """A message with these arrays in its record "arrays"."""
    held = ArrayRecord({name: Array(np.asarray(value)) for name, value in given.items()})
    return asking(RecordDict({"arrays": held}))


messages = contents.map(RecordDict).map(asking) | errors.map(
    lambda error: Message(error, reply_to=of())
)


def same(one: Message, other: Message) -> bool:
    """Whether two messages say the same, of which one has a content or an error."""
    about = [{**message.metadata.__dict__, "_message_id": ""} for message in (one, other)]
    if about[0] != about[1] or one.has_error() != other.has_error():
        return False
    if one.has_error():
        return (one.error.code, one.error.reason) == (other.error.code, other.error.reason)
    return one.content == other.content


def held(parcel: Parcel) -> dict[str, bytes]:
    return {name: part.load() for name, part in parcel.parts.items()}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def carried(parcel: Parcel, store: Store, lacking: list[str] | None = None) -> None:
    """Carry a parcel's objects into a store, which holds them."""
    sizes = refuse_oversized(
        ((name, part.size) for name, part in parcel.parts.items()), parcel.root, MOST
    )
    store.hold(sizes)

    def stream() -> Iterator[tuple[str, bytes]]:
        for name in sizes if lacking is None else lacking:
            yield from ((name, data) for data in pieces(parcel.parts[name].load()))

    store.take(sizes, stream(), "test")


@settings(max_examples=100, deadline=None)
@given(messages)
def test_a_message_is_the_same_after_the_journey_and_for_flower(message: Message) -> None:
    parcel = take_apart(message)
    objects = held(parcel)
    assert list(objects)[-1] == parcel.root == message.object_id
    assert all(sha256(data).hexdigest() == name for name, data in objects.items())
    assert objects == {k: v.deflate() for k, v in get_all_nested_objects(message).items()}
    assert all(part.size == len(objects[name]) for name, part in parcel.parts.items())
    came, model = put_together(parcel.root, objects.__getitem__, MOST)
    assert same(came, message)
    assert model == parcel.model
    assert take_apart(came).root == parcel.root
    flowers = inflate_object_from_contents(parcel.root, dict(objects))
    assert isinstance(flowers, Message)
    assert same(flowers, came)


def test_a_large_array_travels_in_chunks_of_which_equal_ones_travel_once(store: Store) -> None:
    rng = np.random.default_rng(0)
    large = np.concatenate([rng.random(CHUNK // 8 + 5), np.zeros(3 * CHUNK // 8)])
    message = of(large=large, again=large, zeros=np.zeros(0))
    parcel = take_apart(message)
    assert parcel.size < large.nbytes  # though it is there twice
    carried(parcel, store)
    came, _ = put_together(parcel.root, store.read, MOST)
    assert came.content == message.content
    assert max(part.size for part in parcel.parts.values()) < CHUNK + 100


def test_the_model_digest_is_of_the_models_records_and_of_nothing_else() -> None:
    weights = np.arange(6, dtype="f4")
    model = take_apart(of(w=weights)).model
    other = asking(RecordDict({"config": ConfigRecord({"a": 1}), **of(w=weights.copy()).content}))
    assert take_apart(other).model == model != ""
    nudged = weights.copy()
    nudged[3] = np.nextafter(nudged[3], np.float32(9))
    for changed in (of(w=nudged), of(v=weights), of(w=weights.reshape(2, 3)), of()):
        assert take_apart(changed).model not in ("", model)
    student = RecordDict({**of(w=weights).content, "student": ArrayRecord({})})
    assert take_apart(asking(student)).model not in ("", model)
    assert take_apart(asking(RecordDict({"config": ConfigRecord({})}))).model == ""


def test_contents_that_messages_share_are_taken_apart_once() -> None:
    content, known = of(w=[1.0]).content, dict[int, dict]()
    first, second = (take_apart(Message(content, n, "train"), known) for n in (1, 2))
    assert len(known) == 1
    assert first.root != second.root
    assert set(first.parts) - set(second.parts) == {first.root}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3 * PIECE))
def test_pieces_are_bounded_and_together_are_the_object(size: int) -> None:
    data = bytes(size)
    found = list(pieces(data))
    assert b"".join(found) == data
    assert 1 <= len(found) <= size // PIECE + 1
    assert max(map(len, found)) <= PIECE


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_what_is_not_what_its_name_says_is_refused_and_not_kept(store: Store) -> None:
    parcel = take_apart(of(w=np.arange(9.0)))
    objects = held(parcel)
    sizes = {name: len(data) for name, data in objects.items()}
    name, data = next(iter(objects.items()))
    other = parcel.root
    streams = {
        "a changed byte": [(name, flipped(data, 20))],
        "one byte more": [(name, data + b"x")],
        "cut short": [(name, data[:-1])],
        "another in its middle": [(name, data[:5]), (other, data[5:])],
        "one that is not lacking": [("0" * 64, b"")],
        "twice": [(name, data), (name, data)],
        "pieces of nothing": [(name, b""), (name, data)],
    }
    for why, stream in streams.items():
        store.hold(sizes)
        with pytest.raises(Refused) as found:
            store.take(sizes, stream, "test")
        assert found.value.reason in ("body", "size"), why
        assert (name in store) == (why == "twice")
        store.let_go(sizes)
        assert list(store._folder.iterdir()) == [], why


def test_what_arrived_whole_stays_when_the_stream_breaks(store: Store) -> None:
    parcel = take_apart(of(v=np.arange(500_000.0), w=np.arange(9.0)))
    objects, sizes = held(parcel), {name: part.size for name, part in parcel.parts.items()}
    large = max(sizes, key=sizes.__getitem__)
    order = sorted(sizes, key=sizes.__getitem__)

    def broken() -> Iterator[tuple[str, bytes]]:
        for name in order:
            for data in pieces(objects[name]):
                yield name, data
                if name == large:
                    raise ConnectionError

    store.hold(sizes)
    with pytest.raises(ConnectionError):
        store.take(sizes, broken(), "test")
    lacking = [name for name in sizes if name not in store]
    assert lacking == [large]
    carried(parcel, store, lacking)
    assert put_together(parcel.root, store.read, MOST)[0].content is not None


def test_objects_go_with_the_last_who_holds_them(store: Store) -> None:
    first, second = take_apart(of(w=[1.0], v=[2.0])), take_apart(of(w=[1.0], v=[3.0]))
    shared = set(first.parts) & set(second.parts)
    carried(first, store)
    carried(second, store)
    store.let_go(first.parts)
    assert {name for name in first.parts if name in store} == shared
    store.let_go(second.parts)
    assert list(store._folder.iterdir()) == []


def test_what_nobody_waits_for_any_longer_is_not_kept(store: Store) -> None:
    parcel = take_apart(of(w=[1.0]))
    carried(parcel, store)
    sizes = {name: part.size for name, part in parcel.parts.items()}
    store.let_go(sizes)  # as a second offer does while the first is being pushed
    with pytest.raises(Refused):
        store.take(sizes, held(parcel).items(), "late")
    assert list(store._folder.iterdir()) == []


@pytest.mark.parametrize(
    ("objects", "reason"),
    [
        ([("a" * 64, 10)], ""),
        ([("b" * 64, 90), ("a" * 64, 10)], ""),
        ([("b" * 64, 91), ("a" * 64, 10)], "size"),
        ([("a" * 64, 10), ("b" * 64, 10)], "body"),  # the last is not the root
        ([], "body"),
        ([("a" * 64, 10), ("a" * 64, 10)], "body"),
        ([("", 0), ("a" * 64, 10)], "body"),  # would be the folder itself
        ([("../x", 0), ("a" * 64, 10)], "body"),
        ([("b" * 600, 0), ("a" * 64, 10)], "body"),
    ],
)
def test_a_list_is_held_to_its_bounds_before_a_byte_is_taken(objects: list, reason: str) -> None:
    if not reason:
        assert refuse_oversized(objects, "a" * 64, 100) == dict(objects)
        return
    with pytest.raises(Refused) as found:
        refuse_oversized(objects, "a" * 64, 100)
    assert found.value.reason == reason


def test_a_list_without_end_is_left_off() -> None:
    endless = ((f"{n:064x}", 0) for n in range(10**9))
    with pytest.raises(Refused, match=str(MOST_OBJECTS)):
        refuse_oversized(endless, "a" * 64, 100)


def made(kind: str, inside: list[str], body: bytes) -> tuple[str, bytes]:
    """An object as Flower writes it: its name and its bytes."""
    data = f"{kind} {','.join(inside)} {len(body)}".encode() + b"\x00" + body
    return sha256(data).hexdigest(), data


def bomb(times: int, chunk: int) -> tuple[str, dict[str, bytes]]:
    """A message whose one array names one chunk many times."""
    objects = dict([made("ArrayChunk", [], bytes(chunk))])
    said = {"dtype": "uint8", "shape": [1], "stype": "numpy.ndarray"}
    body = json.dumps(said | {"arraychunk_ids": [0] * times}).encode()
    for kind in ("Array", "ArrayRecord", "RecordDict"):
        inside = list(objects)[-1]
        body = body if kind == "Array" else json.dumps({"w": inside}).encode()
        objects |= dict([made(kind, [inside], body)])
    message = of().deflate()
    body = message[message.index(DIVIDER) + 1 :]
    root, data = made("Message", [list(objects)[-1]], body)
    return root, objects | {root: data}


def test_one_chunk_that_stands_in_many_places_is_counted_as_often() -> None:
    root, objects = bomb(10, 1000)
    assert put_together(root, objects.__getitem__, 11_000)
    root, objects = bomb(10_000, 1000)
    with pytest.raises(Refused) as found:
        put_together(root, objects.__getitem__, 11_000)
    assert found.value.reason == "size"


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"[" * 5000, b"\xff\x00", b'{"a": 1}'])
def test_an_object_that_is_no_message_or_damaged_is_refused(kind: str, body: bytes) -> None:
    for inside in ([], ["0" * 64], [next(iter(bomb(1, 1)[1]))]):
        root, data = made(kind, inside, body)
        objects = bomb(1, 1)[1] | {root: data}
        try:
            message, _ = put_together(root, objects.__getitem__, MOST)
            assert isinstance(message, Message)
        except Refused as refusal:
            assert refusal.reason in ("message", "body")


def test_an_object_that_holds_itself_cannot_be_made_and_a_wrong_place_is_refused() -> None:
    root, objects = bomb(1, 1)
    chunk, array, record, content = list(objects)[:4]
    message = of().deflate()
    body = message[message.index(DIVIDER) + 1 :]
    for inside in (chunk, array, record, root):
        wrong, data = made("Message", [inside], body)
        with pytest.raises(Refused, match="may not"):
            put_together(wrong, (objects | {wrong: data}).__getitem__, MOST)
    right, data = made("Message", [content], body)
    assert put_together(right, (objects | {right: data}).__getitem__, MOST)


def test_flowers_objects_are_as_this_link_relies_on() -> None:
    """What we take from Flower's private parts; another version of it may differ."""
    assert (HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER, CHUNK) == (DIVIDER, " ", 5 * 2**20)
    for name, kind in KINDS.items():
        assert inflatable_class_registry[name] is kind
    assert set(inflatable_class_registry) == set(KINDS), "Flower has another kind of object"
    message = of(w=np.arange(4.0))
    for name, part in get_all_nested_objects(message).items():
        data = part.deflate()
        validate_object_content(data)
        assert sha256(data).hexdigest() == name
        head, _, body = data.partition(DIVIDER)
        kind, inside, length = head.decode().split(" ")
        assert KINDS[kind] is type(part)
        assert int(length) == len(body)
        assert [i for i in inside.split(",") if i] == list(part.children or {})
        assert all(
            isinstance(child, INSIDE[type(part)]) for child in (part.children or {}).values()
        )
    content = message.content.deflate().partition(DIVIDER)[2]
    assert json.loads(content) == {"arrays": message.content["arrays"].object_id}
