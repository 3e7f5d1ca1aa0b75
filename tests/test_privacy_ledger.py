"""The ledger: reserve, write ahead, release; every refusal; every edit seen; never over the cap."""

import dataclasses
import json
import math
import re
import resource
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager

import pytest

from fedaccord.errors import BudgetError, LedgerError
from fedaccord.evidence import canonical_json
from fedaccord.privacy import accounting
from fedaccord.privacy.ledger import GENESIS, Cap, Ledger, chain, check_chain, spent
from fedaccord.privacy.plan import PrivacyPlan

PLAN = PrivacyPlan(
    site="ward",
    subjects=100,
    rounds=2,
    steps=2,
    sampling_prob=1.0,
    noise_multiplier=4.0,
    max_grad_norm=1.0,
    delta=1e-5,
)
ONE = PLAN.epsilon()
TWO = accounting.epsilon(accounting.compose([PLAN.event()] * 2), 1e-5)
CAP = Cap(1.2 * ONE, 1e-5)
ROOM = Cap(10 * ONE, 1e-5)
UNCAPPED = Cap(math.inf, 1e-5)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ward" / "ledger.sqlite"


@pytest.fixture
def ledger(path):
    with closing(Ledger(path, "ward")) as opened:
        yield opened


def kinds(ledger):
    return [entry["kind"] for entry in ledger.entries()]


def reserve(ledger, run="a", plan=PLAN, cap=CAP):
    return ledger.reserve(run, plan, 2, cap, "f" * 64)


def test_reserve_intend_release_are_written_in_that_order(ledger):
    reserve(ledger)
    ledger.intend("a", 1, PLAN)
    ledger.release("a", 1, what="weights", sha256="0" * 64)
    ledger.counts("a", 1, what="group counts", cells=4)
    assert kinds(ledger) == ["RESERVE", "INTENT", "RELEASE", "COUNTS"]
    first, intent, *_ = ledger.entries()
    assert first["event"] == PLAN.event()
    assert first["plan"] == PLAN.to_json()
    assert first["plan_digest"] == PLAN.digest
    assert first["epsilon"] == PLAN.epsilon()
    assert (intent["round"], intent["slot"], intent["slots"]) == (1, 1, 2)
    assert [entry["seq"] for entry in ledger.entries()] == [1, 2, 3, 4]


def test_the_whole_plan_is_spent_from_its_reservation_on(ledger):
    assert spent(ledger.entries(), 1e-5) == 0
    reserve(ledger)
    reserved = spent(ledger.entries(), 1e-5)
    assert reserved == pytest.approx(ONE, rel=1e-3)
    ledger.intend("a", 1, PLAN)
    ledger.release("a", 1)
    assert spent(ledger.entries(), 1e-5) == reserved


def test_an_entry_outlives_its_process_and_is_read_as_it_was_written(path):
    with closing(Ledger(path, "ward")) as one:
        entry = reserve(one)
    with closing(Ledger(path, "ward")) as other:
        assert other.entries() == [entry]


def test_the_same_run_reserves_once(ledger):
    assert reserve(ledger) == reserve(ledger)
    ledger.consider("a", PLAN, CAP, "f" * 64)
    assert kinds(ledger) == ["RESERVE"]


@pytest.mark.parametrize("change", [{"noise_multiplier": 0.1}, {"steps": 200}, {"rounds": 50}])
def test_a_reservation_covers_the_plan_that_it_was_made_for_and_no_other(ledger, change):
    reserve(ledger)
    other = dataclasses.replace(PLAN, **change)
    for attempt in (
        lambda: reserve(ledger, plan=other, cap=UNCAPPED),
        lambda: ledger.consider("a", other, UNCAPPED, "f" * 64),
        lambda: ledger.intend("a", 1, other),
        lambda: ledger.intend("a", 1, None),
    ):
        with pytest.raises(BudgetError, match=r"Site ward has reserved plan .* Start a new run"):
            attempt()
    assert kinds(ledger) == ["RESERVE"]


def test_the_number_of_slots_is_the_plans_whatever_the_caller_says(ledger):
    assert ledger.reserve("a", PLAN, 1_000, CAP, "f" * 64)["rounds"] == PLAN.rounds


