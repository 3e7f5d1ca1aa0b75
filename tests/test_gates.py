"""The gates: what an honest site sends arrives as it was sent, whatever comes beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedaccord import accord as accords
from fedaccord.client.app import app as client_app
from fedaccord.evidence import sha256
from fedaccord.models.build import build
from fedaccord.runs import RunFolder
from fedaccord.server import checkpoint, gates, records
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
ENCODINGS = ("float32", "float16", "int8")


def honest(site: str) -> Weights:
    """What a site's training would add to the weights, each site in its own direction."""
    rng = np.random.default_rng(NODES[site])
    return {k: rng.normal(0, 0.1, v.shape).astype(v.dtype) for k, v in BASE.items()}


def content(site: str, encoding: Any = "float32") -> RecordDict:
    """A site's honest reply."""
    config = ConfigRecord({"site": site, "run": RUN, "round": ROUND})
    return RecordDict({**encodings.pack(honest(site), encoding), "config": config})


def with_array(site: str, name: str, array: np.ndarray[Any, Any]) -> RecordDict:
    what = content(site)
    what.array_records["arrays"][name] = Array(array)
    return what


def everybody(*but: str) -> list[Message]:
    return [reply(site, content(site)) for site in SITES if site not in but]


def reply(site: str, what: RecordDict | Error) -> Message:
    return Message(what, reply_to=Message(RecordDict(), NODES[site], "train"))


def inspect(what: RecordDict | Error, bound: float | None = 100.0, **how: Any) -> gates.Verdict:
    return gates.inspect(reply("va", what), "va", RUN, ROUND, BASE, bound, **how)


def coordinator(folder: Path) -> Coordinator:
    mail, heads = Mail(GRID), Heads(SITES)
    places = [Place(site, node, 3, {}) for site, node in NODES.items()]
    it = Coordinator(
        accord=AGREED,
        task=TASK,
        mail=mail,
        driver=driver_for(AGREED),
        folder=RunFolder(folder / RUN),
        places=places,
        plans=dict.fromkeys(SITES),
        heads=heads,
        door=Door(mail, AGREED, RUN, heads, places),
        model={name: value.copy() for name, value in BASE.items()},
        student=None,
        number=ROUND,
    )
    it.driver.ask(ROUND, it.model, ConfigRecord(), GRID)
    return it


def aggregate(replies: list[Message], folder: Path) -> tuple[bytes, list[gates.Verdict]]:
    """Gate and aggregate as a round does; the model as bytes and the verdicts."""
    it = coordinator(folder)
    it.aggregate(it.gate(it.places, replies))
    return weights_bytes(it.model), it.verdicts


# --- one reply ----------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_honest_update_arrives_with_its_norm_and_the_hash_of_its_release(encoding: Any) -> None:
    verdict = inspect(content("va", encoding), encoding=encoding)
    assert (verdict.site, verdict.reason, verdict.metrics) == ("va", "", {})
    assert verdict.change is not None
    squares = 0.0
    for name, value in honest("va").items():
        np.testing.assert_allclose(verdict.change[name], value, atol=np.abs(value).max() / 250)
        assert verdict.change[name].dtype == value.dtype
        squares += float((verdict.change[name].astype(np.float64) ** 2).sum())
    assert verdict.norm == pytest.approx(math.sqrt(squares), rel=1e-12)
    release = encodings.wire_bytes(encodings.pack(honest("va"), encoding))
    assert verdict.sha256 == sha256(release)
    kept = verdict.without_change()
    assert (kept.change, kept.norm, kept.sha256) == (None, verdict.norm, verdict.sha256)


@pytest.mark.parametrize("value", [1.0, np.nan, np.inf, 3e38])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_under_client_level_privacy_any_value_passes_and_leaves_no_mark(
    value: float, encoding: Any
) -> None:
    change = honest("va")
    change["0.bias"][0] = value
    what = content("va")
    del what["arrays"]
    for name, record in encodings.pack(change, encoding).items():
        what[name] = record
    verdict = inspect(what, None, encoding=encoding)
    assert (verdict.reason, verdict.norm, verdict.sha256) == ("", None, None)
    assert verdict.change is not None
    assert np.isfinite(verdict.change["0.bias"]).all() == np.isfinite(value)


