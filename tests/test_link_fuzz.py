"""Fuzzed messages: let in only where an honest site might have sent them, and nothing breaks."""

from __future__ import annotations

import json
import logging
import os
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import link_mutants as mutants
import pytest
from deployed import MOST, Caller, Here, answer, listed, listening
from link_fuzz import Fuzz, FuzzedSite, forget_peak, memory

from fedaccord import link_pb2
from fedaccord.envelope import seal
from fedaccord.objects import take_apart

SERVICE = "/fedaccord.link.v1.Link/"


@pytest.fixture
def here() -> Iterator[Here]:
    """A coordinator whose files lie in memory where that can be; its log goes to its journal."""
    memory_ = Path("/dev/shm")
    place = memory_ if os.access(memory_, os.W_OK) else None
    loggers = [logging.getLogger(f"fedaccord.{name}") for name in ("link", "site")]
    for logger in loggers:
        logger.propagate = False
    logging.getLogger("flwr").setLevel(logging.ERROR)  # it warns of what is put in on purpose
    with tempfile.TemporaryDirectory(dir=place) as folder, listening(Path(folder)) as found:
        yield found
    for logger in loggers:
        logger.propagate = True


def fuzz(here: Here, count: int, seed: int) -> None:
    """Send so many messages, one in five of them to a site; hold what came of them to the rules."""
    replies, site = Fuzz(here, seed), FuzzedSite(here, "va", seed)

    def go(count: int) -> None:
        for number in range(count):
            (site if number % 5 == 0 else replies).one()

    go(min(400, count // 5))
    measured = Path("/proc/self/clear_refs").exists()
    before = memory("VmRSS") if measured else 0
    if measured:
        forget_peak()
    go(count)
    print("replies:", sorted(replies.seen.items()))
    print("requests:", sorted(site.seen.items()))
    assert replies.wrong + site.wrong == []
    seen = replies.seen + site.seen
    assert seen["uncaught"] == 0
    for outcome in ("accepted", "refused by the link", "dropped by the gates"):
        assert seen[outcome] > count / 50, outcome  # each of it did happen
    for outcome in ("answered", "refused by the site"):
        assert seen[outcome] > count / 100, outcome
    if measured:
        after = memory("VmHWM")
        print(f"memory: {before / 1e6:.0f} MB before, {after / 1e6:.0f} MB at most")
        assert after < 2 * before + MOST


def test_four_thousand_fuzzed_messages_are_let_in_only_where_they_may_be(here: Here) -> None:
    fuzz(here, 4_000, 0)


@pytest.mark.soak
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_of_a_hundred_thousand_fuzzed_messages_none_is_let_in_that_may_not_be(
    here: Here, seed: int
) -> None:
    fuzz(here, 25_000, seed)


def call(caller: Caller, name: str, many_in: bool, many_out: bool) -> Callable[[Any], Any]:
    """A method of the service that takes bytes as they are."""
    ways = {
        (False, False): caller.channel.unary_unary,
        (True, False): caller.channel.stream_unary,
        (False, True): caller.channel.unary_stream,
    }
    method = ways[many_in, many_out](SERVICE + name)  # without serializers bytes stay bytes

    def once(data: Any) -> Any:
        answer = method(iter(data) if many_in else data, timeout=10)
        return list(answer) if many_out else answer

    return once


def told(send: Callable[[Any], Any], data: Any) -> str:
    """Send bytes; how it ended."""
    try:
        send(data)
    except grpc.RpcError as fault:
        assert isinstance(fault, grpc.Call)
        return str(fault.code().name)
    return "OK"


def test_bytes_that_are_no_message_end_their_call_and_nothing_else(here: Here) -> None:
    chance, ends = random.Random(3), set[str]()
    for _ in range(5):
        with Caller(here, "va").join() as caller:
            here.ask("va")
            request = caller.asked()
            parcel = take_apart(answer())
            signed = seal(caller.reply(request, parcel), caller.key)
            offer = link_pb2.Sealed(
                text=signed.text,
                signature=signed.signature,
                session=caller.session,
                objects=listed(parcel),
            )
            pushed = [
                piece.SerializeToString()
                for piece in caller.in_pieces(request.message, parcel, parcel.parts)
            ]
            ids = [one.id for one in caller.sealed.objects]
            wanted = link_pb2.Wanted(session=caller.session, message=request.message, ids=ids)
            session = link_pb2.Session(id=caller.session).SerializeToString()
            for _ in range(20):
                for name, data, *many in (
                    ("Offer", offer.SerializeToString(), False, False),
                    ("Fetch", wanted.SerializeToString(), False, True),
                    ("Beat", session, False, False),
                ):
                    send = call(caller, name, *many)
                    ends.add(f"{name} {told(send, mutants.noise(chance, data))}")
                broken: Iterable[bytes] = [mutants.noise(chance, data) for data in pushed]
                ends.add(f"Push {told(call(caller, 'Push', True, False), broken)}")
            join = caller.joining().SerializeToString()
            ends.add(
                f"Join {told(call(caller, 'Join', False, False), mutants.noise(chance, join))}"
            )
    print(sorted(ends))
    lines = map(json.loads, (here.folder / "journal.jsonl").read_text().splitlines())
    assert [line for line in lines if line["event"] == "link.failed"] == []
    said = {end.split()[1] for end in ends}
    assert said <= {"OK", "PERMISSION_DENIED", "UNAUTHENTICATED"}  # nothing else, and no exception
    with Caller(here, "va").join() as caller:
        (mark,) = here.ask("va", number=2)
        while (request := caller.asked()).message != mark:
            pass
        caller.send(request, answer(site="va"))
        assert len(here.pulled(mark)) == 1
