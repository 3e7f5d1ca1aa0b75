"""The journal: log lines as JSON, one a line, in a file of bounded size that holds no record.

A line has `time` (UTC), `level`, `component`, `event` and `fields`. Lines are made by `event`, or
by any call of the three loggers. What depends on private records goes into a site's own diary
(`fedaccord.client.diary`) and never here.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TextIO

from fedaccord.errors import AccordError, BudgetError, LedgerError, PolicyError

LOGGERS = ("fedaccord.link", "fedaccord.site", "fedaccord.coordinator")
MOST_BYTES = 10_000_000  # of one file
KEPT = 5  # older files: journal.1 is the youngest of them
MOST_TEXT = 1000  # characters of one value
MOST_ITEMS = 50  # of one list or table
MOST_DEPTH = 4
# What these say depends on accord, policy, ledger and disk alone.
SAYABLE = (AccordError, BudgetError, LedgerError, PolicyError)


def plain(value: Any, depth: int = 0) -> Any:
    """Reduce a value to bounded JSON that shows nothing of an object that it does not know.

    | value | what is written |
    |---|---|
    | text, number, true, false, none | itself; text after 1,000 characters is cut |
    | whole number of more than 64 bits | "int" |
    | NaN, infinity | "nan", "inf", "-inf" |
    | path | its text |
    | error about an accord, a policy, a ledger or a budget | its sentence |
    | any other exception | its type, and where to look |
    | list, tuple, table | its first 50 values, to a depth of 4 |
    | anything else (an array, bytes, a record) | its type |
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str | Path):
        text = str(value).encode("utf-8", "backslashreplace").decode()  # no half of a character
        return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]} ..."
    if isinstance(value, BaseException):
        kind = type(value).__name__
        return plain(str(value)) if isinstance(value, SAYABLE) else f"{kind}; see the diary"
    if isinstance(value, Integral):
        return int(value) if int(value).bit_length() <= 64 else "int"
    if isinstance(value, Real):
        number = float(value)
        return number if math.isfinite(number) else str(number)
    if depth < MOST_DEPTH and isinstance(value, Mapping):
        some = list(value.items())[:MOST_ITEMS]
        return {str(plain(key)): plain(item, depth + 1) for key, item in some}
    if depth < MOST_DEPTH and isinstance(value, Sequence) and not isinstance(value, bytes):
        return [plain(item, depth + 1) for item in value[:MOST_ITEMS]]
    return type(value).__name__


def event(logger: logging.Logger, name: str, level: int = logging.INFO, **fields: Any) -> None:
    """Log an event with its fields.

    A handler that writes to a terminal shows it as `name key=value ...`.

    Args:
        logger: one of `LOGGERS`.
        name: what happened, as dotted words: "link.joined".
        level: of the logging module.
        fields: figures and names of the system; each goes through `plain`.
    """
    if not logger.isEnabledFor(level):
        return
    said = {key: plain(value) for key, value in fields.items()}
    words = " ".join([name, *(f"{key}={json.dumps(value)}" for key, value in said.items())])
    logger.log(level, "%s", words, extra={"journal_event": name, "journal_fields": said})


class JsonLines(logging.Formatter):
    """One record as one line of ASCII JSON, so that no value can start a line or hide text."""

    def __init__(self, component: str) -> None:
        super().__init__()
        self.component = component

    def format(self, record: logging.LogRecord) -> str:
        """Write a record without its traceback, which can show what a variable held."""
        fields = getattr(record, "journal_fields", None)
        if fields is None:
            fields = {"message": _message(record)}
        if isinstance(record.exc_info, tuple) and record.exc_info[1] is not None:
            fields = {**fields, "raised": plain(record.exc_info[1])}
        when = datetime.fromtimestamp(record.created, UTC)
        said = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "component": self.component,
            "event": getattr(record, "journal_event", record.name),
            "fields": fields,
        }
        return json.dumps(said, allow_nan=False)


def _message(record: logging.LogRecord) -> str:
    """Put a record's values into its words; where they do not fit, the words alone."""
    words = record.msg if isinstance(record.msg, str) else str(plain(record.msg))
    args = record.args
    try:
        if isinstance(args, Mapping):
            words = words % {key: plain(value) for key, value in args.items()}
        elif args:
            words = words % tuple(plain(value) for value in args)
    except (TypeError, ValueError, KeyError):
        pass
    return str(plain(words))


class _File(RotatingFileHandler):
    """The file behind the journal: mode 0600, bounded; a fault of the disk stops nobody."""

    def __init__(self, path: Path, form: JsonLines, most_bytes: int, kept: int) -> None:
        self.lost = 0
        self.loggers: list[logging.Logger] = []
        super().__init__(path, "a", most_bytes, kept, "ascii", delay=True)
        self.setFormatter(form)

    def _open(self) -> Any:
        """Open the file to append; end a line that a killed process left unfinished."""
        path = self.baseFilename
        unfinished = False
        try:
            with open(path, "rb") as file:
                unfinished = bool(file.seek(0, os.SEEK_END))
                if unfinished:
                    file.seek(-1, os.SEEK_END)
                    unfinished = file.read(1) != b"\n"
        except FileNotFoundError:
            pass
        stream: TextIO = open(path, "a", encoding="ascii", opener=_private)  # noqa: SIM115
        if unfinished:
            stream.write("\n")
        return stream

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; after a fault, say first how many were lost."""
        if lost := self.lost:
            self.lost = 0
            note = logging.LogRecord(record.name, logging.WARNING, "", 0, "", None, None)
            note.journal_event, note.journal_fields = "journal.lost", {"lines": lost}
            super().emit(note)
            if self.lost:  # as full as before
                self.lost = lost + 1
                return
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Count a line that could not be written; logging itself would print its values."""
        self.lost += 1
        stream, self.stream = self.stream, None
        try:
            if stream is not None:
                stream.close()
        except OSError:
            return


def _private(path: str, how: int) -> int:
    """Open a file that only its owner may read, whatever the umask and an older mode say."""
    handle = os.open(path, how | getattr(os, "O_NOFOLLOW", 0), 0o600)
    if hasattr(os, "fchmod"):
        os.fchmod(handle, 0o600)
    return handle


def to_file(
    path: Path,
    component: str,
    *,
    level: int = logging.INFO,
    loggers: Sequence[str] = LOGGERS,
    most_bytes: int = MOST_BYTES,
    kept: int = KEPT,
) -> logging.Handler:
    """Let what the loggers say go into a file as JSON lines, from now on.

    The file has mode 0600. When it would pass `most_bytes` it becomes `<path>.1` and a new one
    starts; the oldest is deleted. A line that cannot be written (a full disk) is counted, and the
    next one that can is preceded by `journal.lost`. Nothing is raised and nothing printed. Give
    what is returned to `close`.

    Args:
        path: the file; its folder is made where there is none.
        component: who writes: "coordinator", or a site's name.
        level: the least that is written.
        loggers: names; a logger that is stricter than `level` is opened to it.
        most_bytes: size of one file.
        kept: older files that are kept.

    Raises:
        OSError: a folder that cannot be made, or a file that cannot be opened.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _File(path, JsonLines(component), most_bytes, kept)
    handler.setLevel(level)
    handler.stream = handler._open()
    for name in loggers:
        logger = logging.getLogger(name)
        if logger.getEffectiveLevel() > level:
            logger.setLevel(level)
        logger.addHandler(handler)
        handler.loggers.append(logger)
    return handler


def close(handler: logging.Handler) -> None:
    """Stop what `to_file` began, and close its file."""
    for logger in getattr(handler, "loggers", []):
        logger.removeHandler(handler)
    handler.close()
