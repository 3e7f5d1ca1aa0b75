"""A site's end of the link: it dials out, answers what it is asked, and comes back when cut off."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

import grpc
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedaccord import accord as accords
from fedaccord import keys, link_pb2, link_pb2_grpc
from fedaccord.client.check import data_of
from fedaccord.client.dial import CALL, Session, dial, join, printable
from fedaccord.client.vigil import Vigil
from fedaccord.envelope import (
    AHEAD,
    COORDINATOR,
    REPLY,
    SKEW,
    Envelope,
    Refused,
    opened,
    seal,
)
from fedaccord.errors import KitError, RunError
from fedaccord.journal import event
from fedaccord.kit import SiteKit
from fedaccord.objects import Parcel, Store, bundles, put_together, refuse_oversized, take_apart
from fedaccord.pieces import packed, unpacked

log = logging.getLogger("fedaccord.link")

FIRST, LONGEST, REFUSED = 0.2, 5.0, 30.0  # seconds before it dials again


class Attendant:
    """Answers the coordinator's requests with the installed ClientApp, one at a time.

    | case | what happens |
    |---|---|
    | the connection breaks | it dials again, after a while that grows and varies |
    | a request comes again that was answered | the same reply is sent, nothing is done twice |
    | a request is not from the coordinator's key, not for this site, run or accord, or old | it |
    | | is refused and logged; nothing is run |
    | the process is killed in training | asked again, the ledger gives the same bytes or refuses |
    | the coordinator shows another model than other sites signed | no more training in this run |
    | another process on this machine serves the same kit | RunError |
    """

    def __init__(self, kit: SiteKit, app: ClientApp, tell: Callable[[str], None]) -> None:
        """Take a kit.

        Args:
            kit: the site's.
            app: the ClientApp that is installed here; nothing that is run ever comes in.
            tell: is given one line of each event, for whoever watches.
        """
        self.kit, self.app, self.tell = kit, app, tell
        self.accord = accords.load(kit.accord_file)
        if set(self.accord.roster) - set(self.accord.pins):
            raise RunError(
                f"{kit.accord_file}: pins no key for some site. Get the accord.toml that "
                "`fedaccord provision` wrote once all sites had sent their requests."
            )
        self._lock = _alone(kit)
        self.vigil = Vigil(kit.site / "link.json", self.accord, kit.name)
        self.store = Store(kit.site / "link")
        self.most = kit.max_request_mb * 1_000_000
        self.stopped = threading.Event()
        self._kept: list[dict[str, int]] = []  # objects of the last requests, to be sent only once
        self._last: tuple[str, Parcel, Envelope] | None = None
        self._state = RecordDict()
        self._call: Any = None

    def stop(self) -> None:
        """End after the request under way; may be called from a signal handler."""
        self.stopped.set()
        if self._call is not None:
            self._call.cancel()

    def run(self) -> None:
        """Serve until `stop`, whatever the network does."""
        pause, turn = FIRST, 0
        while not self.stopped.is_set():
            address = self.kit.coordinator[turn % len(self.kit.coordinator)]
            began = time.monotonic()
            try:
                with dial(self.kit, address) as channel:
                    self._serve(join(self.kit, link_pb2_grpc.LinkStub(channel)), address)
                words, longest = "the coordinator ended the session", LONGEST
            except grpc.RpcError as fault:
                words, longest = _plain(fault)
            except (Refused, KitError) as refusal:
                words, longest = str(refusal), REFUSED
                event(log, "link.refused", logging.WARNING, words=words)
            if self.stopped.is_set():
                break
            served = time.monotonic() - began > 2 * LONGEST
            pause = FIRST if served else min(longest, 2 * pause)
            turn += 1
            event(log, "link.down", logging.WARNING, address=address, words=words)
            self.tell(f"{address}: {words}; dialling again")
            self.stopped.wait(pause * random.uniform(0.5, 1.5))
        event(log, "link.stopped")
        self._lock.close()

    def _serve(self, session: Session, address: str) -> None:
        """Answer requests until the session is over."""
        event(log, "link.joined", address=address, run=session.run)
        self.tell(f"{address}: joined run {session.run}")
        self.vigil.begin(session.run, session.handovers)
        call = self._call = session.stub.Work(link_pb2.Session(id=session.id))
        over = threading.Event()
        beats = threading.Thread(target=_beat, args=(session, call, over), daemon=True)
        beats.start()
        try:
            if self.stopped.is_set():  # before there was a call to be cancelled
                return
            for sealed in call:
                try:
                    self._answer(session, sealed)
                except Refused as refusal:
                    words = {"reason": refusal.reason, "words": str(refusal)}
                    event(log, "link.refused", logging.WARNING, **words)
                    self.tell(f"refused a request: {refusal}")
                if self.stopped.is_set():
                    return
        finally:
            over.set()
            call.cancel()

    def _answer(self, session: Session, sealed: Any) -> None:
        """Check a request, work on it unless it was answered before, and send the reply.

        Raises:
            Refused: it is not one that this site answers.
            grpc.RpcError: the connection broke; the request will come again.
        """
        request = opened(sealed.text, sealed.signature, session.key)
        self.vigil.check(request)
        if self._last is None or self._last[0] != request.message:
            self._last = None  # its memory is needed
            message = self._message(session, sealed, request)
            event(log, "link.request", kind=request.kind, round=request.round)
            reply = self._reply(message)
            self._last = (request.message, take_apart(reply), request)
            words = f"round {request.round}: " if request.round else ""
            self.tell(f"{words}answered {request.kind}")
        self._send(session)

    def _message(self, session: Session, sealed: Any, request: Envelope) -> Message:
        """Fetch what is lacking of a request, and put it together."""
        listed = ((one.id.hex(), one.size) for one in sealed.objects)
        sizes = refuse_oversized(listed, request.body, self.most)
        self.store.hold(sizes)
        self._kept.append(sizes)
        while len(self._kept) > 2:
            self.store.let_go(self._kept.pop(0))
        lacking = [name for name in sizes if name not in self.store]
        wanted = link_pb2.Wanted(
            session=session.id,
            message=request.message,
            ids=[bytes.fromhex(name) for name in lacking],
        )
        if lacking:
            came = session.stub.Fetch(wanted)
            self.store.take(sizes, (one for some in came for one in unpacked(some)), "fetch")
        message, model = put_together(request.body, self.store.read, self.most)
        self.vigil.hold(
            request, message, model, [(one.text, one.signature) for one in sealed.shown]
        )
        message.metadata.__dict__["_message_id"] = request.message
        return message

    def _reply(self, message: Message) -> Message:
        """Let the ClientApp answer; what it raises stays here."""
        node = {"site": self.kit.name, "folder": str(self.kit.folder)}
        node |= {"accord": str(self.kit.accord_file), "data": str(data_of(self.kit))}
        context = Context(
            run_id=1,
            node_id=message.metadata.dst_node_id,
            node_config={k: v for k, v in node.items() if v},
            state=self._state,
            run_config={},
        )
        try:
            return self.app(message=message, context=context)
        except Exception as fault:
            event(log, "site.failed", logging.ERROR, fault=type(fault).__name__)
            words = "internal error at the site"
            error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, words)
            return Message(error, reply_to=message)

    def _send(self, session: Session) -> None:
        """Offer the last reply, newly sealed, and push what the coordinator lacks of it."""
        assert self._last is not None
        mark, parcel, request = self._last
        reply = Envelope(
            run=request.run,
            round=request.round,
            sender=self.kit.name,
            recipient=COORDINATOR,
            direction=REPLY,
            kind=request.kind,
            message=mark,
            nonce=self.vigil.next_nonce(),
            expires=time.time() + min(max(SKEW, self.accord.rounds.timeout), AHEAD),
            body=parcel.root,
            accord=request.accord,
            model=request.model,
            shown="",
        )
        signed = seal(reply, keys.load(self.kit.identity_key))
        parts = parcel.parts.items()
        offer = link_pb2.Sealed(
            text=signed.text,
            signature=signed.signature,
            session=session.id,
            objects=[link_pb2.Object(id=bytes.fromhex(k), size=part.size) for k, part in parts],
        )
        lacking = session.stub.Offer(offer, timeout=CALL + parcel.size / 1e6)
        if lacking.known:
            return
        wanted = [name.hex() for name in lacking.ids]
        receipt = session.stub.Push(_pieces(session.id, mark, parcel, wanted))
        if not receipt.whole:
            raise Refused("body", "The coordinator did not get the whole reply.")
        event(log, "link.reply", kind=request.kind, round=request.round, bytes=parcel.size)


def _pieces(session: str, mark: str, parcel: Parcel, wanted: list[str]) -> Iterator[Any]:
    about = {"session": session, "message": mark}
    for bundle in bundles((name, parcel.parts[name]) for name in wanted if name in parcel.parts):
        yield packed(bundle, **about)
        about = {}


def _alone(kit: SiteKit) -> IO[bytes]:
    """Hold the kit for this process; the lock goes when it ends, however it ends."""
    lock = open(kit.site / "link.lock", "wb")  # noqa: SIM115
    if os.name == "posix":
        import fcntl

        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise RunError(
                f"{kit.folder}: another process serves this kit. Stop that one first."
            ) from None
    return lock


def _plain(fault: grpc.RpcError) -> tuple[str, float]:
    """Say what broke, and how long at most to wait before dialling again."""
    code, details = fault.code(), printable(fault.details())
    if code == grpc.StatusCode.UNAUTHENTICATED:
        return "the session is over", LONGEST
    if code == grpc.StatusCode.PERMISSION_DENIED:
        event(log, "link.refused-by-coordinator", logging.WARNING, words=details)
        return f"the coordinator refused: {details}", REFUSED
    if code == grpc.StatusCode.CANCELLED:
        return "stopped", LONGEST
    return f"cannot be reached ({code.name}: {details})", LONGEST


def _beat(session: Session, call: Any, over: threading.Event) -> None:
    """Show that this site is there, also while it trains; end the session if nobody hears it."""
    failed = 0
    while not over.wait(session.beat):
        try:
            session.stub.Beat(link_pb2.Session(id=session.id), timeout=CALL)
            failed = 0
        except grpc.RpcError as fault:
            failed += 1
            if fault.code() == grpc.StatusCode.UNAUTHENTICATED or failed > 2:
                call.cancel()
                return
