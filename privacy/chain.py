"""The ledger's chain as pure functions: hashes, signatures, keys, heads; no file is touched.

An entry is a JSON object. Its `hash` covers the entry's canonical JSON and the hash before it; its
`signature` covers the hash, the entry's number and the site. The first entry is of kind KEY and
names the key that signs; a later KEY hands over to a new key and is signed by both. A head is the
number, hash and signature of an entry: whoever keeps one can tell later that the ledger was cut or
replaced.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from fedaccord.errors import LedgerError
from fedaccord.evidence import canonical_json, sha256
from fedaccord.keys import SigningKey, signed

GENESIS = "0" * 64
Entry = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """An entry as it is stored: the text of its body, its hash, and the signature of the hash."""

    body: str
    hash: str
    signature: str

    @classmethod
    def of(cls, entry: Entry) -> Row:
        """Take an exported entry apart."""
        body = {k: v for k, v in entry.items() if k not in ("hash", "signature")}
        return cls(canonical_json(body), str(entry.get("hash")), str(entry.get("signature")))

    @property
    def entry(self) -> Entry:
        """The entry as it is exported."""
        return json.loads(self.body) | {"hash": self.hash, "signature": self.signature}

    @property
    def line(self) -> str:
        """The entry as a line of an exported ledger."""
        return canonical_json(self.entry)


@dataclass(frozen=True)
class Head:
    """The end of a ledger at some moment, as its site signed it.

    Attributes:
        site: whose ledger.
        key: public half of the key that signed, hex.
        seq: number of the entry.
        hash: of the entry, and so of all before it.
        signature: of site, number and hash (`stamp`): none of them can be changed.
    """

    site: str
    key: str
    seq: int
    hash: str
    signature: str

    def to_json(self) -> dict[str, Any]:
        """Return the head as a message or an entry carries it."""
        return asdict(self)

    @property
    def valid(self) -> bool:
        """Whether the key that it names signed it."""
        return signed(self.key, self.signature, stamp(self.site, self.seq, self.hash))


def read_heads(text: str) -> list[Head]:
    """Read heads that came from outside; what is malformed or not signed is left out."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return []
    heads = []
    for said in found if isinstance(found, list) else []:
        try:
            head = Head(**said)
        except TypeError:
            continue
        words = (head.site, head.key, head.hash, head.signature)
        typed = type(head.seq) is int and all(type(word) is str for word in words)
        if typed and len("".join(words)) < 1000 and head.valid:
            heads.append(head)
    return heads


def latest(heads: Iterable[Head]) -> list[Head]:
    """Keep the longest head of each site and key, in order of site."""
    best: dict[tuple[str, str], Head] = {}
    for head in heads:
        known = best.get((head.site, head.key))
        if known is None or head.seq > known.seq:
            best[head.site, head.key] = head
    return [best[name] for name in sorted(best)]


def chain(previous: str, body: str) -> str:
    """Hash an entry's text together with the hash of the entry before it."""
    return sha256(f"{previous}\n{body}")


def stamp(site: str, seq: int, mark: str) -> str:
    """What a site signs of an entry: enough to check a head without the entry itself."""
    return f"entry\n{seq}\n{mark}\n{site}"


def handover(public: str, previous: str) -> str:
    """What a new key signs to show that it agrees to go on from an entry."""
    return f"handover\n{previous}\n{public}"


def seal(previous: str, entry: Entry, key: SigningKey) -> Row:
    """Chain and sign a new entry, which names its number and its site."""
    body = canonical_json(entry)
    mark = chain(previous, body)
    return Row(body, mark, key.sign(stamp(entry["site"], entry["seq"], mark)))


