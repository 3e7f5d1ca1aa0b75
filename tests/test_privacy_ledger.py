"""The ledger: reserve, write ahead, release; every refusal; one budget for all; no cap passed."""

import dataclasses
import math
from contextlib import closing
from datetime import UTC, datetime

import pytest

from fedaccord.errors import BudgetError, LedgerError
from fedaccord.privacy import accounting
from fedaccord.privacy.budget import Cap
from fedaccord.privacy.ledger import Ledger, Terms, overlap, reserved, spent
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
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
ACCORD = "f" * 64


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ward" / "ledger.sqlite"


@pytest.fixture
def ledger(path, tmp_path):
    with closing(Ledger(path, "ward", tmp_path / "heads" / "ward.json")) as opened:
        yield opened


def kinds(ledger):
    """What the ledger has after its key."""
    first, *others = [entry["kind"] for entry in ledger.entries()]
    assert first == "KEY"
    return others


def reserve(ledger, run="a", plan=PLAN, cap=CAP, **terms):
    return ledger.reserve(run, plan, 2, Terms(**{"cap": cap, "accord": ACCORD} | terms))


def total(ledger, cap=ROOM, **about):
    return spent(ledger.entries(), cap, **about)


def test_reserve_intend_release_are_written_in_that_order(ledger):
    reserve(ledger, dataset="heart", disjoint=[["heart"], ["lung"]])
    ledger.intend("a", 1, PLAN, ACCORD)
    ledger.release("a", 1, what="weights", sha256="0" * 64)
    ledger.counts("a", 1, what="group counts", cells=4)
    assert kinds(ledger) == ["RESERVE", "INTENT", "RELEASE", "COUNTS"]
    _, first, intent, release, _ = ledger.entries()
    assert first["event"] == PLAN.event()
    assert first["plan"] == PLAN.to_json()
    assert first["plan_digest"] == PLAN.digest
    assert first["epsilon"] == PLAN.epsilon()
    assert first["cap"] == {"epsilon": CAP.epsilon, "delta": CAP.delta}
    assert (first["accord"], first["dataset"]) == (ACCORD, "heart")
    assert first["disjoint"] == [["heart"], ["lung"]]
    assert (intent["round"], intent["slot"], intent["slots"]) == (1, 1, 2)
    assert (release["what"], release["sha256"]) == ("weights", "0" * 64)
    assert [entry["seq"] for entry in ledger.entries()] == [1, 2, 3, 4, 5]
    assert {entry["site"] for entry in ledger.entries()} == {"ward"}


def test_an_entry_has_the_time_that_the_sites_clock_tells(path):
    with closing(Ledger(path, "ward", clock=lambda: NOON)) as ledger:
        assert reserve(ledger)["time"] == "2026-11-22T12:00:00+00:00"


def test_the_whole_plan_is_spent_from_its_reservation_on(ledger):
    assert total(ledger) == 0
    reserve(ledger)
    before = total(ledger)
    assert before == pytest.approx(ONE, rel=1e-3)
    ledger.intend("a", 1, PLAN, ACCORD)
    ledger.release("a", 1)
    assert total(ledger) == before


def test_an_entry_outlives_its_process_and_is_read_as_it_was_written(path):
    with closing(Ledger(path, "ward")) as one:
        entry = reserve(one)
    with closing(Ledger(path, "ward")) as other:
        assert other.entries()[1:] == [entry]


def test_the_same_run_reserves_once(ledger):
    assert reserve(ledger) == reserve(ledger)
    ledger.consider("a", PLAN, Terms(CAP, ACCORD))
    assert kinds(ledger) == ["RESERVE"]


