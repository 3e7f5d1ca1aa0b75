"""A site whose policy rules a request out: each message is refused by name and nothing is read."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from wards import small_accord

from fedaccord import accord as accords
from fedaccord.client import policy, policy_file
from fedaccord.client.app import app
from fedaccord.privacy.ledger import Ledger
from fedaccord.simulations.engine import InProcessGrid
from fedaccord.simulations.heart import Heart

SITE = "cleveland"
ACCORD: dict[str, Any] = small_accord()
PLAIN = ("max_epsilon", "accords")  # rules that refuse training without privacy

STRICTER: dict[str, dict[str, Any]] = {
    "approved": {"approved": ["ab" * 32]},
    "expires": {"expires": date(2020, 1, 1)},
    "delta": {"delta": 1e-7},
    "units": {"units": ["client"]},
    "min_noise_multiplier": {"min_noise_multiplier": 3.5},
    "max_grad_norm": {"max_grad_norm": 0.5},
    "min_subjects": {"min_subjects": 201},
    "min_records": {"min_records": 261},
    "models": {"models": ["mlp"]},
    "max_parameters": {"max_parameters": 5},
    "releases": {"releases": ["weights"]},
    "min_cell": {"min_cell": 11},
}


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The heart task, whose records nobody may read: who did."""
    readings: list[str] = []

    def site(self: Heart, name: str) -> None:
        readings.append(name)
        raise AssertionError("records were read")

    monkeypatch.setattr(Heart, "site", site)
    yield readings


def ask(folder: Path, values: dict[str, Any], agreed: accords.Accord, kind: str) -> str:
    """Send one message to the site under a policy; what it says against it, or ""."""
    (folder / SITE).mkdir(parents=True, exist_ok=True)
    (folder / SITE / policy.FILE).write_text(policy_file.text(values))
    grid = InProcessGrid(app, 1, {"accord": str(folder / "small.toml"), "sites": str(folder)})
    (node,) = grid.get_node_ids()
    asked = ConfigRecord({"run": "a", "accord": agreed.digest, "server-round": 1})
    content = RecordDict({"config": asked, "arrays": ArrayRecord()})
    (reply,) = grid.send_and_receive([Message(content, node, kind)])
    assert reply.has_content(), reply.error
    return str(reply.content.config_records["config"].get("refused", ""))


def agree(folder: Path, enabled: bool = True) -> accords.Accord:
    declared = ACCORD | {"privacy": ACCORD["privacy"] | {"enabled": enabled}}
    (folder / "small.toml").write_text(tomlkit.dumps(declared))
    return accords.load(folder / "small.toml")


@pytest.mark.parametrize("rule", [*STRICTER, "hours", *PLAIN])
def test_a_refused_site_answers_every_message_with_the_rule_and_reads_nothing(
    rule: str, tmp_path: Path, unread: list[str]
) -> None:
    agreed = agree(tmp_path, enabled=rule not in PLAIN)
    values = policy_file.simulated(tmp_path / SITE, agreed) | STRICTER.get(rule, {})
    later = datetime.now(UTC) + timedelta(hours=2)
    if rule == "hours":
        values["hours"] = f"{later:%H:%M}-{later + timedelta(hours=2):%H:%M}"
    elif rule == "max_epsilon":
        values["max_epsilon"] = 1.0
    elif rule == "accords":
        values["accords"] = {agreed.digest: {"max_epsilon": 1.0}}
    asked_any_time = ["query.join", "query.reserve", "query.ledger"]
    for kind in ["train", "evaluate"] + (asked_any_time * (rule != "hours")):
        words = ask(tmp_path, values, agreed, kind)
        assert words.startswith(f"Site {SITE} refuses by its rule {rule}: "), (kind, words)
    assert unread == []
    book = Ledger(tmp_path / SITE / "ledger.sqlite", SITE)
    entries = book.entries()
    book.close()
    assert {entry["kind"] for entry in entries} - {"KEY"} == {"REFUSAL"}
    assert {entry["rule"] for entry in entries if entry["kind"] == "REFUSAL"} == {rule}


@pytest.mark.parametrize("enabled", [True, False], ids=["private", "plain"])
def test_the_same_site_joins_and_reserves_where_no_rule_is_broken(
    enabled: bool, tmp_path: Path, unread: list[str]
) -> None:
    agreed = agree(tmp_path, enabled)
    values = policy_file.simulated(tmp_path / SITE, agreed)
    assert [ask(tmp_path, values, agreed, kind) for kind in ("query.join", "query.reserve")] == [
        "",
        "",
    ]
    assert unread == []


def test_a_node_that_is_told_which_site_it_is_takes_part_in_nothing_without_a_policy(
    tmp_path: Path, unread: list[str]
) -> None:
    agreed = agree(tmp_path)
    grid = InProcessGrid(app, 1, {"accord": str(tmp_path / "small.toml"), "sites": str(tmp_path)})
    (node,) = grid.get_node_ids()
    context = grid._context(node)
    agreed_on = str(tmp_path / "small.toml")
    context.node_config = {"site": SITE, "accord": agreed_on, "folder": str(tmp_path)}
    grid._context = lambda _: context  # type: ignore[method-assign]
    asked = ConfigRecord({"run": "a", "accord": agreed.digest, "server-round": 1})
    for kind in ("query.join", "query.reserve", "query.ledger", "train", "evaluate"):
        content = RecordDict({"config": asked, "arrays": ArrayRecord()})
        (reply,) = grid.send_and_receive([Message(content, node, kind)])
        assert "policy.toml is missing" in reply.content.config_records["config"]["refused"]
    assert not (tmp_path / SITE / policy.FILE).exists()
    assert unread == []
