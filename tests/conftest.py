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

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def heart_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished private run of the heart accord, without a report; copy it before editing it."""
    from fedaccord.simulations import engine

    run = tmp_path_factory.mktemp("heart") / "heart-run"
    engine.simulate("heart", run, run / "sites", 4)
    return run
