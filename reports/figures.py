"""The report's figures: inline SVG drawn by matplotlib, the same bytes for the same facts."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Row = dict[str, Any]
Mark = tuple[float, str, str]  # height, words, colour

# Okabe and Ito's colours, which people with any colour vision tell apart.
COLOURS = {"model": "#0072B2", "student": "#D55E00"}
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
INK, SOFT, GRID = "#222222", "#666666", "#DDDDDD"
STYLE: Any = {  # matplotlib types this as a dict of 290 literal keys
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.0,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
}


def draw(content: Row) -> dict[str, str]:
    """Draw every figure that a run's facts can carry.

    Args:
        content: what `facts` returned.

    Returns:
        SVG elements by name: "accuracy", "epsilon", and for each attribute "parity/NAME" and
        "selection/NAME". A figure without data is left out.
    """
    out: dict[str, str] = {}
    if content["accuracy"]["rounds"]:
        out["accuracy"] = accuracy(content["accuracy"]["rounds"])
    if content["privacy"]["headline"] and content["privacy"]["rounds"]:
        out["epsilon"] = epsilon(content["privacy"])
    for attribute in content["fairness"]["attributes"]:
        name, bound = attribute["attribute"], content["fairness"]["max_parity_difference"]
        if attribute["rounds"]:
            out[f"parity/{name}"] = parity(attribute, bound)
            out[f"selection/{name}"] = selection(attribute)
    return out


def accuracy(rounds: list[Row]) -> str:
    """Draw the mean accuracy over the sites by round, with the band from lowest to highest site."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "accuracy"}):
        figure, panels = _panels(rounds)
        for which, axes in panels.items():
            rows = [row for row in rounds if row[which] and row[which]["mean"] is not None]
            _prepare(axes, which, [row["round"] for row in rounds])
            if not rows:
                _empty(axes, "not assessable")
                continue
            x = [row["round"] for row in rows]
            axes.set_ylim(0, 1)
            by_site = [
                [s["value"] for s in row[which]["sites"] if s["value"] is not None] for row in rows
            ]
            low, high = [min(v) for v in by_site], [max(v) for v in by_site]
            axes.fill_between(x, low, high, color=COLOURS[which], alpha=0.15, linewidth=0)
            mean = [row[which]["mean"] for row in rows]
            axes.plot(x, mean, color=COLOURS[which], marker="o", markersize=3)
            ends = [(high[-1], "highest site", SOFT), (low[-1], "lowest site", SOFT)]
            _label(axes, [(mean[-1], "mean", COLOURS[which]), *ends])
        panels["model"].set_ylabel("share predicted right")
        return _svg(figure, "Accuracy by round, mean over sites with the range of the sites.")


def epsilon(privacy: Row) -> str:
    """Draw what each site has spent so far by the odometer, against the reserved plan and the cap.

    Sites that have the same points, claim, ledger and cap share a line.
    """
    curves: dict[tuple[Any, ...], list[str]] = {}
    for site in privacy["sites"]:
        points = tuple(
            (row["round"], mine["epsilon"])
            for row in privacy["rounds"]
            for mine in row["sites"]
            if mine["site"] == site["site"]
        )
        if not points:
            continue
        key = (points, site["epsilon"], site["ledger"]["epsilon"], site["ledger"]["cap"])
        curves.setdefault(key, []).append(site["site"])
    last = max(*(s["rounds_reserved"] for s in privacy["sites"]), privacy["rounds"][-1]["round"])
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "epsilon"}):
        figure = Figure(figsize=(7.6, 3.2), layout="constrained")
        axes = figure.subplots()
        levels: dict[tuple[float, str, str], set[str]] = {}
        for place, ((points, claim, total, cap), sites) in enumerate(curves.items()):
            colour = CYCLE[place % len(CYCLE)]
            names = ", ".join(sites) if len(sites) < 5 else f"{len(sites)} sites alike"
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=colour, marker="o", markersize=3, label=f"spent by {names}")
            levels.setdefault((claim, "reserved: the claim", "--"), set()).add(colour)
            if not isinstance(total, str | None) and total > claim + 1e-3:
                levels.setdefault((total, "whole ledger", ":"), set()).add(colour)
            if not isinstance(cap, str):
                levels.setdefault((cap, "cap of the site", "-"), set()).add(INK)
        marks: list[Mark] = []
        for (height, words, style), colours in levels.items():
            colour = colours.pop() if len(colours) == 1 else SOFT
            axes.axhline(height, color=colour, linestyle=style, linewidth=1.3)
            marks.append((height, words, colour))
        axes.legend(loc="best", frameon=False, labelcolor="linecolor")
        _prepare(axes, "", list(range(1, last + 1)))
        highest = max(y for points, *_ in curves for _, y in points)
        axes.set_ylim(0, 1.06 * max(highest, *(y for y, *_ in marks)))
        axes.set_ylabel("epsilon")
        _label(axes, marks)
        words = "Epsilon spent by site and round, against the reserved epsilon and the cap."
        return _svg(figure, words)


