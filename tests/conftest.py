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
import shutil
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
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kits whose sites were all granted; a test that edits them copies them."""
    from kitted import HEART, HEART_FILE, enrolled

    from fedaccord import provision

    root = tmp_path_factory.mktemp("whole") / "kits"
    provision.finish(enrolled(root), HEART, HEART_FILE)
    return root


@pytest.fixture
def kits(whole: Path, tmp_path: Path) -> Any:
    """A copy of those kits."""
    from fedaccord.provision import Kits

    return Kits(shutil.copytree(whole, tmp_path / "kits"))


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Any]:
    """A coordinator's end of the link that listens in this process."""
    from deployed import listening

    with listening(tmp_path) as found:
        yield found


@pytest.fixture
def site(here: Any) -> Iterator[Any]:
    """The accord's first site, which has joined `here`."""
    from deployed import SITES, Caller

    with Caller(here, SITES[0]) as found:
        yield found.join()


@pytest.fixture(scope="session")
def linked(linked_run: Any) -> Path:
    """The folder of a finished run over the link; copy it before editing it."""
    return linked_run.run


@pytest.fixture(scope="session")
def signers(linked_run: Any) -> Any:
    """Who signed in that run."""
    return linked_run.signers


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
