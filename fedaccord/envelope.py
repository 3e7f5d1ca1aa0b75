"""The envelope: what both ends sign around every request and reply, and why one is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from fedaccord.errors import FedAccordError
from fedaccord.evidence import canonical_json
from fedaccord.keys import SigningKey, signed

COORDINATOR = "coordinator"
REQUEST, REPLY, JOIN, WELCOME = "request", "reply", "join", "welcome"
MOST_TEXT = 4096  # characters of an envelope
MOST_HANDOVERS = 100
AHEAD = 7 * 24 * 3600.0  # seconds: no envelope may be good for longer
SKEW = 120.0  # seconds that two clocks may differ by


class Refused(FedAccordError):
    """An envelope or a message that is not let in; the words name no private value.

    Attributes:
        reason: a word of a closed list, for counting.
    """

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


@dataclass(frozen=True)
class Envelope:
    """What is signed of a request or a reply.

    Attributes:
        run: the run's id.
        round: of the run; 0 before the first.
        sender: a site's name, or "coordinator".
        recipient: likewise.
        direction: "request", "reply", "join" or "welcome".
        kind: Flower's message type, such as "train".
        message: id of the request, which its reply repeats.
        nonce: larger than in every earlier envelope of this sender to this recipient.
        expires: unix seconds.
        body: id of the message's root object (SHA-256 of a tree of hashes); of a hello, its hash.
        accord: digest of the accord.
        model: digest of the global model in the request, which its reply repeats.
        shown: digest of the replies that a request shows, and of the reply's place "".
    """

    run: str
    round: int
    sender: str
    recipient: str
    direction: str
    kind: str
    message: str
    nonce: int
    expires: float
    body: str
    accord: str
    model: str
    shown: str

    def text(self) -> str:
        """Write it as canonical JSON, which is what is signed."""
        return canonical_json(asdict(self))


@dataclass(frozen=True)
class Signed:
    """An envelope's text as its sender signed it."""

    text: str
    signature: str

    def to_json(self) -> dict[str, str]:
        """Return it as a record holds it."""
        return {"text": self.text, "signature": self.signature}


def words(text: str) -> str:
    """What is signed of an envelope; no other kind of signed words begins like this."""
    return f"envelope\n{text}"


def seal(envelope: Envelope, key: SigningKey) -> Signed:
    """Sign an envelope."""
    text = envelope.text()
    return Signed(text, key.sign(words(text)))


def opened(text: str, signature: str, public: str) -> Envelope:
    """Check an envelope's signature and read it.

    Args:
        text: canonical JSON, at most 4 KiB.
        signature: 128 hex digits.
        public: the key of the sender that it must come from, hex.

    Raises:
        Refused: "signature" if the key did not sign it, "envelope" if it is none.
    """
    if len(text) > MOST_TEXT:
        raise Refused("envelope", f"An envelope has {len(text)} characters, above {MOST_TEXT}.")
    if not signed(public, signature, words(text)):
        raise Refused("signature", "The signature is not of this text by the sender's key.")
    return read(text)


def read(text: str) -> Envelope:
    """Read an envelope's text without checking who signed it.

    Raises:
        Refused: "envelope": not canonical JSON, or other keys or types than an envelope has.
    """
    try:
        said = json.loads(text)
        canonical = isinstance(said, dict) and canonical_json(said) == text
    except (ValueError, RecursionError):
        canonical = False
    wanted = {field.name: TYPES[str(field.type)] for field in fields(Envelope)}
    if not canonical or said.keys() != wanted.keys():
        raise Refused("envelope", "The text is no envelope.")
    for name, kind in wanted.items():
        if type(said[name]) is not kind and not (kind is float and type(said[name]) is int):
            raise Refused("envelope", f'The envelope\'s "{name}" is no {kind.__name__}.')
    within = (("nonce", 2**63), ("round", 2**31), ("expires", 2**53))
    if not all(0 <= said[name] < end for name, end in within):
        raise Refused("envelope", "The envelope's numbers are out of range.")
    return Envelope(**said)


TYPES: dict[str, type] = {"str": str, "int": int, "float": float}


def refuse_unexpected(envelope: Envelope, wanted: Mapping[str, Any]) -> None:
    """Hold an envelope's fields to what its receiver knows.

    Args:
        envelope: as it was signed.
        wanted: fields and the values that they must have.

    Raises:
        Refused: the first field that differs, as its reason.
    """
    for name, value in wanted.items():
        found = getattr(envelope, name)
        if found != value:
            raise Refused(
                name,
                f"The envelope is of another {name}: {str(found)[:40]!r}, not {str(value)[:40]!r}.",
            )


def refuse_stale(envelope: Envelope, last_nonce: int, now: float) -> None:
    """Refuse an envelope that was seen before, came out of order, or is not good at this time.

    Args:
        envelope: as it was signed.
        last_nonce: the largest that came from its sender.
        now: unix seconds at the receiver.

    Raises:
        Refused: "nonce" for a replay or another order, "expired", or "clock".
    """
    if envelope.nonce <= last_nonce:
        raise Refused("nonce", "The envelope was seen before, or came out of order.")
    if envelope.expires < now - SKEW:
        raise Refused("expired", f"The envelope expired {now - envelope.expires:.0f} s ago.")
    if envelope.expires > now + AHEAD + SKEW:
        raise Refused("clock", "The envelope is good for longer than any may be.")


def handover_words(name: str, new: str) -> str:
    """What a key signs to hand over to a new one."""
    return f"handover of {name}\n{new}"


def handover(name: str, new: str, old: SigningKey) -> dict[str, str]:
    """Let a key in force name the key that comes after it."""
    return {"key": new, "signature": old.sign(handover_words(name, new))}


def key_in_force(pin: str, name: str, handovers: Sequence[Mapping[str, Any]]) -> str:
    """Follow handovers from the key that was pinned to the one in force.

    Each is signed by the key before it; the first that is not ends the chain.

    Args:
        pin: public half of the pinned key, hex.
        name: a site's name, or "coordinator".
        handovers: in order, each {"key", "signature"}.
    """
    return keys_led_to(pin, name, handovers)[-1]


def keys_led_to(pin: str, name: str, handovers: Sequence[Mapping[str, Any]]) -> list[str]:
    """List the pinned key and those after it that handovers lead to, in order.

    A key may be pinned after some of them (a kit that was made later): those are passed over.
    """
    keys, named = [pin], [str(step.get("key")) for step in handovers[:MOST_HANDOVERS]]
    for step in handovers[named.index(pin) + 1 if pin in named else 0 : MOST_HANDOVERS]:
        new, signature = str(step.get("key")), str(step.get("signature"))
        if not signed(keys[-1], signature, handover_words(name, new)):
            break
        keys.append(new)
    return keys
