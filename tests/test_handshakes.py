"""Refused TLS handshakes of a real gRPC server: each is named, and other output is left alone."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedaccord import authority
from fedaccord.server.handshakes import reason_of, watch

SERVER = """
import atexit, os, sys, threading, time
from pathlib import Path
from fedaccord.server import handshakes
seen = open(sys.argv[2], "a", buffering=1)
stop = handshakes.watch(lambda reason: print(reason, file=seen))
import grpc
from concurrent import futures
folder = Path(sys.argv[1])
tls = [(folder / name).read_bytes() for name in ("server.key", "server.pem", "ca.pem")]
server = grpc.server(futures.ThreadPoolExecutor(2))
good = grpc.ssl_server_credentials([(tls[0], tls[1])], tls[2], True)
print(server.add_secure_port("127.0.0.1:0", good), flush=True)
server.start()
print("words for the console", file=sys.stderr, flush=True)
os.write(2, b"a question without an end? ")
sys.stdin.readline()
server.stop(0).wait()
"""
NOW = datetime.now(UTC)
Pair = tuple[Path, Path]


def issued(folder: Path, name: str, ca: tuple, start: float = 0, days: int = 9) -> Pair:
    """A certificate that begins so many days from now, and its key."""
    key = authority.new_key()
    begin = NOW + timedelta(days=start)
    made = authority.issue(ca, key.public_key(), name, ["127.0.0.1"], "client", days, begin)
    files = folder / f"{name}.pem", folder / f"{name}.key"
    files[0].write_bytes(authority.certificate_pem(made))
    files[1].write_bytes(authority.key_pem(key))
    return files


def founded(name: str = "ca") -> tuple:
    key = authority.new_key()
    return authority.found(name, key, 99, NOW - timedelta(days=50)), key


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int, Path, tuple]]:
    """A gRPC server with mutual TLS in a process of its own: folder, port, what it saw, its CA."""
    folder = tmp_path_factory.mktemp("tls")
    ca = founded()
    (folder / "ca.pem").write_bytes(authority.certificate_pem(ca[0]))
    key = authority.new_key()
    made = authority.issue(ca, key.public_key(), "coordinator", [], "server", 9, NOW)
    (folder / "server.pem").write_bytes(authority.certificate_pem(made))
    (folder / "server.key").write_bytes(authority.key_pem(key))
    seen, error = folder / "seen", folder / "error"
    with error.open("wb") as err:
        command = [sys.executable, "-c", SERVER, str(folder), str(seen)]
        running = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err
        )
        try:
            yield folder, int(running.stdout.readline()), seen, ca
            running.communicate(b"\n", timeout=20)
        finally:
            running.kill()
            running.wait()
    assert running.returncode == 0
    written = error.read_text()
    assert written == "words for the console\na question without an end? "


def shaken(server: tuple, pair: Pair | None, most: ssl.TLSVersion | None = None) -> bytes:
    """Shake hands as a site would; the first byte that comes back, b"" if none does."""
    import socket

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(server[0] / "ca.pem")
    context.set_alpn_protocols(["h2"])
    if pair:
        context.load_cert_chain(*pair)
    if most:
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
        context.minimum_version = context.maximum_version = most
    try:
        with (
            socket.create_connection(("127.0.0.1", server[1]), 5) as raw,
            context.wrap_socket(raw, server_hostname="coordinator") as secure,
        ):
            return secure.recv(1)
    except OSError:
        return b""


def heard(seen: Path, count: int) -> list[str]:
    """What the server has seen, once it is as much."""
    for _ in range(200):
        if seen.exists() and len(said := seen.read_text().splitlines()) >= count:
            return said
        time.sleep(0.02)
    return seen.read_text().splitlines()


def test_each_refused_handshake_is_named_once_and_a_good_one_is_not(server: tuple) -> None:
    folder, port, seen, ca = server
    assert shaken(server, issued(folder, "good", ca)) == b"\0"  # HTTP/2's SETTINGS frame
    wanted = []
    for reason, pair in (
        ("no certificate", None),
        ("expired certificate", issued(folder, "late", ca, start=-20)),
        ("certificate not yet valid", issued(folder, "early", ca, start=3)),
        ("another authority", issued(folder, "alien", founded("another"))),
        ("another authority", issued(folder, "twin", founded())),  # of the same name
    ):
        assert shaken(server, pair) == b""
        wanted.append(reason)
        assert heard(seen, len(wanted)) == wanted
    import socket

    with socket.create_connection(("127.0.0.1", port), 5) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\n\r\n")
        while raw.recv(100):
            pass
    assert heard(seen, 6) == [*wanted, "plain text"]
    assert shaken(server, issued(folder, "good", ca)) == b"\0"
    assert shaken(server, None) == b""
    assert heard(seen, 7) == [*wanted, "plain text", "no certificate"]


PREFIX = b"I1122 14:15:15.222929   15446 ssl_transport_security.cc:2563] "
FAILED = (
    PREFIX + b"Handshake failed with error SSL_ERROR_SSL: error:1:SSL routines:OPENSSL_internal:"
)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (FAILED + b"TLSV1_ALERT_PROTOCOL_VERSION: Invalid", "TLS version"),
        (FAILED + b"CERTIFICATE_VERIFY_FAILED: self signed certificate", "another authority"),
        (FAILED + b"WRONG_VERSION_NUMBER: Invalid certificate verification", "plain text"),
        (FAILED + b"SOMETHING_NEW: \xff\xfe", "other"),
        (PREFIX + b"No match found for server name: other", ""),
        (b"a line of ours: Handshake failed with error certificate has expired", ""),
        (b"", ""),
    ],
)
def test_a_line_is_judged_by_its_form_and_its_reason_by_a_closed_list(line, reason) -> None:
    assert reason_of(line) == reason


def where() -> tuple[int, int]:
    """What file descriptor 2 leads to."""
    found = os.fstat(2)
    return found.st_dev, found.st_ino


def test_the_stream_is_put_back_and_nothing_in_the_pipe_is_lost(capfd) -> None:
    found: list[str] = []

    def bad(reason: str) -> None:
        found.append(reason)
        raise ValueError("what it raises is dropped")

    before = where()
    open_before = set(os.listdir("/proc/self/fd"))
    stop = watch(bad)
    assert where() != before
    for number in range(300):
        os.write(2, f"line {number}\n".encode() + FAILED + b"HTTP_REQUEST: x\n")
    os.write(2, b"W1 x] Log level INFO is not suitable for production. Prefer\nthe end")
    stop()
    stop()
    os.write(2, b"!\n")
    assert where() == before
    assert set(os.listdir("/proc/self/fd")) == open_before
    assert found == ["plain text"] * 300
    said = "".join(f"line {number}\n" for number in range(300))
    assert capfd.readouterr().err == f"{said}the end!\n"


def test_the_traceback_of_a_process_that_fails_still_reaches_the_console() -> None:
    code = "from fedaccord.server.handshakes import watch\nwatch(print)\nraise SystemError('gone')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stderr.endswith("SystemError: gone\n") and "Traceback" in done.stderr
