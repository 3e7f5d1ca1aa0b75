"""Attack scripts: what a hostile, broken or late site sends changes no bit of the model."""

from __future__ import annotations

import io
import math
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedaccord import accord as accords
from fedaccord.accord import Accord
from fedaccord.client.app import app as client_app
from fedaccord.models.build import build
from fedaccord.runs import RunFolder
from fedaccord.server import checkpoint, gates
from fedaccord.server.admission import Place
from fedaccord.server.checkpoint import weights_bytes
from fedaccord.server.door import Door
from fedaccord.server.heads import Heads
from fedaccord.server.mail import Mail
from fedaccord.server.one_run import FIRST_NODE
from fedaccord.server.rounds import Coordinator
from fedaccord.simulations.engine import InProcessGrid
from fedaccord.strategies import encoding as encodings
from fedaccord.strategies.seam import driver_for
from fedaccord.strategies.updates import Weights
from fedaccord.tasks import load_task

TASK = load_task("heart")
RUN, ROUND = "this-run", 2
BASE = checkpoint.weights_of(build("mlp", TASK.spec, {"hidden": 3}, 0))
ENCODINGS = ("float32", "float16", "int8")


def agreed(encoding: str) -> Accord:
    """The heart accord with a model of a few weights, no student, and an encoding."""
    return accords.parse(
        accords.load("heart").model_dump(mode="json")
        | {"model": {"name": "mlp", "options": {"hidden": 3}}}
        | {"distillation": {"enabled": False}, "strategy": {"encoding": encoding}}
    )


AGREED = {encoding: agreed(encoding) for encoding in ENCODINGS}
SITES = list(AGREED["float32"].roster)  # cleveland, hungary, switzerland, va
NODES = {site: FIRST_NODE + place for place, site in enumerate(SITES)}
GRID = InProcessGrid(client_app, 4, {})  # so that messages can be made


def honest(site: str) -> Weights:
    """What a site's training would add to the weights."""
    rng = np.random.default_rng(NODES[site])
    return {k: rng.normal(0, 0.1, v.shape).astype(v.dtype) for k, v in BASE.items()}


def content(site: str, encoding: Any = "float32", /, **said: Any) -> RecordDict:
    """A site's honest reply, but for what its config says."""
    config = ConfigRecord({"site": site, "run": RUN, "round": ROUND} | said)
    return RecordDict({**encodings.pack(honest(site), encoding), "config": config})


def reply(site: str, what: RecordDict | Error) -> Message:
    return Message(what, reply_to=Message(RecordDict(), NODES[site], "train"))


def coordinator(folder: Path, encoding: Any) -> Coordinator:
    accord, mail, heads = AGREED[encoding], Mail(GRID), Heads(SITES)
    places = [Place(site, node, 3, {}) for site, node in NODES.items()]
    return Coordinator(
        accord=accord,
        task=TASK,
        mail=mail,
        driver=driver_for(accord),
        folder=RunFolder(folder / RUN),
        places=places,
        plans=dict.fromkeys(SITES),
        heads=heads,
        door=Door(mail, accord, RUN, heads, places),
        model={name: value.copy() for name, value in BASE.items()},
        student=None,
        number=ROUND,
    )


def round_of(
    folder: Path, encoding: Any, *replies: tuple[str, RecordDict | Error]
) -> tuple[bytes, dict[str, str]]:
    """Gate and aggregate as a round does: the model as bytes, the reason of each site."""
    it = coordinator(folder, encoding)
    it.driver.ask(ROUND, it.model, ConfigRecord(), GRID)
    it.aggregate(it.gate(it.places, [reply(site, what) for site, what in replies]))
    return weights_bytes(it.model), {verdict.site: verdict.reason for verdict in it.verdicts}


def others(encoding: Any) -> list[tuple[str, RecordDict | Error]]:
    return [(site, content(site, encoding)) for site in SITES if site != "va"]


# --- the scripts --------------------------------------------------------------------------------

FIRST = honest("va")["0.weight"]  # (3, inputs)


def npy(array: np.ndarray[Any, Any], pickled: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=pickled)
    return buffer.getvalue()


def zipped(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, array)
    return buffer.getvalue()


def put(name: str, array: Array | np.ndarray[Any, Any] | None, encoding: Any = "float32") -> Any:
    """An honest reply with one array replaced, added or (None) left out."""
    what = content("va", encoding)
    record = what.array_records["scales" if name == "scales" else "arrays"]
    if array is None:
        del record[name]
    else:
        record[name] = array if isinstance(array, Array) else Array(array)
    return what


def one(value: float) -> RecordDict:
    """One coordinate of an honest update replaced."""
    array = FIRST.copy()
    array[1, 2] = value
    return put("0.weight", array)


