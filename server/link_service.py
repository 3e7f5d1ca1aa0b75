"""The coordinator's end of the link: gRPC with mutual TLS; who is who, then the desks."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent import futures
from contextlib import contextmanager
from secrets import token_hex
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from fedaccord import __version__, link_pb2, link_pb2_grpc
from fedaccord.envelope import (
    COORDINATOR,
    JOIN,
    MOST_TEXT,
    SKEW,
    WELCOME,
    Envelope,
    Refused,
    Signed,
    opened,
    refuse_stale,
    refuse_unexpected,
    seal,
)
from fedaccord.errors import RunError
from fedaccord.evidence import canonical_json, sha256
from fedaccord.journal import event
from fedaccord.kit import CoordinatorKit
from fedaccord.objects import Parcel, bundles
from fedaccord.pieces import packed, unpacked
from fedaccord.server.desk import Over
from fedaccord.server.desks import Desks
from fedaccord.server.gates import told
from fedaccord.server.watch import BEAT

log = logging.getLogger("fedaccord.link")

BROKEN = "the connection ended"
SEALED = 16 << 20  # bytes of the largest single gRPC message: a list of 100,000 objects
OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", SEALED),
    ("grpc.max_send_message_length", SEALED),
    ("grpc.so_reuseport", 0),
    # A firewall forgets a silent connection after minutes; a ping keeps it, and finds a dead one.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.max_concurrent_streams", 32),
]
CALLS = 8  # of one site at a time: its stream of work, and what it calls meanwhile


def serve(kit: CoordinatorKit, desks: Desks) -> tuple[grpc.Server, int]:
    """Open the port; whoever has no certificate of the authority does not get through.

    Returns:
        The server, started, and the port that it listens on.

    Raises:
        RunError: the address is taken, or is not of this machine.
    """
    workers = 8 + CALLS * len(desks.accord.roster)
    pool = futures.ThreadPoolExecutor(workers)
    server = grpc.server(pool, interceptors=[Patient()], options=OPTIONS)
    link_pb2_grpc.add_LinkServicer_to_server(Service(desks, kit), server)
    pair = (kit.tls_key.read_bytes(), kit.tls_cert.read_bytes())
    credentials = grpc.ssl_server_credentials([pair], kit.ca.read_bytes(), True)
    try:
        port = server.add_secure_port(kit.listen, credentials)
    except RuntimeError:
        raise RunError(
            f"listen = {kit.listen}: the address is taken, or is not of this machine. Stop the "
            "other process, or name another in coordinator.toml."
        ) from None
    server.start()
    return server, port


class Patient(grpc.ServerInterceptor):  # type: ignore[misc]  # grpcio has no types
    """Bytes that are no message become an empty message, which is refused and on record.

    gRPC itself ends such a call for its caller alone: the thread that it took waits on, and its
    place among the streams stays taken, until the connection ends.
    """

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Have a method's handler read whatever comes."""
        handler = continuation(details)
        if handler is None:  # no such method
            return None
        read = handler.request_deserializer

        def read_or_empty(data: bytes) -> Any:
            try:
                return read(data)
            except DecodeError:
                return read(b"")

        return handler._replace(request_deserializer=read_or_empty)


