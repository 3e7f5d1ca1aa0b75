"""A site's personal model (Ditto): pulled to the global one, never sent, never read by what is."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from lone_site import NAME, SITES, accord_of, asked, initial, opened, run_of, sent, some
from safetensors import torch as safetensors
from torch.nn import functional
from wards import Silent, small_accord

from fedaccord import accord as accords
from fedaccord.client import app, local, personal
from fedaccord.client.site import Site
from fedaccord.models.build import trained
from fedaccord.reports.verify import verify
from fedaccord.tasks import Records

torch.set_num_threads(1)  # as a site does for a small model
ON = {"personal": 0.5}


def own(site: Site) -> personal.Personal:
    found = personal.stored(site.folder, "a")
    assert found is not None
    return found


def file_of(site: Site) -> Path:
    return personal.path_of(site.folder, "a")


def payload(site: Site, number: int) -> bytes:
    return (site.folder / "releases" / f"a-{number:05d}.safetensors").read_bytes()


def diary_of(site: Site) -> str:
    path = site.folder / "private.log"
    return path.read_text() if path.exists() else ""


# --- it never feeds what is released -------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[bytes]]]:
    """The same plain run without and with personal models."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("without", "with")}
    return {
        "without": run_of(folders["without"]),
        "with": run_of(folders["with"], training=ON),
    }


def test_a_plain_run_releases_the_same_bytes_with_and_without_personal_models(
    runs: dict[str, tuple[Path, list[bytes]]],
) -> None:
    (without, _), (run, _) = runs.values()
    name = "model.safetensors"
    assert (run / name).read_bytes() == (without / name).read_bytes()
    for site in SITES:
        held = [sorted((r.parent / "sites" / site / "releases").iterdir()) for r in (without, run)]
        assert [p.read_bytes() for p in held[0]] == [p.read_bytes() for p in held[1]]
        assert len(held[1]) == 2
    assert not (without.parent / "sites" / "va" / "personal").exists()


def test_no_reply_holds_a_byte_of_a_personal_model(
    runs: dict[str, tuple[Path, list[bytes]]],
) -> None:
    run, replies = runs["with"]
    whole = b"\n".join(replies)

    def shows(data: bytes) -> bool:  # any run of 16 bytes of it, 4 bytes apart
        return any(data[at : at + 16] in whole for at in range(0, len(data) - 15, 4))

    for site in SITES:
        found = personal.find(run.parent / "sites" / site, run.name)
        assert found.round == 2
        assert not any(shows(value.numpy().tobytes()) for value in found.weights.values())
        released = run.parent / "sites" / site / "releases" / f"{run.name}-00002.safetensors"
        for value in safetensors.load(released.read_bytes()).values():
            if value.numel() >= 4:
                assert shows(value.numpy().tobytes())  # so that the search would find it
    assert b"personal" not in whole


def test_a_run_with_personal_models_verifies_and_its_report_says_what_they_are(
    runs: dict[str, tuple[Path, list[bytes]]],
) -> None:
    said = {}
    for name, (run, _) in runs.items():
        assert [fault for check in verify(run) for fault in check.faults] == []
        said[name] = json.loads((run / "report.json").read_text())["not_protected"]
    assert sum("site also trains one of its own, without noise" in x for x in said["with"]) == 1
    assert not any("site also trains" in x or "model.local" in x for x in said["without"])


@pytest.mark.parametrize("private", [True, False], ids=["private", "plain"])
def test_whatever_lies_in_the_personal_file_changes_nothing_that_is_released(
    tmp_path: Path, private: bool
) -> None:
    updates = []
    for name in ("none", "garbage", "huge"):
        accord = accord_of(private, training=ON)
        site = opened(tmp_path / name, accord, some())
        if name != "none":
            asked(site, 1)
            file_of(site).write_bytes(b"garbage")
        if name == "huge":
            weights = {k: v + 1e30 for k, v in trained(initial(accord)).items()}
            held = personal.Personal("a", accord.digest, 1, weights)
            file_of(site).write_bytes(held.to_bytes())
        app.train_and_record(site, initial(accord), "a", 2, (), Silent)
        reply = asked(site, 2)
        updates.append({k: v.tobytes() for k, v in sent(reply).items()})
    assert updates[0] == updates[1] == updates[2]


