"""Admission: which node is which site, who lets the accord in, and what each site has reserved."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedaccord.accord import Accord
from fedaccord.privacy import accounting
from fedaccord.privacy.plan import plan_for
from fedaccord.server.gates import told
from fedaccord.server.heads import Heads
from fedaccord.server.mail import Mail
from fedaccord.strategies.updates import config_of


@dataclass
class Place:
    """A site in a run.

    Attributes:
        site: its name in the roster.
        node: its Flower node.
        slots: how many of its reserved rounds are left.
        entry: its ledger's reservation.
        misses: rounds in a row that it was asked for and did not answer in time.
    """

    site: str
    node: int
    slots: int
    entry: dict[str, Any]
    misses: int = 0


class DrawnGrid(Grid):
    """A Grid that shows only the sites that were drawn for a round, in order of site.

    Flower's strategies draw clients themselves, unseeded; shown exactly the drawn sites and told
    to take all of them, they have nothing left to draw.
    """

    def __init__(self, grid: Grid, sites: dict[int, str]) -> None:
        """Take a grid, and the drawn nodes with their sites in order of site."""
        self._grid, self.sites, self._nodes = grid, sites, list(sites)

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


def words(reply: Message) -> dict[str, Any]:
    """Return the config record of a reply, or what went wrong under "refused"."""
    if reply.has_error():
        return {"refused": reply.error.reason}
    return config_of(reply.content)


def question(accord: Accord, run: str) -> RecordDict:
    """Write what every question to a site carries."""
    return RecordDict({"config": ConfigRecord({"run": run, "accord": accord.digest})})


def admit(
    mail: Mail, accord: Accord, run: str, heads: Heads
) -> tuple[list[Place], dict[str, str], set[int]]:
    """Learn which node is which site, ask each for admission, and have the willing reserve.

    Nobody reserves unless enough sites let the accord in, so that a run that cannot start costs
    no site anything.

    Args:
        mail: the carrier.
        accord: what was agreed.
        run: the run's id.
        heads: takes in the heads of the sites' ledgers, and shows them before anybody reserves.

    Returns:
        The places in order of site, none if too few sites let the accord in; the reason of every
        site that stays out; and the nodes that gave one, which are not to be asked again.
    """
    config, timeout = question(accord, run), accord.rounds.timeout
    nodes_there = list(mail.grid.get_node_ids())
    answers = {
        node: words(reply)
        for node, reply in mail.ask(nodes_there, "query.join", config, timeout).items()
    }
    claims: dict[str, list[tuple[int, str]]] = {}
    for node, said in answers.items():
        site = told(said.get("site", f"node {node}"))
        reason = told(said.get("refused") or heads.hear(site, said))
        claims.setdefault(site, []).append((node, reason))
    nodes: dict[str, int] = {}
    out: dict[str, str] = {}
    for site, [(node, reason), *more] in claims.items():
        if more:
            out[site] = "more than one node says that it is this site; stop the others"
        elif reason or site not in accord.roster:
            out[site] = reason or "not in the accord's roster"
        else:
            nodes[site] = node
    for site in accord.roster:
        if site not in nodes and site not in out:
            out[site] = "no answer"
    closed = set(answers) - set(nodes.values())
    if len(nodes) < accord.rounds.min_sites:
        return [], out, closed
    places: list[Place] = []
    config.config_records["config"].update(heads.words(0))
    replies = mail.ask([nodes[s] for s in sorted(nodes)], "query.reserve", config, timeout)
    for site in sorted(nodes):
        said = words(replies[nodes[site]]) if nodes[site] in replies else {"refused": "no answer"}
        entry, reason = reservation(said, accord, site, run)
        if reason := reason or heads.hear(site, said):
            out[site] = reason
            closed |= {nodes[site]} if nodes[site] in replies else set()
        else:
            places.append(Place(site, nodes[site], accord.reserved_rounds, entry))
    return places, out, closed


def reservation(
    said: dict[str, Any], accord: Accord, site: str, run: str
) -> tuple[dict[str, Any], str]:
    """Read the ledger's entry in a site's reply, and say why if it is not what was agreed.

    Rounds, plan and epsilon of the report come from this entry, so a site may not choose them.
    """
    if said.get("refused"):
        return {}, told(said["refused"])
    try:
        entry = dict(json.loads(said["entry"]))
    except (KeyError, TypeError, ValueError):
        return {}, "its reply to the reservation holds no entry of a ledger"
    plan = plan_for(accord, site)
    wanted = {
        "kind": "RESERVE" if plan else "NONPRIVATE",
        "site": site,
        "run": run,
        "accord": accord.digest,
        "rounds": accord.reserved_rounds,
        "plan_digest": plan.digest if plan else None,
        "event": plan.event() if plan else accounting.NON_PRIVATE,
    }
    wrong = [key for key, value in wanted.items() if entry.get(key) != value]
    said_epsilon = entry.get("epsilon")
    if plan is None:
        wrong += ["epsilon"] if said_epsilon != "infinite" else []
    elif type(said_epsilon) is not float or not math.isclose(
        said_epsilon, plan.epsilon(), rel_tol=1e-6
    ):
        wrong += ["epsilon"]
    if wrong:
        return entry, f"its reservation differs from the accord's in: {', '.join(wrong)}"
    return entry, ""


def refusal(out: dict[str, str]) -> str:
    """Say in one line why a run cannot start: the first site's own words, and who else is out."""
    (site, words), *others = sorted(out.items())
    words = words if site in words else f"Site {site} is out: {words.rstrip('.')}."
    names = ", ".join(site for site, _ in others)
    return f"{words} Out as well: {names}." if others else words


def collect_ledgers(mail: Mail, places: list[Place], accord: Accord, run: str) -> dict[str, str]:
    """Ask every site for its ledger, as JSON lines by site; a silent one is left out."""
    sites = {place.node: place.site for place in places}
    replies = mail.ask(sites, "query.ledger", question(accord, run), accord.rounds.timeout)
    texts = {sites[node]: words(reply).get("ledger") for node, reply in replies.items()}
    return {site: str(text) for site, text in sorted(texts.items()) if text}
