"""docs/strategies.md: its table is what the code does, and its example of a third party's runs."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord
from flwr.supercore.task_identity import TaskIdentity

from fedaccord import registry
from fedaccord.errors import AccordError
from fedaccord.server.admission import DrawnGrid
from fedaccord.strategies.driver import Driver
from fedaccord.strategies.seam import Setting, make
from fedaccord.strategies.updates import Update

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "strategies.md").read_text("utf-8")
SITES = ("a", "b", "c", "d", "e")
SETTING = Setting(SITES, 5, 5, 10, 0.1, 0.0, "sgd", False)
BESIDE_THE_CODE = {"num_nodes_to_select": "min_sites - f - 2", "radius": "(none)"}  # None there


@pytest.fixture
def medians(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The page's example as a module on the path; its text."""
    (text,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "medians.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    return str(text)


def aggregate(driver: Driver, rows: np.ndarray) -> dict[str, np.ndarray]:
    model = {"m": np.full((2, 2), 7.0), "s": np.array(7.0)}
    driver.ask(1, model, ConfigRecord({}), DrawnGrid(None, dict(enumerate(SITES, 1))))  # type: ignore[arg-type]
    found = [
        Update(site, {"m": row[:4].reshape(2, 2), "s": row[4]}, 1, {})
        for site, row in zip(SITES, rows, strict=True)
    ]
    made = driver.combine(1, model, found, bound=1e9, heaviest=1, quorum=5).model
    assert made is not None
    return made


def test_the_example_is_at_most_30_lines_and_is_the_geometric_median(medians: str) -> None:
    assert medians.count("\n") <= 30
    rows = np.random.default_rng(0).normal(size=(5, 5))
    made = aggregate(make("medians:GeometricMedian", {"iterations": 500}, SETTING), rows)
    middle = np.append(made["m"].ravel(), made["s"]) - 7
    # Where the sum of distances is least, the unit vectors to the updates cancel.
    units = (rows - middle) / np.linalg.norm(rows - middle, axis=1)[:, None]
    assert np.linalg.norm(units.sum(axis=0)) < 1e-6
    far = rows.copy()
    far[:2] = 1e8
    moved = aggregate(make("medians:GeometricMedian", {}, SETTING), far)
    assert np.abs(moved["m"]).max() < 20  # the mean would be at 4e7


def test_the_example_works_as_an_entry_point_too(medians: str, tmp_path: Path) -> None:
    info = tmp_path / "medians-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: medians\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[fedaccord.strategies]\ngeometric-median = medians:GeometricMedian\n"
        "krum = medians:GeometricMedian\n"
    )
    assert "geometric-median" in registry.known("strategy")
    rows = np.random.default_rng(0).normal(size=(5, 5))
    named = aggregate(make("geometric-median", {"iterations": 9}, SETTING), rows)
    pathed = aggregate(make("medians:GeometricMedian", {"iterations": 9}, SETTING), rows)
    assert named["m"].tobytes() == pathed["m"].tobytes()
    assert make("krum", {}, SETTING).strategy.__class__.__module__.startswith("flwr.")


def test_a_wrong_option_of_the_example_is_one_line(medians: str) -> None:
    with pytest.raises(AccordError, match=r"cannot be made with options .*rounds.*Change"):
        make("medians:GeometricMedian", {"rounds": 3}, SETTING)


def rows_of_the_table() -> dict[str, tuple[str, str]]:
    """For each name in the table, its options and what it says under privacy."""
    part = PAGE[PAGE.index("## All of them") :]
    found = re.findall(r"^\| `([a-z-]+)` \|(.*)\|$", part[: part.index("\n## ")], re.MULTILINE)
    cells = {name: rest.split("|") for name, rest in found}
    return {name: (rest[0].strip(), rest[3].strip()) for name, rest in cells.items()}


def test_the_table_names_every_strategy_and_no_other() -> None:
    assert sorted(rows_of_the_table()) == sorted(registry.STRATEGIES)


@pytest.mark.parametrize("name", sorted(registry.STRATEGIES))
def test_the_table_has_each_option_with_its_default(name: str) -> None:
    parameters = dict(inspect.signature(registry.load("strategy", name)).parameters)
    parameters.pop("setting")
    expected = []
    for option, parameter in parameters.items():
        if parameter.default is None:
            beside = BESIDE_THE_CODE[option]
            expected.append(
                f"`{option} = {beside}`" if beside[0] != "(" else f"`{option}` {beside}"
            )
        else:
            shown = str(parameter.default).lower()
            expected.append(f"`{option} = {shown}`")
    assert rows_of_the_table()[name][0] == (", ".join(expected) or "none")


@pytest.mark.parametrize("name", sorted(registry.STRATEGIES))
def test_the_table_says_what_privacy_allows(name: str) -> None:
    private = Setting((*SITES, "f", "g"), 7, 7, 10, 0.1, 0.0, "sgd", True)
    allowed = rows_of_the_table()[name][1]
    if allowed == "yes":
        assert make(name, {}, private)
    else:
        assert allowed.startswith("**no**")
        with pytest.raises(AccordError, match="privacy"):
            make(name, {}, private)


def test_the_fault_on_the_page_is_the_one_that_is_raised() -> None:
    four = Setting(SITES[:4], 4, 4, 10, 0.1, 0.0, "sgd", False)
    with pytest.raises(AccordError) as caught:
        make("krum", {"num_malicious_nodes": 2}, four)
    assert f"\n{caught.value}\n" in PAGE