def faulty(kind: str) -> Any:
    data = some()
    if kind == "unreadable":
        return OSError("disk of patient 7")
    if kind == "no columns":
        return dataclasses.replace(data, subjects=data.subjects.astype(str))
    if kind == "labels of no class":
        data.labels[:] = 9
    return data


@pytest.mark.parametrize("kind", ["unreadable", "no columns", "labels of no class"])
def test_a_fault_of_the_data_goes_to_the_diary_and_the_reply_says_what_it_would(
    tmp_path: Path, kind: str
) -> None:
    said = []
    for name, training in (("without", {}), ("with", ON)):
        site = opened(tmp_path / name, accord_of(True, training=training), faulty(kind))
        reply = asked(site, 1)
        config = dict(reply.config_records["config"])
        del config["head"]
        shapes = {k: (v.shape, v.dtype) for k, v in sent(reply).items()}
        said.append((config, shapes, [e["kind"] for e in site.ledger.entries()]))
    assert said[0] == said[1]
    if kind != "labels of no class":  # that one trains on nobody
        assert "the personal model was not trained in round 1 of a" in diary_of(site)
        assert not file_of(site).exists()


def test_a_record_that_would_spoil_the_model_is_left_out_alone(tmp_path: Path) -> None:
    spoiled, clean = some(), some()
    spoiled.inputs[3, 0], spoiled.labels[5] = np.nan, 7
    clean = Records(
        *(np.delete(column, [3, 5], axis=0) for column in (clean.inputs, clean.labels)),
        np.delete(clean.subjects, [3, 5]),
        {},
    )
    models = []
    for name, data in (("spoiled", spoiled), ("clean", clean)):
        accord = accord_of(True, training=ON, privacy={"sampling_prob": 1.0})
        site = opened(tmp_path / name, accord, data)
        asked(site, 1)
        models.append(own(site).weights)
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[1])


def test_a_model_that_ran_away_is_not_stored(tmp_path: Path) -> None:
    accord = accord_of(training=ON | {"learning_rate": 2.0})
    site = opened(tmp_path, accord, some())
    asked(site, 1)
    before = file_of(site).read_bytes()
    weights = {name: value * 1e38 for name, value in trained(initial(accord)).items()}
    personal.advance(site, "a", 2, _record(weights))
    assert file_of(site).read_bytes() == before


def _record(weights: dict[str, torch.Tensor]) -> Any:
    return ArrayRecord({name: Array(value.numpy()) for name, value in weights.items()})


# --- when it is trained --------------------------------------------------------------------------


def test_killed_after_the_release_a_site_sends_the_same_bytes_and_makes_the_round_up(
    tmp_path: Path,
) -> None:
    accord = accord_of(training=ON)
    whole, cut = (opened(tmp_path / name, accord, some()) for name in ("whole", "cut"))
    replies = [sent(asked(whole, number)) for number in (1, 2)]
    asked(cut, 1)
    app.train_and_record(cut, initial(accord), "a", 2)  # and there it was killed
    assert own(cut).round == 1
    again = sent(asked(cut, 2))
    assert all(np.array_equal(again[name], replies[1][name]) for name in again)
    assert payload(cut, 2) == payload(whole, 2)
    mine, expected = own(cut), own(whole)
    assert mine.round == expected.round == 2
    assert all(torch.equal(mine.weights[name], expected.weights[name]) for name in mine.weights)


