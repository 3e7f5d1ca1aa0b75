"""Whole deployments for tests: real processes on 127.0.0.1, killed, stopped and started at will."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from wards import faults, small_accord, toml

from fedaccord.privacy.ledger import Ledger
from fedaccord.runs import RunFolder
from fedaccord.server import checkpoint
from fedaccord.simulations.deployment import free_ports

SITES = ["cleveland", "hungary", "va"]
STEPS = ["invite", "train", "gate", "aggregate", "distil", "audit", "record", "decide"]
Record = dict[str, Any]


def accord_file(folder: Path, private: bool = False, **tables: Any) -> Path:
    """Write an accord of three sites whose rounds take a few hundredths of a second."""
    data = small_accord() | {
        "sites": [{"name": name, "subjects": 100} for name in SITES],
        "model": {"name": "mlp", "options": {"hidden": 3}},
        "rounds": {"rounds": 3, "spare_rounds": 3, "min_sites": 2, "timeout": 30.0},
        "strategy": {"name": "fedavgm", "averaging": 0.5},
        "distillation": {"enabled": False},  # test_resume.py kills runs that have it
    }
    data["privacy"] = data["privacy"] | {"enabled": private}
    for table, keys in tables.items():
        data[table] = data[table] | keys
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "accord.toml"
    path.write_text("".join(f"{key} = {toml(value)}\n" for key, value in data.items()))
    return path


class Nursery:
    """A process that has imported everything and forks others from itself."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("nursery.py")
        root = Path(__file__).resolve().parents[1]
        with tempfile.TemporaryDirectory() as folder:
            accord = accord_file(Path(folder), private=True, rounds={"rounds": 1})
            self._begin([sys.executable, str(script), str(accord)], root)

    def _begin(self, words: list[str], root: Path) -> None:
        env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            cwd=root,
            text=True,
        )
        self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the nursery ended"
        return json.loads(line)

    def ask(self, **order: Any) -> Any:
        """Send a request; return the answer."""
        assert self._process.stdin is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        """End it, and with it whatever it forked."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(10)


@dataclass
class Running:
    """A process that a nursery forked."""

    nursery: Nursery
    pid: int

    @property
    def code(self) -> int | None:
        """How it ended; None while it runs."""
        found: int | None = self.nursery.ask(do="poll", pid=self.pid)["code"]
        return found

    def wait(self, seconds: float = 60.0) -> int:
        """Wait for its end; a process that does not end is a failure."""
        end = time.monotonic() + seconds
        while (code := self.code) is None:
            assert time.monotonic() < end, f"process {self.pid} does not end"
            time.sleep(0.01)
        return code

    def signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.code is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it as a power cut does."""
        self.signal(signal.SIGKILL)
        self.wait()

    def stop(self) -> int:
        """Ask it to end; how it did."""
        self.signal(signal.SIGTERM)
        return self.wait(20.0)


def fork(what: str, log: str, **order: Any) -> Running:
    """Start a process; see nursery.py for what it may be and do."""
    return Running(nursery(), nursery().ask(do="fork", what=what, log=log, **order)["pid"])


def straight(accord: Path, folder: Path) -> Path:
    """Run an accord in the in-process engine, in a process of its own; the run's folder."""
    folder.mkdir(parents=True)
    about = {"accord": str(accord), "run": str(folder / "run"), "sites": str(folder / "sites")}
    done = fork("engine", str(folder / "log"), nodes=len(SITES), **about)
    assert done.wait() == 0, (folder / "log").read_text()
    return folder / "run"


