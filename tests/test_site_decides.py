"""What a request may say and what it may not: plan, task and folder are the site's own affair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord
from lone_site import accord_of, initial, message, opened, sent, some
from wards import Silent

from fedaccord.client import app, diary
from fedaccord.errors import PolicyError
from fedaccord.models.build import trained

# What a coordinator might add to its request to get more than was agreed.
ADDED: dict[str, Any] = {
    "max_grad_norm": 1e6,
    "max-grad-norm": 1e6,
    "clipping_norm": 1e6,
    "noise_multiplier": 0.0,
    "noise_stddev": 0.0,
    "sampling_prob": 1.0,
    "steps": 1000,
    "learning_rate": 100.0,
    "epsilon": 100.0,
    "privacy.enabled": False,
    "engine": "none",
    "task": "adult",
    "site": "va",
    "sites": "/elsewhere",
    "folder": "/elsewhere",
    "data": "/etc",
    "accord.toml": "privacy = {}",
    "code": "import os",
}


def released(
    where: Path, monkeypatch: pytest.MonkeyPatch, added: dict[str, Any]
) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """The update and the ledger's entry of a round, with silent noise, so that bits compare."""
    accord = accord_of(private=True)
    site = opened(where, accord, some())
    asked = message(accord, "train", 1, trained(initial(accord)))
    config = asked.content["config"]
    assert isinstance(config, ConfigRecord)
    config.update(added)
    right = app.train.train_private

    def silently(model: Any, records: Any, plan: Any, training: Any, _: Any, *rest: Any) -> None:
        right(model, records, plan, training, Silent, *rest)

    with monkeypatch.context() as patch, diary.privacy_diary(site.folder):
        patch.setattr(app.train, "train_private", silently)
        reply = app.train_round.__wrapped__(site, asked)
    (entry,) = site.ledger.find("a", "RELEASE")
    return sent(reply), entry


def test_no_word_of_a_request_raises_the_clip_lowers_the_noise_or_changes_the_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, entry = released(tmp_path / "plain", monkeypatch, {})
    urged, urged_entry = released(tmp_path / "urged", monkeypatch, ADDED)
    assert plain.keys() == urged.keys()
    assert all(np.array_equal(plain[name], urged[name]) for name in plain)
    assert entry["plan_digest"] == urged_entry["plan_digest"]
    assert entry["sha256"] == urged_entry["sha256"]


def test_a_word_that_a_request_may_say_changes_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # so the test above would see a change
    plain, _ = released(tmp_path / "plain", monkeypatch, {})
    pulled, _ = released(tmp_path / "pulled", monkeypatch, {"proximal-mu": 1.0})
    assert any(not np.array_equal(plain[name], pulled[name]) for name in plain)


def test_a_round_that_is_asked_for_twice_gives_the_same_bytes_and_uses_one_slot(
    tmp_path: Path,
) -> None:
    accord = accord_of(private=True)
    site = opened(tmp_path, accord, some())
    weights = trained(initial(accord))
    with diary.privacy_diary(site.folder):
        first = app.train_round.__wrapped__(site, message(accord, "train", 1, weights))
        other = {name: value + 1 for name, value in weights.items()}
        again = app.train_round.__wrapped__(site, message(accord, "train", 1, other))
    assert first["arrays"].object_id == again["arrays"].object_id
    assert [e["round"] for e in site.ledger.find("a", "INTENT")] == [1]


def test_a_training_loss_is_refused_under_privacy_whatever_the_request_wants(
    tmp_path: Path,
) -> None:
    accord = accord_of(private=True)
    site = opened(tmp_path, accord, some())
    asked = message(accord, "train", 1, trained(initial(accord)))
    asked.content["config"]["wants"] = "train-loss"  # type: ignore[index]
    asked.content["further"] = ArrayRecord()
    with pytest.raises(PolicyError, match="does not send its training loss"):
        app.train_round.__wrapped__(site, asked)
    assert not site.ledger.find("a", "INTENT")
