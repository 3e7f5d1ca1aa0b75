"""Commands on a task: `task check` counts each site's records and names every fault in them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedaccord.errors import AccordError, TaskError

if TYPE_CHECKING:
    from rich.table import Table

    from fedaccord.accord import Accord
    from fedaccord.tasks import Records, SiteData, Task

app = typer.Typer(no_args_is_help=True, help="Where records come from: check them at the site.")

MOST_LINES = 50  # of records at fault that are printed, unless --all


@app.callback()
def group() -> None:
    """Keep `check` a command of its own name, though it is the only one."""


@app.command()
def check(
    accord: Annotated[
        str, typer.Argument(help="A TOML file, or the name of a bundled accord (heart).")
    ],
    site: Annotated[str, typer.Option(help="One site's name in the accord (default: all).")] = "",
    data: Annotated[
        Path | None,
        typer.Option(
            help="The site's own folder of data sets, as its node config has it (default: records "
            "lie beside the accord)."
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Print every fault there is.")] = False,
) -> None:
    """Count each site's records by split, class and group; exit code 2 where one is at fault.

    What it prints holds values of private records: it is for the site's own console.
    """
    from rich.console import Console

    from fedaccord import accord as accords
    from fedaccord import registry, tasks

    agreed = accords.load(accord)
    task = tasks.task_of(agreed, accords.find(accord).parent, data)
    tasks.check_fits(agreed, task)
    if site and site not in agreed.roster:
        raise AccordError(
            f'--site {site}: accord "{agreed.name}" has no such site.'
            f"{registry.nearest(site, agreed.roster)} Its sites: {', '.join(agreed.roster)}."
        )
    loaded, faults = _load(agreed, task, [site] if site else list(agreed.roster))
    if loaded:
        Console().print(_table(task, loaded))
    print("Counts and faults are for this site's own eyes: they are not noised.")
    shown = faults if every else faults[:MOST_LINES]
    for line in shown:
        print(f"FAULT  {line}")
    if len(shown) < len(faults):
        print(f"FAULT  {len(faults) - len(shown)} more; --all prints them")
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    if faults:
        raise TaskError(
            f"{accord}: {count} in the records of task {task.spec.name}. A record at fault is left "
            "out; mend what the lines above name."
        )
    print(f"{accord}: no fault found in the records of task {task.spec.name}")


def _load(
    agreed: Accord, task: Task, names: list[str]
) -> tuple[dict[str, SiteData], list[str]]:  # fmt: skip
    """Read the sites' records; list what is wrong, site by site and over all of them."""
    from fedaccord import own_check
    from fedaccord.own import Loaded, OwnTask

    found: dict[str, Loaded] = {}
    data: dict[str, SiteData] = {}
    faults: list[str] = []
    for name in names:
        try:
            if isinstance(task, OwnTask):
                found[name] = task.load(name)
                data[name] = found[name].data
                faults += [str(fault) for fault in found[name].found]
            else:
                data[name] = task.site(name)
        except TaskError as fault:
            faults.append(f"site {name}: {fault}")
            continue
        faults += own_check.sizes(agreed, name, data[name])
    if isinstance(task, OwnTask) and found:
        faults += own_check.columns(task, found) + own_check.shared(task, found)
        task.public(1, agreed.seed)  # what is public is wrong for everybody, so it raises
    return data, list(dict.fromkeys(faults))


def _table(task: Task, loaded: dict[str, SiteData]) -> Table:
    """Lay the counts out: a row for each site and split, a column for each class and group."""
    from rich.table import Table

    spec = task.spec
    groups = [
        (a, at, group) for a, names in spec.attributes.items() for at, group in enumerate(names)
    ]
    table = Table(title=f"task {spec.name}: records", title_justify="left")
    for heading in ("site", "split"):
        table.add_column(heading)
    for heading in ("subjects", "records", *spec.classes):
        table.add_column(heading, justify="right")
    for attribute, _, group in groups:
        table.add_column(f"{attribute}\n{group}", justify="right")
    for name, data in loaded.items():
        for split, records in (("train", data.train), ("test", data.test)):
            table.add_row(name, split, *_counts(records, len(spec.classes), groups))
    return table


def _counts(records: Records, classes: int, groups: list[tuple[str, int, str]]) -> list[str]:
    """Count subjects, records, records of each class and of each group."""
    import numpy as np

    found = [len(np.unique(records.subjects)), len(records)]
    found += [int((records.labels == label).sum()) for label in range(classes)]
    found += [int((records.groups[attribute] == at).sum()) for attribute, at, _ in groups]
    return [str(count) for count in found]
