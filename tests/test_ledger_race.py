"""Eight processes race on one ledger with random plans, runs and caps: none of them passes a cap.

Run as a script, this file is the race: it forks the racers, each of which does random jobs.
"""

import json
import os
import random
import subprocess
import sys
import time
import traceback
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from fedaccord import keys
from fedaccord.errors import BudgetError
from fedaccord.privacy.budget import Cap
from fedaccord.privacy.keeping import read_export
from fedaccord.privacy.ledger import Ledger, Terms, spent
from fedaccord.privacy.plan import PrivacyPlan
from fedaccord.privacy.second import SecondPlace

ROOT = Path(__file__).resolve().parents[1]
RACERS = 8
# Cheap for the accountant: few plans, so that its answers are soon known by heart.
PLANS = [
    PrivacyPlan("ward", 100, rounds, 1, 1.0, sigma, 1.0, 1e-5)
    for sigma, rounds in ((40.0, 2), (60.0, 3), (25.0, 1))
]
CAPS = [Cap(0.7, 1e-5), Cap(0.9, 1e-5), Cap(1.2, 1e-5)]
ACCORDS = {"a" * 64: Cap(0.5, 1e-5), "b" * 64: None}
DATASETS = ["heart", "lung", "eye"]
DISJOINT = (("heart",), ("lung",))  # eye may share subjects with either


def plan_of(run):
    return PLANS[run % len(PLANS)]


def terms_of(run, chance):
    """A run belongs to one accord and one data set; the site's cap is changed now and then."""
    accord = list(ACCORDS)[run % len(ACCORDS)]
    dataset = DATASETS[run % 7 % len(DATASETS)]
    return Terms(chance.choice(CAPS), accord, dataset, DISJOINT, ACCORDS[accord])


def job(ledger, run, chance):
    """Do what a site does of a run, or what it should not do; count how it ended."""
    name, plan, number = f"run-{run}", plan_of(run), chance.randrange(1, 5)
    what = chance.choice(["reserve", "consider", "round", "round", "counts", "wrong plan"])
    try:
        if what == "consider":
            ledger.consider(name, plan, terms_of(run, chance))
        elif what == "wrong plan":
            ledger.reserve(name, plan_of(run + 1), 1, terms_of(run, chance))
        else:
            ledger.reserve(name, plan, 1, terms_of(run, chance))
        if what == "counts":
            ledger.counts(name, number, cells=4)
        elif what == "round":
            ledger.intend(name, number, plan, list(ACCORDS)[run % len(ACCORDS)])
            ledger.release(name, number, sha256="0" * 64)
    except BudgetError:
        return "refused"
    return "done"


def race(folder, me, jobs):
    """Do a racer's share of the jobs; it opens the ledger again and again, as sites do."""
    chance, ended = random.Random(me), Counter()
    place = folder / "ward" / "ledger.sqlite", "ward", folder / "heads" / "ward.json"
    left = jobs
    while left:
        with closing(Ledger(*place)) as ledger:
            for _ in range(min(left, chance.randrange(1, 20))):
                ended[job(ledger, chance.randrange(jobs), chance)] += 1
                left -= 1
            if chance.random() < 0.05:
                ledger.rotate()
    (folder / f"racer-{me}.json").write_text(json.dumps(ended))


