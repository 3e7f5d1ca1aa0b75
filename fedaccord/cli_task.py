"""Commands on a task: `check` counts its records and names faults; `plot` pictures the split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedaccord.errors import AccordError, TaskError

if TYPE_CHECKING:
    from rich.table import Table

    from fedaccord.accord import Accord
    from fedaccord.tasks import Records, SiteData, Task

app = typer.Typer(
    no_args_is_help=True, help="Where records come from: check them, see their split."
)

MOST_LINES = 50  # of records at fault that are printed, unless --all


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


@app.command()
def plot(
    task: Annotated[
        str, typer.Argument(help="A TOML file, or the name of a bundled accord or of a task.")
    ],
    out: Annotated[Path, typer.Option(help="The picture: .svg, .png or .pdf.")] = Path("split.svg"),
    partition: Annotated[
        str,
        typer.Option(
            help="Pool all records and divide them anew: iid, dirichlet:ALPHA (of labels), "
            "sizes:ALPHA, shards:K (a site), column:NAME (label or an attribute) or natural."
        ),
    ] = "",
    sites: Annotated[
        int | None, typer.Option(help="How many sites --partition makes (default: as many).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of --partition.")] = 0,
) -> None:
    """Draw how a task's records fall over its sites: sizes, labels, groups.

    It reads the records of every site and draws their counts without noise: for simulated or public
    data, all of it on this machine. A site that is asked for it should decline.
    """
    from fedaccord.simulations import split_plot
    from fedaccord.simulations.partition import PartitionFault

    if out.suffix.lower() not in split_plot.FORMATS:
        known = ", ".join(split_plot.FORMATS)
        raise TaskError(f"--out {out}: is not one of {known}. Give it one of these endings.")
    if not out.resolve().parent.is_dir() or out.is_dir():
        raise TaskError(f"--out {out}: its folder does not exist, or it is one. Name a file.")
    if sites is not None and not partition:
        raise TaskError(f"--sites {sites}: needs --partition, which says how. Add it.")
    found, names = _named(task)
    split = split_plot.of_task(found, names)
    if not len(split.home):
        raise TaskError(f"{task}: its sites have no record. Put their records there.")
    if partition:
        try:
            split = split_plot.divided(split, partition, sites, seed)
        except PartitionFault as fault:
            raise TaskError(f"--partition {partition}: {fault}") from None
    if len(split.sites) > split_plot.MOST_SITES:
        most = split_plot.MOST_SITES
        raise TaskError(f"{len(split.sites)} sites: a picture shows {most} at most. Take fewer.")
    split_plot.write(split, out)
    print(out)


def _named(name: str) -> tuple[Task, list[str]]:
    """Find a task and its sites by an accord's file or name, or by the task's own name."""
    from fedaccord import accord as accords
    from fedaccord import registry, tasks

    if not Path(name).is_file() and name not in accords.bundled():
        known = registry.known("task")
        if name not in known:
            names = sorted({*known, *accords.bundled()})
            raise AccordError(
                f'"{name}" is no file, no bundled accord and no task.'
                f"{registry.nearest(name, names)} Known: {', '.join(names)}."
            )
        found = tasks.load_task(name)
        sites = list(found.sites)
    else:
        agreed = accords.load(name)
        found = tasks.task_of(agreed, accords.find(name).parent)
        tasks.check_fits(agreed, found)
        sites = list(agreed.roster)
    tasks.refuse_missing(found, sites)
    return found, sites


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