@pytest.mark.parametrize("change", [{"noise_multiplier": 0.5}, {"steps": 200}, {"rounds": 50}])
def test_a_reservation_covers_the_plan_that_it_was_made_for_and_no_other(ledger, change):
    reserve(ledger)
    other = dataclasses.replace(PLAN, **change)
    for attempt in (
        lambda: reserve(ledger, plan=other, cap=UNCAPPED),
        lambda: ledger.consider("a", other, Terms(UNCAPPED, ACCORD)),
        lambda: reserve(ledger, plan=None, cap=UNCAPPED),
        lambda: ledger.intend("a", 1, other, ACCORD),
        lambda: ledger.intend("a", 1, None, ACCORD),
    ):
        with pytest.raises(BudgetError, match=r"Site ward has reserved plan .* Start a new run"):
            attempt()
    assert kinds(ledger) == ["RESERVE"]


def test_a_reservation_covers_the_accord_that_it_was_made_for_and_no_other_with_the_same_plan(
    ledger,
):
    groups = [["heart"], ["lung"]]
    reserve(ledger, dataset="heart", disjoint=groups)
    # The other accord has other people's records, or a cap of its own: neither is paid for.
    for attempt in (
        lambda: reserve(ledger, accord="e" * 64, dataset="lung", disjoint=groups),
        lambda: reserve(ledger, accord="e" * 64, accord_cap=Cap(0.01, 1e-5)),
        lambda: ledger.consider("a", PLAN, Terms(UNCAPPED, "e" * 64)),
        lambda: ledger.intend("a", 1, PLAN, "e" * 64),
    ):
        with pytest.raises(BudgetError, match="has reserved run a for accord ffffffffffff, not e"):
            attempt()
    assert kinds(ledger) == ["RESERVE"]


def test_the_number_of_slots_is_the_plans_whatever_the_caller_says(ledger):
    assert ledger.reserve("a", PLAN, 1_000, Terms(CAP, ACCORD))["rounds"] == PLAN.rounds
    off = ledger.reserve("b", None, 7, Terms(UNCAPPED, ACCORD))
    assert off["rounds"] == 7


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
    last = ledger.entries()[-1]
    assert (last["reason"], last["rule"]) == (str(refusal.value), "budget")
    assert total(ledger) == pytest.approx(ONE, rel=1e-3)
    with pytest.raises(BudgetError, match="no slot left of 0 reserved for run b"):
        ledger.intend("b", 1, PLAN, ACCORD)


def test_the_cap_itself_can_be_spent_and_nothing_above_it(ledger):
    exactly = Cap(ONE, 1e-5)
    with pytest.raises(BudgetError):
        reserve(ledger, cap=Cap(math.nextafter(ONE, 0), 1e-5))
    reserve(ledger, cap=exactly)


def test_past_plans_are_composed_and_not_added(ledger):
    assert TWO < 1.6 * ONE
    enough = Cap(TWO + 0.01, 1e-5)
    reserve(ledger, "a", cap=enough)
    reserve(ledger, "b", cap=enough)
    assert total(ledger) == pytest.approx(TWO, rel=1e-3)
    with pytest.raises(BudgetError):
        reserve(ledger, "c", cap=enough)


def test_a_plan_chosen_after_a_result_never_costs_less_than_one_chosen_before(ledger):
    reserve(ledger, "a", cap=ROOM)
    before = spent(ledger.entries(), ROOM, PLAN.event())
    assert reserved(ledger.entries()) == ([PLAN.event()], [], False)
    ledger.intend("a", 1, PLAN, ACCORD)  # a round may end in words that its noised step chose
    assert reserved(ledger.entries()) == ([PLAN.event()], [], True)
    ledger.release("a", 1)
    assert reserved(ledger.entries()) == ([PLAN.event()], [], True)
    assert spent(ledger.entries(), ROOM, PLAN.event()) >= before
    reserve(ledger, "b", cap=ROOM)
    assert reserved(ledger.entries()) == ([PLAN.event()], [PLAN.event()], True)


