"""Who gets through to the coordinator: by certificate, whatever the envelopes say."""

import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from deployed import SITES, Caller, Here, listening, refused

from fedaccord import authority, keyfiles, link_pb2, link_pb2_grpc, membership
from fedaccord.client import enrol
from fedaccord.client.dial import OPTIONS
from fedaccord.kit import SiteKit

NORTH, SOUTH = SITES[0], SITES[1]
NOW = datetime.now(UTC)


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Here]:
    with listening(tmp_path) as found:
        yield found


def issued(here: Here, name: str, end: datetime, by: object = None) -> dict[str, bytes]:
    """A key and a certificate of the accord's authority, good for a day until some moment."""
    key, began = authority.new_key(), end - timedelta(days=1)
    made = authority.issue(by or here.kits.issuer(), key.public_key(), name, [], "client", 1, began)
    return {
        "private_key": authority.key_pem(key),
        "certificate_chain": authority.certificate_pem(made),
    }


def nobody_came(here: Here) -> bool:
    return here.grid.get_node_ids() == [] and not any(d.joins for d in here.desks._desks.values())


def test_anothers_certificate_does_not_go_with_ones_own_envelope(here: Here) -> None:
    with Caller(here, SOUTH, says=NORTH) as caller, refused():
        caller.stub.Join(caller.joining(), timeout=5)
    assert here.refusals() == here.journaled() == [(SOUTH, "signature")]
    assert nobody_came(here)


def test_ones_own_certificate_does_not_go_with_anothers_envelope(here: Here) -> None:
    with Caller(here, NORTH) as north, Caller(here, SOUTH) as south:
        sealed = north.joining()
        with refused():  # taken from the wire, as somebody in between could
            south.stub.Join(sealed, timeout=5)
    assert here.refusals() == [(SOUTH, "signature")]
    assert nobody_came(here)


def test_a_good_certificate_of_no_site_is_refused_and_named(here: Here) -> None:
    stranger = issued(here, "stranger", NOW + timedelta(days=1))
    with Caller(here, NORTH, **stranger) as caller, refused() as fault:
        caller.stub.Join(caller.joining(), timeout=5)
    assert "'stranger' is no site" in str(fault.value.details())
    assert here.refusals() == here.journaled() == [("", "certificate")]
    [row] = here.grid.notes(0)["link"]
    assert "stranger" in row["what"]


def test_a_second_certificate_of_the_authority_for_a_site_is_refused(here: Here) -> None:
    second = issued(here, NORTH, NOW + timedelta(days=1))
    with Caller(here, NORTH, **second) as caller, refused():
        caller.stub.Join(caller.joining(), timeout=5)
    assert here.refusals() == [(NORTH, "certificate")]
    assert nobody_came(here)


def test_after_a_rotation_the_old_certificate_is_refused_and_the_new_one_let_in(
    here: Here,
) -> None:
    kit = SiteKit.read(here.kits.site(NORTH))
    with Caller(here, NORTH) as old:
        old.join()
        request = enrol.rotate(kit, int(time.time()) + 1)
        membership.grant(here.kits, here.desks.accord, request, 397, datetime.now(UTC))
        for call in (
            lambda: old.stub.Beat(link_pb2.Session(id=old.session), timeout=5),
            lambda: old.stub.Join(old.joining(), timeout=5),
        ):
            with refused():
                call()
    with Caller(here, NORTH) as new:
        new.join()
    assert {reason for _, reason in here.refusals()} == {"certificate"}


def test_a_revoked_site_is_cut_off_within_two_seconds_and_not_let_in_again(here: Here) -> None:
    with Caller(here, NORTH) as caller, Caller(here, SOUTH) as other:
        caller.join()
        other.join()
        membership.revoke(here.kit, NORTH, "the contract ended", datetime.now(UTC))
        began = time.monotonic()
        with refused() as fault:
            next(caller.work)
        assert time.monotonic() - began < 10  # it is at most a look a second, on a busy machine
        assert "the contract ended" in str(fault.value.details())
        with refused():
            caller.stub.Join(caller.joining(), timeout=5)
        assert here.desks.present() == [SOUTH]
        other.stub.Beat(link_pb2.Session(id=other.session), timeout=5)
    assert here.refusals() == [(NORTH, "revoked")]


def test_a_certificate_that_expires_while_the_session_is_open_ends_it(here: Here) -> None:
    end = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=2)
    short = issued(here, NORTH, end)
    held = authority.read_certificate(short["certificate_chain"], "")
    members = here.kit.members()
    changed = members[NORTH].model_copy(update={"certificate": authority.fingerprint(held)})
    here.kit.write_members(members | {NORTH: changed})
    with Caller(here, NORTH, **short) as caller:
        caller.join()
        with refused() as fault:
            next(caller.work)
    assert "has expired" in str(fault.value.details())
    assert not nobody_came(here)  # it was in while it was good
    assert here.refusals() == [(NORTH, "certificate")]


def test_without_a_certificate_of_the_authority_no_call_gets_through(here: Here) -> None:
    key = keyfiles.create(here.folder / "other.key")
    other = (authority.found("FedAccord small", key, 1, NOW), key)  # an authority of the same name
    cases = {
        "none": {"private_key": None, "certificate_chain": None},
        "another authority's": issued(here, NORTH, NOW + timedelta(days=1), by=other),
        "an expired one": issued(here, NORTH, NOW - timedelta(minutes=1)),
    }
    for case, pair in cases.items():
        with Caller(here, NORTH, **pair) as caller, refused(grpc.StatusCode.UNAVAILABLE):
            caller.stub.Join(caller.joining(), timeout=10)
        assert nobody_came(here), case
    with Caller(here, NORTH) as caller:
        sealed = caller.joining()
    plain = grpc.insecure_channel(f"127.0.0.1:{here.port}", OPTIONS)
    with plain, refused(grpc.StatusCode.UNAVAILABLE):
        link_pb2_grpc.LinkStub(plain).Join(sealed, timeout=10)
    assert nobody_came(here)
    assert here.refusals() == []


def test_an_end_that_says_nothing_keeps_nobody_out(here: Here) -> None:
    silent = [socket.create_connection(("127.0.0.1", here.port)) for _ in range(50)]
    with Caller(here, NORTH) as caller:
        caller.join()
    for connection in silent:
        connection.close()


def test_members_that_cannot_be_read_let_in_nobody_new_and_keep_who_is_there(here: Here) -> None:
    with Caller(here, NORTH) as caller:
        caller.join()
        (here.kit.folder / "members.json").write_text("{")
        caller.stub.Beat(link_pb2.Session(id=caller.session), timeout=5)
    stranger = issued(here, "stranger", NOW + timedelta(days=1))
    with Caller(here, NORTH, **stranger) as caller, refused():
        caller.stub.Join(caller.joining(), timeout=5)
    assert "members-unreadable" in (here.folder / "journal.jsonl").read_text()
