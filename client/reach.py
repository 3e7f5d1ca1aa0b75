"""Whether the coordinator can be reached from a site, and if not, at which step and why."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from cryptography import x509

from fedaccord.client.check import Finding
from fedaccord.envelope import COORDINATOR, SKEW
from fedaccord.errors import FedAccordError
from fedaccord.kit import SiteKit, host_and_port

PATIENCE = 5.0  # seconds for each of: connect, handshake, first word


class Answer(Protocol):
    """What a coordinator says over the link to a site that only asks whether it is there."""

    @property
    def reachable(self) -> bool:
        """Whether it let the site in."""

    @property
    def why(self) -> str:
        """Why not, or ""."""

    @property
    def clock_offset(self) -> float:
        """Seconds by which its clock is ahead of this one's, where it let the site in."""

    @property
    def run(self) -> str:
        """The run that is under way, or ""."""

    @property
    def version(self) -> str:
        """Of FedAccord there."""


Probe = Callable[[SiteKit], Answer]


@dataclass(frozen=True)
class Reached:
    """How far a connection to one address came.

    Attributes:
        address: as in site.toml.
        why: what stopped it, or "" where the coordinator accepted this site's certificate.
        remedy: what to do then.
        made: from when the coordinator's certificate is valid, where it showed a good one.
    """

    address: str
    why: str = ""
    remedy: str = ""
    made: datetime | None = None


def reach(kit: SiteKit, address: str, patience: float = PATIENCE) -> Reached:
    """Connect to an address, shake hands with the site's certificate, and wait for a first word.

    Nothing but the handshake is sent. A server that speaks TLS 1.3 judges the site's certificate
    after the site has finished its part, so only its first word shows that it accepts it.

    Args:
        kit: the site's, with its certificate and key.
        address: "fed.example.org:8443".
        patience: seconds for each step.
    """
    host, port = host_and_port(address)
    try:
        context = _context(kit)
    except (FedAccordError, OSError, ssl.SSLError) as fault:
        said = str(fault).splitlines()[0]
        return Reached(address, said, f"`fedaccord site init {kit.folder}`")
    try:
        connection = socket.create_connection((host, port), patience)
    except OSError as fault:
        return Reached(address, *_unconnected(fault, host, port))
    connection.settimeout(patience)
    made = None
    with connection:
        try:
            with context.wrap_socket(connection, server_hostname=COORDINATOR) as secure:
                shown = secure.getpeercert(binary_form=True)
                made = x509.load_der_x509_certificate(shown).not_valid_before_utc if shown else None
                heard = secure.recv(1)
        except OSError as fault:  # every error of ssl is one
            return Reached(address, *_unshaken(fault, address, kit, made is not None), made)
    if not heard:
        return Reached(address, *_rejected(kit), made)
    return Reached(address, made=made)


def _context(kit: SiteKit) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(kit.ca)
    context.load_cert_chain(kit.tls_cert, kit.tls_key)
    context.set_alpn_protocols(["h2"])
    return context


def _unconnected(fault: OSError, host: str, port: int) -> tuple[str, str]:
    """Say why there is no connection, and what to do."""
    if isinstance(fault, socket.gaierror):
        return f"The name {host} is not known here.", f"`getent hosts {host}`, or mend site.toml."
    if isinstance(fault, ConnectionRefusedError):
        return (
            f"{host} refuses connections to port {port}: nothing listens there.",
            "Have the coordinator say `fedaccord coordinator up ACCORD`, or mend site.toml.",
        )
    if isinstance(fault, TimeoutError):
        return (
            f"{host} did not answer on port {port}: most often a firewall drops it.",
            f"Allow this machine to dial out to {host}, TCP port {port}; `nc -vz {host} {port}` "
            "shows whether it can.",
        )
    words = fault.strerror or type(fault).__name__
    return (
        f"{host} port {port}: {words}.",
        f"`nc -vz {host} {port}` shows whether it can be reached.",
    )


