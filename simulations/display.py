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

FEW = 12  # sites whose answers are named one by one; of more they are counted
WORDS = {"train": "trained", "evaluate": "counted", "query.reserve": "reserved"}


class Answers:
    """Who has answered the question under way: a line that is no longer for 10,000 sites."""

    def __init__(self) -> None:
        self._kind, self._count, self._began = "", 0, time.monotonic()
        self._last: list[str] = []

    def note(self, kind: str, site: str) -> None:
        """Note an answer to a message of a kind; another kind than before is another question."""
        if kind != self._kind:
            self.ask(kind)
        self._count += 1
        self._last = [*self._last, f"{site} {WORDS[kind]}"][-FEW:]

    def ask(self, kind: str) -> None:
        """Start to count anew."""
        self._kind, self._count, self._began = kind, 0, time.monotonic()

    def line(self, sites: int) -> str:
        """Name the answers of the last few questions, or count those of this one.

        Args:
            sites: how many there are in the run.
        """
        if sites <= FEW or not self._count:
            return ", ".join(self._last[-sites:])
        pace = self._count / max(time.monotonic() - self._began, 1e-3)
        return f"{self._count:,} sites {WORDS[self._kind]}, {pace:,.0f} a second"


class Progress:
    """A live table of finished rounds, read from the run's records, and of the round under way."""

    def __init__(self, accord: Accord, folder: RunFolder) -> None:
        self.accord, self.folder = accord, folder
        self.tell: Callable[[str], None] = lambda _: None
        self.began = time.monotonic()
        self.answers = Answers()
        self._read = -1  # bytes of the records at the last look
        self.rounds: list[dict[str, Any]] = []

    def on_reply(self, reply: Message) -> None:
        """Note a site's reply; catch up with the records at the start of a round."""
        kind = reply.metadata.message_type
        if kind == "train":
            self.catch_up()
        config: dict[str, Any] = {}
        if reply.has_content():
            config |= dict(reply.content.get("config", {}))  # `config_records` would keep it alive
        if kind in WORDS:
            self.answers.note(kind, str(config.get("site", "?")))

    def catch_up(self) -> None:
        """Read the records that were appended since the last look."""
        path = self.folder.path / "rounds.jsonl"
        size = path.stat().st_size if path.exists() else -1
        if size == self._read:  # asked at every reply, and one line can name thousands of sites
            return
        self._read = size
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
        answers = self.answers.line(len(self.accord.roster))
        line = f"round {min(done + 1, planned)} of {planned}, {left}   {answers}"
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
