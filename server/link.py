"""LinkGrid: a Flower Grid whose nodes are hospitals that dial in over gRPC."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any
from uuid import uuid4

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo

from fedaccord.envelope import COORDINATOR, REQUEST, Envelope, Refused
from fedaccord.evidence import digest
from fedaccord.objects import Parcel, Part, put_together, take_apart
from fedaccord.server.desk import Letter, Reply
from fedaccord.server.desks import Desks
from fedaccord.server.gates import told
from fedaccord.server.one_run import FIRST_NODE, OneRun
from fedaccord.strategies.updates import config_of


class LinkClock:
    """The machine's clock, whose sleep ends as soon as something arrives."""

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed

    def now(self) -> float:
        """Seconds since some moment."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait until a reply arrives, at most so long."""
        with self._changed:
            self._changed.wait(seconds)


class LinkGrid(OneRun):
    """A Flower Grid over the link: messages in, messages out; each is signed by who sent it.

    | case | what happens |
    |---|---|
    | a site is not there | its requests wait for it until their deadline |
    | a site comes back | requests without a reply are delivered again, newly sealed |
    | a reply to what was never asked, or asked of another site | refused, and on record |
    | a reply that comes twice | the first counts; the site is told that it is known |
    | a signed reply that is no message | an error reply, as from a site that failed |
    | a reply after the deadline | let in; `Mail.late` finds it |
    """

    def __init__(self, desks: Desks) -> None:
        """Take the desks; node ids are the sites' places in the accord's roster."""
        super().__init__()
        self.desks, self.clock = desks, LinkClock(desks.changed)
        roster = desks.accord.roster
        self._sites = {FIRST_NODE + place: site for place, site in enumerate(roster)}
        self._nodes = {site: node for node, site in self._sites.items()}

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes of the sites that are there, in order of site."""
        return [self._nodes[site] for site in self.desks.present()]

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return what Flower wants to know of the sites that are there."""
        return [NodeInfo(node_id=node, name=self._sites[node]) for node in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages; each is delivered as soon as its site is there."""
        marks, known = [], dict[int, dict[str, Part]]()
        held = list(messages)  # contents are told apart by id(), so they must stay
        for message in held:
            mark = uuid4().hex
            marks.append(mark)
            site = self._sites.get(message.metadata.dst_node_id)
            if site is not None:  # else it is never answered, as in Flower
                message.metadata.__dict__["_message_id"] = mark
                self.desks.put(self._letter(site, message, take_apart(message, known)))
        return marks

    def _letter(self, site: str, message: Message, parcel: Parcel) -> Letter:
        config, kind = config_of(message.content), message.metadata.message_type
        number = int(config.get("server-round", 0))
        shown = self.desks.shown(number) if kind == "train" else []
        request = Envelope(
            run=self.desks.run,
            round=number,
            sender=COORDINATOR,
            recipient=site,
            direction=REQUEST,
            kind=kind,
            message=message.metadata.message_id,
            nonce=0,  # this and the next are filled in at each delivery
            expires=0.0,
            body=parcel.root,
            accord=self.desks.accord.digest,
            model=parcel.model,
            shown=digest([signed.to_json() for signed in shown]),
        )
        asked = Message(RecordDict(), message.metadata.dst_node_id, kind)
        asked.metadata.__dict__.update(message.metadata.__dict__)
        end = time.monotonic() + self.desks.accord.rounds.timeout
        return Letter(site, request, parcel, shown, end, asked)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to messages that have arrived, and forget them."""
        found = [self.desks.take(mark) for mark in message_ids]
        return [self._message(letter, reply) for letter, reply in filter(None, found)]

    def _message(self, letter: Letter, reply: Reply) -> Message:
        """Put a reply together; what is none becomes an error, as from a site that failed."""
        asked, site, desks = letter.asked, letter.site, self.desks

        def load(name: str) -> bytes:
            if name not in reply.sizes:  # it may be there, as part of another site's reply
                raise Refused("body", "The reply has an object inside that it does not list.")
            return desks.store.read(name)

        try:
            said, _ = put_together(reply.envelope.body, load, desks.most)
            if said.has_error():
                return Message(Error(said.error.code, told(said.error.reason)), reply_to=asked)
            if str(config_of(said.content).get("site", site)) != site:
                raise Refused("identity", f"Site {site} says that it is another site.")
            return Message(said.content, reply_to=asked)
        except Refused as refusal:
            desks.note(site, str(refusal), refusal.reason)
            words = f"the link refused it: {refusal}"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, words), reply_to=asked)
        finally:
            desks.done(reply)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and wait for their replies until all are there or the time is up."""
        end = None if timeout is None else time.monotonic() + timeout
        open_, replies = list(self.push_messages(messages)), list[Message]()
        while open_ and (end is None or time.monotonic() < end):
            for mark in list(open_):
                for reply in self.pull_messages([mark]):
                    open_.remove(mark)
                    replies.append(reply)
            if open_:
                left = 1.0 if end is None else end - time.monotonic()
                self.clock.sleep(min(1.0, max(0.0, left)))
        return replies

    def about(self) -> dict[str, Any]:
        """Return what the run's first record says of the link."""
        handovers = self.desks.members.handovers()
        return {"link": {"coordinator_key": self.desks.key.public, "handovers": handovers}}

    def notes(self, number: int) -> dict[str, Any]:
        """Return what a round's record says of the link."""
        handovers = self.desks.members.handovers()  # a key may change while a run goes on
        said = self.desks.notes(number) | ({"handovers": handovers} if handovers else {})
        return said | {"audit_log": self.desks.watch.audit.end._asdict()}
