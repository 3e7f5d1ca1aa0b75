"""Non-interference: with the mechanism's output constant, nothing that leaves a site shows data."""

import contextlib
import json
import logging
import shutil

import numpy as np
import pytest

from fedaccord.client import train
from fedaccord.conformance import leaks
from fedaccord.conformance.data import crowd_of, interfering
from fedaccord.conformance.runs import laboratory, site_bench
from fedaccord.conformance.site import nobody
from fedaccord.conformance.transcript import captured, transcript

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

BASE = "20 subjects"
NEIGHBOURS = [name for name, _ in interfering(8) if name != BASE]


@pytest.fixture(scope="module")
def transcripts():
    """All that leaves a site, for each of the neighbouring data sets."""
    with laboratory() as lab:
        yield lab.transcripts


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_all_that_leaves_a_site_is_byte_identical_on_neighbouring_data(name, transcripts):
    base, other = transcripts[BASE], transcripts[name]
    assert [part for part in other if other[part] != base[part]] == []


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_nothing_is_left_out_but_the_evaluation_of_records_that_cannot_be_read(name, transcripts):
    missing = transcripts[BASE].keys() - transcripts[name].keys()
    unreadable = name == "records that cannot be read"
    assert missing == ({"size of the reply to evaluate"} if unreadable else set())


def test_the_neighbours_are_neighbours_and_the_hard_ones_among_them():
    data = dict(interfering(8))
    assert len(data[BASE]) == 20
    assert len(data["a subject less"]) == 19
    more = data["a subject more"]
    assert len(more) == 21 and np.array_equal(more.inputs[:20], data[BASE].inputs)
    assert np.isnan(data["a subject with NaN"].inputs).any()
    assert data["a subject whose record raises"].labels.max() > 1
    assert isinstance(data["records that cannot be read"], Exception)


def test_a_transcript_holds_a_whole_run(transcripts):
    base = transcripts[BASE]
    for number in (1, 2, 3):
        reply = json.loads(base[f"reply to train, round {number}"])
        assert {"arrays/weight", "arrays/bias", "config/site", "config/round"} <= reply.keys()
    assert base["reply to train again, round 1"].count("arrays/weight") == 1
    entries = json.loads(base["reply to ledger"])["config/ledger"]
    assert [entries.count(f'"kind":"{k}"') for k in ("RESERVE", "INTENT", "RELEASE")] == [1, 4, 4]
    assert len(base["stored releases"].splitlines()) == 4


def differing(spoil, first, second):
    """The parts of two transcripts that differ while a leak is planted."""
    with laboratory() as lab, spoil():
        bench = site_bench(lab.folder / "site")
        bench.start()
        kept = lab.folder / "kept"
        shutil.copytree(bench.folder, kept)
        one, other = (transcript(bench, kept, data) for data in (first, second))
    return {part for part in one if one[part] != other[part]}


def test_two_transcripts_of_the_same_data_are_the_same():
    assert differing(contextlib.nullcontext, crowd_of(20, 8), crowd_of(20, 8)) == set()


def test_a_record_in_a_hundred_thousandth_of_a_weight_shows():
    def tiny(model, records):
        model.bias.data += 1e-5 * len(records)

    parts = differing(leaks.after_training(tiny), crowd_of(20, 8), nobody(8))
    assert "reply to train, round 1" in parts
    assert "stored releases" in parts


def test_a_line_of_any_logger_that_propagates_shows():
    def line(model, records):
        logging.getLogger("some.library").debug("%d", len(records))

    assert differing(leaks.after_training(line), crowd_of(20, 8), crowd_of(21, 8)) == {"log"}


def test_a_draw_from_a_global_generator_shows():
    def draw(model, records):
        np.random.random(len(records))

    parts = differing(leaks.after_training(draw), crowd_of(20, 8), crowd_of(21, 8))
    assert parts == {"state of numpy's generator"}


def test_what_a_fault_of_the_data_writes_stays_in_the_sites_own_diary():
    with captured() as (log, printed):
        train.log.warning("record 17 raised")
    assert (log, printed.getvalue()) == ([], "")
    with captured() as (log, _):
        logging.getLogger("fedaccord.site").warning("policy read")
    assert log == ["fedaccord.site WARNING policy read "]