def data(raw: bytes) -> RecordDict:
    """Bytes of any kind, under the right words for the array."""
    return put("0.weight", Array("float32", FIRST.shape, "numpy.ndarray", raw))


def words(dtype: str, shape: tuple[int, ...], stype: str = "numpy.ndarray") -> RecordDict:
    """The right bytes, under any words for the array."""
    return put("0.weight", Array(dtype, shape, stype, npy(FIRST)))


def zeros(*shape: int, dtype: str = "float32") -> np.ndarray[Any, Any]:
    return np.zeros(shape, dtype)


def header(shape: str, descr: str = "<f4", more: int = 16) -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(more)


def renamed() -> RecordDict:
    what: RecordDict = put("0.bias", None)
    what.array_records["arrays"]["0.Bias"] = Array(zeros(3))
    return what


def scaled(*scales: float) -> RecordDict:
    """An honest int8 reply with other scales for its four tensors."""
    old = content("va", "int8").array_records["scales"]["scales"].numpy()
    return put("scales", np.float32([*scales, *old[len(scales) :]]), "int8")


def with_record(name: str, record: Any) -> RecordDict:
    return RecordDict({**content("va"), name: record})


def without(name: str, encoding: str = "float32") -> RecordDict:
    return RecordDict({k: v for k, v in content("va", encoding).items() if k != name})


def many_records() -> RecordDict:
    return RecordDict({**content("va"), **{f"r{n}": MetricRecord({"x": 1}) for n in range(20)}})


def too_long() -> RecordDict:
    """An update whose L2 norm is the next number above the accord's bound."""
    bound = AGREED["float32"].strategy.max_update_norm
    array = np.zeros_like(FIRST)
    array[0, 0] = np.nextafter(np.float32(bound), np.float32(np.inf))
    what = content("va")
    change = {name: np.zeros_like(value) for name, value in BASE.items()} | {"0.weight": array}
    what["arrays"] = encodings.pack(change, "float32")["arrays"]
    return what


REFUSED = RecordDict({"config": ConfigRecord({"refused": "No."})})
ARRAYS = content("va").array_records["arrays"]
NAMES = "form: names of the weights differ from the global model's"
RECORDS = "form: {} records of arrays, not exactly "
BEGIN = "form: 0.weight cannot be read: its bytes do not begin as those of a numpy array"
IDENTITY = "identity: asked va for round 2, got {"
MEGABYTES = 10 * 2**20

