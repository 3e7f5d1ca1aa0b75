"""Resuming: a coordinator killed at any step loses no finished round, and goes on to its end."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from wards import Call, faults, small_accord, toml

from fedaccord import accord as accords
from fedaccord.errors import BudgetError, EvidenceError
from fedaccord.privacy.ledger import Ledger
from fedaccord.runs import ROUNDS, RunFolder
from fedaccord.server import checkpoint, resume
from fedaccord.simulations import engine

SITES = ["cleveland", "hungary", "switzerland", "va"]
STEPS = ["invite", "train", "gate", "aggregate", "distil", "audit", "record", "decide"]
Record = dict[str, Any]


def accord_file(folder: Path, strategy: Record, private: bool = False, **more: Any) -> Path:
    """Write an accord whose rounds depend on all that a checkpoint has to hold."""
    data = small_accord() | {
        "sites": [{"name": name, "subjects": 100} for name in SITES],
        "model": {"name": "mlp", "options": {"hidden": 3}},
        "rounds": {"rounds": 3, "spare_rounds": 2, "sites_per_round": 3},
        "strategy": strategy | {"averaging": 0.5},
        "distillation": {"options": {"hidden": 3}, "steps": 3},
    }
    data["privacy"] = data["privacy"] | {"enabled": private}
    for table, keys in more.items():
        data[table] = data.get(table, {}) | keys
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "accord.toml"
    path.write_text("".join(f"{key} = {toml(value)}\n" for key, value in data.items()))
    return path


def run(folder: Path, accord: Path, again: bool = False) -> Path:
    engine.simulate(accord, folder / "run", folder / "sites", 4, resume=again)
    return folder / "run"


def kill(accord: Path, *deaths: tuple[Path, str, int, str]) -> None:
    """Run in other processes, until each has killed itself: folder, step, round, when."""
    script = Path(__file__).with_name("coordinator_kills.py")
    words = [str(word) for death in deaths for word in death]
    done = subprocess.run([sys.executable, script, accord, *words], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def models(run: Path) -> dict[str, bytes]:
    names = ("model.safetensors", "student.safetensors", checkpoint.LATEST)
    return {name: (run / name).read_bytes() for name in names[:2]} | weights(run)


def weights(run: Path) -> dict[str, bytes]:
    """All that a checkpoint holds of models and strategy (its record has times in it)."""
    state = checkpoint.load(run)
    return {
        f"{part}/{name}": value.tobytes()
        for part in checkpoint.PARTS
        for name, value in getattr(state, part).items()
    }


def kinds(folder: Path, *names: str) -> dict[str, list[Any]]:
    out: dict[str, list[Any]] = {}
    for site in SITES:
        book = Ledger(folder / "sites" / site / "ledger.sqlite", site)
        out[site] = [(e["kind"], e.get("round")) for e in book.entries() if e["kind"] in names]
        book.close()
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of FedAdam without privacy that nobody cut short, and its accord."""
    folder = tmp_path_factory.mktemp("whole")
    accord = accord_file(folder, {"name": "fedadam"})
    return run(folder, accord), accord


