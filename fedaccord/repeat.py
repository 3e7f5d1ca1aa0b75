"""Something that is done over and over beside the main thread, and once more at the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeated(seconds: float, what: Callable[[], None]) -> Iterator[None]:
    """Do something every so many seconds, in a thread of its own, for as long as a block lasts."""
    over = threading.Event()

    def loop() -> None:
        while not over.wait(seconds):
            what()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