def start(folder, jobs):
    """Fork the racers, let them go at once, and wait for all."""
    ready, go = os.pipe()
    children = []
    for me in range(RACERS):
        child = os.fork()
        if child:
            children.append(child)
            continue
        try:
            os.close(go)
            os.read(ready, 1)  # ends when the last writer closes the pipe
            race(folder, me, jobs // RACERS)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    begin = time.monotonic()
    os.close(go)
    ended = [os.waitpid(child, 0)[1] for child in children]
    print(json.dumps({"ended": ended, "seconds": time.monotonic() - begin}))


def overshoots(entries):
    """Recompute what was spent when each plan was let in; list those that passed a cap."""
    wrong = []
    for number, entry in enumerate(entries):
        if entry["kind"] != "RESERVE":
            continue
        before, about = entries[:number], (entry["dataset"], entry["disjoint"])
        own = ACCORDS[entry["accord"]]
        mine = [e for e in before if e.get("accord") == entry["accord"] or "accord" not in e]
        for cap, held in ((Cap(**entry["cap"]), before), (own, mine)):
            if cap and spent(held, cap, entry["event"], *about) > cap.epsilon:
                wrong.append(entry["seq"])
    return wrong


def check_race(folder, jobs):
    """Let eight processes race; nothing is passed, lost, forged or refused without reason."""
    command = [sys.executable, __file__, str(folder), str(jobs)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["ended"] == [0] * RACERS, done.stderr[-3000:]
    ended = Counter()
    for me in range(RACERS):
        ended.update(json.loads((folder / f"racer-{me}.json").read_text()))
    assert ended.total() == jobs
    place = folder / "ward" / "ledger.sqlite", "ward", folder / "heads" / "ward.json"
    with closing(Ledger(*place)) as ledger:
        (folder / "export.jsonl").write_text(ledger.export())
        assert SecondPlace(place[2]).read() == ledger.head()
    entries = read_export(folder / "export.jsonl").entries  # with every signature checked
    kinds = Counter(entry["kind"] for entry in entries)
    print(jobs, "jobs", result["seconds"], "s", dict(ended), dict(kinds))  # pytest -s shows it
    assert overshoots(entries) == []
    runs = [entry["run"] for entry in entries if entry["kind"] == "RESERVE"]
    assert len(runs) == len(set(runs)) > 3
    for run in runs:
        slots = next(e["rounds"] for e in entries if e["kind"] == "RESERVE" and e["run"] == run)
        used = [e["round"] for e in entries if e["kind"] == "INTENT" and e["run"] == run]
        assert len(used) == len(set(used)) <= slots
    assert {e["run"] for e in entries if e["kind"] == "INTENT"} <= set(runs)
    assert kinds["INTENT"] == kinds["RELEASE"] > 0
    assert min(ended["done"], ended["refused"], kinds["REFUSAL"]) > 0
    return entries


def test_the_recomputation_sees_a_plan_that_passed_its_cap():
    entry = {
        "kind": "RESERVE",
        "seq": 2,
        "run": "a",
        "accord": "b" * 64,
        "dataset": "heart",
        "disjoint": [],
        "event": PLANS[0].event(),
        "cap": {"epsilon": 1.01 * PLANS[0].epsilon(), "delta": 1e-5},
    }
    assert overshoots([entry]) == []
    assert overshoots([entry, entry | {"seq": 3, "run": "b"}]) == [3]


@pytest.mark.parametrize("when", [(SecondPlace, "read"), (keys, "load")])
@pytest.mark.parametrize("what", ["counts", "rotate", "both"])
def test_what_another_process_does_while_a_ledger_is_opened_is_no_fault(
    tmp_path, monkeypatch, when, what
):
    place = tmp_path / "ledger.sqlite", "ward", tmp_path / "head.json"
    right = getattr(*when)
    with closing(Ledger(*place)) as other:

        def meanwhile(*args):
            monkeypatch.undo()
            if what != "rotate":
                other.counts("a", 1)
            if what != "counts":
                other.rotate()
            return right(*args)

        monkeypatch.setattr(*when, meanwhile)
        with closing(Ledger(*place)) as ledger:
            assert len(other.entries()) == {"counts": 2, "rotate": 2, "both": 3}[what]
            assert ledger.head() == other.head()
            ledger.counts("a", 2)
        assert other.entries()[-1]["round"] == 2


@pytest.mark.slow
def test_eight_processes_that_race_with_1000_jobs_never_pass_a_cap(tmp_path):
    check_race(tmp_path, 1_000)


@pytest.mark.soak
def test_eight_processes_that_race_with_10000_jobs_never_pass_a_cap(tmp_path):
    entries = check_race(tmp_path, 10_000)
    assert len(entries) > 1_000


if __name__ == "__main__":
    start(Path(sys.argv[1]), int(sys.argv[2]))
