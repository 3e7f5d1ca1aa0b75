"""Mail: messages out to sites, replies back as they come, until a deadline; late ones are known."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

SHORTEST, LONGEST = 0.02, 1.0  # seconds between two looks for replies, more while none come
PATIENCE = 1_000  # unanswered messages of the past that are still looked for


class Clock(Protocol):
    """What time it is; a test has one of its own, so that no deadline is waited for."""

    def now(self) -> float:
        """Seconds since some moment."""

    def sleep(self, seconds: float) -> None:
        """Wait."""


class RealClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        """Seconds since some moment."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)


class Mail:
    """A grid as the coordinator uses it: no wait is longer than a deadline, nothing is forgotten.

    | reply | where it comes out |
    |---|---|
    | before the deadline | `exchange`, in order of arrival, one in memory at a time |
    | after it | `late`, in a later round |
    | a second one to the same message | as the carrier has it; the gates drop it |
    | never | nowhere; the site counts as silent |
    """

    def __init__(self, grid: Grid) -> None:
        """Take a grid; one that has a `clock` of its own says what time it is."""
        self.grid = grid
        self.clock: Clock = getattr(grid, "clock", None) or RealClock()
        self._missing: dict[str, tuple[int, str]] = {}  # message -> node, what it was about

    def about(self) -> dict[str, Any]:
        """Return what the carrier has to say of itself in the run's first record."""
        carrier: Any = self.grid
        return dict(carrier.about()) if hasattr(carrier, "about") else {}

    def notes(self, number: int) -> dict[str, Any]:
        """Return what the carrier has to say of a round in its record."""
        carrier: Any = self.grid
        return dict(carrier.notes(number)) if hasattr(carrier, "notes") else {}

    def exchange(
        self, messages: Iterable[Message], timeout: float, about: str
    ) -> Iterator[Message]:
        """Send messages and give back their replies as they arrive.

        Args:
            messages: one a node.
            timeout: seconds; what is not there then is late.
            about: what a late reply is said to answer, such as "round 3".
        """
        end = self.clock.now() + timeout
        sent = list(messages)
        nodes = [message.metadata.dst_node_id for message in sent]
        open_ = dict(zip(self.grid.push_messages(sent), nodes, strict=True))
        del sent
        pause = SHORTEST
        while open_ and self.clock.now() < end:
            arrived = False
            for mark in list(open_):
                if self.clock.now() >= end:
                    break
                for reply in self.grid.pull_messages([mark]):
                    arrived = True
                    open_.pop(mark, None)
                    yield reply
            if open_ and not arrived:
                self.clock.sleep(min(pause, max(0.0, end - self.clock.now())))
            pause = SHORTEST if arrived else min(LONGEST, 2 * pause)
        self.remember(open_, about)

    def remember(self, marks: dict[str, int], about: str) -> None:
        """Keep looking for the replies of messages that were sent, without waiting for them.

        Args:
            marks: ids of messages, and the node that each went to.
            about: what they ask.
        """
        self._missing |= {mark: (node, about) for mark, node in marks.items()}
        while len(self._missing) > PATIENCE:  # the oldest first
            self._missing.pop(next(iter(self._missing)))

    def late(self) -> list[tuple[int, str, Message]]:
        """Give back what has arrived of earlier messages: node, what it answers, the reply."""
        found = []
        for mark, (node, about) in list(self._missing.items()):
            for reply in self.grid.pull_messages([mark]):
                self._missing.pop(mark, None)
                found.append((node, about, reply))
        return found

    def forget(self, node: int, about: str, most: int) -> None:
        """Stop looking for the oldest answers of a node, if more than some are missing."""
        found = [mark for mark, what in self._missing.items() if what == (node, about)]
        for mark in found[: max(0, len(found) - most)]:
            del self._missing[mark]

    def ask(
        self, nodes: Iterable[int], kind: str, content: RecordDict, timeout: float
    ) -> dict[int, Message]:
        """Send the same content to some nodes and collect the first reply of each, by node."""
        messages = [Message(content, node, kind) for node in nodes]
        found: dict[int, Message] = {}
        for reply in self.exchange(messages, timeout, kind):
            found.setdefault(reply.metadata.src_node_id, reply)
        return found

    def whisper(self, nodes: Iterable[int], kind: str, content: RecordDict, about: str) -> None:
        """Send the same content to some nodes without waiting; `late` has what they answer."""
        messages = [Message(content, node, kind) for node in nodes]
        asked = [message.metadata.dst_node_id for message in messages]
        self.remember(dict(zip(self.grid.push_messages(messages), asked, strict=True)), about)