def parity(attribute: Row, bound: float | None) -> str:
    """Draw the demographic parity difference by round with the band of its interval."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": f"parity {attribute['attribute']}"}):
        rounds = attribute["rounds"]
        figure, panels = _panels(rounds)
        for which, axes in panels.items():
            _prepare(axes, which, [row["round"] for row in rounds])
            rows = [row for row in rounds if row[which] and row[which]["value"] is not None]
            if not rows:
                _empty(axes, "not assessable")
                continue
            x, colour = [row["round"] for row in rows], COLOURS[which]
            axes.set_ylim(0, 1)
            low, value, high = ([row[which][k] for row in rows] for k in ("low", "value", "high"))
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(x, value, color=colour, marker="o", markersize=3)
            marks = [(value[-1], "difference", colour), (low[-1], "its interval", SOFT)]
            if bound is not None:
                axes.axhline(bound, color=INK, linestyle="--", linewidth=1)
                marks.append((bound, "agreed bound", INK))
            _label(axes, marks)
        panels["model"].set_ylabel("largest less smallest\nselection rate")
        by = f"by {attribute['attribute']} and round, with the band of its interval"
        return _svg(figure, f"Demographic parity difference {by}.")


def selection(attribute: Row) -> str:
    """Draw the selection rate of each group in the last round with its interval."""
    models, round_number = attribute["last"]["models"], attribute["last"]["round"]
    names = [row["group"] for row in models[0]["groups"]]
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": f"selection {attribute['attribute']}"}):
        figure = Figure(figsize=(7.6, 0.9 + 0.55 * len(names)), layout="constrained")
        axes = figure.subplots()
        axes.grid(axis="x", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        for place, model in enumerate(models):
            shift = (place - (len(models) - 1) / 2) * 0.28
            for line, row in enumerate(model["groups"]):
                rate, y = row["selection_rate"], line + shift
                if rate["value"] is None:
                    axes.text(0.01, y, f"{model['which']}: not assessable", va="center", color=SOFT)
                    continue
                colour = COLOURS[model["which"]]
                axes.plot([rate["low"], rate["high"]], [y, y], color=colour, linewidth=2)
                axes.plot(rate["value"], y, "o", color=colour, markersize=6)
                axes.annotate(
                    model["which"], (rate["high"], y), (5, 0), textcoords="offset points",
                    va="center", color=colour,
                )  # fmt: skip
        axes.set_yticks(range(len(names)), names, color=INK)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("selection rate")
        by = f"by {attribute['attribute']} with intervals, round {round_number}"
        return _svg(figure, f"Selection rate {by}.")


def _panels(rounds: list[Row]) -> tuple[Figure, dict[str, Axes]]:
    """Make a panel for the model and, where there is one, for the student."""
    shown = [which for which in COLOURS if which == "model" or any(row[which] for row in rounds)]
    figure = Figure(figsize=(7.6, 3.0), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    return figure, dict(zip(shown, panels, strict=True))


def _prepare(axes: Axes, title: str, rounds: list[int]) -> None:
    """Set up an axis of rounds."""
    axes.set_title(title)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("round")
    axes.margins(x=0.02)
    axes.set_xlim(min(rounds) - 0.4, max(rounds) + 0.4)


def _empty(axes: Axes, words: str) -> None:
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", color=SOFT)


def _label(axes: Axes, marks: list[Mark]) -> None:
    """Write labels to the right of the panel, each near its height and clear of the others."""
    low, high = axes.get_ylim()
    free = low
    for y, words, colour in sorted(set(marks)):
        place = max(y, free)
        free = place + 0.075 * (high - low)
        axes.annotate(
            words, (1.0, place), (4, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", va="center", color=colour, annotation_clip=False,
        )  # fmt: skip


def _svg(figure: Figure, words: str) -> str:
    """Render a figure as one SVG element that says in words what it shows."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[a-zA-Z][a-zA-Z0-9.]*_\d+"', "", svg)  # not unique over figures, not used
    svg = re.sub(r' width="[\d.]+pt"| height="[\d.]+pt"| xmlns(:xlink)?="[^"]*"', "", svg)
    label = words.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()
