"""The command `site check`: what stands between a site and its first round, with remedies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedaccord.accord import Accord
    from fedaccord.client.check import Finding
    from fedaccord.client.reach import Probe
    from fedaccord.kit import SiteKit
    from fedaccord.tasks import Task

app = typer.Typer()

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@app.command()
def check(
    kit: Annotated[Path, typer.Argument(help="The site's kit, as `fedaccord provision` made it.")],
) -> None:
    """Check data, policy, keys, dates, clock, disk, GPU and the way to the coordinator.

    Nothing about records is sent or stored. What it prints holds counts of them: it is for the
    site's own console. Exit code 1 where a check fails.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fedaccord.client.dial import probe
    from fedaccord.kit import SiteKit

    found = list(findings(SiteKit.read(kit), probe))
    table = Table("check", "result", "what was found", "remedy")
    for one in found:
        words = (_plain(one.found), _plain(one.remedy))
        table.add_row(one.name, Text(one.state, COLOURS[one.state]), *map(Text, words))
    Console().print(table)
    failed = [one.name for one in found if one.state == "fail"]
    print(f"{kit}: " + (f"{', '.join(failed)} failed" if failed else "nothing fails"))
    raise typer.Exit(1 if failed else 0)


def findings(kit: SiteKit, probe: Probe) -> Iterator[Finding]:
    """Run every check in turn; one that needs what an earlier one did not find is left out.

    Args:
        kit: the site's.
        probe: asks a coordinator over the link whether it would let the site in.
    """
    from datetime import UTC, datetime

    from fedaccord import accord as accords
    from fedaccord.client import check as checks
    from fedaccord.errors import FedAccordError

    now = datetime.now(UTC)
    accord: Accord | None = None
    try:
        accord = accords.load(kit.accord_file)
    except FedAccordError as fault:
        yield checks.Finding(
            "accord",
            "fail",
            str(fault),
            "Put the accord.toml here that `fedaccord provision` wrote once all keys were there.",
        )
    else:
        yield checks.Finding("accord", "ok", f"{accord.name} ({accord.digest[:12]}).")
    weights = 0
    if accord is not None:
        try:
            task, weights = _built(accord, kit)
        except FedAccordError as fault:
            look = f"`fedaccord check {kit.accord_file}`"
            yield checks.Finding("task", "fail", str(fault), look)
        else:
            yield checks.check_data(accord, task, kit)
            yield checks.check_policy(accord, kit, weights, now)
            yield checks.check_ledger(accord, kit)
    yield checks.check_keys(accord, kit)
    yield checks.check_certificate(kit, now)
    yield checks.check_disk(kit.site, 4 * weights)
    if accord is not None:
        yield checks.check_device(kit.name, accord.privacy.precision)
    yield from _coordinator(kit, probe)


def _built(accord: Accord, kit: SiteKit) -> tuple[Task, int]:
    """Build the accord's task, and count the weights of its model; no record is read."""
    from fedaccord import tasks
    from fedaccord.client.check import data_of
    from fedaccord.models.build import agreed, parameter_count

    task = tasks.task_of(accord, kit.accord_file.parent, data_of(kit))
    tasks.check_fits(accord, task)
    return task, parameter_count(agreed(accord.model, task.spec, accord.seed))


def _coordinator(kit: SiteKit, probe: Probe) -> Iterator[Finding]:
    """Try every address, then ask over the link, then compare clocks."""
    from datetime import UTC, datetime

    from fedaccord.client import reach

    reached = [reach.reach(kit, address) for address in kit.coordinator]
    there = any(not one.why for one in reached)
    answer = probe(kit) if there else None
    yield reach.check_coordinator(reached, answer)
    made = max((one.made for one in reached if one.made), default=None)
    offset = answer.clock_offset if answer is not None and answer.reachable else None
    refused = answer.why if answer is not None and "clock" in answer.why else ""
    yield reach.check_clock(offset, made, datetime.now(UTC), refused)


def _plain(words: str) -> str:
    """Show words that came from outside without characters that move or hide text."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in words)
