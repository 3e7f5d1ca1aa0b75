"""`python -m benchmarks.stock_engine heart --rounds 2`: an accord on Flower's deployment engine.

A `flower-superlink` with TLS, node authentication and a database, and one `flower-supernode` a site
with its registered key and its own node config; all on 127.0.0.1, with a FLWR_HOME of their own,
with installs, telemetry and update checks off. Seconds are the rounds' own, from the run's records;
what a round costs beyond training is the difference to `simulate` on the same accord.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit

from benchmarks import stock_keys
from fedaccord import accord as accords
from fedaccord.client import policy, policy_file
from fedaccord.runs import RunFolder
from fedaccord.simulations.deployment import free_ports

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
APPS = ("fedaccord.server.app:app", "fedaccord.client.app:app")
CONFIG = {"accord": "heart", "run": "", "sites": "", "resume": False}
STEP = 0.5  # s between two looks at something that is awaited


class StockError(RuntimeError):
    """The stock engine did not start, or a run on it did not complete."""


@dataclass(frozen=True)
class Outcome:
    """How one run on the stock engine ended."""

    status: str  # Flower's: "finished:completed", "finished:failed", "finished:stopped"
    details: str
    seconds: float  # waited, until `flwr list` showed its end
    log: str

    @property
    def completed(self) -> bool:
        """Whether the ServerApp returned; `flwr run` leaves exit code 0 either way."""
        return self.status == "finished:completed"


class Stock:
    """A SuperLink and a SuperNode a site as real processes, for as long as a `with` block lasts.

    | case | what happens |
    |---|---|
    | a process does not start | StockError with the end of its log; the others are ended |
    | the block is left by an exception | every process is ended by its pid, children too |
    | no /proc (not Linux) | StockError: what is left behind could not be found |

    Args:
        accord: the accord's file, the same for all sites, or the name of a bundled one.
        sites: the sites' names.
        work: an empty folder for keys, logs, the database and the sites' folders.
        apps: ServerApp and ClientApp as "module:attribute", which every process can import.
        config: the app's run config with its defaults.
        node: further keys of every site's node config.
    """

    def __init__(
        self,
        accord: Path | str,
        sites: Sequence[str],
        work: Path,
        apps: tuple[str, str] = APPS,
        config: Mapping[str, bool | float | str] | None = None,
        node: Mapping[str, bool | float | str] | None = None,
    ) -> None:
        path = Path(accord)
        self.accord = str(path.resolve()) if path.is_file() else str(accord)
        self.names, self.work, self.apps = list(sites), work.resolve(), apps
        self.config, self.node = dict(config or CONFIG), dict(node or {})
        self.home, self.sites = self.work / "flwr-home", self.work / "sites"
        self.port, *self.node_ports = free_ports(1 + len(self.names))
        # Where sites and administrators dial: the SuperLink itself, or a proxy before it.
        self.fleet = self.control = self.port
        self._started: list[subprocess.Popen[bytes]] = []
        self.env = {n: v for n, v in os.environ.items() if not n.startswith("FLWR_")} | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "FLWR_HOME": str(self.home),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def __enter__(self) -> Stock:
        if not Path("/proc/self/environ").exists():
            raise StockError("the stock engine's processes are found under /proc; run it on Linux.")
        try:
            self._start()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def _start(self) -> None:
        """Start the SuperLink, register every site's key, start the SuperNodes."""
        keys = self.work / "keys"
        if not (keys / "tls.key").exists():  # a proxy before it may need them earlier
            stock_keys.certificates(keys)
        self._write_app()
        superlink = self._spawn(
            "superlink",
            *("--ssl-ca-certfile", keys / "ca.pem", "--ssl-certfile", keys / "tls.pem"),
            *("--ssl-keyfile", keys / "tls.key", "--enable-supernode-auth"),
            *("--disable-runtime-dependency-installation", "--host", "127.0.0.1"),
            *("--port", self.port, "--database", self.work / "superlink.db"),
        )
        self._await_port(superlink)
        for name, port in zip(self.names, self.node_ports, strict=True):
            stock_keys.node_key(keys / name)
            self.flwr("supernode", "register", str(keys / f"{name}.pub"), "stock", "--name", name)
            self._spawn(
                f"supernode-{name}",
                *("--root-certificates", keys / "ca.pem", "--superlink", f"127.0.0.1:{self.fleet}"),
                *("--auth-supernode-private-key", keys / name, "--port", port),
                *("--node-config", self._node_config(name)),
            )

    def _node_config(self, name: str) -> str:
        """What a site says of itself, in its own command line."""
        own = {"site": name, "accord": self.accord, "folder": str(self.sites)} | self.node
        return " ".join(f"{key}={json.dumps(value)}" for key, value in own.items())

    def _write_app(self) -> None:
        """Write the app that is submitted, without a line of code, and where to submit it.

        The processes take the apps from their own installation. Nothing forces a submitter to be
        so modest (docs/stock-engine.md).
        """
        project: Any = tomlkit.parse((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        server, client = self.apps
        app = {
            "project": {"name": "accord", "version": project["project"]["version"]},
            "tool": {
                "flwr": {
                    "app": {
                        "publisher": "fedaccord",
                        "components": {"serverapp": server, "clientapp": client},
                        "config": self.config,
                    }
                }
            },
        }
        (self.work / "app").mkdir(parents=True, exist_ok=True)
        (self.work / "app" / "pyproject.toml").write_text(tomlkit.dumps(app))
        address = {
            "address": f"127.0.0.1:{self.control}",
            "root-certificates": str(self.work / "keys" / "ca.pem"),
        }
        self.home.mkdir(parents=True, exist_ok=True)
        connection = {"superlink": {"default": "stock", "stock": address}}
        (self.home / "config.toml").write_text(tomlkit.dumps(connection))

    def _spawn(self, name: str, *options: object) -> subprocess.Popen[bytes]:
        """Start one of Flower's processes as the leader of a group, with a log of its own."""
        command = [str(BIN / f"flower-{name.split('-')[0]}"), *map(str, options)]
        with (self.work / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=self.work,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def _await_port(self, process: subprocess.Popen[bytes], patience: float = 60) -> None:
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(STEP)
        raise StockError(f"the SuperLink does not listen.\n{self.logs()}")

    def flwr(self, *command: str) -> Any:
        """Run one `flwr` command against this SuperLink; what it prints as JSON."""
        done = subprocess.run(
            [str(BIN / "flwr"), *command, "--format", "json"],
            cwd=self.work / "app",
            env=self.env,
            capture_output=True,
            text=True,
            timeout=120,
        )
        start = done.stdout.find("{")
        if done.returncode or start < 0:
            raise StockError(f"flwr {command[0]} failed.\n{done.stdout}{done.stderr}{self.logs()}")
        return json.loads(done.stdout[start:])

    def online(self) -> int:
        """How many SuperNodes the SuperLink sees."""
        listed = self.flwr("supernode", "list", "stock")
        return sum(str(node.get("status", "")) == "online" for node in listed["nodes"])

    def run(self, config: Mapping[str, bool | float | str], patience: float = 600) -> Outcome:
        """Submit the app and wait for its end; as `submit` and `ended`."""
        return self.ended(self.submit(config), patience)

    def submit(self, config: Mapping[str, bool | float | str], patience: float = 120) -> str:
        """Submit the app once every SuperNode is online; the run's number.

        Args:
            config: run config beyond the defaults.
            patience: s to wait for the SuperNodes.

        Raises:
            StockError: a SuperNode is missing, or the run was refused.
        """
        deadline = time.monotonic() + patience
        while self.online() < len(self.names):
            if time.monotonic() > deadline:
                raise StockError(f"not all SuperNodes are online.\n{self.logs()}")
            time.sleep(STEP)
        words = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        return str(self.flwr("run", ".", "stock", "--run-config", words)["run-id"])

    def ended(self, number: str, patience: float = 600) -> Outcome:
        """Wait for a run's end, which its status alone shows.

        Raises:
            StockError: it did not end in time; it is stopped.
        """
        start = time.monotonic()
        while (seconds := time.monotonic() - start) < patience:
            (listed,) = self.flwr("list", "stock", "--run-id", number)["runs"]
            if str(listed["status"]).startswith("finished"):
                details = str(listed.get("status-details", ""))
                return Outcome(str(listed["status"]), details, seconds, self.logs())
            time.sleep(STEP)
        self.flwr("stop", number, "stock")
        raise StockError(f"run {number} did not end within {patience:.0f} s.\n{self.logs()}")

    def logs(self) -> str:
        """The end of what every process has said."""
        return "".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-4000:]}\n"
            for path in sorted(self.work.glob("*.log"))
        )

    def processes(self) -> dict[int, str]:
        """Every living process that was started with this FLWR_HOME, with its command line."""
        mark, found = f"FLWR_HOME={self.home}".encode(), {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(folder.name)] = command.decode(errors="replace")
            except OSError:  # it has ended meanwhile, or is a zombie
                continue
        return found

    def end(self, patience: float = 20) -> None:
        """End every process by its pid: the ones started here first, then all that they left."""
        for process in self._started:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + patience
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
            for process in self._started:
                process.poll()
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in self._started:
            process.wait(timeout=patience)
        self._started.clear()


