"""The gates: what a hostile, broken or late site sends does not reach the model, and is named."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedaccord import accord as accords
from fedaccord.client.app import app as client_app
from fedaccord.models.build import build
from fedaccord.runs import RunFolder
from fedaccord.server import checkpoint, gates
from fedaccord.server.admission import Place
from fedaccord.server.checkpoint import weights_bytes
from fedaccord.server.gates import Weights
from fedaccord.server.heads import Heads
from fedaccord.server.rounds import Coordinator
from fedaccord.simulations.engine import FIRST_NODE, InProcessGrid
from fedaccord.strategies.fedavg import fedavg
from fedaccord.tasks import load_task

AGREED = accords.load("heart")
AGREED = accords.parse(
    AGREED.model_dump(mode="json")
    | {"model": {"name": "mlp", "options": {"hidden": 3}}, "distillation": {"enabled": False}}
)
TASK = load_task("heart")
SITES = list(AGREED.roster)  # cleveland, hungary, switzerland, va
NODES = {site: FIRST_NODE + place for place, site in enumerate(SITES)}
RUN, ROUND = "this-run", 2
BASE = checkpoint.weights_of(build("mlp", TASK.spec, {"hidden": 3}, 0))
GRID = InProcessGrid(client_app, 4, {})  # so that messages can be made


def honest(site: str) -> Weights:
    """What a site would send: the base moved a little, each site in its own direction."""
    rng = np.random.default_rng(NODES[site])
    return {k: v + rng.normal(0, 0.1, v.shape).astype(v.dtype) for k, v in BASE.items()}


def content(site: str, arrays: Mapping[str, Array | None] | None = None) -> RecordDict:
    """A site's honest reply, with some arrays replaced, added or (None) left out."""
    record = gates.to_arrays(honest(site))
    for name, array in (arrays or {}).items():
        if array is None:
            del record[name]
        else:
            record[name] = array
    config = ConfigRecord({"site": site, "run": RUN, "round": ROUND})
    return RecordDict({"arrays": record, "config": config})


def everybody(*but: str) -> list[Message]:
    return [reply(site, content(site)) for site in SITES if site not in but]


def reply(site: str, what: RecordDict | Error, node: int | None = None) -> Message:
    asked = Message(RecordDict(), NODES[site] if node is None else node, "train")
    return Message(what, reply_to=asked)


def coordinator(folder: Path) -> Coordinator:
    places = [Place(site, node, 3, {}) for site, node in NODES.items()]
    return Coordinator(
        accord=AGREED,
        task=TASK,
        grid=GRID,
        strategy=fedavg(),
        folder=RunFolder(folder / RUN),
        places=places,
        plans=dict.fromkeys(SITES),
        heads=Heads(SITES),
        model={name: value.copy() for name, value in BASE.items()},
        student=None,
        number=ROUND,
    )


def aggregate(replies: list[Message], folder: Path) -> tuple[bytes, list[gates.Verdict]]:
    """Gate and aggregate as a round does; the model as bytes and the verdicts."""
    it = coordinator(folder)
    verdicts = it.gate(it.places, replies)
    it.aggregate(verdicts)
    return weights_bytes(it.model), [verdict for verdict, _ in verdicts]


# --- attacks ------------------------------------------------------------------------------------


def npy(array: np.ndarray[Any, Any], pickled: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=pickled)
    return buffer.getvalue()


def zipped(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, array)
    return buffer.getvalue()


FIRST = BASE["0.weight"]  # (3, inputs)
SPOILT = honest("va")["0.weight"].copy()


def spoilt(value: float) -> Array:
    array = SPOILT.copy()
    array[1, 2] = value
    return Array(array)


