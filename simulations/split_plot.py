"""A picture of a split: sizes, label shares and group shares of each site, a row a site."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedaccord.simulations import partition
from fedaccord.simulations.partition import Indices
from fedaccord.tasks import Records, SiteData, Task

# Paul Tol's "muted" colours, which people with any colour vision tell apart, for labels; grey is
# for the rest of them. Groups have others (Okabe and Ito's), so that nobody mixes the two up.
LABELS = ("#332288", "#DDCC77", "#117733", "#88CCEE", "#882255", "#44AA99", "#CC6677", "#999933",
          "#AA4499")  # fmt: skip
GROUPS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#F0E442")
REST, EMPTY = "#C8C8C8", "#F4F4F4"
TRAIN, HELD = "#4D4D4D", "#B5B5B5"
INK, SOFT = "#222222", "#666666"
STYLE: Any = {  # matplotlib types this as a dict of 290 literal keys
    "svg.fonttype": "path",  # looks the same without our fonts
    "svg.hashsalt": "split",
    "text.parse_math": False,
    "font.size": 9.0,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": INK,
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
}
FORMATS = (".svg", ".png", ".pdf")
MOST_SITES = 200  # a row each; more cannot be read
LETTER = 0.073  # width of a letter, inches
LINE = 0.19  # height of a line of a legend, inches


@dataclass(frozen=True)
class Split:
    """Records and where they are.

    Attributes:
        title: what is shown.
        about: one line on how records were divided.
        sites: names.
        subjects: (n,), whose record each is.
        home: (n,), index of each record's site.
        held: (n,), whether a record is held out for evaluation; None where nothing says so.
        classes: names of the label's values.
        labels: (n,), index of a class.
        attributes: for each sensitive attribute the names of its groups.
        groups: for each sensitive attribute (n,), index of a group.
    """

    title: str
    about: str
    sites: tuple[str, ...]
    subjects: Indices
    home: Indices
    held: npt.NDArray[np.bool_] | None
    classes: tuple[str, ...]
    labels: Indices
    attributes: Mapping[str, tuple[str, ...]]
    groups: Mapping[str, Indices]


def of_task(task: Task, sites: Sequence[str]) -> Split:
    """Read the records of sites of a task; a subject is a person at a site, as in its ledger.

    Raises:
        TaskError: records that are not on this machine.
    """
    sizes = [[len(half) for half in _halves(task.site(site))] for site in sites]
    records = pooled(task, sites)
    place = np.repeat(np.arange(2 * len(sites)), np.ravel(sizes))
    return Split(
        title=f"{task.spec.name}: {_many(len(records), 'record')} at {_many(len(sites), 'site')}",
        about="As the task has them.",
        sites=tuple(sites),
        subjects=records.subjects,
        home=place // 2,
        held=place % 2 == 1,
        classes=task.spec.classes,
        labels=records.labels,
        attributes=task.spec.attributes,
        groups=records.groups,
    )


def pooled(task: Task, sites: Sequence[str]) -> Records:
    """Join the records of sites, training and held-out ones, in order of the sites given.

    A subject is a person at a site, as in the site's ledger: subjects are numbered anew.
    """
    halves = [half for site in sites for half in _halves(task.site(site))]
    place = np.repeat(np.arange(len(halves)), [len(half) for half in halves])
    ids = np.concatenate([half.subjects for half in halves])
    _, subjects = np.unique(np.stack([place // 2, ids]), axis=1, return_inverse=True)
    return Records(
        inputs=np.concatenate([half.inputs for half in halves]),
        labels=np.concatenate([half.labels for half in halves]),
        subjects=subjects.reshape(-1).astype(np.int64),
        groups={
            name: np.concatenate([half.groups[name] for half in halves])
            for name in task.spec.attributes
        },
    )


def divided(split: Split, how: str, sites: int | None, seed: int) -> Split:
    """Pool the records of a split and divide them anew (`partition.divide`).

    Raises:
        PartitionFault: as `partition.divide`.
    """
    columns = {"label": split.labels, **split.groups}
    rng = np.random.default_rng(seed)
    parts = partition.divide(how, columns, sites, rng, split.subjects, split.home)
    home = np.zeros(len(split.home), np.int64)
    for place, records in enumerate(parts):
        home[records] = place
    count, width = len(parts), len(str(len(parts)))
    name = split.title.partition(":")[0]
    seeded = "" if how == "natural" else f", seed {seed}"
    return replace(
        split,
        title=f"{name}: {_many(len(home), 'record')} at {_many(count, 'site')}",
        about=f"Simulated: the records of all sites, divided anew by {how}{seeded}.",
        sites=tuple(f"site-{place + 1:0{width}}" for place in range(count)),
        home=home,
        held=None,
    )


def _halves(data: SiteData) -> tuple[Records, Records]:
    return data.train, data.test


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def counted(home: Indices, codes: Indices, sites: int, kinds: int) -> Indices:
    """Count records by site and kind: (sites, kinds)."""
    return np.bincount(home * kinds + codes, minlength=sites * kinds).reshape(sites, kinds)


def folded(
    counts: Indices, names: Sequence[str], colours: Sequence[str]
) -> tuple[Indices, list[str], list[str]]:
    """Give each kind a colour; where colours run out, the rarest kinds become "N others", grey.

    Args:
        counts: (sites, kinds).
        names: of the kinds.
        colours: for the most frequent ones.

    Returns:
        Counts, names and colours of what is drawn, kinds in their own order.
    """
    if len(names) <= len(colours) + 1:
        return counts, list(names), [*colours, REST][: len(names)]
    frequent = np.sort(np.argsort(-counts.sum(axis=0), kind="stable")[: len(colours)])
    rest = np.setdiff1d(np.arange(len(names)), frequent)
    drawn = np.column_stack([counts[:, frequent], counts[:, rest].sum(axis=1)])
    said = [*(names[kind] for kind in frequent), f"{len(rest)} others"]
    return drawn, said, [*colours, REST]


def picture(split: Split) -> Figure:
    """Draw a split; the first row is all sites together.

    | case | drawn |
    |---|---|
    | a site without a record | an empty row, size 0 |
    | more than ten classes | the nine most frequent; the others as one, grey |
    | more than eight groups | the seven most frequent; the others as one, grey |

    Args:
        split: 1 to 200 sites.
    """
    sites = len(split.sites)
    labels = counted(split.home, split.labels, sites, len(split.classes))
    panels = [("label", *folded(labels, split.classes, LABELS), 4.6)]
    for name, every in split.attributes.items():
        of_groups = counted(split.home, split.groups[name], sites, len(every))
        panels.append((name, *folded(of_groups, every, GROUPS), 2.4))
    columns = [max(1, int(width / _entry(names))) for _, _, names, _, width in panels]
    lines = [math.ceil(len(panel[2]) / fit) for panel, fit in zip(panels, columns, strict=True)]
    row = 0.27 if sites <= 24 else 0.19
    left, gap, top = 0.35 + LETTER * max(7, *map(len, split.sites)), 0.3, 0.85 + LINE * max(lines)
    widths = [2.1, *(panel[4] for panel in panels)]
    width = left + sum(widths) + gap * len(panels) + 0.2
    height = top + row * (sites + 1.4) + 0.45
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        figure.text(0.15 / width, 1 - 0.3 / height, split.title, size=13, weight="bold")
        figure.text(0.15 / width, 1 - 0.53 / height, split.about, size=9, color=SOFT)
        at = left
        for place, wide in enumerate(widths):
            box = (at / width, 0.45 / height, wide / width, row * (sites + 1.4) / height)
            axes = figure.add_axes(box)
            at += wide + gap
            _prepare(axes, split.sites if place == 0 else None, sites, row)
            if place == 0:
                _sizes(axes, split)
                continue
            name, counts, names, colours, _ = panels[place - 1]
            _shares(axes, counts, names, colours, wide, row)
            _legend(axes, name, names, colours, columns[place - 1])
    return figure


def write(split: Split, file: Path) -> None:
    """Draw a split into a file (.svg, .png, .pdf); the same bytes for the same split as SVG."""
    with matplotlib.rc_context(STYLE):
        kind = file.suffix.lower()
        metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(kind)
        picture(split).savefig(file, format=kind[1:], dpi=150, metadata=metadata)


def _entry(names: Sequence[str]) -> float:
    """Width of an entry of a legend, inches."""
    return 0.36 + LETTER * max(map(len, names))


def _rows(sites: int) -> npt.NDArray[np.float64]:
    """Heights of the rows: all sites together at the top, a little apart from the others."""
    return np.concatenate([[-1.4], np.arange(sites, dtype=np.float64)])


def _prepare(axes: Axes, names: Sequence[str] | None, sites: int, row: float) -> None:
    """Lay out the rows of a panel, with their names in the first one."""
    axes.set_ylim(sites - 0.5, -1.9)
    axes.tick_params(length=0, labelsize=9 if row > 0.2 else 7.5)
    axes.tick_params(axis="x", length=2, labelsize=8)
    if names is None:
        axes.set_yticks([])
        return
    axes.set_yticks(_rows(sites), ["all", *names])
    axes.get_yticklabels()[0].set_fontweight("bold")


def _sizes(axes: Axes, split: Split) -> None:
    """Draw how many records each site has; the total is written, as its bar would hide theirs."""
    sites = len(split.sites)
    held = np.zeros(len(split.home), np.int64) if split.held is None else split.held.astype(int)
    counts = counted(split.home, held, sites, 2)
    rows, total = range(sites), [int(size) for size in counts.sum(axis=1)]
    axes.barh(rows, counts[:, 0], 0.8, color=TRAIN)
    axes.barh(rows, counts[:, 1], 0.8, left=counts[:, 0], color=HELD)
    most = max(1, *total)
    for place, size in zip(rows, total, strict=True):
        axes.text(size + most * 0.03, place, f"{size:,}", va="center_baseline", size=8)
    axes.text(0, -1.4, f"{len(split.home):,}", va="center_baseline", size=8, weight="bold")
    axes.set_xlim(0, most * 1.3)
    axes.locator_params(axis="x", nbins=4, integer=True)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    parted = split.held is not None
    words, colours = (["training", "held out"], [TRAIN, HELD]) if parted else ([" "], ["white"])
    _legend(axes, "records", words, colours, 2)


def _shares(
    axes: Axes,
    counts: Indices,
    names: Sequence[str],
    colours: Sequence[str],
    wide: float,
    row: float,
) -> None:
    """Draw what share of each site every kind has; its name stands in a bar that has the room."""
    every = np.vstack([counts.sum(axis=0), counts])
    total = every.sum(axis=1, keepdims=True)
    shares = every / np.maximum(total, 1)
    starts = np.cumsum(shares, axis=1) - shares
    rows = _rows(len(counts))
    axes.barh(rows, 1.0, 0.8, color=EMPTY)
    for kind, (name, colour) in enumerate(zip(names, colours, strict=True)):
        part, start = shares[:, kind], starts[:, kind]
        axes.barh(rows, part, 0.8, left=start, color=colour, edgecolor="white", linewidth=0.6)
        for place, share, begin in zip(rows, part, start, strict=True):
            short = f"{share:.0%}" if len(names) < 4 else name
            fit = [words for words in (f"{name}: {share:.0%}", short) if _fits(words, share * wide)]
            if fit:
                axes.text(
                    begin + share / 2,
                    place,
                    fit[0],
                    ha="center",
                    va="center_baseline",
                    size=7.5 if row > 0.2 else 6.5,
                    color=_ink(colour),
                )
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    first, _, last = axes.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")


def _fits(words: str, wide: float) -> bool:
    """Whether words fit into a bar, width in inches."""
    return wide >= 0.068 * len(words) + 0.08


def _ink(colour: str) -> str:
    """Choose black or white for words on a colour, whichever stands out more (WCAG 2.2)."""
    red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "white" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "black"


def _legend(
    axes: Axes, title: str, names: Sequence[str], colours: Sequence[str], columns: int
) -> None:
    """Write a legend above a panel, names in reading order, left to right."""
    handles = [matplotlib.patches.Patch(color=colour) for colour in colours]
    lines = math.ceil(len(names) / columns)
    order = [n for c in range(columns) for n in range(c, len(names), columns)]
    legend = axes.legend(
        [handles[n] for n in order],
        [names[n] for n in order],
        title=title,
        ncols=min(columns, len(names)),
        loc="lower left",
        bbox_to_anchor=(0, 1),
        frameon=False,
        borderaxespad=0.2,
        borderpad=0,
        handlelength=1,
        handleheight=1,
        handletextpad=0.4,
        columnspacing=1.2,
        labelspacing=0.35,
        alignment="left",
        fontsize=8.5 if lines < 4 else 8,
    )
    legend.get_title().set_fontweight("bold")
