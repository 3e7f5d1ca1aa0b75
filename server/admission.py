"""Admission: which node is which site, who lets the accord in, and what each site has reserved."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedaccord.accord import Accord
from fedaccord.errors import RunError


@dataclass
class Place:
    """A site in a run: its Flower node, and how many of its reserved rounds are left."""

    site: str
    node: int
    slots: int
    entry: dict[str, Any]


class DrawnGrid(Grid):
    """A Grid that shows only the sites that were drawn for a round, in order of site.

    Flower's strategies draw clients themselves, unseeded; shown exactly the drawn sites and told
    to take all of them, they have nothing left to draw.
    """

    def __init__(self, grid: Grid, nodes: list[int]) -> None:
        self._grid, self._nodes = grid, nodes

    def get_node_ids(self) -> Iterable[int]:
        """Return the drawn nodes."""
        return list(self._nodes)

    def set_run(self, run: Run) -> None:
        """Pass on."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """Pass on."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Pass on."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the drawn nodes' information."""
        return [info for info in self._grid.get_nodes() if info.node_id in self._nodes]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass on."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pass on."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Pass on."""
        return self._grid.send_and_receive(messages, timeout=timeout)


def ask(
    grid: Grid, nodes: Iterable[int], kind: str, content: RecordDict, timeout: float
) -> dict[int, Message]:
    """Send the same content to some nodes and collect the first reply of each, by node."""
    messages = [Message(content, node, kind) for node in nodes]
    replies = grid.send_and_receive(messages, timeout=timeout)
    found: dict[int, Message] = {}
    for reply in replies:
        found.setdefault(reply.metadata.src_node_id, reply)
    return found


def words(reply: Message) -> dict[str, Any]:
    """Return the config record of a reply, or what went wrong under "refused"."""
    if reply.has_error():
        return {"refused": reply.error.reason}
    return dict(reply.content.config_records.get("config", {}))


def admit(grid: Grid, accord: Accord, run: str) -> tuple[list[Place], dict[str, str]]:
    """Learn which node is which site, ask each for admission, and have the willing reserve.

    Nobody reserves unless enough sites let the accord in, so that a run that cannot start costs
    no site anything.

    Args:
        grid: the carrier.
        accord: what was agreed.
        run: the run's id.

    Returns:
        The places in order of site, none if too few sites let the accord in, and the reason of
        every site that stays out.

    Raises:
        RunError: two nodes claim one site.
    """
    config = RecordDict({"config": ConfigRecord({"run": run, "accord": accord.digest})})
    timeout = accord.rounds.timeout
    answers = {
        node: words(reply)
        for node, reply in ask(grid, grid.get_node_ids(), "query.join", config, timeout).items()
    }
    nodes: dict[str, int] = {}
    out: dict[str, str] = {}
    for node, said in answers.items():
        site = str(said.get("site", f"node {node}"))
        if site in nodes:
            raise RunError(f"Two nodes say that they are site {site}. Stop one of them.")
        reason = str(said.get("refused") or said.get("reason") or "")
        if reason or site not in accord.roster:
            out[site] = reason or "not in the accord's roster"
        else:
            nodes[site] = node
    for site in accord.roster:
        if site not in nodes and site not in out:
            out[site] = "no answer"
    if len(nodes) < accord.rounds.min_sites:
        return [], out
    places: list[Place] = []
    replies = ask(grid, [nodes[s] for s in sorted(nodes)], "query.reserve", config, timeout)
    for site in sorted(nodes):
        said = words(replies[nodes[site]]) if nodes[site] in replies else {"refused": "no answer"}
        if said.get("refused"):
            out[site] = str(said["refused"])
            continue
        entry = json.loads(said["entry"])
        places.append(Place(site, nodes[site], int(entry["rounds"]), entry))
    return places, out


def refusal(out: dict[str, str]) -> str:
    """Say in one line why a run cannot start: the first site's own words, and who else is out."""
    (_, words), *others = sorted(out.items())
    names = ", ".join(site for site, _ in others)
    return f"{words} Out as well: {names}." if others else words


def collect_ledgers(grid: Grid, places: list[Place], accord: Accord, run: str) -> dict[str, str]:
    """Ask every site for its ledger, as JSON lines by site; a silent one is left out."""
    config = RecordDict({"config": ConfigRecord({"run": run, "accord": accord.digest})})
    sites = {place.node: place.site for place in places}
    replies = ask(grid, sites, "query.ledger", config, accord.rounds.timeout)
    texts = {sites[node]: words(reply).get("ledger") for node, reply in replies.items()}
    return {site: str(text) for site, text in sorted(texts.items()) if text}