@pytest.fixture(scope="module")
def dead(whole: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, killed after each of the eight steps of its second round."""
    folder = tmp_path_factory.mktemp("dead")
    kill(whole[1], *((folder / step, step, 2, "after") for step in STEPS))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_killed_after_any_step_the_resumed_run_gives_the_same_bits(
    step: str, whole: tuple[Path, Path], dead: Path
) -> None:
    straight, accord = whole
    on_record = [r for r in RunFolder(dead / step / "run").records() if r["kind"] == "round"]
    resumed = run(dead / step, accord, again=True)
    assert models(resumed) == models(straight)
    after = [r for r in RunFolder(resumed).records() if r["kind"] == "round"]
    assert after[: len(on_record)] == on_record  # a finished round stays as it was
    assert faults(resumed) == []


@pytest.mark.slow
def test_killed_in_the_middle_of_training_the_resumed_run_gives_the_same_bits(
    whole: tuple[Path, Path], tmp_path: Path
) -> None:
    straight, accord = whole
    kill(accord, (tmp_path, "train", 3, "inside"))
    resumed = run(tmp_path, accord, again=True)
    assert models(resumed) == models(straight)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedavgm", "centred-clipping"])
def test_strategies_that_number_or_sum_all_weights_resume_to_the_same_bits(
    name: str, tmp_path: Path
) -> None:
    accord = accord_file(tmp_path / "accord", {"name": name}, rounds={"min_sites": 3})
    straight = run(tmp_path / "whole", accord)
    kill(accord, (tmp_path, "invite", 3, "before"))
    assert models(run(tmp_path, accord, again=True)) == models(straight)


@pytest.mark.soak
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["fedavgm", "scaffold", "feddyn", "centred-clipping"])
def test_every_strategy_resumes_to_the_same_bits(
    name: str, step: str, number: int, when: str, tmp_path: Path
) -> None:
    accord = accord_file(tmp_path / "accord", {"name": name}, rounds={"min_sites": 3})
    straight = run(tmp_path / "whole", accord)
    kill(accord, (tmp_path, step, number, when))
    assert models(run(tmp_path, accord, again=True)) == models(straight)


@pytest.mark.slow
def test_a_private_run_has_the_same_ledger_events_whether_or_not_it_was_killed(
    tmp_path: Path,
) -> None:
    accord = accord_file(tmp_path, {"name": "scaffold"}, private=True)
    run(tmp_path / "whole", accord)
    kill(accord, (tmp_path / "cut", "record", 1, "after"))
    resumed = run(tmp_path / "cut", accord, again=True)
    events = ("RESERVE", "INTENT", "RELEASE", "COUNTS")
    assert kinds(tmp_path / "cut", *events) == kinds(tmp_path / "whole", *events)
    assert faults(resumed) == []


@pytest.mark.slow
def test_a_private_site_cut_in_training_has_used_its_slot_and_sends_what_it_released(
    tmp_path: Path,
) -> None:
    accord = accord_file(tmp_path, {"name": "fedavg"}, private=True)
    kill(accord, (tmp_path, "gate", 2, "after"))  # all had released round 2, none was recorded
    before = kinds(tmp_path, "INTENT", "RELEASE")
    resumed = run(tmp_path, accord, again=True)
    rounds = [r for r in RunFolder(resumed).records() if r["kind"] == "round"]
    assert [r["round"] for r in rounds] == [1, 2, 3] and all(r["aggregated"] for r in rounds)
    after = kinds(tmp_path, "INTENT", "RELEASE")
    for site in SITES:  # the round that ran twice used one slot
        assert after[site][: len(before[site])] == before[site]
        assert len(set(after[site])) == len(after[site])
    assert faults(resumed) == []


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that was cut short after its first round, and its accord."""
    folder = tmp_path_factory.mktemp("cut")
    accord = accord_file(folder, {"name": "fedavg"}, rounds={"rounds": 2})
    kill(accord, (folder, "invite", 2, "before"))
    return folder, accord


def test_a_line_that_was_being_written_is_cut_off(cut: tuple[Path, Path], tmp_path: Path) -> None:
    folder, accord = cut
    shutil.copytree(folder, tmp_path / "copy")
    with open(tmp_path / "copy" / "run" / ROUNDS, "ab") as file:
        file.write(b'{"id":"decision-1","ki')
    resumed = run(tmp_path / "copy", accord, again=True)
    (record,) = [r for r in RunFolder(resumed).records() if r["kind"] == "resume"]
    assert record["cut"] == 22
    assert faults(resumed) == []


def test_another_accord_or_other_ledgers_are_refused_in_words(
    cut: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, accord = cut
    other = accord_file(tmp_path, {"name": "fedmedian"}, rounds={"rounds": 2})
    with pytest.raises(EvidenceError, match=r"is of another accord .* Give the accord that"):
        resume.reopen(folder / "run", accords.load(other))
    shutil.copytree(folder / "run", tmp_path / "run")
    with pytest.raises(BudgetError, match=r"shows another reservation .* \(--sites\)"):
        run(tmp_path, accord, again=True)  # its folder of sites is new


@pytest.mark.parametrize("spoil", ["checkpoint gone", "older checkpoint", "edited record"])
def test_a_run_that_was_altered_is_not_resumed(
    spoil: str, cut: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, accord = cut
    path = tmp_path / "run"
    shutil.copytree(folder / "run", path)
    if spoil == "checkpoint gone":
        (path / checkpoint.LATEST).unlink()
    elif spoil == "older checkpoint":
        state = checkpoint.load(path)
        changed = checkpoint.Checkpoint(0, state.model, record=state.record)
        checkpoint.save(path, changed)
    else:
        text = (path / ROUNDS).read_text()
        (path / ROUNDS).write_text(text.replace('"seconds":', '"seconds":1', 1))
    with pytest.raises(EvidenceError, match=r"[Rr]estore"):
        resume.reopen(path, accords.load(accord))


def test_the_command_goes_on_with_a_run_and_says_what_cannot_be_resumed(
    cut: tuple[Path, Path], tmp_path: Path, called: Call
) -> None:
    folder, _ = cut
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "run"
    words = ["simulate", "--resume", path, "--sites", tmp_path / "copy" / "sites"]
    code, out, _ = called(*words)
    assert code == 0 and "rounds done: 2 of 2" in out
    assert called("verify", path)[0] == 0
    code, _, err = called(*words)
    assert code == 2 and "has come to its end, there is nothing to resume" in err
    code, _, err = called("simulate", "--resume", tmp_path / "nowhere")
    assert code == 2 and "not a run folder" in err
    code, _, err = called("simulate")
    assert code == 2 and "none was given" in err
