"""Admission and rounds, on real runs: who takes part, what is on record, and when a run stops."""

from __future__ import annotations

import json
import logging
import logging.handlers
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from carriers import Asked, Rough, run_over
from flwr.app import Message
from wards import toml

from fedaccord import accord as accords
from fedaccord import registry
from fedaccord.evidence import sha256
from fedaccord.privacy.ledger import Ledger
from fedaccord.privacy.plan import plan_for
from fedaccord.runs import RunFolder
from fedaccord.server import checkpoint
from fedaccord.simulations import engine

SITES = ["cleveland", "hungary", "switzerland", "va"]
Record = dict[str, Any]

# Small models, no student: a round takes a fraction of a second.
SMALL: Record = {
    "name": "small",
    "purpose": "Test.",
    "task": {"name": "heart"},
    "sites": [{"name": name, "subjects": 100 + 10 * n} for n, name in enumerate(SITES)],
    "model": {"name": "mlp", "options": {"hidden": 4}},
    "rounds": {"rounds": 3, "spare_rounds": 1, "min_sites": 2},
    "training": {"steps": 4, "learning_rate": 0.1},
    "privacy": {
        "noise_multiplier": 2.0,
        "delta": 1e-4,
        "max_epsilon": 10.0,
        "sampling_prob": 0.1,
    },
    "fairness": {"attributes": ["sex"], "min_group": 5},
    "distillation": {"enabled": False},
}
PLAIN = {"privacy.enabled": False}


def accord_file(folder: Path, **changes: Any) -> Path:
    """Write the small accord with some values changed: accord_file(p, **{"rounds.rounds": 2})."""
    data: Record = json.loads(json.dumps(SMALL))
    for path, value in changes.items():
        *tables, key = path.split(".")
        here = data
        for table in tables:
            here = here.setdefault(table, {})
        here[key] = value
    path = folder / "accord.toml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{key} = {toml(value)}\n" for key, value in data.items()))
    return path


def entries(sites: Path, site: str) -> list[Record]:
    """What a site's own ledger holds."""
    book = Ledger(sites / site / "ledger.sqlite", site)
    try:
        return book.entries()
    finally:
        book.close()


class Run:
    """One finished run: its folder, its records by kind, its sites' ledgers."""

    def __init__(self, folder: Path, sites: Path) -> None:
        self.folder, self.sites = folder, sites
        self.records = RunFolder.open(folder).records()

    def kind(self, kind: str) -> list[Record]:
        return [record for record in self.records if record["kind"] == kind]

    def end(self) -> Record:
        assert self.records[-1]["kind"] == "end"
        return self.records[-1]

    def ledger(self, site: str) -> list[Record]:
        return entries(self.sites, site)

    def used(self, kind: str) -> dict[str, list[int]]:
        return {
            site: [entry["round"] for entry in self.ledger(site) if entry["kind"] == kind]
            for site in SITES
        }


