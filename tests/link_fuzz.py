"""Fuzzed messages against link, envelope and gates, and what they may make of each.

Half of the messages are changed before a valid site (or the coordinator) signs them, half after.
Whatever is let in is held to what is written here of an honest reply, read with Flower's and
NumPy's own code from the very bytes that were sent.
"""

from __future__ import annotations

import io
import random
import time
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import link_mutants as mutants
import numpy as np
from deployed import MOST, RUN, SITES, Here
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedaccord import keys, link_pb2
from fedaccord.client.dial import Session
from fedaccord.client.link import Attendant
from fedaccord.envelope import COORDINATOR, REPLY, Envelope, Refused, Signed, read, seal, words
from fedaccord.evidence import canonical_json, digest
from fedaccord.objects import take_apart
from fedaccord.server import gates
from fedaccord.server.admission import reservation
from fedaccord.server.admission import words as words_of
from fedaccord.server.heads import heads_over
from fedaccord.server.one_run import FIRST_NODE
from fedaccord.strategies.updates import to_arrays

BASE = {"w": np.zeros((4, 3), np.float32), "b": np.zeros(3, np.float32)}
BOUND = 10.0
SHAPES = {"sex": (2, 2, 2)}
BEFORE = ("content", "content", "objects", "objects", "objects", "bomb", "envelope")
AFTER = ("text", "signature", "listing", "pieces", "pieces", "other")


def honest(chance: random.Random, kind: str, site: str, number: int) -> RecordDict:
    """What a site that means well replies."""
    said = {"site": site, "run": RUN, "round": number, "head": "{}"}
    content = RecordDict({"config": ConfigRecord(said)})
    if kind == "train":
        moved = {k: np.float32(chance.gauss(0, 0.1)) + v for k, v in BASE.items()}
        content["arrays"] = to_arrays({k: np.asarray(v, np.float32) for k, v in moved.items()})
        content["metrics"] = MetricRecord({"train_loss": chance.random()})
    elif kind == "evaluate":
        cells = [chance.randrange(50) for _ in range(8)]
        content["model"] = MetricRecord({"sex": cells})
    else:
        content["config"]["entry"] = canonical_json({"kind": "RESERVE", "site": site})
    return content


def apart(content: RecordDict, kind: str) -> tuple[mutants.Objects, str]:
    """The objects of a message, and the name of its root."""
    message = Message(content, FIRST_NODE, kind)
    parcel = take_apart(message)
    return {name: part.load() for name, part in parcel.parts.items()}, parcel.root


def inflated(objects: mutants.Objects, root: str) -> RecordDict | None:
    """What Flower's own code makes of objects."""
    message = inflate_object_from_contents(root, dict(objects), keep_object_contents=True)
    assert isinstance(message, Message)
    return message.content if message.has_content() else None


def permitted(kind: str, said: RecordDict, site: str, number: int, change: Any) -> bool:
    """Whether a reply is one that an honest site might send, and gives what was read of it."""
    config = dict(said["config"].items())
    right = (config["site"], config["run"], config["round"]) == (site, RUN, number)
    right &= type(config["round"]) is int and not config.get("refused")
    if kind == "evaluate":
        (record,) = [r for r in said.values() if isinstance(r, MetricRecord)]
        cells = record["sex"]
        right &= all(type(cell) is int and cell >= 0 for cell in cells) and len(cells) == 8
        return right and cells == np.ravel(change["model"]["sex"]).tolist()
    (arrays,) = [r for r in said.values() if isinstance(r, ArrayRecord)]
    read = {k: np.load(io.BytesIO(a.data), allow_pickle=False) for k, a in arrays.items()}
    right &= read.keys() == BASE.keys() == change.keys()
    for name, value in read.items():
        right &= value.dtype == np.float32 and value.shape == BASE[name].shape
        right &= bool(np.isfinite(value).all()) and bool(np.array_equal(value, change[name]))
    length = np.sqrt(sum(np.sum(v.astype("f8") ** 2) for v in read.values()))
    return right and bool(length <= BOUND)


def changed(chance: random.Random, text: str) -> str:
    """Change an envelope, but not to a nonce that lets its signer say nothing more in this run."""
    found = mutants.envelope(chance, text)
    try:
        ahead = read(found).nonce - read(text).nonce
    except Refused:
        return found
    return found if ahead <= 1 else text[:-1]


