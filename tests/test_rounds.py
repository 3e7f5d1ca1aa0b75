"""Admission and rounds, on real runs: who takes part, what is on record, and when a run stops."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedaccord import accord as accords
from fedaccord import registry
from fedaccord.accord import Accord
from fedaccord.client.app import app as client_app
from fedaccord.errors import BudgetError, EvidenceError
from fedaccord.evidence import canonical_json, sha256
from fedaccord.privacy.ledger import Ledger
from fedaccord.privacy.plan import plan_for
from fedaccord.runs import RunFolder
from fedaccord.server import admission, checkpoint, gates
from fedaccord.server.app import app as server_app
from fedaccord.server.app import initial
from fedaccord.server.rounds import student_weights
from fedaccord.simulations import engine, heart
from fedaccord.tasks import load_task

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


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


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


def refused(folder: Path, nodes: int = 4, **changes: Any) -> tuple[str, Run]:
    accord = accord_file(folder, **changes)
    with pytest.raises(BudgetError) as caught:
        engine.simulate(accord, folder / "run", folder / "sites", nodes)
    return str(caught.value), Run(folder / "run", folder / "sites")


def cap(sites: Path, site: str, epsilon: float, delta: float = 1e-4) -> None:
    """The site's own policy, written before anybody asks it."""
    (sites / site).mkdir(parents=True)
    (sites / site / "policy.toml").write_text(f"max_epsilon = {epsilon}\ndelta = {delta}\n")


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
    number, model, student = checkpoint.load(private.folder)
    assert number == 3
    assert checkpoint.weights_digest(model) == last["model"]
    assert checkpoint.weights_digest(student) == last["student"]


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
            assert said["curve"] == (plan.epsilon(used) if used else 0.0)
            assert said["curve"] < said["reserved"] == plan.epsilon()


def test_a_run_without_privacy_is_stamped_from_start_to_end(plain: Run) -> None:
    assert plain.kind("start")[0]["private"] is False
    assert {record["statement"] for record in plain.kind("plan")} == {
        "no privacy guarantee: privacy.enabled = false"
    }
    for record in plain.kind("round"):
        assert {said["reserved"] for said in record["epsilon"].values()} == {"infinite"}
    for site in SITES:
        assert plain.ledger(site)[0]["kind"] == "NONPRIVATE"
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


# --- admission ----------------------------------------------------------------------------------


def test_a_site_that_refuses_stays_out_by_name_and_the_others_go_on(tmp_path: Path) -> None:
    cap(tmp_path / "sites", "va", 0.5)
    run = simulate(tmp_path)
    (out,) = run.kind("out")
    accord = accords.load(run.folder / "accord.toml")
    plan = plan_for(accord, "va")
    assert plan is not None and plan.epsilon() > 0.5
    assert out["site"] == "va"
    assert out["reason"].startswith("This plan needs epsilon ")
    assert "site va has 0.50 of 0.50 left at delta 0.0001. Plan fewer rounds" in out["reason"]
    assert [record["site"] for record in run.kind("plan")] == SITES[:3]
    assert invitations(run) == [SITES[:3]] * 3
    assert [entry["kind"] for entry in run.ledger("va")] == ["REFUSAL"]
    assert run.end()["reason"] == "rounds done: 3 of 3"


def test_a_site_with_a_stricter_delta_refuses(tmp_path: Path) -> None:
    cap(tmp_path / "sites", "va", 10.0, delta=1e-5)
    run = simulate(tmp_path, **{"rounds.rounds": 1})
    (out,) = run.kind("out")
    assert out["reason"].startswith("privacy.delta = 0.0001 is above 1e-05, the delta of site va")


def test_a_site_with_a_cap_takes_no_part_in_plain_training(tmp_path: Path) -> None:
    cap(tmp_path / "sites", "va", 10.0)
    run = simulate(tmp_path, **PLAIN, **{"rounds.rounds": 1})
    (out,) = run.kind("out")
    assert out["reason"].startswith("This plan needs epsilon infinite (privacy.enabled = false)")
    assert invitations(run) == [SITES[:3]]


class Watch:
    """Files that Python opens, while it is on (an audit hook cannot be taken out again)."""

    def __init__(self) -> None:
        self.on, self.opened = False, list[str]()
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.on and event == "open":
            self.opened.append(str(args[0]))


