"""What several test files share: quiet Flower, and one finished run of the heart accord."""

from __future__ import annotations

import os

os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomlkit


@pytest.fixture(autouse=True)
def _loud_again() -> Iterator[None]:
    """Undo what a command silences in this process, or a later test hears nothing."""
    loggers = [logging.getLogger(name) for name in ("flwr", "flower")]
    levels = [logger.level for logger in loggers]
    yield
    logging.disable(logging.NOTSET)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="session")
def heart_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished private run of the heart accord, without a report; copy it before editing it."""
    from fedaccord.simulations import engine

    run = tmp_path_factory.mktemp("heart") / "heart-run"
    engine.simulate("heart", run, run / "sites", 4)
    return run


@pytest.fixture(scope="session")
def linked_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run as the link leaves it (see `linked_run.Linked`); copy it before editing it."""
    from linked_run import make

    return make(tmp_path_factory.mktemp("linked"))


@pytest.fixture(scope="session")
def set_policy() -> Callable[..., None]:
    """Write a simulated site's policy for an accord, with some keys set to other values."""
    from fedaccord.accord import load
    from fedaccord.client import policy

    def write(folder: Path, accord: Any, **keys: Any) -> None:
        agreed = load(accord) if isinstance(accord, str | Path) else accord
        (folder / "policy.toml").unlink(missing_ok=True)
        policy.of_site(folder, agreed)
        text = tomlkit.parse((folder / "policy.toml").read_text(encoding="utf-8"))
        text.update(keys)
        (folder / "policy.toml").write_text(tomlkit.dumps(text), encoding="utf-8")

    return write


@pytest.fixture
def called(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run `fedaccord` in this process; its exit code and what it wrote."""
    from fedaccord import cli

    def call(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedaccord", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call