def test_a_second_plan_over_the_cap_is_refused_with_what_is_needed_and_left(ledger):
    reserve(ledger)
    left = math.floor(100 * (CAP.epsilon - ONE)) / 100
    with pytest.raises(BudgetError) as refusal:
        reserve(ledger, run="b")
    assert str(refusal.value) == (
        f"This plan needs epsilon {accounting.show(ONE)}; site ward has {left:.2f} of "
        f"{CAP.epsilon:.2f} left at delta 1e-05. Plan fewer rounds, raise "
        "privacy.noise_multiplier, or ask the site to raise its cap."
    )
    assert kinds(ledger) == ["RESERVE", "REFUSAL"]
    assert ledger.entries()[1]["reason"] == str(refusal.value)
    assert spent(ledger.entries(), 1e-5) == pytest.approx(ONE, rel=1e-3)
    with pytest.raises(BudgetError, match="no slot left of 0 reserved for run b"):
        ledger.intend("b", 1, PLAN)


def test_the_cap_itself_can_be_spent_and_nothing_above_it(ledger):
    exactly = Cap(spent([{"kind": "RESERVE", "event": PLAN.event()}], 1e-5), 1e-5)
    with pytest.raises(BudgetError):
        reserve(ledger, cap=Cap(math.nextafter(exactly.epsilon, 0), 1e-5))
    reserve(ledger, cap=exactly)


def test_past_plans_are_composed_and_not_added(ledger):
    assert TWO < 1.6 * ONE
    reserve(ledger, "a", cap=Cap(TWO + 0.01, 1e-5))
    reserve(ledger, "b", cap=Cap(TWO + 0.01, 1e-5))
    assert spent(ledger.entries(), 1e-5) == pytest.approx(TWO, rel=1e-3)
    with pytest.raises(BudgetError):
        reserve(ledger, "c", cap=Cap(TWO + 0.01, 1e-5))


def test_considering_a_plan_reserves_nothing_and_records_a_refusal(ledger):
    ledger.consider("a", PLAN, CAP, "f" * 64)
    assert kinds(ledger) == []
    reserve(ledger)
    with pytest.raises(BudgetError, match="This plan needs epsilon"):
        ledger.consider("b", PLAN, CAP, "f" * 64)
    assert kinds(ledger) == ["RESERVE", "REFUSAL"]


def test_a_cap_that_is_not_a_number_refuses(ledger):
    with pytest.raises(BudgetError):
        reserve(ledger, cap=Cap(math.nan, 1e-5))
    assert kinds(ledger) == ["REFUSAL"]


def test_privacy_off_is_infinite_from_then_on(ledger):
    with pytest.raises(BudgetError, match="This plan needs epsilon infinite"):
        reserve(ledger, plan=None)
    entry = reserve(ledger, plan=None, cap=UNCAPPED)
    assert (entry["kind"], entry["epsilon"]) == ("NONPRIVATE", "infinite")
    assert spent(ledger.entries(), 1e-5) == math.inf
    with pytest.raises(BudgetError, match=r"has 0\.00 of"):
        reserve(ledger, "b", cap=ROOM)
    assert reserve(ledger, "b", cap=UNCAPPED)["cap"] == {"delta": 1e-5, "epsilon": "infinite"}


def test_a_round_has_one_slot_and_a_run_as_many_as_it_reserved(ledger):
    with pytest.raises(BudgetError, match="no slot left of 0 reserved for run a"):
        ledger.intend("a", 1, PLAN)
    reserve(ledger)
    ledger.intend("a", 1, PLAN)
    with pytest.raises(BudgetError, match="already used its slot for round 1 of run a"):
        ledger.intend("a", 1, PLAN)
    ledger.intend("a", 7, PLAN)
    with pytest.raises(BudgetError, match="no slot left of 2 reserved for run a"):
        ledger.intend("a", 8, PLAN)
    assert kinds(ledger) == ["RESERVE", "INTENT", "INTENT"]


