"""The training loss that a strategy may weigh sites by: exact, on record, never under a plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import RecordDict
from lone_site import accord_of, initial, message, opened, some
from torch.nn import functional

from fedaccord.client import app, diary
from fedaccord.client.site import Site
from fedaccord.errors import PolicyError
from fedaccord.models.build import trained

LOSS = {"strategy": {"name": "qfedavg"}}


def wanted(site: Site, number: int, wants: bool = True) -> RecordDict:
    asked = message(site.accord, "train", number, trained(initial(site.accord)))
    if wants:
        asked.content["config"]["wants"] = "train-loss"  # type: ignore[index]
    with diary.privacy_diary(site.folder):
        return app.train_round.__wrapped__(site, asked)


def released(site: Site) -> list[str]:
    return [entry["what"] for entry in site.ledger.entries() if entry["kind"] == "RELEASE"]


def test_the_loss_is_the_mean_cross_entropy_of_the_model_that_came_and_its_release_names_it(
    tmp_path: Path,
) -> None:
    site, records = opened(tmp_path, accord_of(**LOSS), some()), some()
    reply = wanted(site, 1)
    logits = initial(site.accord).eval()(torch.from_numpy(records.inputs))
    mean = functional.cross_entropy(logits, torch.from_numpy(records.labels)).item()
    assert reply["metrics"]["train_loss"] == pytest.approx(mean, rel=1e-5)
    assert released(site) == ["weights and training loss"]
    assert wanted(site, 1)["metrics"] == reply["metrics"]  # a retry sends the same
    assert released(site) == ["weights and training loss"]


def test_a_retry_that_asks_for_a_loss_which_is_not_on_record_gets_none(tmp_path: Path) -> None:
    site = opened(tmp_path, accord_of(**LOSS), some())
    assert "metrics" not in wanted(site, 1, wants=False)
    assert "metrics" not in wanted(site, 1)
    assert released(site) == ["weights"]


@pytest.mark.parametrize("private", [True, False])
def test_under_a_plan_or_without_the_policys_word_nothing_is_trained_or_sent(
    private: bool, tmp_path: Path
) -> None:
    site = opened(tmp_path, accord_of(private, **({} if private else LOSS)), some())
    if not private:
        strict = site.policy.model_copy(update={"releases": ["weights", "group counts"]})
        site = replace(site, policy=strict)
    with pytest.raises(PolicyError):
        wanted(site, 1)
    assert released(site) == []
    assert not any(entry["kind"] == "INTENT" for entry in site.ledger.entries())