@dataclass
class Deployment:
    """The kits of an accord, and the processes that use them."""

    accord: Path
    kits: Path
    change: Record = field(default_factory=dict)
    running: dict[str, Running] = field(default_factory=dict)
    port: int = 0
    dialled: int = 0
    join_wait: int = 60

    def __enter__(self) -> Deployment:
        self.port = self.port or free_ports(1)[0]
        self.dialled = self.dialled or self.port
        words = [str(self.accord), "--out", str(self.kits), "--demo"]
        words += ["--address", f"127.0.0.1:{self.dialled}"]
        log = str(self.kits.with_suffix(".log"))
        made = fork("command", log, words=["provision", *words])
        assert made.wait() == 0, Path(log).read_text()
        file = self.kits / "coordinator" / "coordinator.toml"
        text = file.read_text().replace(f"127.0.0.1:{self.dialled}", f"127.0.0.1:{self.port}", 1)
        file.write_text(text.replace("join_wait = 60.0", f"join_wait = {self.join_wait}.0"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, _: TracebackType | None
    ) -> None:
        for process in self.running.values():
            process.kill()

    def start(self, *names: str, **change: Any) -> None:
        """Start processes: "coordinator", or a site by its name; none of them twice."""
        for name in names:
            assert name not in self.running or self.running[name].code is not None
            what = name if name == "coordinator" else "site"
            about = {"kit": str(self.kits / name), "change": self.change | change}
            if what == "site":
                about["change"] |= {"notes": str(self.kits / f"{name}.read")}
            self.running[name] = fork(what, str(self.log(name)), **about)

    def start_all(self) -> None:
        """Start the coordinator and every site."""
        self.start("coordinator", *SITES)

    def play(self, deaths: dict[str, list[Any]], seconds: float = 60.0) -> int:
        """Run to the end; each process dies as it is told, begins again, and dies of the next.

        Args:
            deaths: by process, what `nursery.prepare` makes it die of: a step or a point.
            seconds: after which it is a failure.

        Returns:
            How often one died.
        """
        left, died = {name: list(found) for name, found in deaths.items()}, 0
        end = time.monotonic() + seconds

        def begin(name: str) -> None:
            kind = "dies in step" if name == "coordinator" else "dies"
            mine = left.get(name, [])
            self.start(name, **({kind: mine.pop(0)} if mine else {}))

        for name in ("coordinator", *SITES):
            begin(name)
        while self.running["coordinator"].code != 0:
            assert time.monotonic() < end, f"it does not end\n{self.logs()}"
            for name, process in list(self.running.items()):
                code = process.code
                if code == -signal.SIGKILL:
                    died += 1
                    begin(name)
                assert code in (None, 0, -signal.SIGKILL), self.logs()
            time.sleep(0.01)
        self.finish()
        return died

    def log(self, name: str) -> Path:
        """What a process wrote on its standard output and errors."""
        file = self.kits / f"{name}.log"
        file.touch()
        return file

    def finish(self, seconds: float = 60.0) -> Path:
        """Wait for the run's end and return its folder; sites are asked to stop."""
        code = self.running["coordinator"].wait(seconds)
        assert code == 0, self.logs()
        for site in SITES:
            if site in self.running:
                assert self.running[site].stop() in (0, -signal.SIGKILL)
        return self.run

    def logs(self) -> str:
        """The end of every log."""
        found = sorted(self.kits.glob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in found)

    @property
    def run(self) -> Path:
        """The folder of the run."""
        said = json.loads((self.kits / "coordinator" / "run.json").read_text())
        return self.kits / "coordinator" / "runs" / str(said["run"])

    def rounds(self) -> list[Record]:
        """The rounds on record."""
        rows = self.run / "rounds.jsonl"
        found = (
            [
                json.loads(line)
                for line in rows.read_text().splitlines(keepends=True)
                if line.endswith("\n")
            ]
            if rows.exists()
            else []
        )
        return [row for row in found if row["kind"] == "round"]

    def entries(self, site: str) -> list[Record]:
        """A site's ledger."""
        book = Ledger(self.kits / site / site / "ledger.sqlite", site)
        try:
            return book.entries()
        finally:
            book.close()

    def audit(self) -> list[Record]:
        """The coordinator's audit log."""
        text = (self.kits / "coordinator" / "audit.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def incidents(self) -> list[Record]:
        """What the rounds' records say of the link."""
        return [entry for record in self.rounds() for entry in record["link"]]

    def wait_for(self, what: str, holds: Any, seconds: float = 30.0) -> None:
        """Wait until something holds."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, f"waited for {what}\n{self.logs()}"
            time.sleep(0.02)


def weights(run: Path) -> Record:
    """All that a run leaves of models and of its strategy's state, as bytes."""
    state = checkpoint.load(run)
    found: Record = {name: (run / name).read_bytes() for name in ("model.safetensors",)}
    for part in checkpoint.PARTS:
        held = getattr(state, part)
        found |= {f"{part}/{name}": value.tobytes() for name, value in held.items()}
    return found


def wrong(deployment: Deployment) -> list[str]:
    """List what is wrong with a finished deployment's evidence: run, ledgers, stored bytes."""
    run, found = deployment.run, faults(deployment.run)
    records = RunFolder.open(run).records()
    rounds = [record for record in records if record["kind"] == "round"]
    name = run.name
    numbers = [record["round"] for record in rounds]
    if numbers != list(range(1, len(numbers) + 1)):
        found.append(f"rounds on record: {numbers}")
    for record in rounds:
        used = record["aggregated"]
        if len(set(used)) != len(used):
            found.append(f"round {record['round']} counts a site twice: {used}")
    for site in SITES:
        mine = [entry for entry in deployment.entries(site) if entry["run"] == name]
        held = {
            kind: [entry["round"] for entry in mine if entry["kind"] == kind]
            for kind in ("INTENT", "RELEASE")
        }
        for kind, listed in held.items():
            if len(set(listed)) != len(listed):
                found.append(f"{site}: {kind} twice: {listed}")
        counted = {record["round"] for record in rounds if site in record["aggregated"]}
        stored = {
            int(p.stem[-5:]) for p in (deployment.kits / site / site).glob("releases/*.safetensors")
        }
        notes = deployment.kits / f"{site}.read"
        read = {int(line) for line in notes.read_text().split()} if notes.exists() else set()
        if lacking := (counted | read | stored | set(held["RELEASE"])) - set(held["INTENT"]):
            found.append(f"{site}: rounds {lacking} are under-counted")
        for record in rounds:
            said = record["replies"].get(site, {})
            shas = [
                e["sha256"]
                for e in mine
                if e["kind"] == "RELEASE" and e["round"] == record["round"]
            ]
            if said.get("accepted") and [said["sha256"]] != shas:
                found.append(f"{site}: round {record['round']} was released with other bytes")
    return found


@cache
def nursery() -> Nursery:
    """Start this process's nursery; it ends with it."""
    found = Nursery()
    atexit.register(found.close)
    return found