WATCH = Watch()


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """What this test opens; the task's records are read afresh."""
    heart._rows.cache_clear()
    WATCH.opened.clear()
    WATCH.on = True
    yield WATCH.opened
    WATCH.on = False


def test_when_all_sites_refuse_nothing_is_reserved_and_no_record_is_read(
    tmp_path: Path, opened: list[str]
) -> None:
    for site in SITES:
        cap(tmp_path / "sites", site, 0.5)
    words, run = refused(tmp_path)
    assert str(heart.FILE) not in opened
    assert str(tmp_path / "accord.toml") in opened  # the watch does see
    assert "\n" not in words
    assert words.startswith("This plan needs epsilon ")
    assert words.endswith("Out as well: hungary, switzerland, va.")
    assert (run.end()["stop"], run.end()["reason"]) == ("refused", words)
    assert run.kind("plan") == run.kind("round") == []
    assert {out["site"] for out in run.kind("out")} == set(SITES)
    for site in SITES:
        assert [entry["kind"] for entry in run.ledger(site)] == ["REFUSAL"]
    assert RunFolder.open(run.folder).faults() == []


def test_when_sites_agree_records_are_read(tmp_path: Path, opened: list[str]) -> None:
    simulate(tmp_path, **PLAIN, **{"rounds.rounds": 1})
    assert str(heart.FILE) in opened


def test_too_few_willing_sites_cost_the_willing_ones_nothing(tmp_path: Path) -> None:
    for site in SITES[:2]:
        cap(tmp_path / "sites", site, 0.5)
    words, run = refused(tmp_path, **{"rounds.min_sites": 3})
    assert "site cleveland has 0.50 of 0.50 left" in words
    assert [run.ledger(site) for site in SITES[2:]] == [[], []]


def test_a_site_without_a_node_is_out_and_a_node_without_a_site_too(tmp_path: Path) -> None:
    accord = accord_file(tmp_path / "few", **PLAIN, **{"rounds.rounds": 1})
    engine.simulate(accord, tmp_path / "few/run", tmp_path / "few/sites", 3)
    run = Run(tmp_path / "few/run", tmp_path / "few/sites")
    assert [(o["site"], o["reason"]) for o in run.kind("out")] == [("va", "no answer")]
    accord = accord_file(tmp_path / "many", **PLAIN, **{"rounds.rounds": 1})
    engine.simulate(accord, tmp_path / "many/run", tmp_path / "many/sites", 5)
    (out,) = Run(tmp_path / "many/run", tmp_path / "many/sites").kind("out")
    assert out["site"] == "node 1004"
    assert "(partition-id 4) is not among the 4 sites of accord" in out["reason"]


def test_a_run_that_lacks_a_site_it_needs_says_which(tmp_path: Path) -> None:
    words, _ = refused(tmp_path, nodes=3, **PLAIN, **{"rounds.min_sites": 4})
    assert words == "Site va is out: no answer."


def test_a_site_whose_ledger_is_damaged_stays_out_by_name(tmp_path: Path) -> None:
    (tmp_path / "sites" / "va").mkdir(parents=True)
    (tmp_path / "sites" / "va" / "ledger.sqlite").write_bytes(b"not a database" * 100)
    run = simulate(tmp_path, **PLAIN, **{"rounds.rounds": 1})
    (out,) = run.kind("out")
    assert out["site"] == "va"
    assert out["reason"].startswith("ledger ") and "restore the file" in out["reason"]


def test_sites_whose_folders_cannot_be_used_refuse_in_words(tmp_path: Path) -> None:
    (tmp_path / "sites").write_text("a file where the folder should be")
    words, _ = refused(tmp_path, **PLAIN)
    assert words.startswith("site cleveland cannot use its folder ")
    assert "\n" not in words


def grid(folder: Path, nodes: int = 4, **changes: Any) -> tuple[engine.InProcessGrid, Accord]:
    accord = accord_file(folder, **changes)
    config: engine.Config = {"accord": str(accord), "sites": str(folder / "sites")}
    return engine.InProcessGrid(client_app, nodes, config), accords.load(accord)


def test_two_nodes_that_say_they_are_one_site_are_both_left_out(tmp_path: Path) -> None:
    both, accord = grid(tmp_path, **PLAIN)
    both._contexts[engine.FIRST_NODE + 3].node_config["site"] = "hungary"
    places, out = admission.admit(both, accord, "run")
    assert [place.site for place in places] == ["cleveland", "switzerland"]
    assert out == {
        "hungary": "more than one node says that it is this site; stop the others",
        "va": "no answer",
    }


