"""The command `conformance`: checks of the installed code, and whether they catch faults."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command()
def conformance(
    repetitions: Annotated[
        int,
        typer.Option(min=0, help="Repeat the statistical checks on the code as it is, and stop."),
    ] = 0,
) -> None:
    """Check the installed code, then plant faults in it and see each caught; exit code 1 if not."""
    from rich.console import Console
    from rich.progress import track

    from fedaccord.conformance import suite
    from fedaccord.privacy.audit import ALPHA

    console = Console()
    if repetitions:
        times = track(
            suite.repeat(repetitions), "repetitions", repetitions, console=console, transient=True
        )
        alarms = [name for names in times for name in names]
        words = f" ({', '.join(sorted(set(alarms)))})" if alarms else ""
        console.print(
            f"{len(alarms)} alarms{words} in {repetitions} clean repetitions of "
            f"{suite.STATISTICAL} statistical tests, alpha {ALPHA:g} each"
        )
        raise typer.Exit(1 if alarms else 0)
    silent = _clean()
    caught = _faults()
    console.print(
        f"alpha {ALPHA:g} for each of {suite.STATISTICAL} statistical tests; the others are exact"
    )
    raise typer.Exit(0 if silent and caught else 1)


def _clean() -> bool:
    """Run every check on the code as it is; print what each found, and tell whether all agree."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Column, Table
    from rich.text import Text

    from fedaccord.conformance import suite

    console = Console()
    name = Column("check", no_wrap=True)
    table = Table(name, "method", "found", "", title="Code as it is", title_justify="left")
    alarms = 0
    total = len(suite.CHECKS)
    for check, found in track(suite.clean(), "checks", total, console=console, transient=True):
        alarms += found.alarm
        verdict = Text("ALARM", "bold red") if found.alarm else Text("silent")
        table.add_row(check.name, check.method, Text(found.figure), verdict)
    console.print(table)
    console.print(f"{alarms} alarms in {total} checks")
    return alarms == 0


def _faults() -> bool:
    """Plant every fault; print which check caught it, and tell whether all were caught."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Column, Table
    from rich.text import Text

    from fedaccord.conformance import suite

    console = Console()
    by = Column("caught by", no_wrap=True)
    table = Table("planted fault", by, "found", title="Faults", title_justify="left")
    missed = []
    total = len(suite.FAULTS)
    for outcome in track(suite.faults(), "faults", total, console=console, transient=True):
        fault, caught = outcome.fault, outcome.caught
        names = Text("\n".join(caught)) if caught else Text("MISSED", "bold red")
        figures = Text("\n".join(finding.figure for finding in caught.values()))
        table.add_row(f"{fault.name}: {fault.words}", names, figures)
        missed += [] if caught else [fault.name]
    console.print(table)
    console.print(f"{total - len(missed)}/{total} faults caught")
    return not missed
