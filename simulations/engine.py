"""The in-process engine: the unmodified ServerApp and ClientApp in one process, without Ray."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

from flwr.app import Array, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import ServerApp

from fedaccord import accord as accords
from fedaccord.server.one_run import FIRST_NODE, RUN_ID, OneRun
from fedaccord.tasks import refuse_missing, task_of

Config = dict[str, bool | float | int | str]


def isolate(content: RecordDict) -> RecordDict:
    """Copy all of a message but the bytes of its arrays, which nobody can change.

    Flower's strategies put one RecordDict into all messages; a site that changed its copy would
    otherwise change everybody's.
    """
    out = content.copy()
    for name, record in content.items():
        own: Any = record.copy()  # shallow, without checking every key and value once more
        for key, value in record.items():
            if isinstance(value, Array):  # its words about its bytes can be changed in place
                own[key] = Array(value.dtype, tuple(value.shape), value.stype, value.data)
            elif isinstance(value, list):
                own[key] = list(value)
        out[name] = own
    return out


class InProcessGrid(OneRun):
    """A Flower Grid whose nodes are calls of the ClientApp in this process, one after another.

    A site works when its reply is pulled, and nothing of a message or reply is held here after
    that. So who pulls one reply at a time, and is done with it before the next, needs memory for
    one reply, however many sites there are.

    | case | what happens |
    |---|---|
    | the ClientApp raises | an error reply; the node's state is what it was before the message |
    | a node that is not there | its message is never answered |
    | a message that nobody pulls | the site never works on it; it is dropped after its time to live |
    | a node that keeps no state | costs nothing between messages |

    It relies on one more name of Flower's that is not documented (`_message_id`; see OneRun), and a
    test compares it with Flower's own runtime.
    """  # noqa: E501  (a table row cannot be broken)

    def __init__(
        self,
        client_app: ClientApp,
        nodes: int,
        run_config: Config,
        on_reply: Callable[[Message], None] = lambda _: None,
    ) -> None:
        """Make the nodes.

        Args:
            client_app: the ClientApp of every node.
            nodes: how many there are; node i has `partition-id` i.
            run_config: what `--run-config` would hold.
            on_reply: called with every reply, for a progress display.
        """
        super().__init__()
        self._app, self._on_reply = client_app, on_reply
        self._waiting: dict[str, Message] = {}
        self._nodes = range(FIRST_NODE, FIRST_NODE + nodes)
        self._run_config = dict(run_config)
        self._states: dict[int, RecordDict] = {}  # of the nodes that keep something

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes, in order."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages; they are worked on when their replies are pulled."""
        ids, now = [], time.time()
        for mark, message in list(self._waiting.items()):
            if message.metadata.created_at + message.metadata.ttl < now:
                del self._waiting[mark]
        for message in messages:
            mark = str(uuid4())
            message.metadata.__dict__["_message_id"] = mark
            ids.append(mark)
            if message.metadata.dst_node_id in self._nodes:
                self._waiting[mark] = message  # to an unknown node: never answered, as in Flower
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Work on messages and return their replies."""
        marks = [mark for mark in message_ids if mark in self._waiting]
        return [self._work(self._waiting.pop(mark)) for mark in marks]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Work on messages in order until all are answered or the time is up."""
        end = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        for mark in list(self.push_messages(messages)):
            if end is not None and time.monotonic() >= end:
                self._waiting.pop(mark, None)
                continue
            replies.extend(self.pull_messages([mark]))
        return replies

    def _work(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        context = self._context(node)
        asked = Message(
            isolate(message.content),
            node,
            message.metadata.message_type,
            ttl=message.metadata.ttl,
            group_id=message.metadata.group_id or None,
        )
        asked.metadata.__dict__["_message_id"] = message.metadata.message_id
        try:
            reply = self._app(message=asked, context=context)
            if reply.has_content():
                reply = Message(isolate(reply.content), reply_to=asked)
            if context.state or node in self._states:
                self._states[node] = context.state
        except Exception as fault:  # Flower's engines turn a ClientApp's exception into a reply
            text = f"{type(fault)}:<'{fault}'>\n{traceback.format_exc()}"
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, text), reply_to=asked)
        reply.metadata.__dict__["_message_id"] = str(uuid4())
        self._on_reply(reply)
        return reply

    def _context(self, node: int) -> Context:
        """Make a node's Context, with a copy of its state, which a fault leaves as it was."""
        return Context(
            run_id=RUN_ID,
            node_id=node,
            node_config={"partition-id": node - FIRST_NODE, "num-partitions": len(self._nodes)},
            state=isolate(self._states.get(node, RecordDict())),
            run_config=dict(self._run_config),
        )


def run_in_process(
    server_app: ServerApp,
    client_app: ClientApp,
    nodes: int,
    run_config: Config,
    on_reply: Callable[[Message], None] = lambda _: None,
) -> None:
    """Run a ServerApp and a ClientApp to their end in this process.

    Raises:
        Exception: whatever the ServerApp raises.
    """
    grid = InProcessGrid(client_app, nodes, run_config, on_reply)
    context = Context(
        run_id=RUN_ID,
        node_id=SUPERLINK_NODE_ID,
        node_config={},
        state=RecordDict(),
        run_config=dict(run_config),
    )
    server_app(grid=grid, context=context)


def simulate(
    accord: Path | str,
    run: Path,
    sites: Path,
    nodes: int,
    on_reply: Callable[[Message], None] = lambda _: None,
    resume: bool = False,
) -> None:
    """Run FedAccord's own apps on this machine.

    Args:
        accord: a TOML file, or the name of a bundled accord.
        run: the folder that the run leaves.
        sites: where the simulated sites keep their ledgers and policies.
        nodes: how many sites the accord has.
        on_reply: called with every reply.
        resume: whether `run` is a run that was cut short, to be gone on with.

    Raises:
        FedAccordError: as the ServerApp; or the task's data was not fetched.
    """
    from fedaccord.client.app import app as client_app
    from fedaccord.server.app import app as server_app

    agreed = accords.load(accord)
    refuse_missing(task_of(agreed, accords.find(accord).parent), agreed.roster)
    config: Config = {"accord": str(accord), "run": str(run), "sites": str(sites.resolve())}
    config["resume"] = resume
    run_in_process(server_app, client_app, nodes, config, on_reply)