@given(st.floats(0.01, 1000), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_an_update_passes_only_up_to_the_agreed_length(length: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    step = {k: rng.normal(size=v.shape) for k, v in BASE.items()}
    size = np.sqrt(sum((v**2).sum() for v in step.values()))
    change = {k: (v * (length / size)).astype(np.float32) for k, v in step.items()}
    exact = gates.norm(change)
    assert exact == pytest.approx(length, rel=1e-4)
    assert all(np.abs(value).max() <= exact for value in change.values())
    what = content("va")
    what.array_records["arrays"].update(encodings.pack(change, "float32")["arrays"])
    for bound, passes in ((exact, True), (np.nextafter(exact, 0), False), (exact * 1.01, True)):
        verdict = inspect(what, float(bound))
        assert (verdict.reason == "") == passes
        assert verdict.norm == (exact if passes else None)
        assert passes or verdict.reason.startswith("norm: update of L2 norm ")


@given(st.lists(st.floats(-1e150, 1e150), min_size=1, max_size=5))
@settings(deadline=None)
def test_no_coordinate_is_larger_than_the_norm(values: list[float]) -> None:
    row = np.array(values)
    row[np.abs(row) < 1e-150] = 0  # their squares are no normal numbers
    assert np.abs(row).max() <= gates.norm({"w": row})


def test_a_figure_that_was_wanted_is_passed_on_and_no_other() -> None:
    what = content("va")
    what["metrics"] = MetricRecord({"train_loss": 0.5, "num-examples": 10**18})
    assert inspect(what, wants="train-loss").metrics == {"train_loss": 0.5}
    assert inspect(what).metrics == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 1e7, [0.5], None])
def test_a_figure_that_was_wanted_and_cannot_be_used_drops_the_reply(value: Any) -> None:
    what = content("va")
    what["metrics"] = MetricRecord({} if value is None else {"train_loss": value})
    verdict = inspect(what, wants="train-loss")
    assert verdict.reason.startswith("metric: train_loss is ")
    assert verdict.change is None
    assert inspect(what).reason == ""


def test_what_a_site_says_is_repeated_on_one_line_and_not_without_end() -> None:
    shouting = RecordDict({"config": ConfigRecord({"refused": "No.\n" * 10_000})})
    reason = inspect(shouting).reason
    assert len(reason) < 600
    assert reason.startswith("refused: No. No. No.")
    assert gates.told("a\x1b[31m\x00\ud800b\u202e") == "a?[31m??b?"
    assert gates.told(10**5000) == "int"


# --- many replies -------------------------------------------------------------------------------


def test_replies_are_judged_as_they_arrive_one_in_one_out() -> None:
    taken: list[str] = []

    def arriving() -> Iterator[Message]:
        for site in SITES:
            taken.append(site)
            yield reply(site, content(site))

    sites = {node: site for site, node in NODES.items()}
    found = gates.gate(arriving(), sites, RUN, ROUND, BASE, 100.0)
    assert taken == []
    for count, (verdict, _) in enumerate(found, 1):
        assert (verdict.site, len(taken)) == (SITES[count - 1], count)


def test_the_first_reply_of_a_site_counts_whatever_it_is(tmp_path: Path) -> None:
    late = content("va")
    late.config_records["config"]["round"] = 1
    model, verdicts = aggregate([reply("va", late), *everybody()], tmp_path)
    assert [v.reason.split(":")[0] for v in verdicts] == ["late", "", "", "", "duplicate"]
    assert model == aggregate(everybody("va"), tmp_path)[0]


def test_the_record_of_a_round_keeps_the_reply_that_counted_beside_its_duplicate(
    tmp_path: Path,
) -> None:
    _, verdicts = aggregate([reply("va", content("va")), *everybody("hungary")], tmp_path)
    said = records.replies(verdicts, SITES)
    duplicate = "duplicate: the site had already replied"
    assert (said["va"]["accepted"], said["va"]["further"]) == (True, [duplicate])
    assert said["va"]["sha256"] == sha256(
        encodings.wire_bytes(encodings.pack(honest("va"), "float32"))
    )
    assert said["hungary"] == {"accepted": False, "reason": "no answer"}


def test_the_model_moves_by_the_mean_of_the_updates_weighted_by_the_roster(tmp_path: Path) -> None:
    it = coordinator(tmp_path)
    it.aggregate(it.gate(it.places, everybody()))
    total = sum(AGREED.roster.values())
    for name in BASE:
        mean = sum(honest(s)[name].astype(np.float64) * w for s, w in AGREED.roster.items()) / total
        np.testing.assert_array_equal(it.model[name], (BASE[name] + mean).astype(np.float32))
        assert it.model[name].dtype == BASE[name].dtype


@given(st.permutations(SITES), st.sets(st.sampled_from(SITES), max_size=1))
@settings(max_examples=15, deadline=None)
def test_the_order_of_replies_changes_no_bit(
    tmp_path_factory: pytest.TempPathFactory, order: list[str], spoil: set[str]
) -> None:
    def made(site: str) -> Message:
        spoilt = with_array(site, "0.bias", np.float32([0, np.nan, 0]))
        return reply(site, spoilt if site in spoil else content(site))

    folder = tmp_path_factory.getbasetemp()
    model, verdicts = aggregate([made(s) for s in order], folder)
    expected, _ = aggregate([made(s) for s in SITES], folder)
    assert model == expected
    assert [v.site for v in verdicts] == order


def fortran(site: str) -> Message:
    what = content(site)
    for name, value in honest(site).items():
        what.array_records["arrays"][name] = Array(np.asfortranarray(value))
    return reply(site, what)