Script = tuple[Callable[[], RecordDict | Error], str]
PLAIN: dict[str, Script] = {
    # values
    "a NaN": (lambda: one(np.nan), "not finite: 0.weight"),
    "an infinity": (lambda: one(np.inf), "not finite: 0.weight"),
    "minus infinity": (lambda: one(-np.inf), "not finite: 0.weight"),
    "an update that is far too long": (lambda: one(1e3), "norm: update of L2 norm 1000 is above"),
    "nearly the largest float32": (lambda: one(3e38), "norm: update of L2 norm 3e+38 is above"),
    "longer than the bound by one bit": (too_long, "norm: update of L2 norm 100.00000762939"),
    # shapes
    "a row that broadcasts": (lambda: put("0.weight", zeros(1, 35)), "form: 0.weight is float32[1"),
    "a bias that broadcasts": (lambda: put("0.weight", zeros(35)), "form: 0.weight is float32[35]"),
    "one number for a bias": (lambda: put("0.bias", zeros(1)), "form: 0.bias is float32[1], not"),
    "a scalar": (lambda: put("2.bias", zeros()), "form: 2.bias is float32[], not float32[2]"),
    "a transposed array": (lambda: put("2.weight", zeros(3, 2)), "form: 2.weight is float32[3, 2]"),
    "an axis too many": (lambda: put("0.bias", zeros(3, 1)), "form: 0.bias is float32[3, 1], not"),
    "no elements": (lambda: put("0.bias", zeros(0)), "form: 0.bias is float32[0], not float32[3]"),
    # dtypes
    "float64": (lambda: put("0.bias", zeros(3, dtype="f8")), "form: 0.bias is float64[3], not"),
    "float16": (lambda: put("0.bias", zeros(3, dtype="f2")), "form: 0.bias is float16[3], not"),
    "int64": (lambda: put("0.bias", zeros(3, dtype="i8")), "form: 0.bias is int64[3], not"),
    "bool": (lambda: put("0.bias", zeros(3, dtype="?")), "form: 0.bias is bool[3], not"),
    "complex": (lambda: put("0.bias", zeros(3, dtype="c8")), "form: 0.bias is complex64[3], not"),
    "text": (lambda: put("0.bias", np.array(["a", "b", "c"])), "form: 0.bias is <U1[3], not"),
    "big-endian numbers": (lambda: data(npy(FIRST.astype(">f4"))), "form: 0.weight holds >f4[3, "),
    "int32 under the words of float32": (
        lambda: data(npy(FIRST.view(np.int32))),
        "form: 0.weight holds int32[3, ",
    ),
    # names
    "a weight left out": (lambda: put("0.bias", None), NAMES),
    "a weight too many": (lambda: put("9.bias", zeros(3)), NAMES),
    "a buffer of whole numbers too many": (lambda: put("n", zeros(1, dtype="i8")), NAMES),
    "a weight by another name": (renamed, NAMES),
    "no arrays": (lambda: without("arrays"), RECORDS.format(0)),
    "an empty record of arrays": (lambda: with_record("arrays", ArrayRecord()), NAMES),
    "figures in the place of arrays": (
        lambda: with_record("arrays", MetricRecord({"0.weight": 1.0})),
        RECORDS.format(0),
    ),
    "the arrays twice": (lambda: with_record("more", ARRAYS), "size: "),
    "a second record, of one array": (
        lambda: with_record("more", ArrayRecord({"x": Array(zeros(1))})),
        RECORDS.format(2),
    ),
    "scales that nobody agreed on": (
        lambda: with_record("scales", ArrayRecord({"scales": Array(zeros(4))})),
        RECORDS.format(2),
    ),
    # who, and when
    "a round that is over": (lambda: content("va", round=1), "late: asked va for round 2, got rou"),
    "a round to come": (lambda: content("va", round=3), IDENTITY),
    "a round of True": (lambda: content("va", round=True), IDENTITY),
    "a round of 2.0": (lambda: content("va", round=2.0), IDENTITY),
    "a list of rounds": (lambda: content("va", round=[2, 2]), IDENTITY),
    "another run": (lambda: content("va", run="other-run"), IDENTITY),
    "another site's name": (lambda: content("va", site="hungary"), IDENTITY),
    "a name in bytes": (lambda: content("va", site=b"va"), IDENTITY),
    "no word of who": (lambda: without("config"), IDENTITY),
    "arrays in the place of words": (lambda: with_record("config", ARRAYS), "size: "),
    "nothing at all": (lambda: RecordDict(), IDENTITY),
    # bytes
    "no bytes": (lambda: data(b""), BEGIN),
    "garbage": (lambda: data(b"garbage"), BEGIN),
    "a pickle": (
        lambda: data(npy(np.array([{"a": 1}], object), pickled=True)),
        "form: 0.weight holds object[1], not",
    ),
    "a pickle without a header": (lambda: data(b"\x80\x04\x95" + bytes(90)), BEGIN),
    "an archive": (lambda: data(zipped(FIRST)), BEGIN),
    "data that are cut off": (lambda: data(npy(FIRST)[:-4]), "form: 0.weight has 416 bytes of num"),
    "data with more behind": (lambda: data(npy(FIRST) + bytes(4)), "form: 0.weight has 424 bytes"),
    "other numbers of the same size": (lambda: data(npy(FIRST.T)), "form: 0.weight holds float32["),
    "a header that asks for 10 GB": (
        lambda: data(header(f"({10 * 2**28},)")),
        "form: 0.weight holds float32[2684354560], not",
    ),
    "a header of a dtype of 1 GB": (
        lambda: data(header("(1,)", f"V{2**30}")),
        "form: 0.weight holds |V1073741824[1], not",
    ),
    "words of 10 GB": (lambda: words("float32", (10 * 2**28,)), "form: 0.weight is float32[2684"),
    "words of another dtype": (lambda: words("float64", FIRST.shape), "form: 0.weight is float64["),
    "words with escape codes": (
        lambda: words("\x1b[2J\n", (3,)),
        "form: 0.weight is ?[2J [3], not",
    ),
    "another way of writing": (
        lambda: words("float32", FIRST.shape, "pickle"),
        "form: 0.weight is written as pickle, not as numpy.ndarray",
    ),
    # sizes
    "far too many bytes": (lambda: data(npy(FIRST) + bytes(MEGABYTES)), "size: 10"),
    "a name of 10 MB": (lambda: put("w" * MEGABYTES, zeros(1)), "size: 10"),
    "words of 10 MB": (lambda: content("va", x="a" * MEGABYTES), "size: 10"),
    "a list of a million": (lambda: content("va", x=[1] * 10**6), "size: 1000"),
    "a refusal of 10 MB": (lambda: content("va", refused="a" * MEGABYTES), "size: 10"),
    "twenty records": (many_records, "size: 22 records are more than 8"),
    # no update
    "an error": (lambda: Error(2, "internal error;\nsee the log"), "error: internal error; see th"),
    "an error without words": (lambda: Error(5), "error: None"),
    "an error of 10 MB": (lambda: Error(2, "\x00" * MEGABYTES), "error: ?????"),
    "a refusal": (lambda: REFUSED, "refused: No."),
}
SCALES: dict[str, Script] = {
    "a scale of NaN": (lambda: scaled(np.nan), "not finite: 0.bias"),
    "a scale of infinity": (lambda: scaled(np.inf), "not finite: 0.bias"),
    "a negative scale": (lambda: scaled(-1), "form: the scale -1 of 0.bias is no magnitude"),
    "a huge scale": (lambda: scaled(3e38), "norm: update of L2 norm "),
    "a scale of nearly nothing": (lambda: scaled(1e-44), "form: the scale "),
    "a scale of nothing": (lambda: scaled(0), "form: the largest magnitude of 0.bias is 127, not"),
    "a scale too many": (
        lambda: put("scales", zeros(5), "int8"),
        "form: scales is float32[5], not float32[4]",
    ),
    "no scales": (lambda: without("scales", "int8"), RECORDS.format(1)),
    "the update as float32": (lambda: content("va"), RECORDS.format(1)),
    "-128": (
        lambda: put("0.bias", np.int8([-128, 0, 0]), "int8"),
        "form: the largest magnitude of 0.bias is 128, not 127, the full scale",
    ),
}
ATTACKS = [("float32", name) for name in PLAIN] + [("int8", name) for name in SCALES]