def _unshaken(fault: OSError, address: str, kit: SiteKit, done: bool) -> tuple[str, str]:
    """Say why the handshake failed, and what to do."""
    look = f"`openssl s_client -connect {address} -CAfile {kit.ca}` shows what answers."
    if isinstance(fault, ssl.SSLCertVerificationError):
        words = fault.verify_message
        if "expired" in words:
            return (
                "The coordinator's certificate has run out.",
                "Have the coordinator say `fedaccord coordinator rotate ACCORD`; `timedatectl` "
                "shows whether the clock here is right.",
            )
        if "not yet valid" in words:
            return (
                "The coordinator's certificate is not valid yet.",
                "`timedatectl` shows whether the clock here is right.",
            )
        if "mismatch" in words:
            return "What answers there is no coordinator of this accord.", look
        return (
            f"What answers there shows a certificate of another authority ({words}): another "
            "accord's coordinator, or a firewall that opens TLS connections to look inside.",
            f"Have the firewall let this connection through unopened. {look}",
        )
    if done and not isinstance(fault, TimeoutError):
        return _rejected(kit)
    if isinstance(fault, TimeoutError):
        return "It was connected, and then nothing was said.", look
    reason = str(getattr(fault, "reason", None) or fault.strerror or type(fault).__name__)
    if "WRONG_VERSION_NUMBER" in reason or "RECORD_LAYER" in reason:
        return "What answers there does not speak TLS.", look
    return f"The TLS handshake failed: {reason}.", look


def _rejected(kit: SiteKit) -> tuple[str, str]:
    return (
        "The coordinator closed the connection when it saw this site's certificate.",
        f"`openssl x509 -in {kit.tls_cert} -noout -subject -issuer -dates` shows it; the "
        "coordinator's `fedaccord coordinator audit ACCORD` says why it was refused.",
    )


def check_coordinator(reached: list[Reached], answer: Answer | None) -> Finding:
    """Say whether the coordinator is there and would let the site in.

    | | state |
    |---|---|
    | no address leads to it, or it refuses the site | fail |
    | some addresses do not lead to it | warn |

    Args:
        reached: each address that was tried.
        answer: over the link; None where no address led there.
    """
    lost = [one for one in reached if one.why]
    said = [f"{one.address}: {one.why}" for one in lost]
    remedy = " ".join(dict.fromkeys(one.remedy for one in lost))
    if len(lost) == len(reached):
        return Finding("coordinator", "fail", " ".join(said), remedy)
    there = ", ".join(one.address for one in reached if not one.why)
    if answer is not None and not answer.reachable:
        return Finding(
            "coordinator",
            "fail",
            f"{there} accepts the certificate and refuses the site: {answer.why}",
            "The coordinator's `fedaccord coordinator audit ACCORD` says more.",
        )
    found = f"{there} accepts this site's certificate"
    if answer is not None:
        found += f", FedAccord {answer.version}, " + (
            f"run {answer.run}" if answer.run else "no run"
        )
    found = " ".join([f"{found}.", *said])
    return Finding("coordinator", "warn" if lost else "ok", found, remedy)


def check_clock(
    offset: float | None, made: datetime | None, now: datetime, refused: str = ""
) -> Finding:
    """Compare the site's clock with the coordinator's.

    Args:
        offset: seconds by which the coordinator's clock is ahead of this one; None where it did
            not answer.
        made: from when the coordinator's certificate is valid; None where it showed none.
        now: this machine's time, with its time zone.
        refused: what was said where a clock was the reason that the site was not let in.
    """
    remedy = "`timedatectl set-ntp true`, then `timedatectl` shows whether it is synchronised."
    utc = f"{now.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC here"
    if made is not None and now < made:
        said = f"{utc}, before the coordinator's certificate begins ({made:%Y-%m-%d %H:%M} UTC)."
        return Finding("clock", "fail", said, remedy)
    if refused:
        return Finding("clock", "fail", f"{utc}. {refused}", remedy)
    if offset is None:
        return Finding("clock", "warn", f"{utc}; the coordinator did not tell its time.", remedy)
    which = "ahead" if offset > 0 else "behind"
    said = f"{utc}; the coordinator's clock is {abs(offset):.1f} s {which}."
    if abs(offset) > SKEW:
        return Finding("clock", "fail", f"{said} More than {SKEW:.0f} s are refused.", remedy)
    if abs(offset) > SKEW / 10:
        return Finding("clock", "warn", said, remedy)
    return Finding("clock", "ok", said)