class Fuzz:
    """A coordinator in this process that takes in fuzzed replies.

    Attributes:
        seen: how many messages were changed in each way, and what became of them.
        wrong: what should not have happened.
    """

    def __init__(self, here: Here, seed: int) -> None:
        self.here, self.chance = here, random.Random(seed)
        self.seen, self.wrong = Counter[str](), list[str]()
        self.keys = {site: keys.load(here.site_kit(site).identity_key) for site in SITES}
        self.heads = heads_over(here.grid, here.desks.accord)
        self._before: Signed | None = None
        self._nonce = time.time_ns()

    def ask(self, site: str, kind: str, number: int) -> tuple[str, Envelope]:
        """Lay down a request; its id and envelope."""
        said = {"run": RUN, "accord": self.here.desks.accord.digest, "server-round": number}
        content = RecordDict({"config": ConfigRecord(said)})
        node = FIRST_NODE + SITES.index(site)
        (mark,) = self.here.grid.push_messages([Message(content, node, kind)])
        return mark, self.here.desks.letter(site, mark).request

    def one(self) -> None:
        """Send one message, changed in one way or as it should be."""
        chance, way = self.chance, "nothing"
        site, number = chance.choice(SITES), chance.randrange(1, 9)
        kind = chance.choices(["train", "evaluate", "query.reserve"], [7, 2, 1])[0]
        mark, request = self.ask(site, kind, number)
        if (drawn := chance.random()) > 0.04:
            way = chance.choice(BEFORE if drawn < 0.52 else AFTER)
            way = "text" if way == "other" and self._before is None else way
        self.seen[f"changed: {way}"] += 1
        content = honest(chance, kind, site, number)
        try:
            if way == "content":
                content = mutants.content(chance, content)
            objects, root = apart(content, kind)
        except (ValueError, TypeError, OverflowError, AttributeError, KeyError):
            self.seen["not made: Flower's own types refuse it"] += 1
            return
        if way in ("objects", "bomb"):
            for _ in range(chance.choice([1, 1, 2])):
                objects = self._changed(way if kind == "train" else "objects", objects)
            root = list(objects)[-1]
        signed = self._signed(site, request, root, way)
        listed = [(name, len(data)) for name, data in objects.items()]
        stream = [(name, data) for name, data in objects.items()]
        if way == "listing":
            listed = mutants.listing(chance, listed)
        elif way == "pieces":
            stream = mutants.pieces(chance, stream)
        elif way == "other" and self._before:
            signed = self._before
        try:
            outcome = self._deliver(site, kind, mark, number, signed, listed, stream, objects, root)
        except Exception:
            outcome = "uncaught"
            self.wrong.append(f"{way} of {kind}: {traceback.format_exc()[-1500:]}")
        self.seen[outcome] += 1
        if way == "nothing" and kind != "query.reserve" and outcome != "accepted":
            self.wrong.append(f"an honest {kind} was not let in: {outcome}")
        after = way in ("text", "signature", "other")
        if outcome == "accepted" and (after or not self._same(signed, site, request, root)):
            self.wrong.append(f"let in though changed: {way} of {kind}: {signed}")
        self._before = signed

    def _same(self, signed: Signed, site: str, request: Envelope, root: str) -> bool:
        """Whether an envelope says what it should, but for its nonce and expiry."""
        said, free = read(signed.text), {"nonce": 0, "expires": 0.0}
        right = {"sender": site, "recipient": COORDINATOR, "direction": REPLY}
        wanted = replace(request, body=root, shown="", **right, **free)
        return replace(said, **free) == wanted

    def _changed(self, way: str, objects: mutants.Objects) -> mutants.Objects:
        try:
            return getattr(mutants, way)(self.chance, objects)
        except (ValueError, StopIteration, RecursionError):  # it was changed beyond that before
            return objects

    def _signed(self, site: str, request: Envelope, root: str, way: str) -> Signed:
        self._nonce += 1
        right = replace(
            request,
            sender=site,
            recipient=COORDINATOR,
            direction=REPLY,
            nonce=self._nonce,
            expires=time.time() + 60,
            body=root,
            shown="",
        )
        flip = way == "signature" and self.chance.random() < 0.5
        others = [name for name in SITES if name != site]
        foreign = way == "signature" and not flip
        key = self.keys[self.chance.choice(others) if foreign else site]
        text = right.text()
        if way == "envelope":
            text = changed(self.chance, text)
        signature = seal(right, key).signature
        if way == "envelope":
            signature = key.sign(words(text))
        elif way == "text":
            text = mutants.flipped(self.chance, text)
        elif flip:
            signature = mutants.flipped(self.chance, signature)
        return Signed(text, signature)

    def _deliver(
        self,
        site: str,
        kind: str,
        mark: str,
        number: int,
        signed: Signed,
        listed: list[tuple[str, int]],
        stream: list[tuple[str, bytes]],
        objects: mutants.Objects,
        root: str,
    ) -> str:
        """Offer, push and pull as the service and the coordinator do; what became of it."""
        desks = self.here.desks
        try:
            reply = desks.offer(site, signed, listed)
            if reply is None:
                return "known"
            if not desks.arrived(site, mark):
                desks.store.take(desks.expected(site, mark), iter(stream), "fuzz")
                if not desks.arrived(site, mark):
                    return "not whole"
        except Refused as refusal:
            if self.chance.random() < 0.05:
                desks.note(site, str(refusal), refusal.reason)
            return "refused by the link"
        (message,) = self.here.pulled(mark)
        sites = {FIRST_NODE + SITES.index(site): site}
        if kind == "train":
            (found,) = gates.gate([message], sites, RUN, number, BASE, BOUND, "float32", "")
            verdict = found[0]
            reason, change = verdict.reason, verdict.change
        elif kind == "evaluate":
            reason, change = gates.read_counts(message, site, RUN, number, SHAPES, ["model"])
        else:
            reservation(words_of(message), self.here.desks.accord, site, RUN)
            reason, change = "a reservation that is none", None
        self.heads.hear(site, words_of(message))
        if reason:
            return "dropped by the gates"
        said = inflated(objects, root)
        if said is None or not permitted(kind, said, site, number, change):
            self.wrong.append(f"let in: {kind} {number} {said}"[:1500])
        return "accepted"


