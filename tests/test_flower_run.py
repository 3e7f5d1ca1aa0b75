"""`flwr run` on Flower's own simulation runtime: the same model, on the loopback, nothing left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedaccord.runs import RunFolder
from fedaccord.simulations import engine
from fedaccord.simulations.deployment import free_ports

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SITES = ["cleveland", "hungary", "switzerland", "va"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git says which files are bundled"),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="/proc shows what is left"),
]

ACCORD = """
name = "tiny"
purpose = "Test."
task = {{ name = "heart" }}
sites = [
  {{ name = "cleveland", subjects = 200 }}, {{ name = "hungary", subjects = 200 }},
  {{ name = "switzerland", subjects = 80 }}, {{ name = "va", subjects = 130 }},
]
model = {{ name = "cnn1d", options = {{ channels = 2, kernel = 3 }} }}
rounds = {{ rounds = {rounds}, sites_per_round = 3 }}
training = {{ steps = 3, learning_rate = 0.1 }}
privacy = {{ enabled = {private}, noise_multiplier = 1.0, sampling_prob = 0.2 }}
fairness = {{ attributes = ["sex"] }}
distillation = {{ steps = 5, proxy_rows = 64 }}
"""
FEDERATION = "num-supernodes=4 client-resources-num-cpus=1 init-args-num-cpus=2"


class Flower:
    """`flwr` in a copy of this checkout, with a home, ports and a local daemon of its own."""

    def __init__(self, top: Path, ray: Path) -> None:
        self.app, self.home = top / "fedaccord", top / "flwr-home"
        self.seen: set[str] = set()  # command lines of everything that ran
        http, control = free_ports(2)
        self.env = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"} | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(self.home),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(http),
            "FLWR_LOCAL_CONTROL_API_PORT": str(control),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else Ray listens on every interface
            "RAY_TMPDIR": str(ray),
            "NO_PROXY": "127.0.0.1",
        }

    def __call__(self, *command: str) -> Any:
        done = subprocess.run(
            [BIN / "flwr", *command, "--format", "json"],
            cwd=self.app,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout[done.stdout.index("{") :])

    def run(self, accord: Path, run: Path, sites: Path, patience: float = 240) -> set[str]:
        """Run an accord to its end; the addresses that its processes listened on meanwhile."""
        config = f'accord="{accord}" run="{run}" sites="{sites}"'
        started = self("run", ".", "--federation-config", FEDERATION, "--run-config", config)
        addresses: set[str] = set()
        end = time.monotonic() + patience
        status = "not listed"
        while time.monotonic() < end and not status.startswith("finished"):
            time.sleep(1)
            now = self.processes()
            addresses |= listening(now)
            self.seen |= set(now.values())
            (listed,) = self("list", "--run-id", started["run-id"])["runs"]
            status = listed["status"]
        # `flwr run` leaves exit code 0 whatever becomes of the run: the status says it.
        assert status == "finished:completed", f"{status}\n{self.log(started['run-id'])}"
        return addresses

    def log(self, run_id: str) -> str:
        """What there is to read when a run failed: the run's log and the daemon's."""
        command = [BIN / "flwr", "log", run_id, "--show"]
        shown = subprocess.run(
            command, cwd=self.app, env=self.env, capture_output=True, text=True, timeout=60
        )
        daemon = self.home / "local-superlink" / "superlink.log"
        return f"{shown.stdout}\n{daemon.read_text() if daemon.exists() else 'no daemon log'}"

    def processes(self) -> dict[int, str]:
        """Every living process that was started with this home: the daemon, its children, Ray."""
        mark = f"FLWR_HOME={self.home}".encode()
        out = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    out[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
            except OSError:  # it has ended meanwhile, or is a zombie
                continue
        return out

    def end(self) -> None:
        """End the daemon by its pid, as docs/flower.md says; it takes its children with it."""
        for pid, command in self.processes().items():
            if "flower-superlink" in command:
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 20
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.2)
        left = self.processes()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert left == {}, "these outlived the daemon"


def listening(processes: dict[int, str]) -> set[str]:
    """The addresses, in the kernel's own writing, that some processes listen on."""
    inodes = set()
    for pid in processes:
        try:
            links = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        inodes |= {link[8:-1] for link in links if link.startswith("socket:[")}
    out = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and rest[5] in inodes:
                out.add(local.split(":")[0])
    return out


LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


@pytest.fixture(scope="module")
def flower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    top = tmp_path_factory.mktemp("flower")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if os.path.lexists(ROOT / name):
            (top / "fedaccord" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, top / "fedaccord" / name, follow_symlinks=False)
    ray = Path(tempfile.mkdtemp(prefix="ray-"))  # short: Ray puts Unix sockets below it
    flower = Flower(top, ray)
    try:
        yield flower
    finally:
        flower.end()
        shutil.rmtree(ray, ignore_errors=True)


def written(folder: Path, private: bool, rounds: int) -> Path:
    path = folder / "accord.toml"
    path.write_text(ACCORD.format(private=str(private).lower(), rounds=rounds))
    return path


def seqs(record: dict[str, Any]) -> dict[str, int]:
    """How far each site's ledger had come, as a round's record says it."""
    return {site: head["seq"] for site, head in record.get("heads", {}).items()}


def test_flowers_runtime_and_the_engine_give_the_same_model_bit_for_bit(
    flower: Flower, tmp_path: Path
) -> None:
    accord = written(tmp_path, private=False, rounds=3)
    addresses = flower.run(accord, tmp_path / "flower", tmp_path / "flower-sites")
    engine.simulate(accord, tmp_path / "engine", tmp_path / "engine-sites", 4)
    for name in ("model.safetensors", "student.safetensors"):
        theirs = (tmp_path / "flower" / name).read_bytes()
        assert theirs == (tmp_path / "engine" / name).read_bytes()
    theirs, ours = (RunFolder.open(tmp_path / name) for name in ("flower", "engine"))
    assert theirs.faults() == ours.faults() == []
    assert [r["id"] for r in theirs.records()] == [r["id"] for r in ours.records()]
    for mine, other in zip(theirs.records(), ours.records(), strict=True):
        if mine["kind"] in ("round", "decision"):  # every figure, but not how long it took
            # Heads hold times and are signed with keys that each run made for itself.
            apart = {"hash": "", "seconds": 0, "heads": {}}
            assert mine | apart == other | apart
            assert seqs(mine) == seqs(other)
    for part in ("flower-superlink", "flwr-simulation", "raylet", "gcs_server"):
        assert any(part in command for command in flower.seen), f"{part} was not looked at"
    assert addresses and addresses <= LOOPBACK


def test_a_private_run_completes_under_flower_and_is_another_each_time(
    flower: Flower, tmp_path: Path
) -> None:
    accord = written(tmp_path, private=True, rounds=2)
    flower.run(accord, tmp_path / "flower", tmp_path / "sites")
    run = RunFolder.open(tmp_path / "flower")
    assert run.faults() == []
    assert run.records()[-1]["reason"] == "rounds done: 2 of 2"
    for site in SITES:
        ledger = (run.path / "ledgers" / f"{site}.jsonl").read_text()
        kinds = [json.loads(line)["kind"] for line in ledger.splitlines()]
        assert kinds[:2] == ["KEY", "RESERVE"]
        assert (tmp_path / "sites" / site / "ledger.sqlite").is_file()
    engine.simulate(accord, tmp_path / "engine", tmp_path / "engine-sites", 4)
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("flower", "engine")]
    assert models[0] != models[1]


def test_the_daemon_ends_by_its_pid_and_takes_everything_with_it(flower: Flower) -> None:
    flower("list")  # even this starts it
    assert [c for c in flower.processes().values() if "flower-superlink" in c] != []
    flower.end()
    assert flower.processes() == {}
