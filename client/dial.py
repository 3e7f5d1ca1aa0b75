"""Dialling out: TLS to the coordinator, and who is who on either side before anything is asked."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import grpc
from cryptography import x509

from fedaccord import __version__, keys, link_pb2, link_pb2_grpc
from fedaccord import accord as accords
from fedaccord.envelope import (
    COORDINATOR,
    JOIN,
    SKEW,
    WELCOME,
    Envelope,
    Refused,
    key_in_force,
    opened,
    refuse_unexpected,
    seal,
)
from fedaccord.errors import KitError
from fedaccord.evidence import build_hash, canonical_json, sha256
from fedaccord.kit import SiteKit

SEALED = 16 << 20  # bytes of the largest single gRPC message
CALL = 20.0  # seconds that a short call may take
SHORTEST, LONGEST = 0.05, 60.0  # seconds between two signs of life that a coordinator may ask for
RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")  # its name, which is a folder's
OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", SEALED),
    ("grpc.max_send_message_length", SEALED),
    ("grpc.ssl_target_name_override", COORDINATOR),
    # A firewall forgets a silent connection after minutes; a ping keeps it, and finds a dead one.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
]


@dataclass(frozen=True)
class Session:
    """A coordinator that let this site in.

    Attributes:
        stub: to call it.
        id: of the session; "" for a probe.
        run: the run that it is for.
        key: the coordinator's key in force.
        handovers: of the other sites' keys, by site.
        beat: seconds between two signs of life.
        most: bytes that it takes of a reply.
        offset: seconds that its clock is ahead.
        version: of its FedAccord.
    """

    stub: Any
    id: str
    run: str
    key: str
    handovers: dict[str, list[dict[str, str]]]
    beat: float
    most: int
    offset: float
    version: str


def refuse_expired(kit: SiteKit) -> None:
    """Look at the site's own certificate: a handshake that fails for it says nothing of the reason.

    Raises:
        KitError: none, or one that is not good today.
    """
    try:
        found = x509.load_pem_x509_certificate(kit.tls_cert.read_bytes())
    except (OSError, ValueError):
        raise KitError(
            f"{kit.tls_cert}: is no certificate. Put the site.pem there that the coordinator sent."
        ) from None
    now = datetime.now(UTC)
    if not found.not_valid_before_utc <= now <= found.not_valid_after_utc:
        raise KitError(
            f"{kit.tls_cert}: is good from {found.not_valid_before_utc:%Y-%m-%d %H:%M} to "
            f"{found.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, and it is {now:%Y-%m-%d %H:%M}. Set "
            "the clock, or ask for a new one (`fedaccord site rotate`)."
        )


def dial(kit: SiteKit, address: str) -> grpc.Channel:
    """Open a channel to one of the coordinator's addresses, with mutual TLS.

    Raises:
        KitError: a key or certificate that is missing, expired, or that others may read.
    """
    refuse_expired(kit)
    credentials = grpc.ssl_channel_credentials(
        kit.ca.read_bytes(), kit.tls_key.read_bytes(), kit.tls_cert.read_bytes()
    )
    return grpc.secure_channel(address, credentials, OPTIONS)


def join(kit: SiteKit, stub: Any, probe: bool = False) -> Session:
    """Show who this site is, and hold the coordinator to the key that the kit pins.

    Args:
        kit: the site's.
        stub: of the coordinator.
        probe: whether to ask only, and begin no session.

    Raises:
        Refused: the coordinator is not the one of the kit, or its clock is far off.
        grpc.RpcError: it cannot be reached, or it refused.
    """
    accord, key = accords.load(kit.accord_file), keys.load(kit.identity_key)
    nonce = time.time_ns()
    about = {"time": time.time(), "version": __version__, "build": build_hash(), "probe": probe}
    hello = canonical_json(about)
    asked = Envelope(
        run="",
        round=0,
        sender=kit.name,
        recipient=COORDINATOR,
        direction=JOIN,
        kind="",
        message="",
        nonce=nonce,
        expires=time.time() + SKEW,
        body=sha256(hello),
        accord=accord.digest,
        model="",
        shown="",
    )
    signed = seal(asked, key)
    sealed = link_pb2.Sealed(text=signed.text, signature=signed.signature, hello=hello)
    answer = stub.Join(sealed, timeout=CALL)
    try:
        said = dict(json.loads(answer.hello))
        handovers = _handovers(said["handovers"])
        mine = key_in_force(kit.coordinator_key, COORDINATOR, handovers.get(COORDINATOR, []))
        welcome = opened(answer.text, answer.signature, mine)
        offset = float(said["time"]) - time.time()
        session = Session(
            stub=stub,
            id=str(said["session"]),
            run=str(said["run"]),
            key=mine,
            handovers=handovers,
            beat=min(max(float(said["beat"]), SHORTEST), LONGEST),
            most=int(said["most"]),
            offset=offset,
            version=str(said["version"]),
        )
        if not RUN.fullmatch(session.run):
            raise ValueError("it names no run")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise Refused("envelope", "The coordinator's welcome is none.") from None
    wanted = {"sender": COORDINATOR, "recipient": kit.name, "direction": WELCOME}
    refuse_unexpected(welcome, wanted | {"body": sha256(answer.hello), "accord": accord.digest})
    if said.get("join") != nonce or welcome.run != session.run:
        raise Refused("nonce", "The coordinator's welcome answers another join.")
    if not abs(offset) < SKEW:
        raise Refused(
            "clock",
            f"The coordinator's clock is {offset:+.0f} s off this site's, above {SKEW:.0f}. Set "
            "the clocks (`timedatectl`).",
        )
    return session


def _handovers(said: Any) -> dict[str, list[dict[str, str]]]:
    """Read handovers by name; what is none of them raises."""
    return {
        str(name): [
            {"key": str(step["key"]), "signature": str(step["signature"])} for step in steps
        ]
        for name, steps in dict(said).items()
    }


def printable(words: object) -> str:
    """Repeat what the other end said: on one line, at most 500 characters, none that acts."""
    return "".join(c if c.isprintable() else "?" for c in str(words)[:500])


class Probe(NamedTuple):
    """What a coordinator answered when a site asked without joining.

    Attributes:
        reachable: whether it let the site in.
        why: else, in one sentence.
        clock_offset: seconds that its clock is ahead.
        run: that it is carrying out.
        version: of its FedAccord.
    """

    reachable: bool
    why: str = ""
    clock_offset: float = 0.0
    run: str = ""
    version: str = ""


def probe(kit: SiteKit) -> Probe:
    """Ask each of the coordinator's addresses whether it would let this site in; nothing begins."""
    why = ""
    for address in kit.coordinator:
        try:
            with dial(kit, address) as channel:
                found = join(kit, link_pb2_grpc.LinkStub(channel), probe=True)
            return Probe(True, "", found.offset, found.run, found.version)
        except grpc.RpcError as fault:
            why = f"{address}: {fault.code().name}: {printable(fault.details())}"
        except (Refused, KitError) as refusal:
            why = f"{address}: {refusal}"
    return Probe(False, why)
