"""The way to the coordinator: each obstacle is told apart, against real TLS servers; the clocks."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from checked_site import NOW, at, enrolled, fails, issue, listening

from fedaccord import authority, membership
from fedaccord.client import dial, reach
from fedaccord.kit import CoordinatorKit, SiteKit
from fedaccord.provision import Kits


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Kits:
    """Not to be changed."""
    return enrolled(tmp_path_factory.mktemp("kits"))


@pytest.fixture
def kit(kits: Kits, tmp_path: Path) -> SiteKit:
    """A copy of the kit of site north, which a test may break."""
    shutil.copytree(kits.site("north"), tmp_path / "north")
    return SiteKit.read(tmp_path / "north")


@pytest.fixture(scope="module")
def coordinator(kits: Kits, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a coordinator that listens."""
    with listening(kits, tmp_path_factory.mktemp("coordinator")) as port:
        yield port


@dataclass
class Said:
    """What a coordinator answers."""

    reachable: bool = True
    why: str = ""
    clock_offset: float = 0.1
    run: str = "ours-1"
    version: str = "0.1.0"


def free() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


@pytest.mark.parametrize(
    ("offset", "state"),
    [
        (0.0, "ok"),
        (11.9, "ok"),
        (-12.1, "warn"),
        (119.0, "warn"),
        (121.0, "fail"),
        (-600.0, "fail"),
    ],
)
def test_a_clock_is_held_to_what_the_link_allows(offset: float, state: str) -> None:
    found = reach.check_clock(offset, NOW - timedelta(days=1), NOW)
    assert found.state == state
    assert f"{abs(offset):.1f} s {'ahead' if offset > 0 else 'behind'}" in found.found


def test_a_clock_before_the_coordinators_certificate_fails_and_an_unknown_one_is_warned_of() -> (
    None
):
    fails(reach.check_clock(None, NOW, NOW - timedelta(minutes=1)), "certificate begins")
    assert reach.check_clock(None, NOW, NOW + timedelta(minutes=1)).state == "warn"
    assert reach.check_clock(None, None, NOW).state == "warn"
    fails(reach.check_clock(None, None, NOW, "The clock is 600 s off."), "600 s off")


def tried(kit: SiteKit, port: int) -> reach.Reached:
    return reach.reach(kit, f"127.0.0.1:{port}", patience=2)


def test_nobody_there_a_name_nobody_knows_and_plain_text_are_told_apart(
    kit: SiteKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "nothing listens there" in tried(kit, free()).why

    def unknown(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    with monkeypatch.context() as patched:
        patched.setattr(socket, "create_connection", unknown)
        found = reach.reach(kit, "fed.invalid:8443")
    assert "not known here" in found.why and "`getent hosts fed.invalid`" in found.remedy
    assert "does not speak TLS" in served(
        kit, lambda raw: raw.sendall(b"SSH-2.0-OpenSSH_9\r\n" * 9)
    )
    assert "nothing was said" in served(kit, lambda raw: raw.recv(1) and Silence.wait(5))


Silence = threading.Event()


def served(kit: SiteKit, answer: Callable[[socket.socket], object]) -> str:
    """What is said of a server that answers so."""
    with socket.create_server(("127.0.0.1", 0)) as here:

        def once() -> None:
            raw, _ = here.accept()
            with raw:
                answer(raw)

        thread = threading.Thread(target=once, daemon=True)
        thread.start()
        found = reach.reach(kit, f"127.0.0.1:{here.getsockname()[1]}", patience=0.5)
        Silence.set()
        thread.join()
        Silence.clear()
        return found.why


def impostor(folder: Path, pem: bytes, key: authority.Key) -> Callable[[socket.socket], object]:
    """A TLS server with a certificate of somebody's choice."""
    folder.mkdir(exist_ok=True)
    (folder / "pem").write_bytes(pem + authority.key_pem(key))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "pem")

    def answer(raw: socket.socket) -> None:
        try:
            with context.wrap_socket(raw, server_side=True) as secure:
                secure.sendall(b"\0")
        except OSError:  # the site turned away
            return

    return answer


def test_another_authority_another_name_and_old_dates_are_told_apart(
    kits: Kits, kit: SiteKit, tmp_path: Path
) -> None:
    key = authority.new_key()
    alien = authority.found("a firewall", key, 9, NOW), key

    def shown(name: str, by: tuple, when: datetime, days: int = 9) -> str:
        made = authority.issue(by, key.public_key(), name, [], "server", days, when)
        pem = authority.certificate_pem(made)
        return served(kit, impostor(tmp_path / "tls", pem, key))

    own = kits.issuer()
    assert shown("coordinator", own, NOW) == ""
    assert "another authority" in shown("coordinator", alien, NOW)
    assert "no coordinator of this accord" in shown("north", own, NOW)
    assert "has run out" in shown("coordinator", own, NOW - timedelta(days=3), 1)
    assert "not valid yet" in shown("coordinator", own, NOW + timedelta(days=3))


def test_a_certificate_that_the_coordinator_refuses_is_named(
    kits: Kits, kit: SiteKit, coordinator: int
) -> None:
    good = tried(kit, coordinator)
    assert good.why == "" and good.made < NOW
    key = authority.new_key()
    issue(kits, kit, by=(authority.found("another", key, 99, NOW), key))
    bad = tried(kit, coordinator)
    assert "when it saw this site's certificate" in bad.why and "openssl x509" in bad.remedy
    found = reach.check_coordinator([bad], None)
    fails(found, "when it saw")


def test_one_address_of_two_that_leads_nowhere_is_warned_of(kit: SiteKit, coordinator: int) -> None:
    both = [tried(kit, coordinator), tried(kit, free())]
    found = reach.check_coordinator(both, Said())
    assert (found.state, "nothing listens" in found.found) == ("warn", True)
    assert reach.check_coordinator(both[:1], Said()).state == "ok"
    fails(reach.check_coordinator(both, Said(False, "PERMISSION_DENIED: revoked")), "revoked")


def test_a_revoked_site_is_told_so_by_the_coordinator_itself(
    kits: Kits, kit: SiteKit, coordinator: int
) -> None:
    own = CoordinatorKit.read(kits.coordinator)
    before = own.members()
    membership.revoke(own, "north", "left the study", NOW)
    try:
        answer = dial.probe(at(kit, coordinator))
    finally:
        own.write_members(before)
        os.utime(own.folder / "members.json", (1, 1))  # it is read anew: its time has changed
    assert not answer.reachable
    fails(reach.check_coordinator([tried(kit, coordinator)], answer), "left the study")
    assert dial.probe(at(kit, coordinator)).reachable