def test_a_site_that_holds_another_accord_stays_out(tmp_path: Path) -> None:
    carrier, accord = grid(tmp_path, **PLAIN)
    other = accords.load(accord_file(tmp_path / "other", **PLAIN, **{"training.steps": 5}))
    places, out = admission.admit(carrier, other, "run")
    assert places == []
    assert out["va"].startswith(f"site va holds another accord: its digest is {accord.digest[:12]}")


@pytest.mark.parametrize("run", ["../escape", "/tmp/escape", "a/b", "", "..\\escape", "x" * 200])
def test_a_site_refuses_a_run_whose_name_leads_out_of_its_folder(run: str, tmp_path: Path) -> None:
    carrier, accord = grid(tmp_path)
    places, out = admission.admit(carrier, accord, run)
    assert places == []
    assert {reason.split("'")[-1] for reason in out.values()} == {
        " is no name of a folder. Give the run another name."
    }


def changed(entry: Record, key: str, value: object) -> str:
    return canonical_json({k: v for k, v in (entry | {key: value}).items() if v != "gone"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rounds", 10**9),
        ("rounds", 3),
        ("rounds", "4"),
        ("epsilon", 0.01),
        ("epsilon", "infinite"),
        ("epsilon", "gone"),
        ("kind", "NONPRIVATE"),
        ("run", "other"),
        ("site", "hungary"),
        ("accord", "0" * 64),
        ("plan_digest", None),
        ("event", {"type": "NonPrivate"}),
    ],
)
def test_a_reservation_that_is_not_what_was_agreed_is_refused(
    key: str, value: object, private: Run
) -> None:
    accord = accords.load(private.folder / "accord.toml")
    entry = private.kind("plan")[3]["entry"]
    assert admission.reservation({"entry": canonical_json(entry)}, accord, "va", "run")[1] == ""
    said = {"entry": changed(entry, key, value)}
    _, reason = admission.reservation(said, accord, "va", "run")
    assert reason == f"its reservation differs from the accord's in: {key}"


@pytest.mark.parametrize("said", [{}, {"entry": "no JSON"}, {"entry": "3"}, {"entry": 3}])
def test_a_reservation_that_cannot_be_read_is_refused(said: Record, private: Run) -> None:
    accord = accords.load(private.folder / "accord.toml")
    _, reason = admission.reservation(said, accord, "va", "run")
    assert reason == "its reply to the reservation holds no entry of a ledger"


# --- rounds that fail, and how a run ends -------------------------------------------------------


def start_weights(run: Run) -> str:
    digest: str = run.kind("start")[0]["model"]["weights"]
    return digest


def test_a_run_whose_rounds_all_fail_uses_its_spare_ones_and_keeps_the_model(
    tmp_path: Path,
) -> None:
    changes = {"rounds.rounds": 2, "strategy.max_update_norm": 1e-6}
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


class Lossy(engine.InProcessGrid):
    """A carrier that loses what some sites send in some rounds."""

    lost: frozenset[tuple[str, int]] = frozenset()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        for reply in super().send_and_receive(messages, timeout=timeout):
            said = reply.content.config_records["config"]
            if (said.get("site"), said.get("round")) not in self.lost:
                yield reply


