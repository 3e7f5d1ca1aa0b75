"""`fedaccord site personal`: a site's own model is taken out, on record first; the accord's key."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from lone_site import accord_of, initial, run_of, written
from safetensors import safe_open
from safetensors import torch as safetensors
from wards import Call

from fedaccord import accord as accords
from fedaccord.client import personal
from fedaccord.errors import AccordError
from fedaccord.evidence import sha256
from fedaccord.privacy.ledger import Ledger
from fedaccord.reports import limits, reading
from fedaccord.reports.verify import verify
from fedaccord.simulations import engine

torch.set_num_threads(1)  # as a site does for a small model
ON = {"personal": 0.5}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished plain run with personal models; its sites lie beside it."""
    return run_of(tmp_path_factory.mktemp("with"), training=ON)[0]


@pytest.fixture
def there(tmp_path: Path, finished: Path) -> tuple[Path, str]:
    """A copy of a site's folder after a run, and the run's id."""
    sites = tmp_path / "sites"
    shutil.copytree(finished.parent / "sites", sites)
    return sites / "va", finished.name


def entries(site: Path) -> list[dict[str, Any]]:
    book = Ledger(site / "ledger.sqlite", site.name)
    try:
        return book.entries()
    finally:
        book.close()


def test_an_export_is_on_record_first_and_says_what_it_means(
    tmp_path: Path, there: tuple[Path, str], called: Call
) -> None:
    site, run = there
    before, out = entries(site), tmp_path / "mine.safetensors"
    code, said, err = called("site", "personal", site, run, "--out", out)
    assert (code, err) == (0, "")
    assert "No epsilon covers this file" in said
    assert "without noise" in said
    *old, new = entries(site)
    assert old == before
    assert (new["kind"], new["run"], new["covers"]) == ("PERSONAL", run, "not covered")
    assert new["what"] == "personal model"
    assert new["bytes"] == out.stat().st_size
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    held = personal.find(site, run)
    exported = safetensors.load(out.read_bytes())
    assert all(torch.equal(exported[k], v) for k, v in held.weights.items())
    code, said, _ = called("ledger", "show", site)
    assert f"{new['seq']} PERSONAL personal model: not covered" in said
    code, _, _ = called("ledger", "verify", site)
    assert code == 0


def test_the_ledgers_hash_of_an_export_tells_nothing_to_who_guesses_the_model(
    tmp_path: Path, there: tuple[Path, str], called: Call
) -> None:
    site, run = there
    hashes = []
    for name in ("one", "two"):
        called("site", "personal", site, run, "--out", tmp_path / name)
        hashes.append(entries(site)[-1]["sha256"])
        assert hashes[-1] == sha256((tmp_path / name).read_bytes())  # who holds the file can tell
    assert hashes[0] != hashes[1]
    assert sha256(personal.find(site, run).to_bytes()) not in hashes


def test_runs_before_and_after_an_export_verify(
    tmp_path: Path, finished: Path, called: Call
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished.parent, folder)
    site = folder / "sites" / "va"
    code, _, _ = called("site", "personal", site, finished.name, "--out", tmp_path / "mine")
    assert code == 0
    later = folder / "later"
    engine.simulate(folder / "accord.toml", later, folder / "sites", 2)
    for found in (folder / "run", later):
        assert [fault for check in verify(found) for fault in check.faults] == []
    assert "PERSONAL" in [e["kind"] for e in reading.read(later).ledgers["va"]]


def test_an_export_before_a_runs_end_is_among_what_left_the_sites(
    tmp_path: Path, there: tuple[Path, str], called: Call, finished: Path
) -> None:
    site, run = there
    called("site", "personal", site, run, "--out", tmp_path / "mine")
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    called("ledger", "export", site, "--out", folder / "ledgers" / "va.jsonl")
    (row,) = [r for r in limits.releases(reading.read(folder)) if r["what"] == "personal model"]
    assert row["covered"] == "not covered"
    assert row["sites"] == [
        {
            "site": "va",
            "count": 1,
            "size": (tmp_path / "mine").stat().st_size,
            "unit": "bytes",
            "record": "ledger/va",
        }
    ]


def test_with_its_accord_the_frozen_weights_are_written_as_well(
    tmp_path: Path, called: Call
) -> None:
    accord = written(tmp_path, training=ON, model={"frozen": ["1."]}, rounds={"rounds": 1})
    engine.simulate(accord, tmp_path / "run", tmp_path / "sites", 2)
    site, out = tmp_path / "sites" / "va", tmp_path / "mine"
    assert called("site", "personal", site, "run", "--out", out, "--accord", accord)[0] == 0
    agreed = accords.load(accord)
    model = initial(agreed)
    model.load_state_dict(safetensors.load(out.read_bytes()))  # strictly: nothing is missing
    with safe_open(out, "pt") as file:
        assert file.metadata()["accord"] == agreed.digest
    code, _, err = called(
        "site", "personal", site, "run", "--out", tmp_path / "b", "--accord", "heart"
    )
    assert (code, err.count("\n")) == (2, 1)
    assert "and run run was of accord" in err
    assert not (tmp_path / "b").exists()


def test_a_mistake_ends_with_one_line_and_writes_nothing(
    tmp_path: Path, there: tuple[Path, str], called: Call
) -> None:
    site, run = there
    before, out = entries(site), tmp_path / "mine"
    taken = tmp_path / "taken"
    taken.write_text("mine")
    damaged = tmp_path / "damaged" / "va"
    shutil.copytree(site, damaged)
    personal.path_of(damaged, run).write_bytes(b"none of ours")
    for words, said in (
        ((site, "other", "--out", out), "holds no personal model of run 'other'. It holds those"),
        ((site, "../personal/" + run, "--out", out), "holds no personal model of run"),
        ((site.parent / "none", run, "--out", out), "It holds none: training.personal"),
        ((site, run, "--out", taken), "is there already. Name a file that is not."),
        ((damaged, run, "--out", out), "is damaged"),
        ((site, run, "--out", out, "--accord", "nowhere.toml"), "no such file"),
        ((site, run), "Missing option '--out'"),
    ):
        code, _, err = called("site", "personal", *words)
        assert (code, err.count("\n")) == (2, 1), err
        assert said in err
        assert not out.exists()
    assert taken.read_text() == "mine"
    assert entries(site) == before


# --- the key -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "rate", "words"),
    [
        (-0.1, 0.5, "training.personal"),
        (101.0, 0.001, "training.personal"),
        (3.0, 0.5, "training.personal = 3 times training.learning_rate = 0.5 is above 1"),
    ],
)
def test_a_pull_out_of_bounds_is_refused_in_one_line(value: float, rate: float, words: str) -> None:
    with pytest.raises(AccordError) as fault:
        accord_of(training={"personal": value, "learning_rate": rate})
    assert words in str(fault.value)
    assert "\n" not in str(fault.value)
    assert accord_of(training={"personal": 2.0, "learning_rate": 0.5}).training.personal == 2.0
