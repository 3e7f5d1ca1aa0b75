"""`fedaccord simulate`: run an accord with all its sites on this machine, or go on with a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedaccord.errors import AccordError, BudgetError

app = typer.Typer()


@app.command()
def simulate(
    accord: Annotated[
        str | None,
        typer.Argument(
            help="A TOML file, or the name of a bundled accord (heart). With --resume it may be "
            "left out, unless the accord names files of your own."
        ),
    ] = None,
    sites: Annotated[
        Path | None,
        typer.Option(help="Lasting folder of the simulated sites' ledgers and policies."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder that gets the run's folder.")] = Path("runs"),
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on with this run, which was cut short, after its last round."),
    ] = None,
) -> None:
    """Run an accord with all its sites on this machine, then write the report."""
    from fedaccord import accord as accords
    from fedaccord import runs

    for name, folder in (("--sites", sites), ("--out", out), ("--resume", resume)):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise AccordError(f"{name} {folder}: is a file. Name a folder.")
    if accord is None and resume is None:
        raise AccordError("accord: none was given. Name a bundled accord (heart) or a TOML file.")
    if resume is not None:
        runs.RunFolder.open(resume)  # a run, or one line on why it is none
    where = accord or str(resume / "accord.toml" if resume else "")
    agreed = accords.load(where)
    run = resume or out / runs.new_id(agreed.name)
    _run(where, run, sites or run / "sites", resume is not None)


def _run(where: str, run: Path, sites: Path, resume: bool) -> None:
    """Run rounds with a live table, then write the report and say what came of it."""
    from rich.console import Console

    from fedaccord import accord as accords
    from fedaccord.reports.report import write_report
    from fedaccord.simulations import display

    console = Console()
    try:
        table = display.simulate(accords.load(where), where, run, sites, console, resume)
    except KeyboardInterrupt:
        print(
            f"fedaccord: interrupted. What was finished is in {run}; what the sites reserved stays "
            f"in their ledgers. Go on with `fedaccord simulate --resume {run}`.",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None
    except BudgetError as refusal:
        raise BudgetError(f"{refusal} The run's record is in {run}.") from None
    page = write_report(run)
    console.print(table)
    _outcome(run, page, console)


def _outcome(run: Path, page: Path, console: object) -> None:
    """Print why the run stopped, what its privacy is and is not, and where the report lies."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    from fedaccord import runs

    assert isinstance(console, Console)
    outcome = json.loads((run / "report.json").read_text(encoding="utf-8"))
    records = runs.RunFolder(run).records()
    for record in records:
        if record["kind"] == "out":
            console.print(
                Text.assemble(("Left out ", "bold"), f"{record['site']}: {record['reason']}")
            )
    console.print(Text.assemble(("Stopped  ", "bold"), records[-1]["reason"]))
    console.print(Text.assemble(("Privacy  ", "bold"), outcome["headline"]))
    console.print(Text("Not protected", "bold"))
    for line in outcome["not_protected"]:
        console.print(Padding(Text(f"- {line}"), (0, 0, 0, 2)))
    console.print(Text.assemble(("Report  ", "bold"), str(page)), soft_wrap=True)
