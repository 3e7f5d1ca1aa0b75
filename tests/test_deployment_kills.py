"""kill -9 of any process of a deployment at any point: no round is lost, no slot under-counted.

What is killed are real processes that talk over the link with mutual TLS; see deployment.py.
"""

from __future__ import annotations

import random
import time
from datetime import datetime
from pathlib import Path

import pytest
from deployment import SITES, STEPS, Deployment, accord_file, straight, weights, wrong

POINTS = [
    "before INTENT",
    "after INTENT",
    "in training",
    "before RELEASE",
    "after RELEASE",
    "during push",
]
IMPATIENT = {"impatient": 0.5}


moment = datetime.fromisoformat


def restarts(deployment: Deployment) -> list[float]:
    """Seconds from each start of the coordinator to its first request to train or to count."""
    found, began = [], None
    for entry in deployment.audit():
        if entry["kind"] == "up":
            began = entry["time"]
        if entry["kind"] == "request" and entry["type"] in ("train", "evaluate") and began:
            found.append((moment(entry["time"]) - moment(began)).total_seconds())
            began = None
    return found


def test_a_coordinator_killed_after_each_of_its_eight_steps_gives_the_same_bits(
    tmp_path: Path,
) -> None:
    accord = accord_file(tmp_path, rounds={"rounds": len(STEPS) + 1})
    deaths = [[step, number, "after"] for number, step in enumerate(STEPS, 1)]
    with Deployment(accord, tmp_path / "kits", IMPATIENT) as deployment:
        assert deployment.play({"coordinator": deaths}) == len(STEPS)
        print("restart to the next request, s:", restarts(deployment))
        assert wrong(deployment) == []
        assert weights(deployment.run) == weights(straight(accord, tmp_path / "straight"))


def test_a_site_killed_at_any_point_of_a_round_gives_the_same_bits(tmp_path: Path) -> None:
    accord = accord_file(tmp_path, rounds={"rounds": len(POINTS)})
    deaths: dict[str, list[list[object]]] = {}
    for number, point in enumerate(POINTS, 1):
        deaths.setdefault(SITES[number % len(SITES)], []).append([point, number])
    with Deployment(accord, tmp_path / "kits", IMPATIENT) as deployment:
        assert deployment.play(deaths) == len(POINTS)
        assert wrong(deployment) == []
        assert [len(row["aggregated"]) for row in deployment.rounds()] == [3] * len(POINTS)
        assert weights(deployment.run) == weights(straight(accord, tmp_path / "straight"))


def kill_at_random(deployment: Deployment, kills: int, seed: int) -> None:
    """Kill processes at random moments and begin them again; then let the run end."""
    chance, names = random.Random(seed), ["coordinator", *SITES]
    deployment.start(*names)
    for _ in range(kills):
        time.sleep(chance.uniform(0.05, 0.6))
        name = chance.choice(names)
        assert deployment.running[name].code is None, deployment.logs()
        before = deployment.rounds()
        deployment.running[name].kill()
        time.sleep(chance.choice([0.0, 0.3]))
        deployment.start(name)
        assert deployment.rounds()[: len(before)] == before  # a finished round stays as it was
    deployment.finish()
    timeout = 30.0
    for record in deployment.rounds():
        assert record["seconds"] < 2 * timeout, record  # to train and to count, one deadline each


def random_kills(folder: Path, kills: int, seed: int) -> None:
    accord = accord_file(
        folder,
        private=True,
        rounds={"rounds": 50, "spare_rounds": 50},  # it does not end before the kills do
        privacy={"noise_multiplier": 8.0},
    )
    with Deployment(accord, folder / "kits", IMPATIENT) as deployment:
        kill_at_random(deployment, kills, seed)
        assert wrong(deployment) == []
        last = deployment.rounds()[-1]
        for site in SITES:
            used = [e for e in deployment.entries(site) if e["kind"] == "INTENT"]
            assert last["epsilon"][site]["rounds_used"] >= len(used)


@pytest.mark.slow
def test_twenty_random_kills_lose_no_round_and_under_count_no_slot(tmp_path: Path) -> None:
    random_kills(tmp_path, 20, 0)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 10))
def test_of_two_hundred_random_kills_none_loses_a_round_or_a_slot(
    seed: int, tmp_path: Path
) -> None:
    random_kills(tmp_path, 20, seed)


def test_a_slot_used_for_a_round_that_was_begun_again_without_its_site_is_counted(
    tmp_path: Path,
) -> None:
    accord = accord_file(tmp_path, private=True)
    with Deployment(accord, tmp_path / "kits", IMPATIENT, join_wait=1) as deployment:
        deployment.start("coordinator", **{"dies in step": ["gate", 2, "after"]})
        deployment.start(*SITES)
        deployment.running["coordinator"].wait()
        deployment.running["va"].kill()  # it has released round 2, which is not on record
        deployment.start("coordinator")
        deployment.finish()
        assert "va" not in deployment.rounds()[1]["invited"]
        used = [e["round"] for e in deployment.entries("va") if e["kind"] == "INTENT"]
        assert used == [1, 2]
        said = [row["epsilon"]["va"]["rounds_used"] for row in deployment.rounds()]
        assert said == [1, 2, 2]
        assert wrong(deployment) == []
