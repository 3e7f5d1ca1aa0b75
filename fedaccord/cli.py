"""The command line and its groups of commands. User errors are one line and exit code 2."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import click
import typer

from fedaccord import (
    __version__,
    cli_conformance,
    cli_coordinator,
    cli_data,
    cli_deploy,
    cli_ledger,
    cli_plan,
    cli_pretrain,
    cli_provision,
    cli_simulate,
    cli_site,
    cli_site_check,
    cli_site_join,
    cli_site_kit,
    cli_task,
)
from fedaccord.errors import FedAccordError

# Flower reads these when it is imported or started; nothing that FedAccord starts calls home.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else Ray listens on every network interface
}

app = typer.Typer(
    add_completion=False,
    suggest_commands=False,  # click suggests them itself
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Federated learning with differential privacy, fairness audits and evidence.",
)

app.add_typer(cli_ledger.app, name="ledger")
app.add_typer(cli_site.app, name="site")
app.add_typer(cli_coordinator.coordinator, name="coordinator")
cli_site.app.add_typer(cli_site_check.app)
cli_site.app.add_typer(cli_site_join.app)
cli_site.app.add_typer(cli_site_kit.app)
app.add_typer(cli_task.app, name="task")
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_conformance.app)
app.add_typer(cli_deploy.app)
app.add_typer(cli_plan.app)
app.add_typer(cli_pretrain.app)
app.add_typer(cli_provision.app)
app.add_typer(cli_simulate.app)

AccordFile = Annotated[
    str, typer.Argument(help="A TOML file, or the name of a bundled accord (heart).")
]
RunPath = Annotated[Path, typer.Argument(help="The folder that a run left.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fedaccord {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, help="Print the version and stop.")
    ] = False,
) -> None:
    """Take the options that stand before a command."""


@app.command()
def check(accord: AccordFile) -> None:
    """Print an accord as a table, with its digest."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fedaccord import accord as accords
    from fedaccord import registry, tasks

    agreed = accords.load(accord)
    tasks.check_fits(agreed, tasks.task_of(agreed, accords.find(accord).parent))
    plain = agreed.strategy.name == "fedavg" and not agreed.strategy.options
    if agreed.strategy.name in registry.STRATEGIES and not plain:  # another's may not be here
        from fedaccord.strategies import seam  # slow: it imports Flower

        seam.driver_for(agreed)
    table = Table("key", "value", title=f"accord {agreed.name}", title_justify="left")
    for key, value in _flat(agreed.model_dump(mode="json"), ""):
        table.add_row(Text(key), Text(str(value)))  # an accord's own words are no markup
    console = Console()
    console.print(table)
    console.print(f"digest {agreed.digest}", soft_wrap=True)


def _flat(value: object, path: str) -> list[tuple[str, object]]:
    """List the leaves of nested tables with their dotted paths; a site by its name."""
    if isinstance(value, dict) and value:
        return [leaf for k, v in value.items() for leaf in _flat(v, f"{path}.{k}" if path else k)]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [leaf for v in value for leaf in _flat(v, f"{path}[{v['name']}]")]
    return [(path, "-" if value in (None, {}) else value)]


@app.command()
def report(run: RunPath) -> None:
    """Render a run's evidence as report.html and report.json."""
    from fedaccord.reports.report import write_report

    print(write_report(run))


@app.command()
def verify(run: RunPath) -> None:
    """Recompute a run's figures from its records; exit code 1 if anything differs."""
    from fedaccord.reports.verify import verify as recompute

    faults = 0
    for found in recompute(run):
        print(f"{'FAULT' if found.faults else 'ok':5}  {found.name}: {found.checked} checked")
        for fault in found.faults:
            print(f"       {fault}")
        faults += len(found.faults)
    count = "1 fault" if faults == 1 else f"{faults} faults"
    print(f"{run}: {count}" if faults else f"{run}: everything recomputes")
    raise typer.Exit(1 if faults else 0)


def main() -> None:
    """Run the command line; a FedAccordError becomes its own words and exit code 2."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as help_text:
        print(help_text.format_message())
        sys.exit(2)
    except click.ClickException as error:  # a mistyped option or command
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else ""
        print(
            f"fedaccord: {error.format_message()} See `{where or 'fedaccord'} --help`.",
            file=sys.stderr,
        )
        sys.exit(2)
    except click.Abort:
        print("fedaccord: stopped; nothing was changed.", file=sys.stderr)
        sys.exit(1)
    except FedAccordError as error:
        print(f"fedaccord: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a disk that is full or gone in the middle of a run
        print(
            f"fedaccord: {error.filename or 'a file'}: {error.strerror or error}. Free or mend the "
            "disk; what was finished is kept.",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