def test_a_release_needs_its_intent_and_comes_once(ledger):
    reserve(ledger)
    with pytest.raises(LedgerError, match="round 1 of run a has no INTENT"):
        ledger.release("a", 1)
    ledger.intend("a", 1, PLAN)
    ledger.release("a", 1)
    with pytest.raises(LedgerError, match="round 1 of run a has a RELEASE already"):
        ledger.release("a", 1)
    assert kinds(ledger) == ["RESERVE", "INTENT", "RELEASE"]


@pytest.mark.parametrize("order", ["UPDATE entries SET body = '{}'", "DELETE FROM entries"])
def test_sql_cannot_change_or_remove_an_entry(ledger, path, order):
    reserve(ledger)
    with (
        closing(sqlite3.connect(path)) as raw,
        pytest.raises(sqlite3.IntegrityError, match="append-only"),
    ):
        raw.execute(order)
    assert kinds(ledger) == ["RESERVE"]


def rows(path):
    with closing(sqlite3.connect(path)) as raw:
        return raw.execute("SELECT seq, hash, body FROM entries ORDER BY seq").fetchall()


def tamper(path, *orders):
    """Change the file behind the ledger's back, its triggers dropped."""
    with closing(sqlite3.connect(path, isolation_level=None)) as raw:
        for order in ("DROP TRIGGER no_update", "DROP TRIGGER no_delete", *orders):
            raw.execute(order)


SWAP = [
    "UPDATE entries SET seq = 99 WHERE seq = 2",
    "UPDATE entries SET seq = 2 WHERE seq = 3",
    "UPDATE entries SET seq = 3 WHERE seq = 99",
]


@pytest.mark.parametrize(
    ("orders", "named"),
    [
        (["UPDATE entries SET body = replace(body, '4.0', '9.0') WHERE seq = 1"], "1 (RESERVE)"),
        (["UPDATE entries SET body = replace(body, '\"round\":1', '\"round\":8')"], "2 (INTENT)"),
        (["UPDATE entries SET hash = '00' WHERE seq = 3"], "3 (RELEASE)"),
        (["DELETE FROM entries WHERE seq = 1"], "1 (INTENT)"),
        (["DELETE FROM entries WHERE seq = 2"], "2 (RELEASE)"),
        (SWAP, "2 (RELEASE)"),
        (["UPDATE entries SET body = '{\"kind\":NaN}' WHERE seq = 2"], "ledger "),
        (["UPDATE entries SET body = '[]' WHERE seq = 2"], "ledger "),
        (["UPDATE entries SET body = 'gone' WHERE seq = 2"], "ledger "),
        (["DELETE FROM entries WHERE seq = 4"], "entry 4 of 4 was removed from its end"),
        (["DELETE FROM entries"], "entry 1 of 4 was removed from its end"),
    ],
    ids=[
        "a plan's noise",
        "an intent's round",
        "a hash",
        "the first removed",
        "one removed",
        "two swapped",
        "not a number",
        "no entry",
        "no JSON",
        "the last removed",
        "all removed",
    ],
)
def test_an_edit_a_removal_or_a_swap_is_named_at_opening(path, orders, named):
    with closing(Ledger(path, "ward")) as ledger:
        reserve(ledger)
        ledger.intend("a", 1, PLAN)
        ledger.release("a", 1)
        ledger.intend("a", 2, PLAN)
    closing(Ledger(path, "ward")).__exit__()  # opens whole
    tamper(path, *orders)
    with pytest.raises(LedgerError, match=re.escape(named)) as fault:
        Ledger(path, "ward")
    assert str(fault.value).startswith(f"ledger {path}: ")
    assert "restore the" in str(fault.value)


def test_an_exported_ledger_is_checked_by_its_chain_alone(ledger):
    reserve(ledger)
    ledger.intend("a", 1, PLAN)
    entries = [json.loads(line) for line in ledger.export().splitlines()]
    check_chain(entries, "export")
    assert entries == ledger.entries()
    for number in (0, 1):
        edited = [dict(entry) for entry in entries]
        edited[number]["time"] = "2020-01-01T00:00:00+00:00"
        with pytest.raises(LedgerError, match=rf"export: entry {number + 1} "):
            check_chain(edited, "export")


def test_an_entrys_hash_covers_its_whole_body_and_the_hash_before_it(path):
    with closing(Ledger(path, "ward")) as ledger:
        reserve(ledger)
        ledger.intend("a", 1, PLAN)
    previous = GENESIS
    for _, mark, body in rows(path):
        assert mark == chain(previous, body)
        assert body == canonical_json(json.loads(body))
        previous = mark


