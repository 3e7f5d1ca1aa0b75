"""The door: sites that are away or late are asked again every round, and nobody waits for them."""

from __future__ import annotations

from typing import Any

from fedaccord.accord import Accord
from fedaccord.server.admission import Place, question, reservation
from fedaccord.server.gates import told
from fedaccord.server.heads import Heads
from fedaccord.server.mail import Mail

JOIN, RESERVE = "an invitation to join", "a request to reserve"
KNOCKS = 3  # questions to a node whose answers are listened for


class Door:
    """Sites that are not at the table, and how they come to it.

    | site | what happens |
    |---|---|
    | asked and silent in `rounds.max_misses` rounds in a row | away: no longer invited |
    | away, answers a question to join | invited again, from the next round on |
    | silent when the run began, or comes later, answers | reserves, gets its plan, is invited |
    | refused, or out for any other reason that it gave | not asked again in this run |
    | away, and another node says that it is this site | that node is the site from then on |
    """

    def __init__(
        self, mail: Mail, accord: Accord, run: str, heads: Heads, places: list[Place]
    ) -> None:
        """Take the run's places; those who come later are added to the list."""
        self._mail, self._accord, self._run, self._heads = mail, accord, run, heads
        self._places = places
        self._closed: set[int] = set()  # nodes that gave a reason to stay out
        self._coming: dict[int, str] = {}  # nodes that were asked to reserve, and their sites

    def away(self, place: Place) -> bool:
        """Whether a site has been silent for so long that nobody asks it to train."""
        return place.misses >= self._accord.rounds.max_misses

    def close(self, nodes: set[int]) -> None:
        """Do not ask these nodes again: they answered, and are out."""
        self._closed |= nodes

    def hear(self, node: int, about: str, said: dict[str, Any]) -> Place | None:
        """Take in a late answer to one of this door's questions.

        Returns:
            The place of a site that is at the table from now on, or None.
        """
        if about == JOIN:
            return self._joins(node, said)
        if about == RESERVE and node in self._coming:
            return self._reserves(node, self._coming.pop(node), said)
        return None

    def _joins(self, node: int, said: dict[str, Any]) -> Place | None:
        site = told(said.get("site", ""))
        if node in self._coming or any(p.node == node and not self.away(p) for p in self._places):
            return None  # an answer to a question that had been asked again
        reason = said.get("refused") or self._heads.hear(site, said)
        if reason or site not in self._accord.roster or site in self._coming.values():
            self._closed.add(node)
            return None
        place = next((place for place in self._places if place.site == site), None)
        if place is None:
            self._coming[node] = site
            self._ask_to_reserve(node)
            return None
        if not self.away(place):
            self._closed.add(node)  # the site is here already, and answers from another node
            return None
        place.node, place.misses = node, 0
        return place

    def _ask_to_reserve(self, node: int) -> None:
        content = question(self._accord, self._run)
        content.config_records["config"].update(self._heads.words(0))
        self._mail.whisper([node], "query.reserve", content, RESERVE)
        self._mail.forget(node, RESERVE, KNOCKS)

    def _reserves(self, node: int, site: str, said: dict[str, Any]) -> Place | None:
        entry, reason = reservation(said, self._accord, site, self._run)
        if reason or self._heads.hear(site, said):
            self._closed.add(node)
            return None
        place = Place(site, node, self._accord.reserved_rounds, entry)
        self._places.append(place)
        self._places.sort(key=lambda place: place.site)
        return place

    def knock(self) -> None:
        """Ask every node that is not at the table whether it would join; wait for nobody.

        A question may be lost with the process that it reached, so it is asked again every round;
        the answers to the last few are listened for.
        """
        here = {place.node for place in self._places if not self.away(place)}
        out = here | set(self._coming) | self._closed
        nodes = [node for node in self._mail.grid.get_node_ids() if node not in out]
        if nodes:
            self._mail.whisper(nodes, "query.join", question(self._accord, self._run), JOIN)
        for node in nodes:
            self._mail.forget(node, JOIN, KNOCKS)
        for node in self._coming:  # a reservation that is there is returned again
            self._ask_to_reserve(node)
