"""A carrier that loses, repeats, delays and reorders what sites send, under a clock of its own."""

from collections.abc import Callable
from dataclasses import dataclass, field

from flwr.app import Context, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID

from fedaccord.client.app import app as client_app
from fedaccord.server.app import app as server_app
from fedaccord.simulations import engine


@dataclass
class FakeClock:
    """Time passes only where somebody waits."""

    seconds: float = 0.0

    def now(self):
        return self.seconds

    def sleep(self, seconds):
        assert seconds > 0, "waiting for nothing, for ever"
        self.seconds += seconds


@dataclass(frozen=True)
class Asked:
    """A message on its way: which node, what kind, which round (0: none), how many before it."""

    node: int
    kind: str
    number: int
    count: int


# For a message: the seconds after which each copy of its reply arrives; None: nobody is there.
Fate = Callable[[Asked], list[float] | None]


@dataclass
class Post:
    """A message at the carrier: worked on once, its copies delivered in time."""

    asked: Asked
    due: list = field(default_factory=list)
    done: bool = False
    reply: object = None


class Rough(engine.InProcessGrid):
    """An in-process grid whose replies meet the fates that a test gives them."""

    def __init__(self, nodes, config, fate):
        super().__init__(client_app, nodes, config)
        self.fate, self.clock, self.log = fate, FakeClock(), []
        self._posts, self._count = {}, 0

    def push_messages(self, messages):
        sent = list(messages)
        marks = list(super().push_messages(sent))
        for mark, message in zip(marks, sent, strict=True):
            config = message.content.config_records["config"]
            number = int(config.get("server-round", 0))
            kind = message.metadata.message_type
            self._posts[mark] = Post(Asked(message.metadata.dst_node_id, kind, number, self._count))
            self._count += 1
        return marks

    def pull_messages(self, message_ids):
        out = []
        for mark in message_ids:
            post = self._posts.get(mark)
            if post is None:
                continue
            if not post.done:
                post.done = True
                delays = self.fate(post.asked)
                if delays is not None:
                    (reply,) = super().pull_messages([mark]) or (None,)
                    now = self.clock.now()
                    post.due = sorted((now + d, n) for n, d in enumerate(delays) if reply)
                    post.reply = reply
                self.log.append(post.asked)
            ready = [entry for entry in post.due if entry[0] <= self.clock.now()]
            post.due = [entry for entry in post.due if entry not in ready]
            out += [post.reply] * len(ready)
        return out


def run_over(carrier, config):
    """Run FedAccord's ServerApp over a carrier."""
    context = Context(
        run_id=engine.RUN_ID,
        node_id=SUPERLINK_NODE_ID,
        node_config={},
        state=RecordDict(),
        run_config=dict(config),
    )
    server_app(grid=carrier, context=context)