def test_considering_a_plan_reserves_nothing_and_records_a_refusal(ledger):
    ledger.consider("a", PLAN, Terms(CAP, ACCORD))
    assert kinds(ledger) == []
    reserve(ledger)
    with pytest.raises(BudgetError, match="This plan needs epsilon"):
        ledger.consider("b", PLAN, Terms(CAP, ACCORD))
    assert kinds(ledger) == ["RESERVE", "REFUSAL"]


def test_the_same_refusal_again_is_not_written_again_and_another_is(ledger):
    for _ in range(3):
        with pytest.raises(BudgetError):
            reserve(ledger, cap=Cap(0.01, 1e-5))
    assert kinds(ledger) == ["REFUSAL"]
    ledger.refuse("a", ACCORD, "expires", "The policy ended.")
    ledger.refuse("a", ACCORD, "expires", "The policy ended.")
    ledger.refuse("b", ACCORD, "expires", "The policy ended.")  # nor under another run's name
    assert [e.get("rule") for e in ledger.entries()[1:]] == ["budget", "expires"]
    ledger.refuse("b", "e" * 64, "expires", "The policy ended.")
    ledger.refuse("b", ACCORD, "expires", "The policy ended on Monday.")
    assert [e.get("rule") for e in ledger.entries()[3:]] == ["expires", "expires"]


def test_a_cap_that_is_not_a_number_refuses(ledger):
    with pytest.raises(BudgetError):
        reserve(ledger, cap=Cap(math.nan, 1e-5))
    assert kinds(ledger) == ["REFUSAL"]


def test_privacy_off_is_infinite_from_then_on(ledger):
    with pytest.raises(BudgetError, match="This plan needs epsilon infinite"):
        reserve(ledger, plan=None)
    entry = reserve(ledger, plan=None, cap=UNCAPPED)
    assert (entry["kind"], entry["epsilon"]) == ("NONPRIVATE", "infinite")
    assert total(ledger) == math.inf
    with pytest.raises(BudgetError, match=r"has 0\.00 of"):
        reserve(ledger, "b", cap=ROOM)
    assert reserve(ledger, "b", cap=UNCAPPED)["cap"] == {"delta": 1e-5, "epsilon": "infinite"}


def test_an_accords_own_cap_holds_over_its_runs_and_leaves_other_accords_alone(ledger):
    mine = {"cap": ROOM, "accord_cap": CAP}
    reserve(ledger, "a", **mine)
    with pytest.raises(BudgetError, match=r"of \d\.\d\d left at delta 1e-05 for this accord\. "):
        reserve(ledger, "b", **mine)
    reserve(ledger, "c", accord="e" * 64, **mine)
    assert kinds(ledger) == ["RESERVE", "REFUSAL", "RESERVE"]
    with pytest.raises(BudgetError, match="This plan needs"):  # the site's cap is over all accords
        reserve(ledger, "d", accord="d" * 64, cap=Cap(TWO + 0.01, 1e-5), accord_cap=ROOM)


@pytest.mark.parametrize(
    ("one", "other", "disjoint", "shared"),
    [
        ("heart", "heart", [], True),
        ("heart", "lung", [], True),
        ("heart", "lung", [["heart"], ["lung"]], False),
        ("heart", "lung", [["heart", "lung"], ["eye"]], True),
        ("heart", "eye", [["heart", "lung"], ["eye"]], False),
        ("heart", "heart", [["heart"], ["lung"]], True),
        ("heart", "lung", [["heart", "lung"], ["lung"]], True),
        ("heart", "new", [["heart"], ["lung"]], True),
        ("heart", "", [["heart"], ["lung"]], True),
        ("", "", [["heart"], ["lung"]], True),
    ],
)
def test_data_sets_share_subjects_unless_they_stand_in_different_groups(
    one, other, disjoint, shared
):
    assert overlap(one, other, disjoint) is shared
    assert overlap(other, one, disjoint) is shared