def test_another_sites_ledger_is_refused(ledger, path):
    reserve(ledger)
    with pytest.raises(LedgerError, match='is of site "ward", not "clinic"'):
        Ledger(path, "clinic")


def test_a_file_that_is_no_ledger_is_refused(path):
    path.parent.mkdir()
    path.write_bytes(b"not a database at all, but long enough to look at" * 20)
    with pytest.raises(LedgerError, match=f"ledger {re.escape(str(path))}: "):
        Ledger(path, "ward")


def test_a_folder_that_cannot_be_made_is_a_ledger_error(tmp_path):
    (tmp_path / "ward").write_text("a file in the folder's place")
    with pytest.raises(LedgerError, match="Nothing was released"):
        Ledger(tmp_path / "ward" / "ledger.sqlite", "ward")


@contextmanager
def full_disk(room=0):
    """No file of this process may grow beyond `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_a_ledger_error_and_leaves_the_ledger_as_it_was(ledger, path):
    reserve(ledger)
    with full_disk(), pytest.raises(LedgerError, match="Nothing was released"):
        ledger.intend("a", 1, PLAN)
    assert kinds(ledger) == ["RESERVE"]
    ledger.intend("a", 1, PLAN)  # the same connection goes on once there is room
    with closing(Ledger(path, "ward")) as again:
        assert kinds(again) == ["RESERVE", "INTENT"]


def test_a_fault_inside_a_transaction_leaves_nothing(ledger, path):
    with pytest.raises(ValueError, match="JSON"):
        ledger.counts("a", 1, cells=math.nan)
    with pytest.raises(KeyboardInterrupt), ledger._transaction():
        ledger._append("INTENT", "a", round=1)
        raise KeyboardInterrupt
    assert rows(path) == []
    reserve(ledger)


@pytest.mark.parametrize("lock", ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
def test_opening_waits_for_another_process_that_creates_the_file(path, lock):
    path.parent.mkdir()
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as raw:
        raw.execute(lock)
        done = threading.Timer(0.3, lambda: raw.execute("ROLLBACK"))
        done.start()
        with closing(Ledger(path, "ward")) as ledger:
            assert reserve(ledger)["seq"] == 1
        done.join()


RACER = """
import sys, time
from pathlib import Path
from fedaccord.errors import BudgetError
from fedaccord.privacy.ledger import Cap, Ledger
from fedaccord.privacy.plan import PrivacyPlan
path, me, epsilon = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
plan = PrivacyPlan("ward", 100, 2, 2, 1.0, 4.0, 1.0, 1e-5)
(path.parent / f"ready-{me}").touch()
while not (path.parent / "go").exists():
    time.sleep(0.001)
won = 0
ledger = Ledger(path, "ward")  # four processes create one file
for number in range(2):
    try:
        ledger.reserve(f"{me}-{number}", plan, 2, Cap(epsilon, 1e-5), "f" * 64)
        ledger.intend(f"{me}-{number}", 1, plan)
        won += 1
    except BudgetError:
        pass
print(won)
"""


def test_four_processes_that_race_never_pass_the_cap(tmp_path):
    path = tmp_path / "ledger.sqlite"
    three = accounting.epsilon(accounting.compose([PLAN.event()] * 3), 1e-5)
    command = [sys.executable, "-c", RACER, str(path)]
    racers = [
        subprocess.Popen([*command, str(me), str(three + 0.01)], stdout=subprocess.PIPE, text=True)
        for me in range(4)
    ]
    while len(list(tmp_path.glob("ready-*"))) < 4:
        assert all(racer.poll() is None for racer in racers)
        time.sleep(0.01)
    (tmp_path / "go").touch()
    won = [int(racer.communicate(timeout=100)[0]) for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 4
    with closing(Ledger(path, "ward")) as ledger:
        found = kinds(ledger)
        assert spent(ledger.entries(), 1e-5) <= three + 0.01
    assert sum(won) == found.count("RESERVE") == found.count("INTENT") == 3
    assert found.count("REFUSAL") == 5
