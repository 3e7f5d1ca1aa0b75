"""kill -9 at any line of a site's bookkeeping: never under-counted, never two releases of a round.

The kills are made by ledger_kills.py, a script that forks sites from a process without threads.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("ledger_kills.py")
ROOT = DRIVER.parents[1]


@pytest.fixture
def folder(tmp_path):
    """A folder in memory where there is one: a kill takes nothing from the kernel, fsync or not."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as made:
        yield Path(made)


def drive(folder, what, share="10", mutant=""):
    """Run the driver in a process without threads; its findings."""
    command = [sys.executable, str(DRIVER), str(folder), what, share, mutant]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(what, {k: v for k, v in found.items() if k != "wrong"})  # pytest -s shows it
    return found, done.stderr


@pytest.mark.slow
def test_a_site_killed_at_a_tenth_of_its_lines_never_under_counts(folder):
    found, said = drive(folder, "rounds")
    assert found["wrong"] == {}, said[-3000:]
    assert found["places"] >= 60
    assert found["kills"] >= 6


@pytest.mark.slow
def test_the_sweep_catches_a_site_that_reads_before_its_intent(folder):
    found, _ = drive(folder, "rounds", mutant="reads first")
    assert any("under-counted" in words for said in found["wrong"].values() for words in said)


def test_a_key_rotation_killed_at_any_line_leaves_a_usable_ledger(folder):
    found, said = drive(folder, "rotation")
    assert found["wrong"] == {}, said[-3000:]
    assert found["places"] >= 60
    assert found["kills"] >= 40


@pytest.mark.soak
def test_a_site_killed_at_every_line_once_and_twice_never_under_counts(folder):
    found, said = drive(folder, "rounds", share="1")
    assert found["wrong"] == {}, said[-3000:]
    assert found["places"] >= 60
    assert found["kills"] >= 200


@pytest.mark.soak
def test_a_key_rotation_killed_at_every_moment_leaves_a_usable_ledger(folder):
    found, said = drive(folder, "rotation", share="1")
    assert found["wrong"] == {}, said[-3000:]
