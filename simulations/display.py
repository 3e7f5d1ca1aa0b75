"""What a person sees of a simulation: a live table while it runs, and the outcome in words."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Message
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedaccord.accord import Accord
from fedaccord.privacy import accounting
from fedaccord.runs import RunFolder
from fedaccord.simulations import engine


class Progress:
    """A live table of finished rounds, read from the run's records, and of the round under way."""

    def __init__(self, accord: Accord, folder: RunFolder) -> None:
        self.accord, self.folder = accord, folder
        self.tell: Callable[[str], None] = lambda _: None
        self.began = time.monotonic()
        self.answered: list[str] = []
        self.rounds: list[dict[str, Any]] = []

    def on_reply(self, reply: Message) -> None:
        """Note a site's reply; catch up with the records at the start of a round."""
        kind = reply.metadata.message_type
        if kind == "train":
            self.catch_up()
        config: dict[str, Any] = {}
        if reply.has_content():
            config |= reply.content.config_records.get("config", {})
        word = {"train": "trained", "evaluate": "counted", "query.reserve": "reserved"}.get(kind)
        if word:
            self.answered.append(f"{config.get('site', '?')} {word}")
            self.answered = self.answered[-len(self.accord.roster) :]

    def catch_up(self) -> None:
        """Read the records that were appended since the last look."""
        path = self.folder.path / "rounds.jsonl"
        if not path.exists():
            return
        rounds = [record for record in self.folder.records() if record["kind"] == "round"]
        for record in rounds[len(self.rounds) :]:
            number, sites, *figures = row(record, self.accord.fairness.attributes[0])
            words = "accuracy {} (student {}), epsilon {}, parity difference {} (student {})"
            self.tell(f"round {number}: {sites} sites, {words.format(*figures)}")
        self.rounds = rounds

    def table(self) -> Table:
        """Show one row a round: accuracy of model and student, highest epsilon, parity."""
        rules, privacy = self.accord.fairness, self.accord.privacy
        cost = "epsilon: privacy is off."
        if privacy.enabled:
            cost = "epsilon: highest of the sites, spent so far/reserved, at delta "
            cost += f"{privacy.delta:g}; reserved is the claim, and holds whenever the run stops. "
            cost += "Spent is read off an odometer, which passes it towards the end."
        table = Table(
            title=Text(f"{self.accord.name}: {self.accord.purpose}"),
            caption=(
                f"accuracy: mean over sites. {cost} parity diff.: demographic, by "
                f"{rules.attributes[0]}, over all sites, with its {100 * rules.confidence:g} % "
                "interval."
            ),
            title_justify="left",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        headings = ["round", "sites", "accuracy\nmodel", "\nstudent", "epsilon"]
        headings += ["parity diff.\nmodel", "\nstudent"]
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for record in self.rounds:
            table.add_row(*row(record, rules.attributes[0]))
        return table

    def __rich__(self) -> Group:
        """Draw the table and a line on the round under way."""
        done, planned = len(self.rounds), self.accord.rounds.rounds
        spent = time.monotonic() - self.began
        left = f"{spent / done * max(0, planned - done):.0f} s left" if done else "planning privacy"
        line = f"round {min(done + 1, planned)} of {planned}, {left}   {', '.join(self.answered)}"
        return Group(self.table(), Text(line, style="dim"))


def row(record: dict[str, Any], attribute: str) -> list[str]:
    """Format one round's record as a row of the table."""
    audit, epsilon = record["audit"] or {}, list(record["epsilon"].values())
    private = all(site["odometer"] != "infinite" for site in epsilon)
    highest = "infinite"
    if private:
        so_far = accounting.show(max(site["odometer"] for site in epsilon))
        highest = f"{so_far}/{accounting.show(max(site['reserved'] for site in epsilon))}"
    cells = [str(record["round"]), str(len(record["aggregated"]))]
    for section in ("model", "student"):
        figures = audit.get(section, {}).get("figures")
        mean = figures and figures["accuracy"]["mean"]
        cells.append("-" if mean is None else f"{mean:.3f}")
    cells.append(highest)
    for section in ("model", "student"):
        figures = audit.get(section, {}).get("figures")
        cells.append(interval(figures, attribute) if figures else "-")
    return cells


def interval(figures: dict[str, Any], attribute: str) -> str:
    """Format a demographic parity difference with its interval, or say that it has none."""
    figure = figures["attributes"][attribute]["all"]["demographic_parity_difference"]
    if figure["value"] is None:
        return "not assessable"
    low, high = (f"{figure[end]:.2f}".removeprefix("0") for end in ("low", "high"))
    return f"{figure['value']:.2f} [{low}, {high}]"


def quiet() -> None:
    """Keep Flower's log lines out of the table; what goes wrong still shows."""
    for name in ("flwr", "flower"):
        logging.getLogger(name).setLevel(logging.WARNING)


def simulate(
    accord: Accord, where: str, run: Path, sites: Path, console: Console, resume: bool = False
) -> Table:
    """Run an accord in this process and show it live.

    Args:
        accord: the accord, already loaded.
        where: the file or name that it came from.
        run: the folder that the run leaves.
        sites: where the simulated sites keep ledgers and policies.
        console: where the table is drawn.
        resume: whether `run` is a run that was cut short.

    Returns:
        The table of all rounds.

    Raises:
        FedAccordError: an accord that does not hold together, or that the sites refuse.
    """
    quiet()
    progress = Progress(accord, RunFolder(run))
    if not console.is_terminal:  # a log gets a line a round
        progress.tell = partial(console.print, soft_wrap=True, markup=False, highlight=False)
    with Live(progress, console=console, transient=True, refresh_per_second=4):
        engine.simulate(where, run, sites, len(accord.roster), progress.on_reply, resume)
    progress.catch_up()
    return progress.table()
