"""Heads of the sites' ledgers: every site is shown them, so that a ledger that goes back is seen.

A site signs the end of its ledger into every reply. The coordinator shows these heads to all sites
with its next request; each keeps those of its peers in its own signed ledger and holds its own
ledger to the one that comes back to it. Peers bring what they hold to the next run as well, so an
older copy of a ledger stops its site even before a coordinator that knows nothing of the past.
Over the link a head counts only where its key is one that the accord pins, or that this handed
over to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.serverapp import Grid

from fedaccord.accord import Accord
from fedaccord.evidence import canonical_json
from fedaccord.privacy.chain import Head, read_heads
from fedaccord.privacy.pins import Handovers, show_handovers, speaks_for

SHOWN = 32  # heads in one request; where there are more sites they take turns
KEYS = 4  # of one site that peers are believed to have seen; its own key always counts


class Heads:
    """The longest head that was heard of each site of a roster, by key."""

    def __init__(
        self,
        roster: Iterable[str],
        pins: Mapping[str, str] | None = None,
        handovers: Callable[[], Handovers] = dict,
    ) -> None:
        """Start with no head.

        Args:
            roster: names of the sites.
            pins: the key that the accord pins for each site, where the carrier is the link; of
                a site without one any key counts.
            handovers: gives the handovers of each site's keys as they are known by now.
        """
        self._roster = set(roster)
        self._pins, self._handovers = dict(pins or {}), handovers
        self._known: dict[tuple[str, str], Head] = {}
        self._asked: dict[tuple[str, str], Head] = {}  # what was known when a request last went out
        self._own: dict[tuple[str, str], Head] = {}  # what a site showed of itself
        self._keys: dict[str, str] = {}  # the key that a site itself uses, whatever peers say

    def hear(self, site: str, said: dict[str, Any]) -> str:
        """Take in the heads of a reply: `head`, the site's own, and `seen`, of its peers.

        A reply must not be older than what was known of its site before it was asked, or than what
        the site has shown itself. A head that a peer saw since then may be of another run that is
        going on, and says nothing against an earlier reply; the next request shows it.

        Returns:
            Why the reply's own head contradicts what this site signed before, or the key that the
            accord pins; or "".
        """
        own = [h for h in read_heads(f"[{said.get('head', '')}]") if h.site == site]
        for head in read_heads(str(said.get("seen", "[]"))):
            if head.site != site:
                self._keep(head)
        for head in own:
            if not self._counts(head):
                return (
                    f"ledger: its head is signed with the key {head.key[:12]}, to which the one "
                    f"that the accord pins ({self._pins[site][:12]}) has not handed over"
                )
            for key in {head.key, self._keys.get(site, head.key)}:  # also where it has rotated
                for known in (self._asked.get((site, key)), self._own.get((site, key))):
                    if known and head != known and head.seq <= known.seq:
                        return _went_back(head, known)
            self._keep(head, own=True)
            self._own[site, head.key] = head
            self._keys[site] = head.key
        return ""

    def _keep(self, head: Head, own: bool = False) -> None:
        """Keep a head that is longer than what was known; a peer cannot crowd others out."""
        known = self._known.get((head.site, head.key))
        keys = sum(site == head.site for site, _ in self._known)
        asked_for = head.site in self._roster and keys < KEYS and self._counts(head)
        welcome = known is not None or own or asked_for
        if welcome and (known is None or head.seq > known.seq):
            self._known[head.site, head.key] = head

    def _counts(self, head: Head) -> bool:
        """Whether the key that signed a head is its site's own, as far as pins say."""
        return speaks_for(head.site, head.key, self._pins, self._handovers())

    def words(self, number: int) -> dict[str, str]:
        """Return what a request carries: heads, and the handovers that make their keys count."""
        said = {"heads": self.show(number)}
        handovers = show_handovers(self._handovers() if self._pins else {})
        return said if handovers == "{}" else said | {"handovers": handovers}

    def show(self, number: int) -> str:
        """Write the heads that a request carries, as JSON; `number` is the round."""
        self._asked = dict(self._known)
        heads = [self._known[name] for name in sorted(self._known)]
        start = number * SHOWN % len(heads) if len(heads) > SHOWN else 0
        turn = (heads + heads)[start : start + min(SHOWN, len(heads))]
        return canonical_json([head.to_json() for head in turn])

    def to_json(self) -> list[dict[str, Any]]:
        """Return every head that is known, the sites' own among them, for a checkpoint."""
        every = {(head.site, head.key, head.seq): head for head in self._own.values()}
        every |= {(head.site, head.key, head.seq): head for head in self._known.values()}
        return [every[name].to_json() for name in sorted(every)]

    def restore(self, said: list[dict[str, Any]]) -> None:
        """Take in heads of a checkpoint; the sites' own replies since then count besides."""
        for head in read_heads(canonical_json(said)):
            self._keep(head)

    def record(self) -> dict[str, Any]:
        """Return the head that each site showed last, for the evidence: number and hash."""
        own = {site: self._own[site, key] for site, key in sorted(self._keys.items())}
        return {site: {"seq": head.seq, "hash": head.hash} for site, head in own.items()}


def heads_over(grid: Grid, accord: Accord) -> Heads:
    """Start with no head; where the link carries the run, the keys that the accord pins count."""
    about = getattr(grid, "about", None)
    if about is None:  # of other carriers nobody checks which key is whose
        return Heads(accord.roster)
    return Heads(accord.roster, accord.pins, lambda: about()["link"]["handovers"])


def _went_back(head: Head, known: Head) -> str:
    return (
        f"ledger: its head is entry {head.seq} ({head.hash[:12]}), after it had shown entry "
        f"{known.seq} ({known.hash[:12]})"
    )
