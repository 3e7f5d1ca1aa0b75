"""Layers that stay at their site: never sent, kept from round to round, as private as the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, Message, RecordDict
from lone_site import SITES, accord_of, asked, initial, opened, sent, some, written
from safetensors import numpy as safetensors
from safetensors import torch as safetensors_torch
from wards import Call, Silent, plan, small_accord

from fedaccord import accord as accords
from fedaccord.client import evaluate, local, train
from fedaccord.client.client_level import train_plainly
from fedaccord.errors import AccordError
from fedaccord.models.build import keep, put, staying, trained
from fedaccord.reports.report import write_report
from fedaccord.reports.verify import verify
from fedaccord.server import checkpoint, distillation, gates
from fedaccord.simulations import engine
from fedaccord.simulations.heart import Heart
from fedaccord.tasks import Records

torch.set_num_threads(1)  # as a site does for a small model
NORMS = {"local": ["2."]}  # the GroupNorm of the small CNN, as in FedBN
STAY = ["2.weight", "2.bias"]


def kept(folder: Path, number: int, run: str = "a") -> dict[str, torch.Tensor]:
    path = folder / "local" / f"{run}-{number:05d}.safetensors"
    return safetensors_torch.load(path.read_bytes())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def small(folder: Path, private: bool, model: dict[str, Any]) -> Path:
    """An accord's file, two hospitals and two rounds."""
    student = {"options": {"hidden": 2}, "steps": 2, "enabled": not private}
    return written(folder, model=model, privacy={"enabled": private}, distillation=student)


# --- a whole run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("private", [True, False], ids=["private", "plain"])
def test_a_run_ends_and_verifies_and_nothing_that_travels_holds_the_layers(
    tmp_path: Path, private: bool
) -> None:
    names: set[str] = set()

    def look(reply: Message) -> None:
        for record in reply.content.array_records.values():
            names.update(record)

    run = tmp_path / "run"
    model = NORMS if private else NORMS | {"frozen": ["1.bias"]}
    engine.simulate(small(tmp_path, private, model), run, tmp_path / "sites", 2, look)
    write_report(run)
    assert [fault for check in verify(run) for fault in check.faults] == []
    travels = {"1.weight", "1.bias", "5.weight", "5.bias"} - set(model.get("frozen", []))
    assert names == travels
    assert set(safetensors.load((run / "model.safetensors").read_bytes())) == travels
    for site in SITES:
        for path in (tmp_path / "sites" / site / "releases").iterdir():
            said = {name.partition("/")[2] for name in safetensors.load(path.read_bytes())}
            assert said == travels
    one, other = (kept(tmp_path / "sites" / site, 2, run.name) for site in SITES)
    assert sorted(one) == sorted(STAY)
    assert all(not torch.equal(one[name], other[name]) for name in STAY)
    said = json.loads((run / "report.json").read_text())["not_protected"]
    assert sum("The audited model is each site's own" in line for line in said) == 1


# --- what travels --------------------------------------------------------------------------------


def test_a_request_with_the_layers_in_it_is_refused(tmp_path: Path) -> None:
    accord = accord_of(model=NORMS)
    site = opened(tmp_path, accord, some())
    with pytest.raises(RuntimeError, match=r"other names: 2\.bias, 2\.weight"):
        asked(site, 1, dict(initial(accord).state_dict()))
    assert "2.weight" not in sent(asked(site, 1))


def test_a_reply_with_the_layers_in_it_is_dropped_at_the_gate(tmp_path: Path) -> None:
    accord = accord_of(model=NORMS)
    site = opened(tmp_path, accord, some())
    base = checkpoint.weights_of(initial(accord))
    assert not base.keys() & set(STAY)
    content = asked(site, 1)

    def verdict() -> gates.Verdict:
        about = Message(RecordDict(), 1000, "train")
        return gates.inspect(Message(content, reply_to=about), site.name, "a", 1, base, 100.0)

    assert verdict().reason == ""
    content.array_records["arrays"]["2.weight"] = Array(np.zeros(2, np.float32))
    assert verdict().reason != ""


def test_the_students_teacher_has_the_layers_that_the_seed_gives() -> None:
    accord = accord_of(model=NORMS)
    proxy = torch.from_numpy(Heart().public(32, 0))
    weights = {k: v + 0.5 for k, v in checkpoint.weights_of(initial(accord)).items()}
    lesson = distillation.Lesson(initial(accord), proxy, 1)
    lesson.hear(weights)

    def shares(change: float) -> torch.Tensor:
        model = initial(accord)
        put(model, {name: torch.from_numpy(value) for name, value in weights.items()})
        with torch.no_grad():
            for value in staying(model).values():
                value += change
            return torch.softmax(model.eval()(proxy), dim=1)

    assert torch.allclose(lesson.targets(), shares(0.0), atol=1e-6)
    assert not torch.allclose(lesson.targets(), shares(0.5), atol=1e-2)


# --- at the site ---------------------------------------------------------------------------------


def changed(model: torch.nn.Module, by: float) -> torch.nn.Module:
    with torch.no_grad():
        for value in staying(model).values():
            value += by
    return model


def test_a_sites_evaluation_uses_its_own_layers_as_they_were_after_the_round(
    tmp_path: Path,
) -> None:
    accord, data = accord_of(model=NORMS), some(300)
    site = opened(tmp_path, accord, data)
    own, later = (changed(initial(accord), by) for by in (3.0, -7.0))
    local.keep(own, site.folder, "a", 1)
    local.keep(later, site.folder, "a", 2)  # of a round that is later than the one asked about
    counts = [
        evaluate.group_counts(model, data, Heart.spec, ["sex"])["sex"].ravel().tolist()
        for model in (own, later, initial(accord))
    ]
    assert counts[0] not in counts[1:]
    said = [
        asked(site, number, kind="evaluate").metric_records["model"]["sex"] for number in (1, 2)
    ]
    assert said == counts[:2]


