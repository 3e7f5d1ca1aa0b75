"""The table of strategies: cells differ in [strategy] and [privacy] alone, and are real runs."""

from __future__ import annotations

import math
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import strategies
from benchmarks.strategies import EPSILONS, GRID, STRATEGIES, TASKS, Case, Outcome
from fedaccord import accord as accords
from fedaccord import registry
from fedaccord.errors import AccordError
from fedaccord.strategies.seam import driver_for

RUN = Case("heart", "fedavg", {}, None, 0, quick=True)


def cases(task: str, epsilon: float | None) -> list[Case]:
    found = strategies.cells(task, STRATEGIES, {})
    return [case for case in found if case.epsilon == epsilon]


@pytest.mark.parametrize("task", ["heart", "digits"])
def test_a_private_cell_takes_the_steps_of_the_bundled_accord_under_its_own_epsilon(
    task: str,
) -> None:
    bundled = accords.load(task)
    with strategies.agreed(Case(task, "feddyn", {"alpha": 0.1}, 3.0, 7)) as (made, _):
        assert (made.seed, made.strategy.name) == (7, "feddyn")
        assert made.strategy.options == {"alpha": 0.1}
        assert made.privacy.target_epsilon == made.privacy.max_epsilon == 3.0
        steps = [a.reserved_rounds * a.training.steps for a in (made, bundled)]
        assert steps[0] == steps[1]
        assert made.rounds.min_sites == len(bundled.roster)
    assert (
        made.privacy.model_copy(
            update={
                name: getattr(bundled.privacy, name) for name in ("target_epsilon", "max_epsilon")
            }
        )
        == bundled.privacy
    )
    assert (made.model, made.task, made.sites) == (bundled.model, bundled.task, bundled.sites)


def test_cells_of_a_task_differ_in_strategy_and_privacy_alone() -> None:
    texts = [tomllib.loads(strategies.variant(c)) for e in EPSILONS for c in cases("digits", e)]
    for text in texts:
        assert text.pop("strategy")["name"] in STRATEGIES and text.pop("privacy")
    assert len(texts) == 3 * len(STRATEGIES) and all(text == texts[0] for text in texts)


@pytest.mark.parametrize("task", ["heart", "digits"])
def test_every_strategy_of_the_table_can_be_made_and_qfedavg_not_under_privacy(task: str) -> None:
    for case in [*cases(task, None), *cases(task, 8.0)]:
        with strategies.agreed(case) as (made, _):
            if (case.strategy, case.epsilon) == ("qfedavg", 8.0):
                with pytest.raises(AccordError, match="privacy"):
                    driver_for(made)
            else:
                driver_for(made)


def test_no_strategy_is_left_out_but_one_that_needs_seven_sites_and_one_choice_of_krum() -> None:
    assert set(registry.STRATEGIES) - set(STRATEGIES) == {"bulyan", "krum"}
    assert set(GRID) < set(STRATEGIES) and set(TASKS) < set(registry.TASKS)


def test_multikrum_stands_a_hostile_site_only_where_there_are_five_sites() -> None:
    assert strategies.options("multikrum", 4) == {"num_malicious_nodes": 0}
    assert strategies.options("multikrum", 5) == {"num_malicious_nodes": 1}


def test_a_cell_is_a_run_of_its_strategy() -> None:
    strategies.quiet()
    found = strategies.run(RUN)
    assert found.accuracy is not None and found.parity is not None and not found.note
    still = {"server_learning_rate": 1e-9}
    assert strategies.run(replace(RUN, strategy="fedavgm", options=still)) != found


def test_a_refused_cell_has_a_reason_and_no_figures() -> None:
    strategies.quiet()
    refused = strategies.run(replace(RUN, strategy="krum"))
    assert refused.accuracy is None and refused.parity is None
    assert refused.note.startswith("refused: strategy.options of krum: num_malicious_nodes = 1")


def test_of_the_tries_the_most_accurate_is_picked_and_of_equal_ones_the_first() -> None:
    tried = strategies.tries("digits", ["fedavg", "fedyogi", "fedavgm"], quick=False)
    assert {case.strategy for case in tried} == {"fedyogi", "fedavgm"}
    assert {(case.epsilon, case.seed) for case in tried} == {(None, strategies.GRID_SEED)}
    reached = {0.01: 0.5, 0.03: 0.7, 0.1: 0.7, 0.3: None, 1.0: 0.8}
    rates = [{**case.options}[GRID[case.strategy][0]] for case in tried]
    picked = strategies.best(tried, [Outcome(reached[rate], 0.0) for rate in rates])
    assert picked["digits", "fedyogi"] == {"eta": 0.03}
    assert picked["digits", "fedavgm"] == {"server_momentum": 0.9, "server_learning_rate": 1.0}


def results(runs: int) -> strategies.Results:
    """Made-up outcomes of two strategies on one task; the second has none under privacy."""
    good = [Outcome(0.7 + 0.1 * seed, 0.25) for seed in range(runs)]
    none = [Outcome(None, None, "refused: it reads losses")] * runs
    rows: dict[str, strategies.Row] = {"fedavg": [], "qfedavg": []}
    for case in strategies.cells("heart", rows, {}):
        open_ = case.strategy == "fedavg" or case.epsilon is None
        rows[case.strategy].append((case, good if open_ else none))
    return {"heart": rows}


def test_the_table_has_means_spreads_and_a_dash_where_there_is_no_figure(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Console(width=150).print(strategies.report(results(2)))
    lines = {
        line.split()[3]: line for line in capsys.readouterr().out.splitlines() if "heart" in line
    }
    spread = f"{0.1 / math.sqrt(2):.3f}"  # of 0.7 and 0.8
    assert lines["fedavg"].count(f"0.750 +- {spread}") == 3
    assert lines["fedavg"].count("0.250 +- 0.000") == 3
    assert lines["qfedavg"].count(" - ") == 4 and "q 0.1" in lines["qfedavg"]
    assert strategies.notes(results(2)) == [
        "heart, qfedavg: refused: it reads losses (epsilon 8, 3)"
    ]


def test_the_majority_of_each_site_is_scored_on_held_out_labels() -> None:
    # Hand count over the four hospitals' held-out patients.
    task = strategies.load_task("heart")
    shares = []
    for name in task.sites:
        part = task.site(name)
        usual = int((part.train.labels == 1).sum() * 2 > len(part.train.labels))
        shares.append(float((part.test.labels == usual).mean()))
    assert strategies.constant("heart") == pytest.approx(sum(shares) / 4)


def test_the_picture_is_the_same_bytes_for_the_same_figures(tmp_path: Path) -> None:
    drawn = []
    for name, runs in (("a", 2), ("b", 2), ("c", 3)):
        strategies.picture(results(runs), tmp_path / name)
        drawn.append((tmp_path / name).read_text(encoding="utf-8"))
    assert drawn[0] == drawn[1] != drawn[2]
    for words in ("fedavg", "qfedavg", "no privacy", "epsilon 8", "epsilon 3", "heart"):
        assert f">{words}</text>" in drawn[0], words
