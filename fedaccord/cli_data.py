"""The commands `data list` and `data fetch`: the data of the bundled tasks, by hash."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from fedaccord import data

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

app = typer.Typer(
    add_completion=False,
    suggest_commands=False,  # click suggests them itself
    no_args_is_help=True,
    help="Data of the bundled tasks and pretrained weights: what there is, and fetching it.",
)


@app.command(name="list")
def list_() -> None:
    """Print what can be fetched, with size, licence and source, and what is here."""
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    size = Column("download", justify="right", no_wrap=True)
    name, here = Column("name", no_wrap=True), Column("here", no_wrap=True)
    table = Table(name, size, here, "what, licence, source", box=box.SIMPLE_HEAD)
    for item in data.items():
        words = Text(f"{item.what}\n")
        words.append(f"{item.licence}. {item.source}", "dim")
        size_words = f"{data.megabytes(item.size)}, {item.how}"
        table.add_row(item.name, size_words, "yes" if data.fetched(item.name) else "no", words)
    console = Console()
    console.print(table)
    console.print(f"Kept in {data.cache()} (change: FEDACCORD_DATA).", soft_wrap=True)


@app.command()
def fetch(
    names: Annotated[list[str], typer.Argument(help="Names of `fedaccord data list`.")],
) -> None:
    """Bring data into the cache; every file's SHA-256 is checked."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    wanted = [data.item(name) for name in dict.fromkeys(names)]  # all known before the first comes
    console = Console()
    for item in wanted:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(item.name, total=item.size)
            place = data.fetch(item.name, partial(_show, bar, task))
        console.print(f"{item.name}: {place}", soft_wrap=True, highlight=False)
        console.print(f"  {item.licence}. {item.source}", soft_wrap=True, highlight=False)


def _show(bar: Progress, task: TaskID, done: int) -> None:
    bar.update(task, completed=done)
