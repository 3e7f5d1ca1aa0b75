"""The site's own diary: what depends on private records is written here, and nowhere else.

Log lines leave a machine more easily than records do: Flower's simulation forwards what a worker
prints. The logger `fedaccord.private` therefore hands nothing on, prints nothing, and writes only
into the file of the site whose message is being answered.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path

NAME = "private.log"
_folder: ContextVar[Path | None] = ContextVar("folder of the site's diary", default=None)


class _Diary(logging.Handler):
    """Append each line to the current site's file; without a site, or on a fault, write nothing."""

    def emit(self, record: logging.LogRecord) -> None:
        folder = _folder.get()
        if folder is None:
            return
        try:
            line = f"{datetime.now(UTC).isoformat(timespec='seconds')} {self.format(record)}\n"
            how = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
            file = os.open(folder / NAME, how, 0o600)
            try:
                os.write(file, line.encode("utf-8", "backslashreplace"))
            finally:
                os.close(file)
        except Exception:  # a full disk must not show outside that a record raised
            return


log = logging.getLogger("fedaccord.private")
log.propagate = False
if not log.handlers:
    log.addHandler(_Diary())


@contextmanager
def privacy_diary(folder: Path) -> Iterator[None]:
    """Let the lines of `fedaccord.private` go into `folder/private.log` (mode 0600) meanwhile.

    Outside such a block the lines are dropped. Blocks of several sites may run in threads at the
    same time; each writes into its own file. It never raises, and a line that cannot be written is
    dropped, since a fault that depends on records must not show.

    Args:
        folder: the site's own folder, which exists.
    """
    mark = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(mark)