def simulate(folder: Path, **changes: Any) -> Run:
    accord = accord_file(folder, **changes)
    engine.simulate(accord, folder / "run", folder / "sites", 4)
    return Run(folder / "run", folder / "sites")


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("private")
    return simulate(
        folder,
        **{"rounds.sites_per_round": 3, "distillation": {"options": {"hidden": 3}, "steps": 5}},
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return simulate(tmp_path_factory.mktemp("plain"), **PLAIN, **{"rounds.sites_per_round": 3})


# --- the record ---------------------------------------------------------------------------------


def test_the_eight_steps_leave_a_round_and_a_decision_after_the_plans(private: Run) -> None:
    assert [record["id"] for record in private.records] == [
        "start",
        *(f"plan/{site}" for site in SITES),
        *(f"{kind}-{number}" for number in (1, 2, 3) for kind in ("round", "decision")),
        "end",
    ]
    assert [(d["stop"], d["reason"]) for d in private.kind("decision")] == [
        (False, "go on"),
        (False, "go on"),
        (True, "rounds done: 3 of 3"),
    ]
    assert private.end()["reason"] == "rounds done: 3 of 3"
    assert RunFolder.open(private.folder).faults() == []


def test_a_round_says_who_was_asked_what_came_and_what_was_made_of_it(private: Run) -> None:
    accord = accords.load(private.folder / "accord.toml")
    for record in private.kind("round"):
        invited = record["invited"]  # 1 invite
        assert len(invited) == 3 and sorted(invited) == invited
        assert sorted(record["replies"]) == invited  # 2 train, 3 gate
        for reply in record["replies"].values():
            assert (reply["accepted"], reply["reason"]) == (True, "")
            assert 0 < reply["update_norm"] <= accord.strategy.max_update_norm
        assert record["aggregated"] == invited  # 4 aggregate
        assert record["weights"] == {site: accord.roster[site] for site in invited}
        lesson = record["distillation"]  # 5 distil
        assert 0 <= lesson["divergence_after"] < lesson["divergence_before"]
        for section in ("model", "student"):  # 6 audit
            counts = record["audit"][section]["counts"]
            assert {s: int(np.sum(c["sex"])) for s, c in counts.items()} == {
                "cleveland": 101,
                "hungary": 98,
                "switzerland": 41,
                "va": 66,
            }
        assert record["audit"]["not_counted"] == {}
        assert sorted(record["epsilon"]) == SITES  # 7 record
    models = [record["model"] for record in private.kind("round")]
    assert len({private.kind("start")[0]["model"]["weights"], *models}) == 4


def test_the_run_keeps_the_last_rounds_model_and_student(private: Run) -> None:
    last = private.kind("round")[-1]
    for name in ("model", "student"):
        assert sha256((private.folder / f"{name}.safetensors").read_bytes()) == last[name]
    state = checkpoint.load(private.folder)
    assert state.number == 3
    assert state.record == {key: value for key, value in last.items() if key != "hash"}
    assert checkpoint.weights_digest(state.model) == last["model"]
    assert checkpoint.weights_digest(state.student) == last["student"]


def test_a_site_has_an_intent_and_a_release_for_each_round_that_it_was_asked_in(
    private: Run,
) -> None:
    asked = {
        site: [r["round"] for r in private.kind("round") if site in r["invited"]] for site in SITES
    }
    assert private.used("INTENT") == private.used("RELEASE") == asked
    assert private.used("COUNTS") == {site: [1, 2, 3] for site in SITES}
    for site in SITES:
        (reserved,) = [e for e in private.ledger(site) if e["kind"] == "RESERVE"]
        assert reserved["rounds"] == 4
        exported = (private.folder / "ledgers" / f"{site}.jsonl").read_text()
        assert [json.loads(line) for line in exported.splitlines()] == private.ledger(site)


def test_epsilon_grows_with_the_rounds_that_a_site_was_asked_in_up_to_what_it_reserved(
    private: Run,
) -> None:
    for site in SITES:
        plan = plan_for(accords.load(private.folder / "accord.toml"), site)
        assert plan is not None
        for number, record in enumerate(private.kind("round"), start=1):
            said = record["epsilon"][site]
            used = len([n for n in private.used("INTENT")[site] if n <= number])
            assert said["rounds_used"] == used
            assert said["odometer"] == plan.odometer(used)
            assert not used or said["odometer"] > plan.epsilon(used)
            assert said["reserved"] == plan.epsilon()


def test_a_run_without_privacy_is_stamped_from_start_to_end(plain: Run) -> None:
    assert plain.kind("start")[0]["private"] is False
    assert {record["statement"] for record in plain.kind("plan")} == {
        "no privacy guarantee: privacy.enabled = false"
    }
    for record in plain.kind("round"):
        assert {said["reserved"] for said in record["epsilon"].values()} == {"infinite"}
    for site in SITES:
        assert [entry["kind"] for entry in plain.ledger(site)[:2]] == ["KEY", "NONPRIVATE"]
        covers = {e["covers"] for e in plain.ledger(site) if e["kind"] in ("RELEASE", "COUNTS")}
        assert covers == {"not covered"}


# --- invitations --------------------------------------------------------------------------------


def invitations(run: Run) -> list[list[str]]:
    return [record["invited"] for record in run.kind("round")]


def test_the_sites_of_a_round_follow_from_the_seed(
    private: Run, plain: Run, tmp_path: Path
) -> None:
    assert invitations(plain) == invitations(private)
    other = simulate(tmp_path, **PLAIN, **{"rounds.sites_per_round": 3, "seed": 1})
    assert invitations(other) != invitations(plain)


def test_different_rounds_draw_different_sites(tmp_path: Path) -> None:
    changes = {"rounds.rounds": 6, "rounds.sites_per_round": 2, "training.steps": 1}
    drawn = invitations(simulate(tmp_path, **PLAIN, **changes))
    assert len({tuple(sites) for sites in drawn}) > 2
    assert {site for sites in drawn for site in sites} == set(SITES)


# --- rounds that fail, and how a run ends -------------------------------------------------------


def start_weights(run: Run) -> str:
    digest: str = run.kind("start")[0]["model"]["weights"]
    return digest


def test_a_run_whose_rounds_all_fail_uses_its_spare_ones_and_keeps_the_model(
    tmp_path: Path,
) -> None:
    changes = {"rounds.rounds": 2, "strategy.max_update_norm": 1e-6, "training.optimizer": "adam"}
    run = simulate(tmp_path, **changes)
    assert [r["aggregated"] for r in run.kind("round")] == [[], [], []]
    reasons = {reply["reason"][:23] for r in run.kind("round") for reply in r["replies"].values()}
    assert reasons == {"norm: update of L2 norm"}
    assert {record["model"] for record in run.kind("round")} == {start_weights(run)}
    assert sha256((run.folder / "model.safetensors").read_bytes()) == start_weights(run)
    assert run.end()["reason"] == (
        "budget: 0 sites have a reserved round left, after 0 of 2 rounds"
    )
    assert run.used("INTENT") == {site: [1, 2, 3] for site in SITES}  # every slot was paid for
    assert run.used("COUNTS") == {site: [] for site in SITES}


def lossy(folder: Path, lost: set[tuple[str, int]], **changes: Any) -> Run:
    """Run over a carrier that loses what some sites send in some rounds."""
    config: engine.Config = {
        "accord": str(accord_file(folder, **changes)),
        "run": str(folder / "run"),
        "sites": str(folder / "sites"),
    }

    def fate(asked: Asked) -> list[float]:
        site = SITES[asked.node - engine.FIRST_NODE]
        return [] if (site, asked.number) in lost else [0.0]

    run_over(Rough(4, config, fate), config)
    return Run(folder / "run", folder / "sites")


def test_a_failed_round_uses_a_spare_one_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    changes = {"rounds.rounds": 2, "rounds.min_sites": 4}
    run = lossy(tmp_path, {("va", 1)}, **PLAIN, **changes)
    first, second, third = run.kind("round")
    assert first["replies"]["va"] == {"accepted": False, "reason": "no answer"}
    assert (first["aggregated"], first["audit"], first["distillation"]) == ([], None, None)
    assert first["model"] == start_weights(run)
    assert second["aggregated"] == third["aggregated"] == SITES
    assert len({first["model"], second["model"], third["model"]}) == 3
    assert run.end()["reason"] == "rounds done: 2 of 2"


def test_a_lost_reply_costs_its_site_the_slot_and_the_round_goes_on(tmp_path: Path) -> None:
    run = lossy(tmp_path, {("va", 1)}, **{"rounds.rounds": 2})
    first = run.kind("round")[0]
    assert first["aggregated"] == SITES[:3]
    assert first["epsilon"]["va"]["rounds_used"] == 1
    assert first["audit"]["not_counted"] == {"va": "no answer"}  # its counts are lost as well
    assert sorted(first["audit"]["model"]["counts"]) == SITES[:3]


def test_without_spare_rounds_a_failed_round_ends_the_run_short(tmp_path: Path) -> None:
    changes = {"rounds.rounds": 2, "rounds.spare_rounds": 0, "rounds.min_sites": 4}
    run = lossy(tmp_path, {("va", 1)}, **PLAIN, **changes)
    assert run.end()["reason"] == (
        "budget: 0 sites have a reserved round left, after 1 of 2 rounds"
    )
    assert run.end()["rounds"] == 1


@pytest.mark.parametrize(("stops", "rounds"), [(True, 1), (False, 3)])
def test_a_broken_fairness_rule_ends_the_run_only_if_the_accord_says_so(
    stops: bool, rounds: int, tmp_path: Path
) -> None:
    rule = {"fairness.max_parity_difference": 0.0, "fairness.stop_on_breach": stops}
    run = simulate(tmp_path, **PLAIN, **rule)
    assert len(run.kind("round")) == rounds
    figures = run.kind("round")[0]["audit"]["model"]["figures"]["attributes"]["sex"]["all"]
    value = figures["demographic_parity_difference"]["value"]
    assert value > 0
    reason = f"difference of the model by sex, {value:.3f}, is above 0"
    assert run.end()["reason"].endswith(reason if stops else "rounds done: 3 of 3")


def test_a_fairness_rule_that_holds_does_not_end_the_run(tmp_path: Path) -> None:
    rule = {"fairness.max_parity_difference": 1.0, "fairness.stop_on_breach": True}
    run = simulate(tmp_path, **PLAIN, **rule, **{"rounds.rounds": 2})
    assert run.end()["reason"] == "rounds done: 2 of 2"


@pytest.mark.parametrize(("target", "rounds"), [(0.01, 1), (1.0, 2)])
def test_a_run_ends_when_the_target_is_reached(target: float, rounds: int, tmp_path: Path) -> None:
    changes = {"rounds.rounds": 2, "rounds.target_accuracy": target}
    run = simulate(tmp_path, **PLAIN, **changes)
    assert len(run.kind("round")) == rounds
    assert run.end()["reason"].startswith("target reached" if rounds == 1 else "rounds done")


# --- what a site never says ---------------------------------------------------------------------

SECRET = "patient-4711-is-positive"
LEAKY = f"""
from fedaccord.simulations.heart import Heart

class Leaky(Heart):
    def site(self, name):
        raise ValueError("{SECRET}")
"""


def test_what_a_sites_error_says_of_its_data_stays_at_the_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not caplog: pytest also listens to loggers that hand nothing on.
    root, heard = logging.getLogger(), logging.handlers.BufferingHandler(10_000)
    monkeypatch.setattr(root, "handlers", [*root.handlers, heard])
    (tmp_path / "leaky_task.py").write_text(LEAKY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(registry.TASKS, "leaky", "leaky_task:Leaky")
    accord = accord_file(tmp_path / "a", **{"task.name": "leaky", "rounds.rounds": 1})
    replies: list[Message] = []
    engine.simulate(accord, tmp_path / "run", tmp_path / "sites", 4, replies.append)
    logging.getLogger("another").error("a line that is heard")
    lines = "".join(logging.Formatter().format(record) for record in heard.buffer)
    assert "a line that is heard" in lines and SECRET not in lines
    for site in SITES:  # the site's own diary has it
        assert SECRET in (tmp_path / "sites" / site / "private.log").read_text(encoding="utf-8")
    sent = "".join(repr(reply) for reply in replies)
    assert SECRET not in sent
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.stem not in ("leaky_task", "private") and path.suffix != ".pyc":
            assert SECRET.encode() not in path.read_bytes(), path
    record = Run(tmp_path / "run", tmp_path / "sites").kind("round")[0]
    assert record["aggregated"] == SITES  # a round of noise alone, of the same size and shape
    assert record["audit"]["not_counted"] == {}  # an error would say something: nobody is counted
    assert record["audit"]["model"]["figures"]["accuracy"]["mean"] is None


def test_the_small_accord_is_written_as_it_is_meant(tmp_path: Path) -> None:
    assert tomllib.loads(accord_file(tmp_path).read_text()) == SMALL