def test_a_round_starts_from_the_sites_own_layers_of_the_round_before(tmp_path: Path) -> None:
    accord, data = accord_of(model=NORMS), some(60)
    site = opened(tmp_path, accord, data)
    expected = initial(accord)
    for number in (1, 2):
        put(expected, trained(initial(accord)))  # what the coordinator sends, each time
        train_plainly(expected, data, accord, site.name, number)
        asked(site, number)
        assert same(kept(site.folder, number), staying(expected))
    assert not same(kept(site.folder, 1), kept(site.folder, 2))


def test_a_round_that_was_cut_short_is_retried_from_the_layers_before_it(tmp_path: Path) -> None:
    accord, data = accord_of(model=NORMS), some(60)
    updates = []
    for folder, cut in ((tmp_path / "whole", False), (tmp_path / "cut", True)):
        site = opened(folder, accord, data)
        asked(site, 1)
        if cut:  # killed once round 2 had kept its layers, before its RELEASE
            site.ledger.intend("a", 2, None, accord.digest)
            local.keep(changed(initial(accord), 9.0), site.folder, "a", 2)
        updates.append(sent(asked(site, 2)))
        updates.append({name: value.numpy() for name, value in kept(site.folder, 2).items()})
    for one, other in zip(updates[:2], updates[2:], strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_private_round_without_a_release_has_moved_the_layers_on(tmp_path: Path) -> None:
    # Its slot is spent, and its layers carry the noise of its steps.
    accord = accord_of(private=True, model=NORMS)
    site = opened(tmp_path, accord, some())
    site.ledger.intend("a", 1, site.plan, accord.digest)
    lost = changed(initial(accord), 0.25)
    local.keep(lost, site.folder, "a", 1)
    next_round = initial(accord)
    local.put_back(next_round, site.folder, "a", 2)
    assert same(dict(staying(next_round)), dict(staying(lost)))


def test_a_run_gets_no_layers_of_another_whose_name_begins_alike(tmp_path: Path) -> None:
    accord = accord_of(model=NORMS)
    for run in ("a-b", "a-00001", "[a]", "a.*"):
        local.keep(changed(initial(accord), 1.0), tmp_path, run, 3)
    model = initial(accord)
    local.put_back(model, tmp_path, "a", 9)
    assert same(dict(staying(model)), dict(staying(initial(accord))))
    local.put_back(model, tmp_path, "[a]", 9)
    assert not same(dict(staying(model)), dict(staying(initial(accord))))


def test_the_layers_of_two_rounds_are_held_and_no_more(tmp_path: Path) -> None:
    for number in (1, 2, 3, 99_999, 100_000, 100_001):
        local.keep(initial(accord_of(model=NORMS)), tmp_path, "a", number)
    held = sorted(path.name for path in (tmp_path / "local").iterdir())
    assert held == ["a-100000.safetensors", "a-100001.safetensors"]


# --- under privacy -------------------------------------------------------------------------------


def totals(data: Records, stay: list[str]) -> np.ndarray[Any, Any]:
    """What a private step sums before there is any noise, over all weights in order."""
    accord = accord_of(private=True)
    model = initial(accord)
    keep(model, stay)
    watched = plan(subjects=1)
    train.train_private(model, data, watched, accord.training, Silent)
    return watched.total


def test_layers_that_stay_share_one_clip_with_the_rest() -> None:
    data = some(12)
    data.inputs[3] *= 1e4
    whole = totals(data, ["2."])
    fewer = Records(
        *(np.delete(column, 3, axis=0) for column in (data.inputs, data.labels, data.subjects)), {}
    )
    change = whole - totals(fewer, ["2."])
    stays = [name in STAY for name, p in initial(accord_of()).named_parameters() for _ in p.ravel()]
    parts = [np.linalg.norm(change[np.array(stays) == which]) for which in (True, False)]
    assert min(parts) > 0.01  # both are in it
    assert np.linalg.norm(change) <= 1 + 1e-8
    assert np.array_equal(whole, totals(data, []))  # as if nothing stayed


def test_layers_that_ran_away_are_refused_before_a_slot_is_used(tmp_path: Path) -> None:
    accord = accord_of(private=True, model=NORMS)
    site = opened(tmp_path, accord, some())
    local.keep(changed(initial(accord), 200.0), site.folder, "a", 1)
    with pytest.raises(AccordError, match=r"2\.weight holds a weight .* above 100"):
        asked(site, 2)
    assert not site.ledger.find("a", "INTENT")


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stay", "words"),
    [
        (["9."], 'model.local: no trained weight\'s name starts with "9.". They are 1.weight,'),
        (["2.", "norm"], 'starts with "norm"'),
        ([""], "model.local leaves no weight to send. Leave a layer out of it."),
    ],
)
def test_a_start_that_names_nothing_or_all_is_refused_in_one_line(
    tmp_path: Path, called: Call, stay: list[str], words: str
) -> None:
    file = small(tmp_path, False, {"local": stay})
    code, _, err = called("simulate", file, "--out", tmp_path / "runs")
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_layers_that_stay_do_not_go_with_client_level_privacy() -> None:
    data = small_accord() | {"model": {"name": "cnn1d", "local": ["2."]}}
    data["privacy"] = {"unit": "client", "noise_multiplier": 1.0, "clipping_norm": 1.0} | {
        "sampling_prob": 0.1
    }
    with pytest.raises(AccordError, match=r'model\.local = \["2\."\] does not go with') as fault:
        accords.parse(data)
    assert "\n" not in str(fault.value)