class FuzzedSite:
    """A site in this process that is asked fuzzed requests, by the key of its own coordinator."""

    def __init__(self, here: Here, name: str, seed: int) -> None:
        self.chance, self.here, self.name = random.Random(seed), here, name
        self.seen, self.wrong, self.calls = Counter[str](), list[str](), 0
        app = ClientApp()

        @app.train()
        def train(message: Message, context: object) -> Message:
            self.calls += 1
            return Message(RecordDict(), reply_to=message)

        kit = here.site_kit(name).model_copy(update={"max_request_mb": MOST // 10**6})
        self.site = Attendant(kit, app, lambda words: None)
        self._nonce = time.time_ns()
        self.site.vigil.begin(RUN, {})

    def one(self) -> None:
        """Ask once; nothing but a refusal, or an answer to what was asked rightly."""
        chance = self.chance
        way = chance.choice(["nothing", *BEFORE, "text", "signature", "listing", "pieces"])
        accord = self.here.desks.accord.digest
        number = int(self.site.vigil.mine.round) + chance.randrange(2)
        said = {"run": RUN, "accord": accord, "server-round": number}
        content = RecordDict({"arrays": to_arrays(BASE), "config": ConfigRecord(said)})
        try:
            if way == "content":
                content = mutants.content(chance, content)
            message = Message(content, FIRST_NODE, "train")
            parcel = take_apart(message)
        except (ValueError, TypeError, OverflowError, AttributeError, KeyError):
            return
        objects, root = {name: part.load() for name, part in parcel.parts.items()}, parcel.root
        if way in ("objects", "bomb"):
            try:
                objects = getattr(mutants, way)(chance, objects)
            except (ValueError, StopIteration, RecursionError):
                return
            root = list(objects)[-1]
        self._nonce += 1
        signed = self._signed(root, parcel.model, number, way)
        listed = [(name, len(data)) for name, data in objects.items()]
        listed = mutants.listing(chance, listed) if way == "listing" else listed
        stream = list(objects.items())
        stream = mutants.pieces(chance, stream) if way == "pieces" else stream
        self.seen[f"asked: {way}"] += 1
        self._ask(signed, listed, stream, way)

    def _signed(self, root: str, model: str, number: int, way: str) -> Signed:
        right = Envelope(
            run=RUN,
            round=number,
            sender=COORDINATOR,
            recipient=self.name,
            direction="request",
            kind="train",
            message=f"{self._nonce}",
            nonce=self._nonce,
            expires=time.time() + 60,
            body=root,
            accord=self.here.desks.accord.digest,
            model=model,
            shown=digest([]),
        )
        text = right.text()
        text = changed(self.chance, text) if way == "envelope" else text
        signature = self.here.key.sign(words(text))
        text = mutants.flipped(self.chance, text) if way == "text" else text
        flip = way == "signature"
        return Signed(text, mutants.flipped(self.chance, signature) if flip else signature)

    def _ask(
        self, signed: Signed, listed: list[tuple[str, int]], stream: list[Any], way: str
    ) -> None:
        names = [(bytes.fromhex(name), size) for name, size in listed if size < 2**64]
        sealed = link_pb2.Sealed(
            text=signed.text.encode(errors="replace").decode(),
            signature=signed.signature.encode(errors="replace").decode(),
            objects=[link_pb2.Object(id=name, size=size) for name, size in names],
        )
        coordinator = SimpleNamespace(  # what gRPC makes of a coordinator
            Fetch=lambda wanted: [
                SimpleNamespace(pieces=[SimpleNamespace(id=_id(n), data=d)]) for n, d in stream
            ],
            Offer=lambda offer, timeout: link_pb2.Lacking(known=True),
        )
        about = Session(coordinator, "", RUN, self.here.key.public, {}, 5.0, MOST, 0.0, "")
        before = self.calls
        try:
            self.site._answer(about, sealed)
            outcome = "answered" if self.calls > before else "answered, nothing was run"
        except Refused:
            outcome = "refused by the site"
        except Exception:
            outcome = "uncaught"
            self.wrong.append(f"{way} at the site: {traceback.format_exc()[-1500:]}")
        self.seen[outcome] += 1
        if self.calls > before and way in ("text", "signature"):
            self.wrong.append(f"the site answered though changed: {way}: {signed}")


def _id(name: str) -> Any:
    return SimpleNamespace(hex=lambda: name)


def memory(which: str) -> int:
    """Bytes of this process by /proc: VmRSS now, VmHWM at most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(which))) * 1024


def forget_peak() -> None:
    """Let VmHWM begin again."""
    Path("/proc/self/clear_refs").write_text("5")
