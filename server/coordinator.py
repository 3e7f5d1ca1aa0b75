"""The coordinator's process: opens the link, waits for sites, runs the rounds, tells its state."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID

from fedaccord import accord as accords
from fedaccord import journal, keys, runs
from fedaccord.accord import Accord
from fedaccord.errors import RunError
from fedaccord.evidence import canonical_json, write_atomic
from fedaccord.kit import CoordinatorKit
from fedaccord.models.build import parameter_count
from fedaccord.objects import Store
from fedaccord.repeat import repeated
from fedaccord.runs import MANIFEST, ROUNDS, RunFolder
from fedaccord.server import handshakes
from fedaccord.server.app import app, initial
from fedaccord.server.audit_log import AuditLog
from fedaccord.server.desks import Desks
from fedaccord.server.link import LinkGrid
from fedaccord.server.link_service import serve
from fedaccord.server.members import Members
from fedaccord.server.metrics import Metrics
from fedaccord.server.one_run import RUN_ID
from fedaccord.server.watch import Watch
from fedaccord.tasks import task_of

STATE, STATUS = "run.json", "status.json"
LOGS, AUDIT = "logs/coordinator.jsonl", "audit.jsonl"
WORDS = 64_000_000  # bytes of a reply besides its arrays: ledgers, counts
LOOK = 1.0  # seconds between two looks at how it stands
Tell = Callable[[str], None]


class Ended(RunError):
    """The kit's run has come to its end; a new one is begun only when somebody says so."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"run {folder}: has come to its end. Say `--new` to begin another.")
        self.folder = folder


@dataclass(frozen=True)
class Which:
    """The run that a coordinator carries out.

    Attributes:
        folder: of its evidence.
        resume: whether it was begun before.
    """

    folder: Path
    resume: bool


def which(kit: CoordinatorKit, accord: Accord, new: bool) -> Which:
    """Find the run to go on with, or name a new one.

    | the kit's last run | then |
    |---|---|
    | none, or none of its records was written | a new one |
    | was cut short | it is gone on with |
    | has come to its end | `Ended`, unless a new one is asked for |

    Raises:
        Ended: as above.
        RunError: a new one is asked for while one was cut short.
    """
    state = kit.folder / STATE
    if state.exists():
        try:
            folder = kit.folder / "runs" / Path(str(json.loads(state.read_bytes())["run"])).name
        except (ValueError, KeyError, TypeError):
            raise RunError(
                f"{state}: is damaged. Write the run's name there, or delete it."
            ) from None
        begun = (folder / ROUNDS).exists() and (folder / ROUNDS).stat().st_size > 0
        ended = (folder / MANIFEST).exists()
        if begun and ended and not new:
            raise Ended(folder)
        if begun and not ended:
            if new:
                raise RunError(
                    f"run {folder}: was cut short, and what its sites reserved stays reserved. Go "
                    "on with it: leave out --new."
                )
            return Which(folder, True)
    folder = kit.folder / "runs" / runs.new_id(accord.name)
    write_atomic(state, canonical_json({"run": folder.name}) + "\n")
    return Which(folder, False)


@contextmanager
def opened(kit: CoordinatorKit, accord: Accord, which_: Which) -> Iterator[LinkGrid]:
    """Open the link for a run, with its logs, and close all of it again.

    Raises:
        RunError: a site without a pinned key, or an address that cannot be listened on.
        EvidenceError: another coordinator has this kit open, or its audit log was altered.
    """
    if lacking := sorted(set(accord.roster) - set(accord.pins)):
        raise RunError(
            f"{kit.accord_file}: pins no key for {', '.join(lacking)}. Say `fedaccord provision` "
            "once more with their requests."
        )
    with ExitStack() as stack:
        log = journal.to_file(kit.folder / LOGS, "coordinator")
        stack.callback(journal.close, log)
        key = keys.load(kit.signing_key)
        audit = AuditLog(kit.folder / AUDIT, key, kit.handovers())
        stack.callback(audit.close)
        metrics = Metrics()
        if kit.metrics:
            stack.callback(metrics.serve(kit.metrics))
        watch = Watch(audit, metrics)
        stack.callback(handshakes.watch(watch.handshake))
        store, members = Store(kit.folder / "spool"), Members(kit, accord.pins)
        most = largest_reply(kit, accord)
        desks = Desks(accord, which_.folder.name, members, key, store, most, watch)
        grid = LinkGrid(desks)
        if which_.resume:
            desks.take_up(signed_before(which_.folder))
        server, port = serve(kit, desks)
        stack.callback(lambda: server.stop(1.0).wait(5.0))
        stack.callback(lambda: desks.close("the coordinator stopped"))
        about: dict[str, Any] = {
            "run": which_.folder.name,
            "accord": accord.digest,
            "pid": os.getpid(),
        }
        audit.append("up", port=port, resume=which_.resume, **about)
        stack.callback(audit.append, "down", run=which_.folder.name)
        journal.event(logging.getLogger("fedaccord.coordinator"), "up", port=port, **about)
        address = f"{kit.listen.rpartition(':')[0]}:{port}"
        stack.enter_context(reporting(kit, desks, which_, address))
        yield grid


