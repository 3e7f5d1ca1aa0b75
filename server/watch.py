"""The watch: whatever happens on the link goes to the journal, the audit log and the metrics."""

from __future__ import annotations

import logging
from typing import Any

from fedaccord.envelope import Envelope
from fedaccord.journal import event
from fedaccord.server.audit_log import AuditLog
from fedaccord.server.metrics import Metrics

log = logging.getLogger("fedaccord.link")
BEAT = 5.0  # seconds between two signs of life of a site


class Watch:
    """Tells three places of each event; none of them gets a private value.

    Attributes:
        silence: seconds without a sign of life after which a site counts as gone.
    """

    def __init__(self, audit: AuditLog, metrics: Metrics, silence: float = 4 * BEAT) -> None:
        self.audit, self.metrics, self.silence = audit, metrics, silence

    def request(self, site: str, request: Envelope, size: int) -> None:
        """A request was laid down for a site."""
        self.metrics.request(request.kind, size)
        if request.kind == "train":
            self.metrics.round(request.round)
        about: dict[str, Any] = {
            "type": request.kind,
            "round": request.round,
            "message": request.message,
        }
        self.audit.append("request", site=site, bytes=size, body=request.body, **about)
        event(log, "link.request", site=site, bytes=size, **about)

    def reply(self, site: str, reply: Envelope, size: int) -> None:
        """A site's whole reply is here."""
        self.metrics.reply(reply.kind, size)
        about: dict[str, Any] = {"type": reply.kind, "round": reply.round, "message": reply.message}
        self.audit.append("reply", site=site, bytes=size, body=reply.body, **about)
        event(log, "link.reply", site=site, bytes=size, **about)

    def joined(self, site: str, version: str, peer: str, present: int) -> None:
        """A site began a session."""
        self.metrics.joined(present)
        self.audit.append("join", site=site, version=version, peer=peer)
        event(log, "link.joined", site=site, version=version, peer=peer)

    def left(self, site: str, why: str, present: int) -> None:
        """A site's session ended."""
        self.metrics.joined(present)
        self.audit.append("left", site=site, why=why)
        event(log, "link.left", site=site, why=why)

    def refused(self, site: str, reason: str, words: str) -> None:
        """Somebody was not let in, or something that came was not taken."""
        self.metrics.refused(reason)
        about = {"site": site, "reason": reason, "words": words}
        if self.audit.append("refused", **about):  # a flood fills neither of the two
            event(log, "link.refused", logging.WARNING, **about)

    def handshake(self, reason: str) -> None:
        """A TLS handshake was refused, so nobody knows who it was."""
        self.metrics.handshake_refused(reason)
        if self.audit.append("refused", site="", reason=reason, stage="handshake"):
            event(log, "link.handshake-refused", logging.WARNING, reason=reason)
