"""A bad line: a TCP proxy between sites and coordinator that drops, delays and stalls connections.

It cannot repeat what it passes on: TLS would notice. What comes twice comes from the two ends: a
request is delivered again over the next connection, and so its reply is offered again.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from types import TracebackType

CHUNK = 16_384  # bytes that are read at once


class Proxy:
    """Passes connections on to a port of this machine until each one's bytes are used up.

    Attributes:
        port: that it listens on.
        seen: how many connections there were, and how often each thing was done to one.
    """

    def __init__(
        self, target: int, seed: int = 0, life: float = 0.0, delay: float = 0.0, stalls: float = 0.0
    ) -> None:
        """Describe the line.

        Args:
            target: port to pass on to.
            seed: of its moods.
            life: bytes after which a connection is dropped, in the mean; 0: never. One in ten is
                dropped within its first 3,000 bytes, which is in its handshake.
            delay: seconds that a chunk is late, at most.
            stalls: share of chunks that are half a second late.
        """
        self.target, self.life, self.delay, self.stalls = target, life, delay, stalls
        self.port, self.seen = 0, Counter[str]()
        self._chance = random.Random(seed)
        self._open: set[asyncio.StreamWriter] = set()
        self._down = self._refuses = False
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, _: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)

    def cut(self, down: bool) -> None:
        """Break every connection, and every new one, from now on; or let new ones pass again."""
        self._refuses = down
        if down:
            self._loop.call_soon_threadsafe(self._abort)

    def _abort(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()

    def silence(self, down: bool) -> None:
        """Pass nothing on from now on, without a word to either end, as behind a pulled cable.

        When it ends, what was sent meanwhile arrives, as TCP would send it again.
        """
        self._down = down

    async def _main(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._pass_on, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._over.wait()
        server.close()
        self._abort()

    def _life(self) -> float:
        if not self.life:
            return float("inf")
        if self._chance.random() < 0.1:
            return self._chance.uniform(0, 3_000)
        return self._chance.expovariate(1 / self.life)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.seen["connections"] += 1
        both = [writer]
        self._open.add(writer)
        try:
            if self._refuses:
                self.seen["refused"] += 1
                return
            try:
                other, to = await asyncio.open_connection("127.0.0.1", self.target)
            except OSError:
                self.seen["nobody there"] += 1
                return
            both.append(to)
            self._open.add(to)
            left = [self._life()]
            ways = [
                asyncio.create_task(self._carry(a, b, left))
                for a, b in ((reader, to), (other, writer))
            ]
            _, others = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in others:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        finally:
            for end in both:
                end.transport.abort()
                self._open.discard(end)

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: list[float]
    ) -> None:
        """Carry bytes one way; a part of the last chunk arrives before the line is dead."""
        while data := await reader.read(CHUNK):
            while self._down:
                self.seen["silent"] += 1
                await asyncio.sleep(0.05)
            if self._chance.random() < self.stalls:
                self.seen["stalled"] += 1
                await asyncio.sleep(0.5)
            if self.delay:
                await asyncio.sleep(self._chance.uniform(0, self.delay))
            left[0] -= len(data)
            writer.write(data if left[0] >= 0 else data[: int(left[0])])
            await writer.drain()
            if left[0] < 0:
                self.seen["dropped"] += 1
                return
