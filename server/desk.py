"""A desk: what the coordinator holds of one site; its requests, their replies and its session."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from flwr.app import Message

from fedaccord.envelope import Envelope, Refused, Signed
from fedaccord.objects import Parcel

OFTEN = 30  # joins of a site that are remembered; its own back-off needs fewer in a minute


class Over(Refused):
    """A session that has ended; nothing is wrong with who comes with it."""


@dataclass
class Letter:
    """A request on its way to a site.

    Attributes:
        site: to whom.
        request: its envelope; nonce and expiry are filled in at each delivery.
        parcel: its objects; None once it is too late to deliver it.
        shown: replies of the round before it, as sites signed them.
        end: seconds on the monotonic clock; it is not delivered after that.
        asked: the message, without its content, that a reply refers to.
    """

    site: str
    request: Envelope
    parcel: Parcel | None
    shown: list[Signed]
    end: float
    asked: Message


@dataclass
class Reply:
    """A reply that is arriving or has arrived: what its site signed, and its objects' sizes."""

    signed: Signed
    envelope: Envelope
    sizes: dict[str, int]


@dataclass
class Desk:
    """What the coordinator holds of one site.

    Attributes:
        letters: requests without a reply, by id, in order.
        arriving: replies that were offered, by id of the request.
        arrived: replies that nobody has pulled yet.
        answered: ids of requests that have their reply.
        session: the one that counts; an older one is over.
        delivered: requests that this session has seen.
        nonce: the largest that came from the site.
        joins: when its last sessions began, on the monotonic clock.
        seen: when it was last heard, on the monotonic clock; 0 for never.
    """

    letters: dict[str, Letter] = field(default_factory=dict)
    arriving: dict[str, Reply] = field(default_factory=dict)
    arrived: dict[str, Reply] = field(default_factory=dict)
    answered: dict[str, None] = field(default_factory=dict)
    session: str = ""
    delivered: set[str] = field(default_factory=set)
    nonce: int = 0
    joins: deque[float] = field(default_factory=lambda: deque(maxlen=OFTEN))
    seen: float = 0.0
