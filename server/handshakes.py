"""Refused TLS handshakes: gRPC tells of them on the standard error stream alone, so that is read.

A peer without a good certificate never reaches the service, and gRPC gives no hook for it. Its
core writes a line for each when GRPC_VERBOSITY is INFO.
"""

from __future__ import annotations

import atexit
import os
import re
import select
import threading
from collections.abc import Callable

VERBOSITY = "GRPC_VERBOSITY"  # gRPC reads it when it is first used in a process
NOISE = b"Log level INFO is not suitable for production"
MOST = 65_536  # bytes of a line that are waited for
WAIT = 0.2  # seconds until a line without an end (a progress bar, a question) is passed on
PIPE = 1_048_576  # bytes that can wait in the pipe, where the system lets it be set (Linux)
F_SETPIPE_SZ = 1031
# It may follow words that somebody else wrote without ending their line.
_LINE = re.compile(rb"[IWE]\d{4} \d\d:[\d:.]+ +\d+ [^]\s]*\] Handshake failed with error (.*)")
# In this order: the first that is found in the line names the reason.
REASONS = (
    (b"PEER_DID_NOT_RETURN_A_CERTIFICATE", "no certificate"),
    (b"certificate has expired", "expired certificate"),
    (b"certificate is not yet valid", "certificate not yet valid"),
    (b"CERTIFICATE_VERIFY_FAILED", "another authority"),
    (b"BAD_SIGNATURE", "another authority"),  # an authority of the same name with another key
    (b"certificate signature failure", "another authority"),
    (b"WRONG_VERSION_NUMBER", "plain text"),
    (b"HTTP_REQUEST", "plain text"),
    (b"PROTOCOL_VERSION", "TLS version"),
    (b"UNSUPPORTED_PROTOCOL", "TLS version"),
    (b"NO_PROTOCOLS_AVAILABLE", "TLS version"),
)
OTHER = "other"


def reason_of(line: bytes) -> str:
    """Say why a handshake was refused, from a closed list; "" for a line about something else.

    | the peer | reason |
    |---|---|
    | shows no certificate | no certificate |
    | shows one whose dates have passed, or lie ahead | expired certificate, certificate not yet valid |
    | shows one that the accord's authority did not sign | another authority |
    | does not speak TLS | plain text |
    | speaks only a version that is too old | TLS version |
    | fails in another way | other |
    """  # noqa: E501
    found = _LINE.search(line)
    if not found:
        return ""
    return next((reason for sign, reason in REASONS if sign in found[1]), OTHER)


def watch(on_refused: Callable[[str], None]) -> Callable[[], None]:
    """Call a function with the reason of each handshake that gRPC refuses in this process.

    From now on file descriptor 2 is a pipe that a thread reads: lines about handshakes are kept
    back, all others go to where it led before. It must be called before gRPC is first used. What
    is still in the pipe when the process is killed is lost; at an orderly end it is passed on.

    Args:
        on_refused: called in the thread, with a reason of `reason_of`; what it raises is dropped.

    Returns:
        A function that passes on what is left, puts file descriptor 2 back, and may be called
        more than once.
    """
    os.environ[VERBOSITY] = "INFO"
    old = os.dup(2)
    source, sink = os.pipe()
    wake, waker = os.pipe()
    _enlarge(sink)
    os.dup2(sink, 2)
    os.close(sink)
    thread = threading.Thread(
        target=_Reader(source, wake, old, on_refused).run, name="handshakes", daemon=True
    )
    thread.start()
    lock, stopped = threading.Lock(), False

    def stop() -> None:
        nonlocal stopped
        with lock:
            if stopped:
                return
            stopped = True
        atexit.unregister(stop)
        os.dup2(old, 2)
        os.close(waker)
        thread.join()
        for handle in (source, wake, old):
            os.close(handle)

    atexit.register(stop)
    return stop


def _enlarge(sink: int) -> None:
    """Give the pipe room: a writer that holds the interpreter must not wait for the reader."""
    try:
        import fcntl

        fcntl.fcntl(sink, F_SETPIPE_SZ, PIPE)
    except (ImportError, OSError):
        return


class _Reader:
    """Reads the pipe until it is woken, then what is left of it."""

    def __init__(self, source: int, wake: int, old: int, on_refused: Callable[[str], None]) -> None:
        self._source, self._wake, self._old, self._tell = source, wake, old, on_refused
        self._waiting = b""

    def run(self) -> None:
        """Read until the end."""
        os.set_blocking(self._source, False)
        last = False
        while True:
            wanted = [self._source] if last else [self._source, self._wake]
            ready, _, _ = select.select(wanted, [], [], 0 if last else self._patience())
            last = last or self._wake in ready
            more = self._read() if self._source in ready else b""
            if more:
                self._take(more)
            elif self._source in ready or last:  # closed at the other end, or read out
                self._pass_on(self._waiting)
                return
            elif not ready:
                self._take(b"", patient=False)

    def _patience(self) -> float | None:
        return WAIT if self._waiting else None

    def _read(self) -> bytes:
        try:
            return os.read(self._source, MOST)
        except BlockingIOError:
            return b""

    def _take(self, more: bytes, patient: bool = True) -> None:
        """Sort whole lines; a beginning waits a moment for its end."""
        *lines, self._waiting = (self._waiting + more).split(b"\n")
        kept = b""
        for line in lines:
            reason = reason_of(line)
            if reason:
                self._refused(reason)
                kept += line[: _LINE.search(line).start()]  # type: ignore[union-attr]
            elif NOISE not in line:
                kept += line + b"\n"
        if not patient or len(self._waiting) > MOST:
            kept, self._waiting = kept + self._waiting, b""
        self._pass_on(kept)

    def _refused(self, reason: str) -> None:
        try:
            self._tell(reason)
        except Exception:  # the reader must go on: who writes to a full pipe would wait for ever
            return

    def _pass_on(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._old, data) :]
            except OSError:  # nobody reads it any longer
                return