def largest_reply(kit: CoordinatorKit, accord: Accord) -> int:
    """Bytes that a reply may have: what the kit says, or twice a float64 update and some words."""
    if kit.max_reply_mb:
        return kit.max_reply_mb * 1_000_000
    model, _ = initial(accord, task_of(accord, kit.folder))
    return 16 * parameter_count(model) + WORDS


def signed_before(folder: Path) -> dict[int, dict[str, Any]]:
    """Read what sites signed of their replies in the last round on record, to be shown again."""
    rows = [row for row in RunFolder(folder).records() if row.get("envelopes")]
    return {int(row["round"]): dict(row["envelopes"]) for row in rows[-1:]}


@contextmanager
def reporting(kit: CoordinatorKit, desks: Desks, which_: Which, address: str) -> Iterator[None]:
    """Keep a file up to date that says how the coordinator stands, for `coordinator status`."""
    began = time.time()

    def write(state: str) -> None:
        said = {
            "state": state,
            "pid": os.getpid(),
            "address": address,
            "run": str(which_.folder),
            "began": began,
            "time": time.time(),
            "sites": desks.standing(),
        }
        try:
            write_atomic(kit.folder / STATUS, canonical_json(said) + "\n")
        except OSError as fault:  # a full disk ends the run where it matters, not here
            journal.event(
                logging.getLogger("fedaccord.coordinator"),
                "status-unwritten",
                logging.ERROR,
                fault=type(fault).__name__,
            )

    write("up")
    try:
        with repeated(LOOK, lambda: write("up")):
            yield
    finally:
        write("down")


def wait_for_sites(grid: LinkGrid, wait: float, tell: Tell) -> None:
    """Wait until all sites are there, or so long and enough of them are.

    Args:
        grid: the link.
        wait: seconds.
        tell: is given a line when that changes.
    """
    desks, clock = grid.desks, grid.clock
    roster, fewest = list(desks.accord.roster), desks.accord.rounds.min_sites
    end, said = clock.now() + wait, ""
    while True:
        here = desks.present()
        absent = [site for site in roster if site not in here]
        words = f"{len(here)} of {len(roster)} sites are here"
        words += f"; waiting for {', '.join(absent)}" if absent else ""
        if words != said:
            tell(words)
            said = words
        if not absent or (clock.now() >= end and len(here) >= fewest):
            return
        clock.sleep(0.5)


def up(kit: CoordinatorKit, tell: Tell, new: bool = False) -> Path:
    """Carry out the kit's run over the link to its end, or go on with it.

    Args:
        kit: the coordinator's.
        tell: is given a line of each event, for whoever watches.
        new: whether to begin another run where the last one has ended.

    Returns:
        The run's folder.

    Raises:
        FedAccordError: as the ServerApp; see `which` and `opened`.
    """
    accord = accords.load(kit.accord_file)
    found = which(kit, accord, new)
    with opened(kit, accord, found) as grid:
        tell(f"run {found.folder.name}: {'resumed' if found.resume else 'new'}")
        wait_for_sites(grid, kit.join_wait, tell)
        context = Context(
            run_id=RUN_ID,
            node_id=SUPERLINK_NODE_ID,
            node_config={},
            state=RecordDict(),
            run_config={
                "accord": str(kit.accord_file),
                "run": str(found.folder),
                "resume": found.resume,
            },
        )
        app(grid=grid, context=context)
    return found.folder