def shortened(where: str, rounds: int, private: bool, folder: Path) -> Path:
    """Write an accord with fewer rounds, and without privacy where models are to be compared."""
    agreed: Any = tomlkit.parse(accords.find(where).read_text(encoding="utf-8"))
    agreed["rounds"]["rounds"] = rounds
    agreed["privacy"]["enabled"] = private
    path = folder / "accord.toml"
    path.write_text(tomlkit.dumps(agreed), encoding="utf-8")
    return path


def approve(accord: Path, sites: Path) -> list[str]:
    """Give every site of an accord a folder and a policy that lets this accord in; their names."""
    agreed = accords.load(accord)
    for name in agreed.roster:
        (sites / name).mkdir(parents=True)
        rules = policy_file.simulated(sites / name, agreed)
        (sites / name / policy.FILE).write_text(policy_file.text(rules))
    return list(agreed.roster)


def seconds_a_round(run: Path) -> list[float]:
    """Read how long each round took, from the run's own records."""
    records = RunFolder.open(run).records()
    return [float(r["seconds"]) for r in records if r["kind"] == "round"]


def main() -> None:
    """Run an accord on the stock engine and in one process, and compare time and model."""
    from fedaccord.simulations import engine

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("accord", nargs="?", default="heart")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--private", action="store_true", help="with noise; models then differ")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stock-") as top:
        work = Path(top)
        accord = shortened(asked.accord, asked.rounds, asked.private, work)
        names = approve(accord, work / "sites")
        start = time.monotonic()
        with Stock(accord, names, work) as stock:
            outcome = stock.run({"accord": str(accord), "run": str(work / "stock")})
        whole = time.monotonic() - start
        if not outcome.completed:
            raise SystemExit(f"{outcome.status}: {outcome.details}\n{outcome.log}")
        engine.simulate(accord, work / "engine", work / "engine-sites", len(names))
        theirs, ours = seconds_a_round(work / "stock"), seconds_a_round(work / "engine")
        print(
            f"{len(names)} sites, {asked.rounds} rounds, privacy {'on' if asked.private else 'off'}"
        )
        print("stock engine:", " ".join(f"{s:.1f}" for s in theirs), "s a round;", end=" ")
        print(f"the run {outcome.seconds:.0f} s, with start and end {whole:.0f} s")
        print("simulate:    ", " ".join(f"{s:.1f}" for s in ours), "s a round")
        same = _model(work / "stock") == _model(work / "engine")
        if not asked.private:
            print("the model is", "the same, bit for bit" if same else "NOT the same")
        shutil.rmtree(work / "flwr-home", ignore_errors=True)
    if not asked.private and not same:
        raise SystemExit(1)


def _model(run: Path) -> bytes:
    return (run / "model.safetensors").read_bytes()


if __name__ == "__main__":
    main()