@pytest.fixture(scope="module")
def without_it(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, bytes]:
    """The model of a round in which the attacker said nothing."""
    folder = tmp_path_factory.mktemp("without")
    return {encoding: round_of(folder, encoding, *others(encoding))[0] for encoding in ENCODINGS}


@pytest.mark.parametrize(("encoding", "attack"), ATTACKS)
def test_an_attack_changes_no_bit_crashes_nothing_and_is_named(
    encoding: str, attack: str, without_it: Mapping[str, bytes], tmp_path: Path
) -> None:
    make, reason = (PLAIN | SCALES)[attack]
    for replies in ([*others(encoding), ("va", make())], [("va", make()), *others(encoding)]):
        model, reasons = round_of(tmp_path, encoding, *replies)
        assert reasons["va"].startswith(reason)
        assert reasons["va"].isprintable() and len(reasons["va"]) < 600
        assert [reasons[site] for site in SITES[:3]] == ["", "", ""]
        assert model == without_it[encoding]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_honest_reply_in_the_place_of_an_attack_does_change_the_model(
    encoding: str, without_it: Mapping[str, bytes], tmp_path: Path
) -> None:
    sent = [*others(encoding), ("va", content("va", encoding))]
    model, reasons = round_of(tmp_path, encoding, *sent)
    assert reasons == dict.fromkeys(SITES, "")
    assert model != without_it[encoding]


@pytest.mark.parametrize("examples", [10**18, -899, 0, math.nan, math.inf, 1])
def test_a_site_cannot_choose_its_own_weight(examples: float, tmp_path: Path) -> None:
    loud = with_record("metrics", MetricRecord({"num-examples": examples, "train_loss": math.nan}))
    quiet = round_of(tmp_path, "float32", *others("float32"), ("va", content("va")))
    assert round_of(tmp_path, "float32", *others("float32"), ("va", loud)) == quiet


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_second_reply_and_one_of_a_node_that_was_not_asked_change_no_bit(
    encoding: str, tmp_path: Path
) -> None:
    sent = [(site, content(site, encoding)) for site in SITES]
    quiet, _ = round_of(tmp_path, encoding, *sent)
    it = coordinator(tmp_path, encoding)
    it.driver.ask(ROUND, it.model, ConfigRecord(), GRID)
    stray = Message(content("va", encoding), reply_to=Message(RecordDict(), 77, "train"))
    twice = reply("va", content("hungary", encoding, site="va"))
    it.aggregate(it.gate(it.places, [stray, *(reply(*pair) for pair in sent), twice]))
    assert weights_bytes(it.model) == quiet
    assert [(v.site, v.reason) for v in it.verdicts if v.reason] == [
        ("node 77", "identity: this node was not asked"),
        ("va", "duplicate: the site had already replied"),
    ]


@pytest.mark.parametrize(
    "attack",
    ["a header that asks for 10 GB", "words of 10 GB", "a header of a dtype of 1 GB"],
)
def test_nothing_is_allocated_for_what_a_header_only_says(attack: str) -> None:
    what = reply("va", PLAIN[attack][0]())
    tracemalloc.start()
    try:
        gates.inspect(what, "va", RUN, ROUND, BASE, 100.0)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
