"""What Prometheus may scrape of a coordinator: figures of the system, never of records."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Info,
    ProcessCollector,
    start_http_server,
)

from fedaccord import __version__
from fedaccord.errors import RunError

OTHER = "other"
# Whatever is not listed counts as "other", so that nobody outside can add a label's value.
KINDS = ("join", "query.join", "query.reserve", "query.ledger", "train", "evaluate")
REFUSALS = (
    "accord",
    "body",
    "certificate",
    "clock",
    "direction",
    "envelope",
    "expired",
    "identity",
    "kind",
    "message",
    "model",
    "nonce",
    "recipient",
    "revoked",
    "round",
    "run",
    "sender",
    "session",
    "shown",
    "signature",
    "size",
)
HANDSHAKES = (
    "no certificate",
    "expired certificate",
    "certificate not yet valid",
    "another authority",
    "plain text",
    "TLS version",
)


class Metrics:
    """Counters and gauges of one coordinator, in a registry of their own.

    Every name begins with `fedaccord_`. A label's value is one of a closed list: the kinds of
    messages, the reasons of refusals; anything else is counted as "other". No site has a label:
    who answers when is in the audit log, which does not leave the coordinator.
    """

    def __init__(self) -> None:
        self.registry = one = CollectorRegistry()
        Info("fedaccord_build", "The code that runs.", registry=one).info({"version": __version__})
        Gauge(
            "fedaccord_start_time_seconds", "When the coordinator started, unix time.", registry=one
        ).set(time.time())
        ProcessCollector(namespace="fedaccord", registry=one)
        self._joined = Gauge("fedaccord_sites_joined", "Sites that are connected.", registry=one)
        self._round = Gauge("fedaccord_round", "Round that is under way.", registry=one)
        self._requests = Counter("fedaccord_requests", "Requests to sites.", ["kind"], registry=one)
        self._request_bytes = Counter(
            "fedaccord_request_bytes", "Bytes of requests.", ["kind"], registry=one
        )
        self._replies = Counter(
            "fedaccord_replies", "Replies of sites that were let in.", ["kind"], registry=one
        )
        self._reply_bytes = Counter(
            "fedaccord_reply_bytes", "Bytes of such replies.", ["kind"], registry=one
        )
        self._refused = Counter(
            "fedaccord_refused", "Envelopes and messages not let in.", ["reason"], registry=one
        )
        self._handshakes = Counter(
            "fedaccord_handshakes_refused", "TLS handshakes refused.", ["reason"], registry=one
        )

    def joined(self, sites: int) -> None:
        """Say how many sites are connected now."""
        self._joined.set(sites)

    def round(self, number: int) -> None:
        """Say which round is under way."""
        self._round.set(number)

    def request(self, kind: str, size: int) -> None:
        """Count a request: Flower's message type, and its bytes."""
        self._requests.labels(_one_of(KINDS, kind)).inc()
        self._request_bytes.labels(_one_of(KINDS, kind)).inc(size)

    def reply(self, kind: str, size: int) -> None:
        """Count a reply that was let in: Flower's message type, and its bytes."""
        self._replies.labels(_one_of(KINDS, kind)).inc()
        self._reply_bytes.labels(_one_of(KINDS, kind)).inc(size)

    def refused(self, reason: str) -> None:
        """Count a message that was not let in, by the word of `fedaccord.envelope.Refused`."""
        self._refused.labels(_one_of(REFUSALS, reason)).inc()

    def handshake_refused(self, reason: str) -> None:
        """Count a refused handshake, by the words of `fedaccord.server.handshakes`."""
        self._handshakes.labels(_one_of(HANDSHAKES, reason)).inc()

    def serve(self, address: str) -> Callable[[], None]:
        """Serve the metrics over HTTP, without a password, until what is returned is called.

        Args:
            address: "127.0.0.1:9464"; port 0 takes a free one. Where others than this machine can
                reach it, they can read it.

        Raises:
            RunError: an address that is none, or is taken.
        """
        return self._serve(address)[0]

    def _serve(self, address: str) -> tuple[Callable[[], None], int]:
        """Serve; how to stop, and the port."""
        host, _, port = address.rpartition(":")
        if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise RunError(
                f'metrics = "{address}" is no address with a port. Write one like '
                '"127.0.0.1:9464", or "" for none, in coordinator.toml.'
            )
        try:
            server: Any
            server, thread = start_http_server(int(port), host.strip("[]"), self.registry)
        except OSError as fault:
            raise RunError(
                f'metrics = "{address}" cannot be listened on: {fault.strerror or fault}. Choose '
                "another port in coordinator.toml, or end what listens there."
            ) from None

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return stop, int(server.server_port)


def _one_of(known: tuple[str, ...], word: str) -> str:
    return word if word in known else OTHER