def lossy(folder: Path, lost: set[tuple[str, int]], **changes: Any) -> Run:
    config: engine.Config = {
        "accord": str(accord_file(folder, **changes)),
        "run": str(folder / "run"),
        "sites": str(folder / "sites"),
    }
    carrier = Lossy(client_app, 4, config)
    carrier.lost = frozenset(lost)
    context = carrier._contexts[engine.FIRST_NODE]
    server_app(grid=carrier, context=context)
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
    reason = f"fairness rule: the demographic parity difference by sex, {value:.3f}, is above 0"
    assert run.end()["reason"] == (reason if stops else "rounds done: 3 of 3")


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "leaky_task.py").write_text(LEAKY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(registry.TASKS, "leaky", "leaky_task:Leaky")
    accord = accord_file(tmp_path / "a", **{"task.name": "leaky", "rounds.rounds": 1})
    replies: list[Message] = []
    engine.simulate(accord, tmp_path / "run", tmp_path / "sites", 4, replies.append)
    assert SECRET in caplog.text  # the site's own log has it
    sent = "".join(repr(reply) for reply in replies)
    assert "internal error; see the site's log" in sent
    assert SECRET not in sent
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name != "leaky_task.py" and path.suffix != ".pyc":
            assert SECRET.encode() not in path.read_bytes(), path
    record = Run(tmp_path / "run", tmp_path / "sites").kind("round")[0]
    assert record["aggregated"] == SITES  # a round of noise alone, of the same size and shape
    fixed = "error: internal error; see the site's log"
    assert record["audit"]["not_counted"] == dict.fromkeys(SITES, fixed)
    assert record["audit"]["model"]["figures"]["accuracy"]["mean"] is None


def test_an_exception_in_a_handler_travels_as_one_fixed_line(tmp_path: Path) -> None:
    carrier, accord = grid(tmp_path)
    config = ConfigRecord({"run": "run", "accord": accord.digest})  # no round: the handler raises
    admission.admit(carrier, accord, "run")
    answers = admission.ask(
        carrier, carrier.get_node_ids(), "evaluate", RecordDict({"config": config}), 60.0
    )
    assert {answer.error.reason for answer in answers.values()} == {
        "internal error; see the site's log"
    }


@pytest.mark.parametrize("kind", ["evaluate", "train"])
def test_a_site_releases_nothing_for_a_run_that_it_has_not_reserved(
    kind: str, tmp_path: Path
) -> None:
    carrier, accord = grid(tmp_path)
    weights = student_weights(initial(accord, load_task("heart"))[0])
    asked = {"run": "run", "accord": accord.digest, "server-round": 1}
    content = RecordDict({"config": ConfigRecord(asked)})
    content["arrays" if kind == "train" else "model"] = gates.to_arrays(weights)
    answers = admission.ask(carrier, carrier.get_node_ids(), kind, content, 60.0)
    assert len(answers) == 4
    for answer in answers.values():
        assert list(answer.content) == ["config"]
        assert "reserv" in str(answer.content.config_records["config"]["refused"])
    assert [entries(tmp_path / "sites", site) for site in SITES] == [[]] * 4


# --- checkpoints --------------------------------------------------------------------------------

WEIGHTS = {
    "b": np.float32([[1.5, -0.0], [2, 3]]),
    "a": np.array(2, np.int64),
    "e": np.zeros((0, 3)),
}


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    for student in (None, {"w": np.float64([np.pi])}):
        checkpoint.save(tmp_path, 7, WEIGHTS, student)
        number, model, again = checkpoint.load(tmp_path)
        assert number == 7
        for there, here in ((model, WEIGHTS), (again, student or {})):
            assert there.keys() == here.keys()
            for name in here:
                assert there[name].tobytes() == here[name].tobytes()
                assert (there[name].dtype, there[name].shape) == (
                    here[name].dtype,
                    here[name].shape,
                )


def test_equal_weights_have_one_digest_whatever_their_order_and_layout() -> None:
    turned = {k: WEIGHTS[k].copy(order="F") for k in reversed(WEIGHTS)}
    assert checkpoint.weights_digest(turned) == checkpoint.weights_digest(WEIGHTS)
    other = WEIGHTS | {"b": np.float32([[1.5, 0.0], [2, 3]])}
    assert checkpoint.weights_digest(other) != checkpoint.weights_digest(WEIGHTS)


@pytest.mark.parametrize("spoil", ["absent", "empty", "garbage", "cut off", "no round"])
def test_a_checkpoint_that_cannot_be_read_is_refused_in_words(spoil: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, WEIGHTS, None)
    path = tmp_path / checkpoint.LATEST
    data = path.read_bytes()
    bare = checkpoint.weights_bytes(WEIGHTS)
    spoilt = {"empty": b"", "garbage": b"\xff" * 64, "cut off": data[:-3], "no round": bare}
    path.unlink() if spoil == "absent" else path.write_bytes(spoilt[spoil])
    with pytest.raises(EvidenceError, match="No round had finished, or restore the file"):
        checkpoint.load(tmp_path)


def test_the_drawn_grid_shows_only_the_drawn_sites(tmp_path: Path) -> None:
    carrier, _ = grid(tmp_path)
    view: Grid = admission.DrawnGrid(carrier, [1002, 1000])
    assert list(view.get_node_ids()) == [1002, 1000]
    assert view.run.run_id == carrier.run.run_id


def test_the_small_accord_is_written_as_it_is_meant(tmp_path: Path) -> None:
    assert tomllib.loads(accord_file(tmp_path).read_text()) == SMALL
