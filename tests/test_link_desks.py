"""The coordinator's end of the link, over real TLS: what it lets in, what it refuses, and why."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from deployed import SITES, Caller, Here, answer, listed, listening, refused, training
from flwr.app import Message
from flwr.common.constant import ErrorCode

from fedaccord import link_pb2
from fedaccord.envelope import AHEAD, SKEW, Signed, seal
from fedaccord.evidence import canonical_json, sha256
from fedaccord.objects import Parcel, take_apart
from fedaccord.server.desk import OFTEN
from fedaccord.server.link_service import CALLS

NORTH, SOUTH = SITES[0], SITES[1]  # cleveland asks, hungary listens


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Here]:
    with listening(tmp_path) as found:
        yield found


@pytest.fixture
def site(here: Here) -> Iterator[Caller]:
    with Caller(here, NORTH) as found:
        yield found.join()


def on_record(here: Here, *expected: tuple[str, str]) -> None:
    """Hold the audit log, the journal and the round's incidents to these refusals, no other."""
    assert here.refusals() == list(expected)
    assert here.journaled() == list(expected)
    noted = here.grid.notes(0)["link"]
    assert {row["site"] for row in noted} == {site for site, _ in expected}
    assert all(row["what"] and row["count"] == 1 for row in noted)


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


def test_a_site_cannot_use_the_session_of_another(here: Here, site: Caller) -> None:
    with Caller(here, SOUTH) as south:
        south.join()
        for session, code in (
            (south.session, grpc.StatusCode.PERMISSION_DENIED),
            ("", grpc.StatusCode.UNAUTHENTICATED),
            ("0" * 32, grpc.StatusCode.UNAUTHENTICATED),
        ):
            with refused(code):
                site.stub.Beat(link_pb2.Session(id=session), timeout=5)
        with refused(grpc.StatusCode.PERMISSION_DENIED):
            next(site.stub.Work(link_pb2.Session(id=south.session), timeout=5))
    assert set(here.refusals()) == {(NORTH, "session")}


def test_a_session_without_a_join_is_none(here: Here) -> None:
    here.ask(NORTH)
    with Caller(here, NORTH) as site:
        for call in (
            lambda: next(site.stub.Work(link_pb2.Session(id=""), timeout=5)),
            lambda: site.stub.Beat(link_pb2.Session(id=""), timeout=5),
            lambda: site.stub.Offer(link_pb2.Sealed(), timeout=5),
            lambda: site.stub.Push(iter([link_pb2.Piece()]), timeout=5),
        ):
            with refused(grpc.StatusCode.UNAUTHENTICATED):
                call()
    assert here.grid.get_node_ids() == []


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
        site.stub.Push((link_pb2.Piece(id=first, data=one, **about) for one in cut), timeout=5)
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
        half = list(site.in_pieces(mark, parcel, [rest[0]]))
        yield link_pb2.Piece(id=half[0].id, data=half[0].data[:-1])
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


