"""The engine's benchmark: three ways leave the same bits, and a round's memory is what it says."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks import simulate, simulate_apps, simulate_scale
from benchmarks.simulate_apps import MODELS, Work
from fedaccord import accord

SITES = 3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the benchmark has it: two threads only wait for each other on a model this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("private", [False, True])
def test_a_plain_loop_and_the_engine_leave_the_same_bits(private: bool) -> None:
    work = Work("4k", private, True)
    plain = simulate.Plain(SITES).rounds(work, 2)
    ours = simulate.Ours(SITES).rounds(work, 2)
    assert plain.model == ours.model
    assert simulate.Plain(SITES + 1).rounds(work, 2).model != plain.model
    assert simulate.Plain(SITES).rounds(work, 1).model != plain.model
    again = simulate.Ours(SITES).rounds(Work("4k", private, False), 2).model
    assert (again == plain.model) is not private  # what is timed under a plan has fresh noise


def test_the_models_have_the_weights_that_their_names_say() -> None:
    assert {name: len(simulate_apps.initial(name)) for name in MODELS} == {
        "4k": 4_090,
        "55k": 55_434,
    }


def test_a_site_starts_from_the_weights_that_it_was_sent_and_leaves_them_as_they_were() -> None:
    weights = simulate_apps.initial("4k")
    kept, work = weights.copy(), Work("4k", False, True)
    first = simulate_apps.update(work, 0, 1, weights)
    assert np.array_equal(weights, kept) and first.any()
    assert np.array_equal(first, simulate_apps.update(work, 0, 1, weights))
    assert not np.array_equal(first, simulate_apps.update(work, 1, 1, weights))


def test_a_rounds_memory_grows_with_its_sites_only_where_the_rule_needs_all_updates() -> None:
    size = 8 * len(simulate_apps.initial("4k"))  # an update in float64
    more = {}
    for name, rule in simulate_scale.rules().items():
        few, many = (simulate_scale.peak(rule, sites) for sites in (4, 16))
        more[name] = (many - few) / 12 / size  # updates that one more site costs
    assert more["one by one"] < 0.2  # its message alone
    assert more["all at once"] > 1.0


def test_the_table_shows_a_line_for_each_case(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(simulate, "CLIENT_ROUNDS", 2)
    asked = argparse.Namespace(sites=[2], no_ray=True, model=["4k"], repeats=1)
    simulate.measure(asked, Console(width=140))
    shown = capsys.readouterr().out.splitlines()
    rows = [line.replace("│", " ").split() for line in shown if " 4k " in line]
    assert [row[:3] for row in rows] == [["4k", "2", "no"], ["4k", "2", "yes"]]
    assert [row[-1] for row in rows] == ["yes", "yes"]


def test_ratios_are_of_turns_and_say_how_many_times_as_fast() -> None:
    taken = {
        "ours": [simulate.Spent(wall, 2.0, "") for wall in (1.0, 2.0, 4.0)],
        "plain": [simulate.Spent(wall, 1.0, "") for wall in (3.0, 4.0, 4.0)],
    }
    assert simulate.ratio(taken, "ours", "plain", "wall") == 2.0
    assert simulate.ratio(taken, "ours", "plain", "processor") == 0.5


def test_a_round_without_every_site_is_no_round(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no records")

    monkeypatch.setattr(simulate_apps, "update", fail)
    with pytest.raises(RuntimeError, match="no records"):
        simulate.Ours(SITES).rounds(Work("4k", False, True), 1)


def test_many_sites_are_drawn_in_order_and_the_table_has_a_line_a_round(
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = simulate_scale.drawn(5, 1_000, 1)
    assert list(chosen) == sorted(chosen) and len(chosen) == 5
    assert simulate_scale.drawn(5, 1_000, 2) != chosen
    console = Console(width=120)
    console.print(simulate_scale.run(1_000, 4, 2, console))
    shown = capsys.readouterr().out
    assert "1,000 sites, 4 a round" in shown and "resident MB" in shown


def test_the_accord_of_many_sites_is_an_accord_and_runs(tmp_path: Path) -> None:
    agreed = accord.load(simulate_scale.write_accord(tmp_path, 12, 1, True))
    assert len(agreed.roster) == 12 and agreed.privacy.enabled
    cells = simulate_scale.own_apps(2, 1, False)
    assert cells[:2] == ["2", "no"] and all(float(cell.replace(",", "")) > 0 for cell in cells[2:])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="/proc shows what is left")
def test_flowers_runtime_leaves_the_same_bits_and_no_process() -> None:
    work = Work("4k", True, True)
    flower = simulate.Ray(SITES)
    try:
        theirs = flower.rounds(work, 2)
        assert len(flower._left()) > 2  # the child, and Ray's own
    finally:
        flower.end()
    assert theirs.model == simulate.Plain(SITES).rounds(work, 2).model
    assert theirs.processor > 0 and theirs.wall > 0
    assert flower._left() == []
