"""Joins and sessions over real TLS: what begins one, what is refused, and who can use it."""

import json
import time

import grpc
import pytest
from deployed import SITES, Caller, Here, on_record, refused, wait_for

from fedaccord import link_pb2
from fedaccord.envelope import SKEW, seal
from fedaccord.evidence import canonical_json, sha256
from fedaccord.server.desk import OFTEN
from fedaccord.server.link_service import CALLS

NORTH, SOUTH = SITES[0], SITES[1]  # cleveland asks, hungary listens


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