def wait_for(what: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


JOINS: dict[str, tuple[str, dict[str, object], dict[str, object]]] = {
    "no time": ("envelope", {"time": None}, {}),
    "a time without end": ("envelope", {"time": 10**400}, {}),
    "too many words": ("envelope", {"version": "1" * 5_000}, {}),
    "another accord": ("accord", {}, {"accord": "0" * 64}),
    "another recipient": ("recipient", {}, {"recipient": SOUTH}),
    "another direction": ("direction", {}, {"direction": "reply"}),
    "other words": ("body", {}, {"body": "0" * 64}),
    "expired": ("expired", {}, {"expires": time.time() - SKEW - 60}),
    "another's name": ("sender", {}, {"sender": SOUTH}),
}


@pytest.mark.parametrize("case", JOINS)
def test_a_join_that_says_otherwise_is_refused(here: Here, case: str) -> None:
    reason, about, change = JOINS[case]
    with Caller(here, NORTH) as site, refused():
        site.stub.Join(site.joining(about, **change), timeout=5)
    assert here.grid.get_node_ids() == []
    on_record(here, (NORTH, reason))


@pytest.mark.parametrize("hello", ["", "null", "[" * 4000, "{}", '{"time":NaN,"version":"1"}'])
def test_words_of_a_join_that_are_none_are_refused(here: Here, hello: str) -> None:
    with Caller(here, NORTH) as site, refused():
        signed = seal(site.envelope(body=sha256(hello)), site.key)
        sealed = link_pb2.Sealed(text=signed.text, signature=signed.signature, hello=hello)
        site.stub.Join(sealed, timeout=5)
    [(name, reason)] = here.refusals()
    assert (name, reason in ("envelope", "clock")) == (NORTH, True)


@pytest.mark.parametrize("offset", [-600.0, -SKEW - 5, SKEW + 5, 600.0])
def test_a_join_of_a_clock_that_is_off_is_refused(here: Here, offset: float) -> None:
    with Caller(here, NORTH) as site, refused():
        site.stub.Join(site.joining({"time": time.time() + offset}), timeout=5)
    on_record(here, (NORTH, "clock"))
    assert here.grid.get_node_ids() == []


@pytest.mark.parametrize("offset", [5 - SKEW, SKEW - 5])
def test_a_join_of_a_clock_that_is_little_off_is_let_in(here: Here, offset: float) -> None:
    with Caller(here, NORTH) as site:
        site.stub.Join(site.joining({"time": time.time() + offset}), timeout=5)
    assert here.desks.present() == [NORTH]


def test_a_join_whose_words_were_changed_is_refused(here: Here) -> None:
    with Caller(here, NORTH) as site, refused():
        sealed = site.joining()
        sealed.hello = canonical_json(json.loads(sealed.hello) | {"version": "2"})
        site.stub.Join(sealed, timeout=5)
    on_record(here, (NORTH, "body"))


def test_a_join_that_was_seen_before_is_refused_and_the_session_goes_on(here: Here) -> None:
    with Caller(here, NORTH) as site:
        sealed = site.joining()
        session = json.loads(site.stub.Join(sealed, timeout=5).hello)["session"]
        with refused():
            site.stub.Join(sealed, timeout=5)
        site.stub.Beat(link_pb2.Session(id=session), timeout=5)
    on_record(here, (NORTH, "nonce"))


def test_a_probe_begins_nothing(here: Here, site: Caller) -> None:
    with Caller(here, NORTH) as other:
        welcome = other.stub.Join(other.joining({"probe": True}), timeout=5)
    assert json.loads(welcome.hello)["session"] == ""
    site.stub.Beat(link_pb2.Session(id=site.session), timeout=5)


def test_a_second_process_takes_the_session_over_and_the_first_one_is_told(here: Here) -> None:
    with Caller(here, NORTH) as first, Caller(here, NORTH) as second:
        first.join()
        second.join()
        here.ask(NORTH)
        assert second.asked().round == 1
        with pytest.raises((StopIteration, grpc.RpcError)):  # it ends, by word or by cut
            next(first.work)
        with refused(grpc.StatusCode.UNAUTHENTICATED):
            first.stub.Beat(link_pb2.Session(id=first.session), timeout=5)


def test_two_processes_with_one_kit_cannot_fill_the_audit_log(here: Here) -> None:
    with Caller(here, NORTH) as site:
        for _ in range(OFTEN):
            site.stub.Join(site.joining(), timeout=5)
        for _ in range(3):
            with refused():
                site.stub.Join(site.joining(), timeout=5)
    assert here.refusals() == [(NORTH, "session")]  # counted, not written each time


def test_one_site_cannot_take_the_threads_of_the_others(here: Here) -> None:
    with Caller(here, NORTH) as site, Caller(here, SOUTH) as other:
        site.join()
        calls = [site.stub.Work(link_pb2.Session(id=site.session)) for _ in range(CALLS + 3)]
        wait_for(lambda: here.refusals() != [])
        other.join()
        here.ask(SOUTH)
        assert other.asked().round == 1
        assert site.join().session  # and it is not locked out itself
        del calls
    assert here.refusals() == [(NORTH, "session")]


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


def test_a_reply_is_offered_again_where_the_disk_was_full(
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
    assert here.pulled(mark) == []
    with Caller(here, NORTH) as again:
        request = again.join().asked()
        assert again.offer(request, parcel).known
    assert len(here.pulled(mark)) == 1


def test_messages_to_nobody_are_never_answered_as_in_flower(here: Here) -> None:
    message = Message(training().content, 5, "train")
    assert len(list(here.grid.push_messages([message]))) == 1
    assert list(here.grid.send_and_receive([message], timeout=0.01)) == []
