"""A coordinator that says what a test lets it, and a real site that listens to it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import grpc
from deployed import RUN, listed, training
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from fedaccord import accord as accords
from fedaccord import keys, link_pb2, link_pb2_grpc
from fedaccord.client.link import Attendant
from fedaccord.envelope import COORDINATOR, REQUEST, SKEW, WELCOME, Envelope, read, seal
from fedaccord.evidence import canonical_json, digest, sha256
from fedaccord.kit import CoordinatorKit, SiteKit
from fedaccord.objects import Part, pieces, take_apart
from fedaccord.pieces import packed
from fedaccord.provision import Kits

SITE = "cleveland"


class Liar(link_pb2_grpc.LinkServicer):
    """The other end of the link, with the coordinator's key; it says whatever it is told to.

    Attributes:
        said, envelope: what is said otherwise in its welcome.
        letters: what its stream of work gives out; None ends the session.
        other_bytes: what it gives for an object instead of its bytes, by id.
        works: how often a site asked for work.
        replies: envelopes that were offered.
    """

    def __init__(self, kits: Kits) -> None:
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
        self.kit = CoordinatorKit.read(kits.coordinator)
        self.key = keys.load(self.kit.signing_key)
        self.accord = accords.load(self.kit.accord_file)
        self.said, self.envelope = dict[str, Any](), dict[str, Any]()
        self.replay, self._first = False, None
        self.letters = queue.Queue[Any]()
        self.parts, self.other_bytes = dict[str, Part](), dict[str, bytes]()
        self.works, self.joins, self.replies = 0, 0, list[Envelope]()
        self.heard = threading.Condition()
        self._nonce = time.time_ns()

    def write(self, **about: Any) -> Envelope:
        """An envelope to the site with the next nonce."""
        self._nonce += 1
        right = Envelope(
            run=RUN,
            round=0,
            sender=COORDINATOR,
            recipient=SITE,
            direction=WELCOME,
            kind="",
            message="",
            nonce=self._nonce,
            expires=time.time() + SKEW,
            body="",
            accord=self.accord.digest,
            model="",
            shown="",
        )
        return replace(right, **about)

    def request(
        self, content: Message, others: tuple[Any, ...] = (), key: Any = None, **change: Any
    ) -> Any:
        """A sealed request, rightly written but for a change."""
        parcel = take_apart(content)
        self.parts |= parcel.parts
        self._nonce += 1
        listed_ = [{"text": one.text, "signature": one.signature} for one in others]
        about = {
            "round": int(content.content["config"]["server-round"]),
            "direction": REQUEST,
            "kind": content.metadata.message_type,
            "message": f"m{self._nonce}",
            "body": parcel.root,
            "model": parcel.model,
            "shown": digest(listed_),
        }
        signed = seal(self.write(**about | change), key or self.key)
        shown_ = [link_pb2.Shown(text=one.text, signature=one.signature) for one in others]
        objects = listed(parcel)
        return link_pb2.Sealed(
            text=signed.text, signature=signed.signature, objects=objects, shown=shown_
        )

    def training(self, number: int = 1, weight: float = 0.0, **change: Any) -> Any:
        """A sealed request to train."""
        return self.request(training(number, weight, accord=self.accord.digest), **change)

    def Join(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.joins += 1
        if self.replay and self._first is not None:
            return self._first
        join = read(request.text)
        said: dict[str, Any] = {"run": RUN, "session": f"s{self.joins}", "join": join.nonce}
        said |= {"time": time.time(), "version": "1", "beat": 60.0, "most": 10**6}
        hello = canonical_json(said | {"handovers": {}} | self.said)
        about = {"body": sha256(hello)} | self.envelope
        signed = seal(self.write(**about), self.key)
        self._first = link_pb2.Sealed(text=signed.text, signature=signed.signature, hello=hello)
        return self._first

    def Work(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        self.works += 1
        while context.is_active():
            try:
                letter = self.letters.get(timeout=0.05)
            except queue.Empty:
                continue
            if letter is None:
                return
            yield letter

    def Fetch(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        for name in request.ids:
            part = self.parts[name.hex()].load()
            for data in pieces(self.other_bytes.get(name.hex(), part)):
                yield packed([(name.hex(), data)])

    def Offer(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self.heard:
            self.replies.append(read(request.text))
            self.offered = request
            self.heard.notify_all()
        return link_pb2.Lacking(known=True)

    def Beat(self, request: Any, context: grpc.ServicerContext) -> Any:
        return link_pb2.Pulse(time=time.time())

    def wait(self, count: int) -> None:
        """Wait until so many replies were offered."""
        with self.heard:
            assert self.heard.wait_for(lambda: len(self.replies) >= count, 10), self.replies


@contextmanager
def talking(liar: Liar, pair: tuple[bytes, bytes] | None = None) -> Iterator[int]:
    """Let a liar listen, with the coordinator's certificate or another pair; its port."""
    server = grpc.server(ThreadPoolExecutor(8))
    link_pb2_grpc.add_LinkServicer_to_server(liar, server)
    own = pair or (liar.kit.tls_key.read_bytes(), liar.kit.tls_cert.read_bytes())
    credentials = grpc.ssl_server_credentials([own], liar.kit.ca.read_bytes(), True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield port
    finally:
        server.stop(0).wait()


class Site:
    """A real site's process, but for the ClientApp: it notes what it is asked.

    Attributes:
        calls: kind and round of each message that the ClientApp got.
        lines: what whoever watches was told.
    """

    def __init__(self, kits: Kits, port: int, fails: str = "") -> None:
        kit = SiteKit.read(kits.site(SITE))
        self.kit = kit.model_copy(update={"coordinator": [f"127.0.0.1:{port}"]})
        self.calls, self.lines = list[tuple[str, int]](), list[str]()
        self._changed, self._fails = threading.Condition(), fails
        self.attendant = Attendant(self.kit, self._app(), self._tell)
        self._thread = threading.Thread(target=self.attendant.run)

    def _app(self) -> ClientApp:
        app = ClientApp()

        def answered(message: Message, context: Context) -> Message:
            config = message.content["config"]
            self.calls.append((message.metadata.message_type, int(config["server-round"])))
            if self._fails:
                raise ValueError(self._fails)
            content = RecordDict({"config": ConfigRecord({"site": SITE})})
            return Message(content, reply_to=message)

        app.train()(answered)
        app.evaluate()(answered)
        return app

    def _tell(self, words: str) -> None:
        with self._changed:
            self.lines.append(words)
            self._changed.notify_all()

    def told(self, words: str) -> None:
        """Wait for a line that has these words in it."""
        with self._changed:
            found = self._changed.wait_for(lambda: any(words in line for line in self.lines), 10)
            assert found, self.lines

    def __enter__(self) -> Site:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.attendant.stop()
        self._thread.join(10)
        assert not self._thread.is_alive()