@pytest.mark.parametrize("turned", [["va"], SITES])
def test_the_layout_of_arrays_in_memory_changes_no_bit(turned: list[str], tmp_path: Path) -> None:
    # safetensors writes the numbers of a transposed array in the wrong places.
    model, verdicts = aggregate([*everybody(*turned), *map(fortran, turned)], tmp_path)
    expected, straight = aggregate(everybody(), tmp_path)
    assert [v.reason for v in verdicts] == [""] * 4
    assert {v.site: v.sha256 for v in verdicts} == {v.site: v.sha256 for v in straight}
    assert model == expected


def test_a_round_with_too_few_good_replies_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    it = coordinator(tmp_path)  # the heart accord's min_sites is 3
    bad = [reply(s, with_array(s, "0.bias", np.zeros(9, np.float32))) for s in SITES[2:]]
    assert it.aggregate(it.gate(it.places, everybody(*SITES[2:]) + bad)) == []
    assert weights_bytes(it.model) == weights_bytes(BASE)
    assert it.finished == 0


# --- fuzz ---------------------------------------------------------------------------------------

JUNK = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(max_size=9), st.binary(max_size=9)
)
SENT = {
    (*name.split("/", 1), encoding): value
    for encoding in ENCODINGS
    for name, value in encodings.encode(honest("va"), encoding).items()
}
ODD = st.sampled_from(["float32", "float64", "<f4", "object", "", "\x00"])


def mutated(draw: st.DataObject, what: RecordDict, encoding: str) -> None:
    """Change one thing of a reply in place: a word, a name, a number, a byte, a description."""
    kind = draw.draw(st.sampled_from(["config", "drop", "bytes", "words", "values", "record"]))
    name = draw.draw(st.sampled_from(["arrays", "scales"]))
    record = what.array_records.get(name)
    if kind == "config":
        key = draw.draw(st.sampled_from(["site", "run", "round", "refused", "other"]))
        what.config_records.get("config", ConfigRecord())[key] = draw.draw(JUNK)
    elif kind == "record":
        name = draw.draw(st.sampled_from(["config", "arrays", "metrics", "x"]))
        what.pop(name, None)
        what[name] = draw.draw(
            st.sampled_from([MetricRecord({"a": 1.0}), ConfigRecord({"b": b"1"}), ArrayRecord()])
        )
    elif record:
        key = draw.draw(st.sampled_from(sorted(record)))
        old = record[key]
        raw = bytearray(old.data)
        if kind == "drop":
            del record[key]
        elif kind == "bytes":
            raw[draw.draw(st.integers(0, len(raw) - 1))] = draw.draw(st.integers(0, 255))
            record[key] = Array(old.dtype, old.shape, old.stype, bytes(raw))
        elif kind == "words":
            shape = tuple(draw.draw(st.lists(st.integers(-1, 40), max_size=3)))
            record[key] = Array(draw.draw(ODD), shape, old.stype, old.data)
        else:
            value = SENT[name, key, encoding].copy()
            value.flat[draw.draw(st.integers(0, value.size - 1))] = draw.draw(
                st.integers(-128, 127) if value.dtype == np.int8 else st.floats(width=16)
            )
            record[key] = Array(value)


@given(st.sampled_from(ENCODINGS), st.integers(1, 3), st.data())
@settings(deadline=None, max_examples=150)
def test_a_mutated_reply_passes_only_as_a_reply_that_an_honest_site_could_send(
    encoding: Any, changes: int, draw: st.DataObject
) -> None:
    what = content("va", encoding)
    for _ in range(changes):
        mutated(draw, what, encoding)
    verdict = gates.inspect(reply("va", what), "va", RUN, ROUND, BASE, 2.0, encoding)
    if verdict.reason:
        assert verdict.reason.split(":")[0] in REASONS
        assert (verdict.change, verdict.norm, verdict.sha256) == (None, None, None)
        return
    config = dict(what.config_records["config"])
    assert (config["site"], config["run"], config["round"]) == ("va", RUN, ROUND)
    assert verdict.change is not None
    # It holds what was sent, and the site could have come to it by training and encoding.
    arrays = what.array_records
    assert verdict.sha256 == sha256(encodings.wire_bytes(arrays))
    again = encodings.encode(verdict.change, encoding)
    for name, value in again.items():
        record, _, key = name.partition("/")
        np.testing.assert_array_equal(value, arrays[record][key].numpy())
    assert {k: (v.dtype, v.shape) for k, v in verdict.change.items()} == {
        k: (v.dtype, v.shape) for k, v in BASE.items()
    }
    length = math.sqrt(sum(float((v.astype(float) ** 2).sum()) for v in verdict.change.values()))
    assert verdict.norm == pytest.approx(length) and length <= 2 + 1e-12
    assert all(np.isfinite(v).all() for v in verdict.change.values())


REASONS = {"refused", "size", "identity", "late", "form", "not finite", "norm"}
