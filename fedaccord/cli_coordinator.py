"""The commands of the coordinator: up, status, down, audit; who may join; its own keys."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from fedaccord.errors import EvidenceError, RunError

coordinator = typer.Typer(
    no_args_is_help=True, help="The coordinator of a deployment: its members and its keys."
)
Where = Annotated[
    Path, typer.Argument(metavar="ACCORD", help="kits/coordinator, or the accord.toml in it.")
]


@coordinator.command()
def up(
    accord: Where,
    new: Annotated[
        bool, typer.Option("--new", help="Begin another run where the last one has ended.")
    ] = False,
) -> None:
    """Open the link and carry out the accord's run, or go on with the one that was cut short."""
    # Before grpc is imported: it then tells of refused handshakes. Flower sets it to "error" for
    # whatever a process of its own starts.
    os.environ["GRPC_VERBOSITY"] = "INFO"
    from rich.console import Console
    from rich.live import Live

    from fedaccord import accord as accords
    from fedaccord.kit import CoordinatorKit
    from fedaccord.reports.report import write_report
    from fedaccord.server import coordinator as process
    from fedaccord.simulations import display
    from fedaccord.standing import Standing, followed

    own, console = CoordinatorKit.read(accord), Console()
    agreed = accords.load(own.accord_file)
    display.quiet()
    # Each has a file, and `tell` has what a person watches.
    for name in ("fedaccord.link", "fedaccord.coordinator"):
        logging.getLogger(name).propagate = False
    signal.signal(signal.SIGTERM, _interrupt)
    standing = Standing(own, agreed)
    tell = _Lines(console)
    try:
        live = Live(standing, console=console, transient=True, refresh_per_second=2)
        with live if console.is_terminal else followed(standing, tell):
            run = process.up(own, tell, new)
    except process.Ended as ended:  # a service manager that starts it again must not begin a run
        print(f"{ended} Report: {write_report(ended.folder)}")
        return
    except KeyboardInterrupt:
        print(
            "fedaccord: stopped. What was finished is kept, and so is what the sites reserved. Go "
            f"on with `fedaccord coordinator up {accord}`.",
            file=sys.stderr,
        )
        raise typer.Exit(0 if _asked else 130) from None
    page = write_report(run)
    console.print(standing)
    console.print(f"Report       {page}", soft_wrap=True)


_asked: list[int] = []  # signals that asked for a stop


def _interrupt(number: int, frame: Any) -> None:
    _asked.append(number)
    raise KeyboardInterrupt


class _Lines:
    """Prints a line of each event, with the time, above the live table."""

    def __init__(self, console: Any) -> None:
        self._console = console

    def __call__(self, words: str) -> None:
        when = datetime.now(UTC).strftime("%H:%M:%S")
        self._console.print(f"{when}  {words}", soft_wrap=True, markup=False, highlight=False)


@coordinator.command()
def status(
    accord: Where,
    once: Annotated[bool, typer.Option("--once", help="Print it once, do not follow.")] = False,
) -> None:
    """Show how the coordinator, its sites and its rounds stand; drawn anew until Ctrl-C."""
    from rich.console import Console
    from rich.live import Live

    from fedaccord import accord as accords
    from fedaccord.kit import CoordinatorKit
    from fedaccord.standing import Standing

    own, console = CoordinatorKit.read(accord), Console()
    standing = Standing(own, accords.load(own.accord_file))
    if once or not console.is_terminal:
        console.print(standing)
        up_ = standing.state(standing.said()).startswith("up ")
        raise typer.Exit(0 if up_ else 1)
    try:
        with Live(standing, console=console, refresh_per_second=2):
            while True:
                time.sleep(1)
    except KeyboardInterrupt:
        return


