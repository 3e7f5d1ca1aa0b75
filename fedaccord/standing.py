"""How a coordinator stands, as a table that is drawn anew: its sites, its rounds."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fedaccord.repeat import repeated

if TYPE_CHECKING:
    from fedaccord.accord import Accord
    from fedaccord.kit import CoordinatorKit

STALE = 10.0  # seconds after which what the coordinator wrote is no longer believed


class Standing:
    """What the coordinator's own files say, read anew each time it is drawn."""

    def __init__(self, kit: CoordinatorKit, accord: Accord) -> None:
        self.kit, self.accord = kit, accord

    def said(self) -> dict[str, Any]:
        """Read what the coordinator wrote last; {} if it never ran."""
        from fedaccord.server.coordinator import STATUS

        try:
            return dict(json.loads((self.kit.folder / STATUS).read_bytes()))
        except (OSError, ValueError):
            return {}

    def state(self, said: dict[str, Any]) -> str:
        """Say in words whether the coordinator is up."""
        if not said:
            return "never started"
        if said["state"] == "up" and not alive(int(said["pid"])):
            return "gone without a word (killed?); `fedaccord coordinator up` goes on with the run"
        if said["state"] == "up" and time.time() - float(said["time"]) > STALE:
            return f"silent for {time.time() - float(said['time']):.0f} s (process {said['pid']})"
        return f"{said['state']} (process {said['pid']}, {said['address']})"

    def __rich__(self) -> Group:
        """Draw the rounds, the sites and the state."""
        from fedaccord.runs import RunFolder
        from fedaccord.simulations.display import Progress

        said = self.said()
        parts: list[Any] = []
        run = Path(str(said.get("run", "")))
        if said and (run / "rounds.jsonl").exists():
            progress = Progress(self.accord, RunFolder(run))
            progress.catch_up()
            parts.append(progress.table())
            parts.append(Text(f"Run          {run}"))
        parts.append(self._sites(said))
        parts.append(Text(f"Coordinator  {self.state(said)}"))
        return Group(*parts)

    def _sites(self, said: dict[str, Any]) -> Table:
        table = Table("site", "here", "last heard", "asked to", box=None, pad_edge=False)
        members = self.kit.members()
        for site in self.accord.roster:
            about = dict(said.get("sites", {}).get(site, {}))
            up = said.get("state") == "up" and about.get("here")
            revoked = members[site].revoked if site in members else "not a member yet"
            heard = about.get("heard")
            table.add_row(
                site,
                Text("revoked" if revoked else "yes" if up else "no", "" if up else "yellow"),
                "never" if heard is None else f"{heard:.0f} s ago" if up else "",
                ", ".join(about.get("asked", ())) if up else "",
            )
        return table


@contextmanager
def followed(standing: Standing, tell: Callable[[str], None]) -> Iterator[None]:
    """Tell a line of each round as it is finished, for a log that nobody watches live."""
    from fedaccord.runs import RunFolder
    from fedaccord.simulations.display import Progress

    seen = dict[str, Progress]()

    def look() -> None:
        said = standing.said()
        run = str(said.get("run", ""))
        if said.get("pid") == os.getpid() and (Path(run) / "rounds.jsonl").exists():
            if run not in seen:
                seen[run] = Progress(standing.accord, RunFolder(Path(run)))
                seen[run].tell = tell
            seen[run].catch_up()

    try:
        with repeated(1.0, look):
            yield
    finally:
        look()


def alive(pid: int) -> bool:
    """Tell whether a process of this machine is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
