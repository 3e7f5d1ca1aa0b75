"""A deployment on one machine: a coordinator and its sites as real processes over the link."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedaccord import accord as accords
from fedaccord.accord import Accord
from fedaccord.errors import RunError

STOP = 10.0  # seconds that a process has to end by itself
LAST = 2_000  # characters of a log that are shown when something fails
Tell = Callable[[str], None]


def free_ports(count: int) -> list[int]:
    """Find ports of the loopback that nobody listens on, all held until all are found."""
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in held]
    for one in held:
        one.close()
    return ports


class Deployment:
    """Kits in a folder, and the processes that were started with them; each is ended by its pid."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def coordinator(self) -> Path:
        """The coordinator's kit."""
        return self.folder / "coordinator"

    @property
    def accord(self) -> Accord:
        """The accord with all keys."""
        return accords.load(self.coordinator / "accord.toml")

    def provision(self, accord: str | Path) -> None:
        """Make the kits of an accord, all keys in one place, for an address of this machine.

        Raises:
            RunError: the command failed; the error has its words.
        """
        address = f"127.0.0.1:{free_ports(1)[0]}"
        words = ["provision", str(accord), "--out", str(self.folder), "--demo"]
        done = subprocess.run(
            [*command(), *words, "--address", address], capture_output=True, text=True
        )
        if done.returncode:
            raise RunError(f"provision failed: {done.stderr.strip()[-LAST:]}")

    def start(self, name: str) -> None:
        """Start the coordinator, or the site of a name."""
        words = ["site", "join", str(self.folder / name)]
        if name == "coordinator":
            words = ["coordinator", "up", str(self.coordinator)]
        log = self.log(name)
        with log.open("ab") as file:
            self.processes[name] = subprocess.Popen(
                [*command(), *words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"},
            )

    def log(self, name: str) -> Path:
        """Return the file that gets what a process prints."""
        return self.folder / f"{name}.out"

    def kill(self, name: str) -> None:
        """End a process as a power cut would."""
        process = self.processes.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def stop(self) -> dict[str, int]:
        """Ask every process to end, the sites first; one that does not is killed.

        Returns:
            Their exit codes.
        """
        for process in reversed(self.processes.values()):
            process.send_signal(signal.SIGTERM)
        codes = {}
        for name, process in self.processes.items():
            try:
                codes[name] = process.wait(STOP)
            except subprocess.TimeoutExpired:
                process.kill()
                codes[name] = process.wait()
        self.processes.clear()
        return codes

    def wait(self, seconds: float, tell: Tell) -> None:
        """Wait until the coordinator has come to its end; hand on what it prints.

        Raises:
            RunError: it failed, or took longer than so many seconds.
        """
        process, end, seen = self.processes["coordinator"], time.monotonic() + seconds, 0
        while True:
            code = process.poll()
            data = self.log("coordinator").read_bytes()
            lines = data[seen:].rpartition(b"\n")[0]
            seen += len(lines) + 1 if lines else 0
            for line in lines.decode(errors="replace").splitlines():
                tell(line)
            if code == 0:
                return
            last = data.decode(errors="replace")[-LAST:]
            if code is not None:
                raise RunError(f"the coordinator ended with exit code {code}. It said: {last}")
            if time.monotonic() > end:
                raise RunError(f"the run took longer than {seconds:g} s. It said: {last}")
            time.sleep(0.1)

    def run_folder(self) -> Path:
        """Return the folder of the newest run."""
        return max((self.coordinator / "runs").iterdir(), key=lambda folder: folder.stat().st_mtime)


def command() -> list[str]:
    """Return the words that start this installation's command line."""
    return [sys.executable, "-m", "fedaccord.cli"]


@contextmanager
def deployed(accord: str | Path, folder: Path) -> Iterator[Deployment]:
    """Make kits for an accord and start its coordinator and all its sites; end them afterwards."""
    deployment = Deployment(folder)
    deployment.provision(accord)
    try:
        for name in ("coordinator", *deployment.accord.roster):
            deployment.start(name)
        yield deployment
    finally:
        deployment.stop()
