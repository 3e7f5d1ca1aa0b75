"""The registry: packages add names by entry points, and take none of ours over."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedaccord import accord as accords
from fedaccord import registry
from fedaccord.errors import AccordError
from fedaccord.tasks import load_task


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that offers a model of its own, one named like ours, and broken ones."""
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[fedaccord.models]\n"
        "wide = theirs:wide\nmlp = theirs:stolen\ngone = theirs:gone\nabsent = no_such_module:x\n"
    )
    (tmp_path / "theirs.py").write_text(
        "from fedaccord.models.tabular import mlp\n"
        "def wide(spec, width=3): return mlp(spec, hidden=width)\n"
        "def stolen(spec): raise RuntimeError('this is not the mlp of FedAccord')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_package_can_add_a_model_by_an_entry_point(package: Path) -> None:
    assert registry.known("model") == sorted(["absent", "gone", "wide", *registry.MODELS])
    data = accords.load("heart").model_dump(mode="json") | {"model": {"name": "wide"}}
    assert accords.parse(data).model.name == "wide"
    assert registry.load("model", "wide").__module__ == "theirs"


def test_a_package_cannot_take_over_a_name_of_ours(package: Path) -> None:
    assert registry.load("model", "mlp").__module__ == "fedaccord.models.tabular"


@pytest.mark.parametrize("name", ["gone", "absent"])
def test_an_entry_point_that_does_not_load_is_refused_in_one_line(name: str, package: Path) -> None:
    with pytest.raises(AccordError, match=f'model "{name}" cannot be loaded from') as caught:
        registry.load("model", name)
    assert "\n" not in str(caught.value)


def test_every_name_of_ours_leads_to_something_that_can_be_called() -> None:
    for kind in ("task", "model", "strategy"):
        for name in registry.known(kind):
            assert callable(registry.load(kind, name))


def test_an_option_that_a_task_does_not_have_is_one_line() -> None:
    with pytest.raises(AccordError, match=r'^task "heart": .*takes no arguments.*task\.options\.$'):
        load_task("heart", {"ward": 7})