def test_data_sets_have_one_budget_unless_they_are_declared_disjoint(ledger):
    groups = [["heart"], ["lung"]]
    reserve(ledger, "a", dataset="heart")
    with pytest.raises(BudgetError):
        reserve(ledger, "b", dataset="lung")
    reserve(ledger, "c", dataset="lung", disjoint=groups)
    with pytest.raises(BudgetError):
        reserve(ledger, "d", dataset="lung", disjoint=groups)
    with pytest.raises(BudgetError):
        reserve(ledger, "e", dataset="eye", disjoint=groups)  # may be anybody's
    assert total(ledger, dataset="lung", disjoint=groups) == pytest.approx(ONE, rel=1e-3)
    assert total(ledger, dataset="lung") == pytest.approx(TWO, rel=1e-3)


def test_a_round_has_one_slot_and_a_run_as_many_as_it_reserved(ledger):
    with pytest.raises(BudgetError, match="no slot left of 0 reserved for run a"):
        ledger.intend("a", 1, PLAN, ACCORD)
    reserve(ledger)
    ledger.intend("a", 1, PLAN, ACCORD)
    with pytest.raises(BudgetError, match="already used its slot for round 1 of run a"):
        ledger.intend("a", 1, PLAN, ACCORD)
    ledger.intend("a", 7, PLAN, ACCORD)
    with pytest.raises(BudgetError, match="no slot left of 2 reserved for run a"):
        ledger.intend("a", 8, PLAN, ACCORD)
    assert kinds(ledger) == ["RESERVE", "INTENT", "INTENT"]


def test_one_runs_slots_are_not_anothers(ledger):
    reserve(ledger, "a", cap=ROOM)
    reserve(ledger, "b", cap=ROOM)
    ledger.intend("a", 1, PLAN, ACCORD)
    ledger.intend("a", 2, PLAN, ACCORD)
    ledger.intend("b", 1, PLAN, ACCORD)
    with pytest.raises(LedgerError, match="round 2 of run b has no INTENT"):
        ledger.release("b", 2)


def test_a_release_needs_its_intent_and_comes_once(ledger):
    reserve(ledger)
    with pytest.raises(LedgerError, match="round 1 of run a has no INTENT"):
        ledger.release("a", 1)
    ledger.intend("a", 1, PLAN, ACCORD)
    ledger.release("a", 1)
    with pytest.raises(LedgerError, match="round 1 of run a has a RELEASE already"):
        ledger.release("a", 1)
    assert kinds(ledger) == ["RESERVE", "INTENT", "RELEASE"]


def test_find_returns_a_runs_entries_of_the_kinds_asked_for(ledger):
    reserve(ledger, "a", cap=ROOM)
    reserve(ledger, "b", cap=ROOM)
    ledger.intend("a", 1, PLAN, ACCORD)
    assert [e["kind"] for e in ledger.find("a", "INTENT", "RESERVE")] == ["RESERVE", "INTENT"]
    assert ledger.find("b", "INTENT") == []


def test_another_sites_ledger_is_refused(ledger, path):
    reserve(ledger)
    with pytest.raises(LedgerError, match='is of site "ward", not "clinic"'):
        Ledger(path, "clinic")


def test_a_folder_that_cannot_be_made_is_a_ledger_error(tmp_path):
    (tmp_path / "ward").write_text("a file in the folder's place")
    with pytest.raises(LedgerError, match="Nothing was released"):
        Ledger(tmp_path / "ward" / "ledger.sqlite", "ward")


@pytest.mark.parametrize("fault", [KeyboardInterrupt, ValueError, BudgetError])
def test_a_fault_inside_a_transaction_leaves_nothing(ledger, fault):
    before = ledger.export()
    with pytest.raises(fault), ledger._log.transaction():
        ledger._log.append("INTENT", "a", round=1)
        raise fault
    assert ledger.export() == before
    reserve(ledger)
    assert kinds(ledger) == ["RESERVE"]


def test_what_json_does_not_have_is_not_written(ledger):
    with pytest.raises(ValueError, match="JSON"):
        ledger.counts("a", 1, cells=math.nan)
    assert kinds(ledger) == []