def huge_header() -> bytes:
    """A header that speaks of 2**40 numbers, before the bytes of a few."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**40},), }}".encode()
    header += b" " * (118 - len(header) - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(16)


def identity(**said: object) -> RecordDict:
    out = content("va")
    for key, value in said.items():
        out.config_records["config"][key] = value  # type: ignore[assignment]
    return out


def put(name: str, array: Array | None) -> RecordDict:
    return content("va", {name: array})


def data(raw: bytes) -> RecordDict:
    """Bytes of any kind, under the right words for the array."""
    return put("0.weight", Array("float32", FIRST.shape, "numpy.ndarray", raw))


def words(dtype: str, shape: tuple[int, ...], stype: str = "numpy.ndarray") -> RecordDict:
    """The right bytes, under any words for the array."""
    return put("0.weight", Array(dtype, shape, stype, npy(SPOILT)))


def zeros(*shape: int, dtype: str = "float32") -> Array:
    return Array(np.zeros(shape, dtype))


REFUSED = RecordDict({"config": ConfigRecord({"refused": "No."})})
ARRAYS, CONFIG = (content("va")[name] for name in ("arrays", "config"))
OTHER_NAMES = "form: names of the weights differ from the global model's"
ONE_RECORD = "form: exactly one record of arrays is expected"
UNREADABLE = "form: 0.weight cannot be read"
OTHER_BYTES = "form: 0.weight holds something else than the float32[3, "
IDENTITY = "identity: asked va for round 2, got {"

ATTACKS: dict[str, tuple[RecordDict | Error, str]] = {
    "a NaN": (put("0.weight", spoilt(np.nan)), "not finite: 0.weight"),
    "an infinity": (put("0.weight", spoilt(np.inf)), "not finite: 0.weight"),
    "minus infinity": (put("0.weight", spoilt(-np.inf)), "not finite: 0.weight"),
    "a row that broadcasts": (put("0.weight", zeros(1, 35)), "form: 0.weight is float32[1, 35]"),
    "a bias that broadcasts": (put("0.weight", zeros(35)), "form: 0.weight is float32[35], not"),
    "a scalar that broadcasts": (put("2.bias", zeros()), "form: 2.bias is float32[], not float"),
    "a transposed array": (put("2.weight", zeros(3, 2)), "form: 2.weight is float32[3, 2], not"),
    "an axis too many": (put("0.bias", zeros(3, 1)), "form: 0.bias is float32[3, 1], not float"),
    "float64": (put("0.bias", zeros(3, dtype="float64")), "form: 0.bias is float64[3], not flo"),
    "float16": (put("0.bias", zeros(3, dtype="float16")), "form: 0.bias is float16[3], not flo"),
    "whole numbers": (put("0.bias", zeros(3, dtype="int64")), "form: 0.bias is int64[3], not fl"),
    "a weight left out": (put("0.bias", None), OTHER_NAMES),
    "a weight too many": (put("9.bias", zeros(3)), OTHER_NAMES),
    "no arrays": (RecordDict({"config": CONFIG}), ONE_RECORD),
    "two records": (RecordDict({"arrays": ARRAYS, "more": ARRAYS, "config": CONFIG}), ONE_RECORD),
    "a record of another name": (RecordDict({"more": ARRAYS, "config": CONFIG}), ONE_RECORD),
    "nothing at all": (RecordDict(), IDENTITY),
    "a round that is over": (identity(round=1), IDENTITY),
    "a round to come": (identity(round=3), IDENTITY),
    "another run": (identity(run="other-run"), IDENTITY),
    "another site's name": (identity(site="hungary"), IDENTITY),
    "an update that is too long": (put("0.weight", spoilt(1e3)), "norm: update of L2 norm 99"),
    "nearly the largest float32": (put("0.weight", spoilt(3e38)), "norm: update of L2 norm 3e+38"),
    "an error": (Error(2, "internal error;\nsee the log"), "error: internal error; see the log"),
    "an error without words": (Error(5), "error: None"),
    "a refusal": (REFUSED, "refused: No."),
    "garbage": (data(b"garbage"), f"{UNREADABLE} (ValueError)"),
    "no bytes": (data(b""), f"{UNREADABLE} (EOFError)"),
    "a pickle": (data(npy(np.array([{}], object), pickled=True)), f"{UNREADABLE} (ValueError)"),
    "an array that is cut off": (data(npy(SPOILT)[:-4]), f"{UNREADABLE} (ValueError)"),
    "an archive that is cut off": (data(b"PK\x03\x04" + bytes(9)), f"{UNREADABLE} (BadZipFile)"),
    "an archive": (data(zipped(SPOILT)), OTHER_BYTES),
    "an array of another shape": (data(npy(SPOILT[:1])), OTHER_BYTES),
    "an array of another byte order": (data(npy(SPOILT.astype(">f4"))), OTHER_BYTES),
    "a header that asks for terabytes": (data(huge_header()), UNREADABLE),
    "far too many bytes": (data(npy(SPOILT) + bytes(10_000)), "form: 0.weight has 10"),
    "words of another shape": (words("float32", (35, 3)), "form: 0.weight is float32[35, 3], not"),
    "words of another dtype": (words("float64", FIRST.shape), "form: 0.weight is float64[3, 35],"),
    "another way of writing arrays": (words("float32", FIRST.shape, "pickle"), UNREADABLE),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_reply_that_is_not_as_agreed_is_dropped_and_changes_no_bit(
    attack: str, tmp_path: Path
) -> None:
    what, reason = ATTACKS[attack]
    model, verdicts = aggregate([*everybody("va"), reply("va", what)], tmp_path)
    assert [v.reason for v in verdicts[:3]] == ["", "", ""]
    assert (verdicts[3].site, verdicts[3].weights) == ("va", None)
    assert verdicts[3].reason.startswith(reason)
    assert verdicts[3].reason.isprintable()
    assert model == aggregate(everybody("va"), tmp_path)[0]


def test_an_honest_reply_does_change_the_model(tmp_path: Path) -> None:
    model, verdicts = aggregate(everybody(), tmp_path)
    assert [v.reason for v in verdicts] == [""] * 4
    assert model != aggregate(everybody("va"), tmp_path)[0]


def test_what_a_site_says_is_repeated_on_one_line_and_not_without_end(tmp_path: Path) -> None:
    shouting = RecordDict({"config": ConfigRecord({"refused": "No.\n" * 10_000})})
    _, verdicts = aggregate([reply("va", shouting)], tmp_path)
    assert len(verdicts[0].reason) < 600
    assert verdicts[0].reason.startswith("refused: No. No. No.")


def test_a_second_reply_of_a_site_is_dropped_and_the_first_one_counts(tmp_path: Path) -> None:
    second = content("va")
    second["arrays"] = gates.to_arrays({k: v * 2 for k, v in honest("va").items()})
    model, verdicts = aggregate([*everybody(), reply("va", second)], tmp_path)
    assert [(v.site, v.reason) for v in verdicts[3:]] == [
        ("va", ""),
        ("va", "duplicate: the site had already replied"),
    ]
    assert model == aggregate(everybody(), tmp_path)[0]


def test_a_reply_of_a_node_that_was_not_asked_is_dropped_and_named(tmp_path: Path) -> None:
    stray = reply("va", content("va"), node=77)
    model, verdicts = aggregate([stray, *everybody()], tmp_path)
    assert ("node 77", "identity: this node was not asked") in [
        (v.site, v.reason) for v in verdicts
    ]
    assert model == aggregate(everybody(), tmp_path)[0]


def test_the_record_of_a_round_keeps_the_reply_that_counted_beside_its_duplicate(
    tmp_path: Path,
) -> None:
    it = coordinator(tmp_path)
    it.folder = RunFolder.create(tmp_path / RUN, "")
    it.places = [Place(s, n, 3, {"rounds": 4, "epsilon": "infinite"}) for s, n in NODES.items()]
    verdicts = it.gate(it.places, [reply("va", content("va")), reply("va", content("va"))])
    it.record(it.places, verdicts, [], None, None, 0.0)
    (record,) = it.folder.records()
    va = record["replies"]["va"]
    assert (va["accepted"], va["further"]) == (True, ["duplicate: the site had already replied"])
    assert record["replies"]["hungary"] == {"accepted": False, "reason": "no answer"}


# --- weights and order --------------------------------------------------------------------------


@pytest.mark.parametrize("examples", [10**18, -899, 0, 1])
def test_a_site_cannot_choose_its_own_weight(examples: int, tmp_path: Path) -> None:
    loud = content("va")
    loud["metrics"] = MetricRecord({"num-examples": examples, "accuracy": 1.0})
    model, verdicts = aggregate([*everybody("va"), reply("va", loud)], tmp_path)
    assert [v.reason for v in verdicts] == [""] * 4
    assert model == aggregate(everybody(), tmp_path)[0]


def test_the_model_is_the_mean_of_the_sites_weighted_by_the_roster(tmp_path: Path) -> None:
    it = coordinator(tmp_path)
    it.aggregate(it.gate(it.places, everybody()))
    total = sum(AGREED.roster.values())
    for name in BASE:
        mean = sum(honest(s)[name].astype(np.float64) * w for s, w in AGREED.roster.items()) / total
        np.testing.assert_allclose(it.model[name], mean, rtol=1e-5, atol=1e-7)
        assert it.model[name].dtype == BASE[name].dtype


@given(st.permutations(SITES), st.sets(st.sampled_from(SITES), max_size=1))
@settings(max_examples=30, deadline=None)
def test_the_order_of_replies_changes_no_bit(
    tmp_path_factory: pytest.TempPathFactory, order: list[str], spoil: set[str]
) -> None:
    def made(site: str) -> Message:
        return reply(site, content(site, {"0.weight": spoilt(np.nan)} if site in spoil else {}))

    folder = tmp_path_factory.getbasetemp()
    model, verdicts = aggregate([made(s) for s in order], folder)
    expected, _ = aggregate([made(s) for s in SITES], folder)
    assert model == expected
    assert [v.site for v in verdicts] == SITES


def fortran(site: str) -> Message:
    turned = {k: Array(np.asfortranarray(v)) for k, v in honest(site).items()}
    return reply(site, content(site, turned))


@pytest.mark.parametrize("turned", [["va"], SITES])
def test_the_layout_of_arrays_in_memory_changes_no_bit(turned: list[str], tmp_path: Path) -> None:
    # safetensors writes the numbers of a transposed array in the wrong places.
    model, verdicts = aggregate([*everybody(*turned), *map(fortran, turned)], tmp_path)
    assert [v.reason for v in verdicts] == [""] * 4
    assert model == aggregate(everybody(), tmp_path)[0]


def test_a_round_with_too_few_good_replies_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    it = coordinator(tmp_path)  # the heart accord's min_sites is 3
    bad = [reply(s, content(s, {"0.bias": None})) for s in SITES[2:]]
    assert it.aggregate(it.gate(it.places, everybody(*SITES[2:]) + bad)) == []
    assert weights_bytes(it.model) == weights_bytes(BASE)
    assert it.finished == 0


@given(st.floats(0.01, 1000), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_an_update_passes_only_up_to_the_agreed_length(length: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    step = {k: rng.normal(size=v.shape) for k, v in BASE.items()}
    size = np.sqrt(sum((v**2).sum() for v in step.values()))
    moved = {k: (BASE[k] + v * (length / size)).astype(np.float32) for k, v in step.items()}
    exact = gates.norm(moved, BASE)
    assert exact == pytest.approx(length, rel=1e-4)
    sent = content("va")
    sent["arrays"] = gates.to_arrays(moved)
    for bound, passes in ((exact, True), (np.nextafter(exact, 0), False), (exact * 1.01, True)):
        verdict = gates.inspect(reply("va", sent), "va", RUN, ROUND, BASE, bound)
        assert (verdict.reason == "") == passes
        assert verdict.norm == (exact if passes else None)


# --- counts -------------------------------------------------------------------------------------

SHAPES = {"sex": (2, 2, 2)}
GOOD = [1, 2, 3, 4, 5, 6, 7, 8]


def counted(cells: object = GOOD, **said: object) -> RecordDict:
    config = ConfigRecord({"site": "va", "run": RUN, "round": ROUND} | said)  # type: ignore[arg-type]
    records = {m: MetricRecord({"sex": list(GOOD)}) for m in ("model", "student")}
    records["model"] = MetricRecord({"sex": cells})  # type: ignore[dict-item]
    return RecordDict({**records, "config": config})


def read(what: RecordDict | Error) -> tuple[str, dict[str, Any]]:
    sections = ("model", "student")
    return gates.read_counts(reply("va", what), "va", RUN, ROUND, SHAPES, sections)


def test_counts_are_read_by_group_label_and_prediction() -> None:
    table = [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    assert read(counted()) == ("", {"model": {"sex": table}, "student": {"sex": table}})


TABLE = MetricRecord({"sex": list(GOOD)})
COUNTS = "form: counts of model by sex"
EXACTLY = "form: counts of exactly model, student are expected"
COUNT_ATTACKS: dict[str, tuple[RecordDict | Error, str]] = {
    "negative": (counted([-1, *GOOD[1:]]), f"{COUNTS} are not whole numbers from 0 up"),
    "a cell too few": (counted(GOOD[:7]), f"{COUNTS} are not [2, 2, 2]"),
    "a cell too many": (counted([*GOOD, 9]), f"{COUNTS} are not [2, 2, 2]"),
    "no cells": (counted([]), f"{COUNTS} are not [2, 2, 2]"),
    "one number": (counted(8), f"{COUNTS} are not [2, 2, 2]"),
    "fractions": (counted([0.5] * 8), f"{COUNTS} are not whole numbers from 0 up"),
    "whole floats": (counted([1.0] * 8), f"{COUNTS} are not whole numbers from 0 up"),
    "a NaN": (counted([np.nan] * 8), f"{COUNTS} are not whole numbers from 0 up"),
    "more than any site has": (counted([2**62, *GOOD[1:]]), f"{COUNTS} sum to more than"),
    "no counts of the student": (RecordDict({"model": TABLE, "config": CONFIG}), EXACTLY),
    "counts of an unknown model": (RecordDict({**counted(), "teacher": TABLE}), EXACTLY),
    "nothing": (RecordDict(), IDENTITY),
    "another round": (counted(round=1), IDENTITY),
    "another site": (counted(site="hungary"), IDENTITY),
    "another run": (counted(run="x"), IDENTITY),
    "an error": (Error(2, "internal error"), "error: internal error"),
    "a refusal": (REFUSED, "refused: No."),
}


@pytest.mark.parametrize("attack", COUNT_ATTACKS)
def test_counts_that_are_not_as_agreed_are_dropped_with_their_reason(attack: str) -> None:
    what, reason = COUNT_ATTACKS[attack]
    said, tables = read(what)
    assert said.startswith(reason)
    assert tables == {}
