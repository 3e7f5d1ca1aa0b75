"""A reply without noise has salt, since others are shown its hash over the link."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from flwr.app import RecordDict
from lone_site import accord_of, initial, message, opened, some

from fedaccord.accord import Accord
from fedaccord.client import app, diary
from fedaccord.models.build import trained


def replies(accord: Accord, folder: Path) -> list[RecordDict]:
    """What a site answers when it is asked twice for the same round."""
    site = opened(folder, accord, some())
    asked = message(accord, "train", 1, trained(initial(accord)))
    with diary.privacy_diary(site.folder):
        return [app.train_round.__wrapped__(site, asked) for _ in range(2)]


CLIENT = {"enabled": True, "unit": "client", "clipping_norm": 1.0, "noise_multiplier": 2.0}


def held(reply: RecordDict) -> dict[str, str]:
    return {name: array.object_id for name, array in reply.array_records["arrays"].items()}


@pytest.mark.parametrize(("privacy", "salted"), [(CLIENT, True), ({}, False)])
def test_the_hash_of_an_update_without_noise_tells_nobody_who_guesses_the_update(
    privacy: dict[str, object], salted: bool, tmp_path: Path
) -> None:
    first, again = replies(accord_of(True, privacy=privacy), tmp_path)
    assert held(first) == held(again)
    salts = [reply["config"].get("salt", "") for reply in (first, again)]
    assert (re.fullmatch("[0-9a-f]{64}", str(salts[0])) is not None) == salted
    assert (salts[0] != salts[1]) == salted