class Service(link_pb2_grpc.LinkServicer):
    """What a site may call; see link.proto. Every call is held to the caller's certificate."""

    def __init__(self, desks: Desks, kit: CoordinatorKit) -> None:
        self.desks, self.kit = desks, kit
        self._lock = threading.Lock()
        self._under_way: dict[str, list[grpc.ServicerContext]] = {}

    def Join(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Check who is there and begin a session; calls of the one before it are ended."""
        desks = self.desks
        with self._call(context, most=sys.maxsize) as site:  # its old calls must not lock it out
            join, hello = self._hello(site, request)
            session = "" if hello.get("probe") is True else token_hex(16)
            if not session:  # `fedaccord site check`: nothing begins
                return self._welcome(site, join, session)
            before = desks.sit(site, session, join.nonce)
            self._end_others(site, context)
            if before:
                desks.ended(site, "it joined anew", counts=True)
            desks.watch.joined(site, told(hello["version"]), context.peer(), len(desks.present()))
            return self._welcome(site, join, session)

    def _hello(self, site: str, request: Any) -> tuple[Envelope, dict[str, Any]]:
        desks = self.desks
        if len(request.hello) > MOST_TEXT:
            raise Refused("envelope", "The words of the join are too many.")
        join = opened(request.text, request.signature, desks.members.key(site))
        wanted = {"sender": site, "recipient": COORDINATOR, "direction": JOIN}
        refuse_unexpected(join, wanted | {"body": sha256(request.hello)})
        try:
            hello = dict(json.loads(request.hello))
            offset = float(hello["time"]) - time.time()
            str(hello["version"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise Refused("envelope", "The words of the join are none.") from None
        if not abs(offset) < SKEW:
            raise Refused(
                "clock",
                f"The clock of site {site} is {offset:.0f} s off the coordinator's, above "
                f"{SKEW:.0f}. Set the clocks (`timedatectl`).",
            )
        refuse_stale(join, 0, time.time())
        if join.accord != desks.accord.digest:
            raise Refused(
                "accord",
                f"Site {site} holds another accord ({join.accord[:12]!r}) than the coordinator "
                f"({desks.accord.digest[:12]!r}). Give both the same accord.toml.",
            )
        return join, hello

    def _welcome(self, site: str, join: Envelope, session: str) -> Any:
        """Answer a join: which run, what may be sent, which keys are in force."""
        desks = self.desks
        said = canonical_json(
            {
                "run": desks.run,
                "session": session,
                "join": join.nonce,
                "time": time.time(),
                "version": __version__,
                "beat": BEAT,
                "most": desks.most,
                "handovers": {**desks.members.handovers(), COORDINATOR: self.kit.handovers()},
            }
        )
        welcome = Envelope(
            run=desks.run,
            round=0,
            sender=COORDINATOR,
            recipient=site,
            direction=WELCOME,
            kind="",
            message="",
            nonce=desks.next_nonce(),
            expires=time.time() + SKEW,
            body=sha256(said),
            accord=desks.accord.digest,
            model="",
            shown="",
        )
        signed = seal(welcome, desks.key)
        return link_pb2.Sealed(text=signed.text, signature=signed.signature, hello=said)

    def Work(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        """Give out requests, as they come, until the session is over."""
        desks, session = self.desks, request.id
        with self._call(context) as site:
            desks.heard(site, session)
            context.add_callback(lambda: self._left(site, session, BROKEN))
            try:
                for letter in desks.next_letter(site, session, context.is_active):
                    if letter is None:
                        self._caller(context)  # it may have been revoked
                    elif (parcel := letter.parcel) is not None:
                        yield _sealed(desks.sealed(letter), parcel, letter.shown)
            except Refused as refusal:
                self._left(site, session, str(refusal))
                raise
            finally:
                self._left(site, session, desks.closed or "another session began")

    def _left(self, site: str, session: str, why: str) -> None:
        """Note once that a session ended."""
        if self.desks.rise(site, session):
            self.desks.ended(site, why, counts=why == BROKEN)

    def Fetch(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        """Give out bytes of a request's objects."""
        with self._call(context) as site:
            self.desks.heard(site, request.session)
            parcel = self.desks.letter(site, request.message).parcel
            parts = parcel.parts if parcel else {}
            names = [name.hex() for name in request.ids]
            if any(name not in parts for name in names):
                raise Refused("body", "The request has no such object.")
            for bundle in bundles((name, parts[name]) for name in names):
                self.desks.heard(site, request.session)
                yield packed(bundle)

    def Offer(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Take in a signed reply and say which of its objects are lacking."""
        with self._call(context) as site:
            self.desks.heard(site, request.session)
            listed = ((one.id.hex(), one.size) for one in request.objects)
            reply = self.desks.offer(site, Signed(request.text, request.signature), listed)
            if reply is None or self.desks.arrived(site, reply.envelope.message):
                return link_pb2.Lacking(known=True)
            lacking = [name for name in reply.sizes if name not in self.desks.store]
            return link_pb2.Lacking(ids=[bytes.fromhex(name) for name in lacking])

    def Push(self, request_iterator: Iterable[Any], context: grpc.ServicerContext) -> Any:
        """Take bytes of a reply's objects; what arrives whole stays, whatever comes after."""
        with self._call(context) as site:
            stream = iter(request_iterator)
            first = next(stream, None)
            if first is None:
                return link_pb2.Receipt(whole=False)
            self.desks.heard(site, first.session)
            sizes = self.desks.expected(site, first.message)

            def came() -> Iterator[tuple[str, bytes]]:
                yield from unpacked(first)
                for more in stream:
                    self.desks.heard(site, first.session)
                    yield from unpacked(more)

            self.desks.store.take(sizes, came(), token_hex(8))
            return link_pb2.Receipt(whole=self.desks.arrived(site, first.message))

    def Beat(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Note that a site is there, and tell it the time."""
        with self._call(context) as site:
            self.desks.heard(site, request.id)
            return link_pb2.Pulse(time=time.time())

    def _caller(self, context: grpc.ServicerContext) -> str:
        """Tell which site calls, by the certificate that the connection was made with."""
        return self.desks.members.site_of(_certificate(context))

    @contextmanager
    def _call(self, context: grpc.ServicerContext, most: int = CALLS) -> Iterator[str]:
        """Say who calls; a refusal ends the call with its words and is on record.

        Of a fault that nobody foresaw nothing travels: gRPC would send its words, paths and all.
        """
        site = ""
        try:
            try:
                site = self.desks.members.named(_certificate(context))
                self._caller(context)
                with self._counted(site, context, most):
                    yield site
                return
            except Over as over:
                code, words = grpc.StatusCode.UNAUTHENTICATED, str(over)
            except Refused as refusal:
                code, words = grpc.StatusCode.PERMISSION_DENIED, str(refusal)
                self.desks.note(site, words, refusal.reason)
        except grpc.RpcError:  # the caller has gone
            raise
        except Exception as fault:
            event(log, "link.failed", logging.ERROR, site=site, fault=type(fault).__name__)
            if isinstance(fault, OSError):  # a full disk
                self.desks.fail(fault)
            code, words = grpc.StatusCode.INTERNAL, "internal error at the coordinator"
        context.abort(code, words)

    @contextmanager
    def _counted(self, site: str, context: grpc.ServicerContext, most: int) -> Iterator[None]:
        """Let no site take the threads that others need."""
        with self._lock:
            mine = self._under_way.setdefault(site, [])
            if len(mine) >= most:
                raise Refused("session", f"Site {site} has {most} calls under way already.")
            mine.append(context)
        try:
            yield
        finally:
            with self._lock:
                mine.remove(context)

    def _end_others(self, site: str, context: grpc.ServicerContext) -> None:
        """End what is left of a site's earlier session, whose connection may be dead."""
        with self._lock:
            others = [other for other in self._under_way[site] if other is not context]
        for other in others:
            other.cancel()


def _certificate(context: grpc.ServicerContext) -> bytes:
    return context.auth_context().get("x509_pem_cert", [b""])[0]


def _sealed(signed: Signed, parcel: Parcel, shown: list[Signed]) -> Any:
    """Write a request as it travels."""
    parts = parcel.parts.items()
    return link_pb2.Sealed(
        text=signed.text,
        signature=signed.signature,
        objects=[link_pb2.Object(id=bytes.fromhex(name), size=part.size) for name, part in parts],
        shown=[link_pb2.Shown(text=one.text, signature=one.signature) for one in shown],
    )