@coordinator.command()
def down(
    accord: Where,
    wait: Annotated[float, typer.Option(min=0, help="Seconds until it is ended by force.")] = 30.0,
) -> None:
    """Stop the coordinator of this machine; its run can be gone on with."""
    from fedaccord import accord as accords
    from fedaccord.kit import CoordinatorKit
    from fedaccord.standing import Standing, alive

    own = CoordinatorKit.read(accord)
    standing = Standing(own, accords.load(own.accord_file))
    said = standing.said()
    if not standing.state(said).startswith(("up ", "silent")):
        raise RunError(f"coordinator {own.folder}: is {standing.state(said)}. Nothing to stop.")
    pid, end = int(said["pid"]), time.monotonic() + wait
    os.kill(pid, signal.SIGTERM)
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.1)
    if alive(pid):
        os.kill(pid, signal.SIGKILL)
        print(f"coordinator: did not stop in {wait:g} s, and was ended by force; nothing is lost.")
        return
    print("coordinator: stopped. Its run can be gone on with: `fedaccord coordinator up`.")


@coordinator.command()
def audit(
    accord: Where,
    entries: Annotated[bool, typer.Option("--entries", help="Every entry, a line each.")] = False,
) -> None:
    """Check the coordinator's audit log: every entry's hash and signature; exit code 1 if not.

    Where the records of its runs say how far the log had come, it is held to that as well.
    """
    from fedaccord import keys
    from fedaccord.kit import CoordinatorKit
    from fedaccord.server import audit_log
    from fedaccord.server.coordinator import AUDIT

    own = CoordinatorKit.read(accord)
    path = own.folder / AUDIT
    if not path.exists():
        raise EvidenceError(f"{path}: no such file. It is begun when the coordinator first runs.")
    rows = [row for run in sorted(own.folder.glob("runs/*/rounds.jsonl")) for row in _rows(run)]
    ends = [audit_log.End(**row["audit_log"]) for row in rows if "audit_log" in row]
    said = audit_log.audit(path, keys.load(own.signing_key).public, own.handovers(), ends)
    faults = [line for line in said if line.startswith("FAULT")]
    for line in said if entries else faults or said[-1:]:
        print(line)
    raise typer.Exit(1 if faults else 0)


def _rows(path: Path) -> list[dict[str, Any]]:
    from fedaccord.runs import RunFolder

    return RunFolder(path.parent).records()


@coordinator.command()
def revoke(
    accord: Where,
    site: Annotated[str, typer.Argument(help="The site that may join no more.")],
    reason: Annotated[str, typer.Option(help="Why, in one line: it stands in the report.")],
) -> None:
    """Let a site join no more; a coordinator that runs sees it at once."""
    from fedaccord import membership
    from fedaccord.kit import CoordinatorKit

    own = CoordinatorKit.read(accord)
    was = membership.revoke(own, site, reason, datetime.now(UTC))
    said = own.members()[site].revoked
    print(
        f"{site}: revoked ({said})."
        if was
        else f"{site}: was revoked before ({said}); nothing was changed."
    )


@coordinator.command()
def rotate(
    accord: Where,
    key: Annotated[bool, typer.Option("--key", help="Replace the signing key as well.")] = False,
    days: Annotated[int, typer.Option(min=1, max=3650, help="The certificate holds.")] = 397,
) -> None:
    """Make a new TLS key and certificate; --key: hand over to a new signing key too."""
    from fedaccord import authority, enrolment, membership
    from fedaccord.kit import CoordinatorKit
    from fedaccord.provision import Kits

    own = CoordinatorKit.read(accord)
    public = membership.rotate(Kits(own.folder.parent), days, datetime.now(UTC), identity=key)
    held = authority.read_certificate(own.tls_cert.read_bytes(), str(own.tls_cert))
    print(f"coordinator: certificate until {held.not_valid_after_utc:%Y-%m-%d}")
    if key:
        print(f"key {public}\nread over the telephone: {enrolment.fingerprint(public)}")
        print("Sites follow the handover from the key in their site.toml by themselves.")
    print("A coordinator that is running uses it after a restart.")