def faults(
    rows: Iterable[Row], every: bool = True, number: int = 0, previous: str = GENESIS, key: str = ""
) -> Iterator[tuple[int, str]]:
    """List what is wrong with a ledger's entries, as (entry number, words).

    Guarantee: with no fault, every entry is as the holder of the first key (or a key that it
    handed over to) wrote it, in that order, with none missing before the last. That the last
    entries were not cut off is for heads kept elsewhere to show.

    Args:
        rows: entries in order.
        every: check the signature of every entry; False checks those of KEY entries and the last
            one, which cover the others through the chain, and is some ten times faster.
        number: of the entry before the first of `rows`, 0 for a whole ledger.
        previous: hash of that entry.
        key: public key in force after it.
    """
    unchecked: tuple[str, str, str] | None = None
    for number, row in enumerate(rows, start=number + 1):  # noqa: B020  (goes on from its start)
        body = _body(row)
        if row.hash != chain(previous, row.body) or body.get("seq") != number:
            yield number, "does not match its hash, or one before it was removed"
        signer = key
        handing_over = number == 1 or body.get("kind") == "KEY"
        if handing_over:
            if words := _key_fault(number, body, previous):
                yield number, words
            key = str(body.get("public_key"))
            signer = signer or key
        last = signer, row.signature, stamp(str(body.get("site")), number, row.hash)
        if (every or handing_over) and not signed(*last):
            yield number, "is not signed by the site's key"
        unchecked = None if every or handing_over else last
        previous = row.hash
    if unchecked and not signed(*unchecked):
        yield number, "is not signed by the site's key"


def _body(row: Row) -> Entry:
    """Read an entry's body; what is no JSON object is an empty one, which no check lets pass."""
    try:
        body = json.loads(row.body)
    except (ValueError, TypeError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _key_fault(number: int, body: Entry, previous: str) -> str:
    """Say what is wrong with an entry that starts a key, or "" if nothing is."""
    public = str(body.get("public_key"))
    if body.get("kind") != "KEY":
        return "is the first and names no key"
    if number > 1 and not signed(public, str(body.get("possession")), handover(public, previous)):
        return "hands over to a key that did not agree"
    return ""


class Chain:
    """The entries of one ledger that were checked, and what follows from them.

    Attributes:
        rows: as they are stored.
        entries: as they are exported.
        signers: public key that signed each entry.
        key: public key in force after the last entry, "" where there is none.
    """

    def __init__(self, where: str) -> None:
        """Start with no entry; `where` names the ledger in errors."""
        self.where = where
        self.rows: list[Row] = []
        self.entries: list[Entry] = []
        self.signers: list[str] = []
        self.key = ""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def last(self) -> str:
        """Hash of the last entry."""
        return self.rows[-1].hash if self.rows else GENESIS

    def extend(self, rows: list[Row], every: bool = False) -> None:
        """Check entries that follow the last one, and take them in.

        Raises:
            LedgerError: the first entry that is edited, missing, out of order or not signed.
        """
        for number, words in faults(rows, every, len(self), self.last, self.key):
            raise LedgerError(
                f"{self.where}: entry {number} {words}. Stop, and restore the ledger from a "
                "trusted copy."
            )
        for row in rows:
            entry = row.entry
            public = str(entry.get("public_key"))
            self.signers.append(self.key or public)
            self.key = public if entry["kind"] == "KEY" else self.key
            self.rows.append(row)
            self.entries.append(entry)

    def cut(self, length: int) -> None:
        """Forget the entries after a number: their transaction was not committed."""
        del self.rows[length:], self.entries[length:], self.signers[length:]
        named = [e["public_key"] for e in self.entries if e["kind"] == "KEY"]
        self.key = named[-1] if named else ""

    def head(self) -> Head:
        """Return the end of the ledger, which has at least one entry."""
        row = self.rows[-1]
        return Head(self.entries[-1]["site"], self.signers[-1], len(self), row.hash, row.signature)

    def missing(self, heads: Iterable[Head]) -> list[Head]:
        """List the heads, signed by one of the ledger's keys, that it does not extend.

        Each is proof that entries were written which this ledger does not hold: it was cut, an
        older copy was put back, or a clone of it is in use. Heads of other sites or keys are passed
        over, so nobody without the key can stop a site. So are those up to the one that a LOST
        entry names: since then epsilon is infinite, and nothing is under-counted any more.
        """
        mine = {*self.signers, self.key}
        lost = max((e["head"]["seq"] for e in self.entries if e["kind"] == "LOST"), default=0)
        return [
            head
            for head in heads
            if head.key in mine and head.seq > lost and head.valid and not self.holds(head)
        ]

    def holds(self, head: Head) -> bool:
        """Tell whether the entry that a head names is in the ledger."""
        return 0 < head.seq <= len(self) and self.rows[head.seq - 1].hash == head.hash