def test_a_retry_trains_it_no_second_time(tmp_path: Path) -> None:
    site = opened(tmp_path, accord_of(training=ON), some())
    asked(site, 1)
    asked(site, 2)
    before = file_of(site).read_bytes()
    for number in (1, 2):
        asked(site, number)
    assert file_of(site).read_bytes() == before
    asked(site, 3)
    assert own(site).round == 3
    assert file_of(site).read_bytes() != before


def test_it_is_kept_for_the_sites_operator_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        site = opened(tmp_path, accord_of(training=ON), some())
        asked(site, 1)
    finally:
        os.umask(old)
    assert stat.S_IMODE(file_of(site).stat().st_mode) == 0o600
    assert [path.name for path in file_of(site).parent.iterdir()] == ["a.safetensors"]


# --- it is Ditto ---------------------------------------------------------------------------------


def gradient(model: torch.nn.Module, data: Records) -> torch.Tensor:
    """Of the site's mean loss, flat, at a model."""
    loss = functional.cross_entropy(
        model(torch.from_numpy(data.inputs)), torch.from_numpy(data.labels)
    )
    slopes = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([slope.double().ravel() for slope in slopes])


def flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.detach().double().ravel() for value in weights.values()])


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Any]:
    """What `at_rest` finds, by the strength of the pull."""
    return {pull: at_rest(tmp_path_factory.mktemp("rest"), pull) for pull in (2.0, 0.1, 1e-6)}


def at_rest(folder: Path, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    """After many rounds: v - w, and the gradient of the site's loss at v."""
    data = some(40)
    accord = accord_with(strength)
    site = opened(folder, accord, data)
    sent_weights = trained(initial(accord))
    for number in range(1, 5):
        asked(site, number, sent_weights)  # the same global model in every round
    model = initial(accord)
    held = own(site)
    held.put(model)
    moved = flat({name: held.weights[name] - value for name, value in sent_weights.items()})
    return moved, gradient(model, data)


def accord_with(strength: float) -> accords.Accord:
    data = small_accord() | {
        "sites": [{"name": NAME, "subjects": 40}],
        "model": {"name": "mlp", "options": {"hidden": 2}},
        "rounds": {"rounds": 4},
        "training": {"steps": 120, "learning_rate": 0.5, "personal": strength},
        "privacy": {"enabled": False, "sampling_prob": 1.0},
    }
    return accords.parse(data)


def test_it_settles_where_its_own_loss_and_the_pull_to_the_global_model_balance(
    settled: dict[float, Any],
) -> None:
    # Li et al. 2021, (Obj L_k): at the minimum of F_k(v) + lambda/2 |v - w|^2 the gradient of F_k
    # is -lambda (v - w).
    for strength in (2.0, 0.1):
        moved, slope = settled[strength]
        assert moved.norm() > 0.05
        assert (slope + strength * moved).norm() < 0.01 * slope.norm()


def test_the_stronger_the_pull_the_nearer_it_stays_and_with_hardly_any_it_finds_its_own_optimum(
    settled: dict[float, Any],
) -> None:
    strong, weak, free = settled.values()
    assert strong[0].norm() < 0.5 * weak[0].norm() < 0.5 * free[0].norm()
    assert free[1].norm() < 0.1 * strong[1].norm()


def test_with_layers_that_stay_it_has_layers_of_its_own_and_is_pulled_to_the_sites(
    tmp_path: Path,
) -> None:
    steep = {"personal": 2.0, "learning_rate": 0.5}  # one step goes all the way to the anchor
    accord = accord_of(training=steep, model={"local": ["2."]})
    site = opened(tmp_path, accord, some())
    far = initial(accord)
    with torch.no_grad():
        for name, value in far.state_dict().items():
            value += 0.25 if name.startswith("2.") else 0.0
    local.keep(far, site.folder, "a", 1)
    asked(site, 2)
    found = own(site)
    assert {"2.weight", "2.bias"} <= found.weights.keys()
    drift = found.weights["2.weight"] - initial(accord).state_dict()["2.weight"]
    assert drift.mean().item() == pytest.approx(0.25, abs=0.15)
