"""The link in this process: kits made once, a coordinator that listens, sites that call by hand."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from wards import small_accord, toml

from fedaccord import accord as accords
from fedaccord import journal, keys, link_pb2, link_pb2_grpc, membership, provision
from fedaccord.client import enrol
from fedaccord.client.dial import OPTIONS
from fedaccord.envelope import COORDINATOR, JOIN, REPLY, SKEW, Envelope, Signed, read, seal
from fedaccord.evidence import canonical_json, sha256
from fedaccord.kit import CoordinatorKit, SiteKit
from fedaccord.objects import Parcel, Store, pieces, put_together, take_apart
from fedaccord.pieces import packed, unpacked
from fedaccord.provision import Kits
from fedaccord.server.audit_log import AuditLog, entries, verify_audit
from fedaccord.server.desks import Desks
from fedaccord.server.link import LinkGrid
from fedaccord.server.link_service import serve
from fedaccord.server.members import Members
from fedaccord.server.metrics import Metrics
from fedaccord.server.one_run import FIRST_NODE
from fedaccord.server.watch import Watch

SITES = ["cleveland", "hungary", "va"]
RUN, MOST = "small-run", 20_000_000


@cache
def made() -> Path:
    """Kits of three sites that have been granted; made once, and copied by each test."""
    root = Path(tempfile.mkdtemp(prefix="fedaccord-kits-"))
    atexit.register(shutil.rmtree, root, True)
    data = small_accord() | {"sites": [{"name": name, "subjects": 100} for name in SITES]}
    file, kits, now = root / "small.toml", Kits(root / "kits"), datetime.now(UTC)
    file.write_text("".join(f"{key} = {toml(value)}\n" for key, value in data.items()))
    accord = accords.load(file)
    provision.lay(kits, accord, ["127.0.0.1:1"], 397, now, demo=False)
    for name in SITES:
        request = enrol.init(SiteKit.read(kits.site(name)), int(now.timestamp()))
        membership.grant(kits, accord, request, 397, now)
    provision.finish(kits, accord, file)
    return kits.root


def kits_in(folder: Path) -> Kits:
    """Kits of a test's own, which it may change."""
    shutil.copytree(made(), folder / "kits")
    return Kits(folder / "kits")


def training(number: int = 1, weight: float = 0.0, **config: Any) -> Message:
    """A request to train in a round, with a model of four equal weights."""
    content = RecordDict(
        {
            "arrays": ArrayRecord({"w": Array(np.full(4, weight))}),
            "config": ConfigRecord({"server-round": number, "run": RUN} | config),
        }
    )
    return Message(content, FIRST_NODE, "train")


def answer(value: Any = 1.0, **config: Any) -> Message:
    """A reply of a site, with four equal weights or those that are given."""
    held = np.full(4, value) if isinstance(value, float) else value
    arrays = ArrayRecord({"w": Array(held)})
    content = RecordDict({"arrays": arrays, "config": ConfigRecord(config)})
    return Message(content, FIRST_NODE, "train")


def listed(parcel: Parcel) -> list[Any]:
    """A parcel's objects as they are listed on the wire."""
    parts = parcel.parts.items()
    return [link_pb2.Object(id=bytes.fromhex(name), size=part.size) for name, part in parts]


class Here:
    """A coordinator that listens in this process."""

    def __init__(self, kits: Kits, folder: Path, most: int = MOST) -> None:
        read_kit = CoordinatorKit.read(kits.coordinator)
        own = read_kit.model_copy(update={"listen": "127.0.0.1:0"})
        self.kits, self.folder, self.kit = kits, folder, own
        self.key = keys.load(own.signing_key)
        accord = accords.load(own.accord_file)
        self.journal = journal.to_file(folder / "journal.jsonl", "coordinator")
        self.audit = AuditLog(folder / "audit.jsonl", self.key)
        watch = Watch(self.audit, Metrics())
        store, members = Store(folder / "spool"), Members(own, accord.pins)
        self.desks = Desks(accord, RUN, members, self.key, store, most, watch)
        self.grid = LinkGrid(self.desks)
        self.server, self.port = serve(own, self.desks)

    def close(self) -> None:
        self.desks.close("the test is over")
        self.server.stop(0).wait()
        self.audit.close()
        journal.close(self.journal)

    def site_kit(self, name: str) -> SiteKit:
        """A site's kit, whose coordinator is this one."""
        kit = SiteKit.read(self.kits.site(name))
        return kit.model_copy(update={"coordinator": [f"127.0.0.1:{self.port}"]})

    def ask(self, *sites: str, **about: Any) -> list[str]:
        """Lay down a training request for sites; the messages' ids."""
        accord = self.desks.accord.digest
        content = training(accord=accord, **about).content
        nodes = [FIRST_NODE + SITES.index(site) for site in sites]
        return list(self.grid.push_messages([Message(content, node, "train") for node in nodes]))

    def pulled(self, *marks: str) -> list[Message]:
        return list(self.grid.pull_messages(marks))

    def refusals(self) -> list[tuple[str, str]]:
        """Site and reason of what was refused, as the audit log has it."""
        assert verify_audit(self.folder / "audit.jsonl", self.key.public) == []
        found = entries(self.folder / "audit.jsonl")
        return [(e["site"], e["reason"]) for e in found if e["kind"] == "refused"]

    def journaled(self) -> list[tuple[str, str]]:
        """The same as the journal has it."""
        lines = map(json.loads, (self.folder / "journal.jsonl").read_text().splitlines())
        found = [line["fields"] for line in lines if line["event"] == "link.refused"]
        return [(fields["site"], fields["reason"]) for fields in found]


