"""The coordinator's end of the link, over real TLS: what it lets in, what it refuses, and why."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from deployed import (
    SITES,
    Caller,
    Here,
    answer,
    listed,
    listening,
    on_record,
    refused,
    training,
    wait_for,
)
from flwr.app import Message
from flwr.common.constant import ErrorCode

from fedaccord import link_pb2
from fedaccord.envelope import AHEAD, SKEW, Signed, seal
from fedaccord.objects import Parcel, take_apart
from fedaccord.pieces import packed

NORTH, SOUTH = SITES[0], SITES[1]  # cleveland asks, hungary listens


def test_a_reply_arrives_once_and_says_what_its_site_said(here: Here, site: Caller) -> None:
    [mark] = here.ask(NORTH, weight=2.0)
    request = site.asked()
    asked = site.fetched(request)
    assert asked.content["arrays"]["w"].numpy().tolist() == [2.0] * 4
    assert asked.content["config"]["run"] == "small-run"
    site.send(request, answer(3.0))
    assert site.offer(request, take_apart(answer(4.0))).known  # a second one is not taken
    [reply] = here.pulled(mark)
    assert reply.content["arrays"]["w"].numpy().tolist() == [3.0] * 4
    assert reply.metadata.reply_to_message_id == mark
    assert here.pulled(mark) == []
    assert here.grid.notes(1)["envelopes"].keys() == {NORTH}
    assert list((here.folder / "spool").iterdir()) == []
    on_record(here)


WRONG: dict[str, dict[str, object]] = {
    "run": {"run": "another-run"},
    "round": {"round": 2},
    "sender": {"sender": SOUTH},
    "recipient": {"recipient": SOUTH},
    "direction": {"direction": "join"},
    "kind": {"kind": "evaluate"},
    "message": {"message": "0" * 32},  # never asked
    "nonce": {"nonce": 1},
    "expired": {"expires": time.time() - SKEW - 60},
    "clock": {"expires": time.time() + AHEAD + SKEW + 86_400},
    "body": {"body": "0" * 64},
    "accord": {"accord": "0" * 64},
    "model": {"model": "0" * 64},
    "shown": {"shown": "0" * 64},
    "envelope": {"round": -1},
}


@pytest.mark.parametrize("reason", WRONG)
def test_a_reply_whose_envelope_says_otherwise_is_refused(
    here: Here, site: Caller, reason: str
) -> None:
    [mark] = here.ask(NORTH)
    request, parcel = site.asked(), take_apart(answer())
    with refused():
        site.offer(request, parcel, **WRONG[reason])
    assert here.pulled(mark) == []
    on_record(here, (NORTH, reason))
    site.send(request, answer())
    assert len(here.pulled(mark)) == 1


@pytest.mark.parametrize("what", ["text", "signature", "list", "order", "size", "ids"])
def test_a_reply_that_was_changed_on_its_way_is_refused(
    here: Here, site: Caller, what: str
) -> None:
    [mark] = here.ask(NORTH)
    request, parcel = site.asked(), take_apart(answer())
    signed, objects = seal(site.reply(request, parcel), site.key), listed(parcel)
    if what == "text":
        signed = Signed(signed.text.replace('"round":1', '"round":2'), signed.signature)
    elif what == "signature":
        signed = Signed(signed.text, f"{int(signed.signature[0], 16) ^ 1:x}{signed.signature[1:]}")
    elif what == "list":
        objects.pop()
    elif what == "order":
        objects.reverse()
    elif what == "size":
        objects[0].size = 2**62
    else:
        objects.insert(0, link_pb2.Object(id=b"", size=0))
    with refused():
        site.stub.Offer(site.offering(signed, parcel, objects), timeout=5)
    assert here.pulled(mark) == []
    expected = "signature" if what in ("text", "signature") else what
    on_record(here, (NORTH, expected if expected in ("signature", "size") else "body"))


def test_an_offer_that_was_seen_before_is_refused(here: Here, site: Caller) -> None:
    [mark] = here.ask(NORTH)
    request, parcel = site.asked(), take_apart(answer())
    signed = seal(site.reply(request, parcel), site.key)
    assert len(site.stub.Offer(site.offering(signed, parcel), timeout=5).ids) == len(parcel.parts)
    with refused():
        site.stub.Offer(site.offering(signed, parcel), timeout=5)
    assert here.pulled(mark) == []
    on_record(here, (NORTH, "nonce"))


def test_a_site_cannot_answer_what_another_was_asked(here: Here, site: Caller) -> None:
    with Caller(here, SOUTH) as south:
        south.join()
        marks = here.ask(NORTH, SOUTH)
        request = south.asked()
        with refused():
            site.offer(request, take_apart(answer()))
        with refused():  # nor read it
            list(site.stub.Fetch(link_pb2.Wanted(session=site.session, message=request.message)))
        assert here.pulled(*marks) == []
        on_record(here, (NORTH, "message"))


def test_a_reply_that_is_too_large_by_its_list_is_refused_before_a_byte(tmp_path: Path) -> None:
    with listening(tmp_path, most=10_000) as here, Caller(here, NORTH) as site:
        [mark] = here.ask(NORTH)
        request, parcel = site.join().asked(), take_apart(answer(np.zeros(2_000)))
        with refused():
            site.offer(request, parcel)
        assert here.pulled(mark) == []
        on_record(here, (NORTH, "size"))


def bytes_of(parcel: Parcel, name: str) -> bytes:
    return parcel.parts[name].load()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: bytes([data[0] ^ 1]) + data[1:], "body"),
        (lambda data: data + bytes(9_000_000), "size"),  # a lie about its length
        (lambda data: data[:-1], "size"),
    ],
)
def test_objects_that_are_not_as_the_list_says_are_refused(
    here: Here, site: Caller, change: Callable[[bytes], bytes], reason: str
) -> None:
    [mark] = here.ask(NORTH)
    request, parcel = site.asked(), take_apart(answer())
    first = bytes.fromhex(site.offer(request, parcel).ids[0].hex())
    data = change(bytes_of(parcel, first.hex()))
    about = {"session": site.session, "message": mark}
    cut = [data[start : start + 2**20] for start in range(0, len(data), 2**20)]
    with refused():
        site.stub.Push((packed([(first.hex(), one)], **about) for one in cut), timeout=5)
    assert here.pulled(mark) == []
    on_record(here, (NORTH, reason))
    assert list((here.folder / "spool").iterdir()) == []


def test_objects_that_no_list_has_are_refused(here: Here, site: Caller) -> None:
    [mark] = here.ask(NORTH)
    request, parcel, other = site.asked(), take_apart(answer()), take_apart(answer(2.0))
    with refused():  # nothing was offered
        site.push(mark, parcel, parcel.parts)
    site.offer(request, parcel)
    with refused():
        site.push(mark, other, other.parts)
    on_record(here, (NORTH, "message"), (NORTH, "body"))


def test_a_push_that_was_cut_is_resumed_with_what_is_lacking(here: Here, site: Caller) -> None:
    [mark] = here.ask(NORTH)
    request = site.asked()
    values = np.random.default_rng(0).random(1_000_000)
    parcel = take_apart(answer(values))
    lacking = [name.hex() for name in site.offer(request, parcel).ids]
    assert lacking == list(parcel.parts)
    cut, whole = threading.Event(), max(parcel.parts, key=lambda name: parcel.parts[name].size)
    rest = [name for name in lacking if name != whole]

    def pieces_of_half() -> Iterator[object]:
        yield from site.in_pieces(mark, parcel, [whole])
        yield packed([(rest[0], parcel.parts[rest[0]].load()[:-1])])
        cut.wait(5)

    call = site.stub.Push.future(pieces_of_half())
    wait_for(lambda: whole in here.desks.store)
    call.cancel()
    cut.set()
    with Caller(here, NORTH) as again:  # as after a broken connection
        request = again.join().asked()
        lacking = [name.hex() for name in again.offer(request, parcel).ids]
        assert lacking == rest
        pushed = sum(parcel.parts[name].size for name in lacking)
        assert pushed < parcel.size / 2
        assert again.push(mark, parcel, lacking).whole
    [reply] = here.pulled(mark)
    assert np.array_equal(reply.content["arrays"]["w"].numpy(), values)
    assert list((here.folder / "spool").iterdir()) == []


def test_a_signed_reply_that_is_no_message_is_an_error_of_its_site(
    here: Here, site: Caller
) -> None:
    [mark] = here.ask(NORTH)
    request, whole = site.asked(), take_apart(answer())
    parts = dict(list(whole.parts.items())[:-1])  # a content, without the message around it
    site.offer(request, parcel := Parcel(list(parts)[-1], parts, ""))
    assert site.push(mark, parcel, parts).whole
    [reply] = here.pulled(mark)
    assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    on_record(here, (NORTH, "message"))


def test_a_reply_that_names_another_site_is_an_error(here: Here, site: Caller) -> None:
    [mark] = here.ask(NORTH)
    site.send(site.asked(), answer(site=SOUTH))
    assert here.pulled(mark)[0].has_error()
    on_record(here, (NORTH, "identity"))


def test_of_a_fault_that_nobody_foresaw_nothing_travels(here: Here, site: Caller) -> None:
    here.ask(NORTH)
    request, parcel = site.asked(), take_apart(answer())
    site.offer(request, parcel)
    shutil.rmtree(here.folder / "spool")
    with refused(grpc.StatusCode.INTERNAL) as fault:
        site.push(request.message, parcel, parcel.parts)
    assert fault.value.details() == "internal error at the coordinator"
    assert '"link.failed"' in (here.folder / "journal.jsonl").read_text()


def test_a_request_whose_time_is_up_is_let_go_also_of_a_site_that_is_away(here: Here) -> None:
    here.ask(NORTH)
    desk = here.desks._desks[NORTH]
    next(iter(desk.letters.values())).end = time.monotonic() - 1
    here.ask(SOUTH)
    assert next(iter(desk.letters.values())).parcel is None
    with Caller(here, NORTH) as site:
        site.join()
        [mark] = here.ask(NORTH)
        assert site.asked().message == mark  # not the one whose time is up


def test_a_full_disk_ends_the_run_and_no_reply_counts_that_is_not_on_record(
    here: Here, site: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    [mark] = here.ask(NORTH)
    request, parcel = site.asked(), take_apart(answer())
    names = [name.hex() for name in site.offer(request, parcel).ids]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(here.folder))

    with monkeypatch.context() as patch:
        patch.setattr(here.desks.watch, "reply", full)
        with refused(grpc.StatusCode.INTERNAL):
            site.push(mark, parcel, names)
    with pytest.raises(OSError, match="No space left"):  # the run can be gone on with
        here.pulled(mark)


def test_messages_to_nobody_are_never_answered_as_in_flower(here: Here) -> None:
    message = Message(training().content, 5, "train")
    assert len(list(here.grid.push_messages([message]))) == 1
    assert list(here.grid.send_and_receive([message], timeout=0.01)) == []