@contextmanager
def listening(folder: Path, most: int = MOST) -> Iterator[Here]:
    """A coordinator with kits of its own in a folder."""
    here = Here(kits_in(folder), folder, most)
    try:
        yield here
    finally:
        here.close()


class Caller:
    """A site that calls by hand, rightly unless a test says otherwise.

    Attributes:
        name: whose certificate it shows.
        says: as whom its envelopes are written and signed.
    """

    def __init__(self, here: Here, name: str, says: str = "", **pair: bytes) -> None:
        self.here, self.name, self.says = here, name, says or name
        kit = here.site_kit(name)
        self.key = keys.load(here.site_kit(self.says).identity_key)
        own = {"private_key": kit.tls_key.read_bytes()}
        own |= {"certificate_chain": kit.tls_cert.read_bytes()}
        credentials = grpc.ssl_channel_credentials(kit.ca.read_bytes(), **own | pair)
        self.channel = grpc.secure_channel(f"127.0.0.1:{here.port}", credentials, OPTIONS)
        self.stub = link_pb2_grpc.LinkStub(self.channel)
        self.session, self._nonce = "", time.time_ns()

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def envelope(self, **change: Any) -> Envelope:
        """An envelope with the next nonce."""
        self._nonce += 1
        right = Envelope(
            run="",
            round=0,
            sender=self.says,
            recipient=COORDINATOR,
            direction=JOIN,
            kind="",
            message="",
            nonce=self._nonce,
            expires=time.time() + SKEW,
            body="",
            accord=self.here.desks.accord.digest,
            model="",
            shown="",
        )
        return replace(right, **change)

    def joining(self, about: dict[str, Any] | None = None, **change: Any) -> Any:
        """What a site sends to join."""
        words = {"time": time.time(), "version": "1", "build": "", "probe": False}
        hello = canonical_json(words | (about or {}))
        signed = seal(self.envelope(**{"body": sha256(hello)} | change), self.key)
        return link_pb2.Sealed(text=signed.text, signature=signed.signature, hello=hello)

    def join(self) -> Caller:
        welcome = self.stub.Join(self.joining(), timeout=5)
        self.session = json.loads(welcome.hello)["session"]
        self.work = self.stub.Work(link_pb2.Session(id=self.session), timeout=20)
        return self

    def asked(self) -> Envelope:
        """Wait for the next request; its envelope."""
        self.sealed = next(self.work)
        return read(self.sealed.text)

    def fetched(self, request: Envelope) -> Message:
        """Fetch all of a request."""
        ids = [one.id for one in self.sealed.objects]
        wanted = link_pb2.Wanted(session=self.session, message=request.message, ids=ids)
        held: dict[str, bytes] = {}
        for some in self.stub.Fetch(wanted, timeout=5):
            for name, data in unpacked(some):
                held[name] = held.get(name, b"") + data
        return put_together(request.body, held.__getitem__, MOST)[0]

    def reply(self, request: Envelope, parcel: Parcel, **change: Any) -> Envelope:
        """The envelope of a reply."""
        about = {name: getattr(request, name) for name in ("run", "round", "kind", "model")}
        about |= {"message": request.message, "direction": REPLY, "body": parcel.root}
        return self.envelope(**about | change)

    def offering(self, signed: Signed, parcel: Parcel, objects: list[Any] | None = None) -> Any:
        """What a site sends to offer a reply."""
        return link_pb2.Sealed(
            text=signed.text,
            signature=signed.signature,
            session=self.session,
            objects=listed(parcel) if objects is None else objects,
        )

    def offer(self, request: Envelope, parcel: Parcel, **change: Any) -> Any:
        signed = seal(self.reply(request, parcel, **change), self.key)
        return self.stub.Offer(self.offering(signed, parcel), timeout=5)

    def push(self, message: str, parcel: Parcel, names: Iterable[str]) -> Any:
        return self.stub.Push(self.in_pieces(message, parcel, names), timeout=5)

    def in_pieces(self, message: str, parcel: Parcel, names: Iterable[str]) -> Iterator[Any]:
        """What a site sends of a reply's objects."""
        about = {"session": self.session, "message": message}
        for name in names:
            for data in pieces(parcel.parts[name].load()):
                yield packed([(name, data)], **about)
                about = {}

    def send(self, request: Envelope, message: Message) -> None:
        """Answer a request as a site does."""
        parcel = take_apart(message)
        lacking = self.offer(request, parcel)
        if not lacking.known:
            assert self.push(request.message, parcel, (n.hex() for n in lacking.ids)).whole


@contextmanager
def refused(code: grpc.StatusCode = grpc.StatusCode.PERMISSION_DENIED) -> Iterator[Any]:
    """Hold a call to ending with this status."""
    with pytest.raises(grpc.RpcError) as fault:
        yield fault
    found = fault.value
    assert isinstance(found, grpc.Call)
    assert found.code() == code, found.details()


def on_record(here: Here, *expected: tuple[str, str]) -> None:
    """Hold the audit log, the journal and the round's incidents to these refusals, no other."""
    assert here.refusals() == list(expected)
    assert here.journaled() == list(expected)
    noted = here.grid.notes(0)["link"]
    assert {row["site"] for row in noted} == {site for site, _ in expected}
    assert all(row["what"] and row["count"] == 1 for row in noted)


def wait_for(what: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)
