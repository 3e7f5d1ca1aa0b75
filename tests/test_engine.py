"""The in-process engine: what it needs of Flower, that nodes are apart, and that runs repeat."""

from __future__ import annotations

import gc
import inspect
import random
import time
import tracemalloc
import weakref
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flwr.app
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedaccord.server.one_run import FIRST_NODE
from fedaccord.simulations import engine
from fedaccord.simulations.engine import InProcessGrid

ACCORD = """
name = "tiny"
purpose = "Test."
seed = {seed}
task = {{ name = "heart" }}
sites = [
  {{ name = "cleveland", subjects = 200 }}, {{ name = "hungary", subjects = 200 }},
  {{ name = "switzerland", subjects = 80 }}, {{ name = "va", subjects = 130 }},
]
model = {{ name = "cnn1d", options = {{ channels = 2, kernel = 3 }} }}
rounds = {{ rounds = 2, sites_per_round = 3 }}
training = {{ steps = 3, learning_rate = 0.1, momentum = 0.5 }}
privacy = {{ enabled = {private}, noise_multiplier = 1.0, sampling_prob = 0.2 }}
fairness = {{ attributes = ["sex"] }}
distillation = {{ steps = 5, proxy_rows = 64 }}
"""


def models(folder: Path, private: bool, seed: int = 0) -> tuple[bytes, bytes]:
    """Run the tiny accord; the bytes of its model and its student."""
    folder.mkdir()
    text = ACCORD.format(private=str(private).lower(), seed=seed)
    (folder / "accord.toml").write_text(text)
    engine.simulate(folder / "accord.toml", folder / "run", folder / "sites", 4)
    model, student = (folder / "run" / f"{m}.safetensors" for m in ("model", "student"))
    return model.read_bytes(), student.read_bytes()


# --- runs repeat, or do not ---------------------------------------------------------------------


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def test_without_privacy_the_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    seed_everything(1)
    first = models(tmp_path / "first", private=False)
    seed_everything(2)
    assert models(tmp_path / "again", private=False) == first
    other = models(tmp_path / "other", private=False, seed=1)
    assert other[0] != first[0] and other[1] != first[1]


def test_with_privacy_no_seed_repeats_the_noise(tmp_path: Path) -> None:
    seed_everything(1)
    first = models(tmp_path / "first", private=True)
    seed_everything(1)
    second = models(tmp_path / "again", private=True)
    assert first[0] != second[0] and first[1] != second[1]


# --- what the engine needs of Flower ------------------------------------------------------------


def test_flower_is_of_the_minor_version_that_the_engine_was_written_for() -> None:
    assert version("flwr").split(".")[:2] == ["1", "41"]


def test_the_grid_has_exactly_flowers_methods_with_flowers_signatures() -> None:
    abstract = {
        "set_run",
        "run",
        "create_message",
        "get_node_ids",
        "push_messages",
        "pull_messages",
        "send_and_receive",
    }
    assert Grid.__abstractmethods__ == abstract

    def parameters(kind: type, name: str) -> list[tuple[str, Any, Any]]:
        member = inspect.getattr_static(kind, name)
        function = member.fget if isinstance(member, property) else member
        found = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in found]

    for name in abstract:
        assert parameters(InProcessGrid, name) == parameters(Grid, name)


def test_flowers_apps_strategies_and_runs_are_called_as_they_want_to_be() -> None:
    def names(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert names(ClientApp.__call__) == ["self", "message", "context"]
    assert names(ServerApp.__call__) == ["self", "grid", "context"]
    for kind in (Strategy, FedAvg):
        assert names(kind.configure_train) == ["self", "server_round", "arrays", "config", "grid"]
        assert names(kind.aggregate_train) == ["self", "server_round", "replies"]
    wanted = {"fraction_train", "min_train_nodes", "min_available_nodes", "weighted_by_key"}
    assert wanted <= set(names(FedAvg.__init__))
    assert {"run_id", "node_id", "node_config", "state", "run_config"} <= set(names(Context))
    assert Run.create_empty(run_id=7).run_id == 7
    assert (SUPERLINK_NODE_ID, ErrorCode.CLIENT_APP_RAISED_EXCEPTION) == (1, 2)
    assert list(Array.__dataclass_fields__) == ["dtype", "shape", "stype", "data"]
    assert hasattr(flwr.app, "Error")


def test_a_message_needs_a_task_identity_which_a_grid_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, None)
    with pytest.raises(RuntimeError, match="not set"):
        Message(RecordDict(), 1, "query")
    InProcessGrid(ClientApp(), 1, {})
    message = Message(RecordDict(), FIRST_NODE, "query", group_id="3")
    assert message.metadata.src_node_id == SUPERLINK_NODE_ID
    assert (message.metadata.message_id, message.metadata.group_id) == ("", "3")


def test_a_reply_goes_back_to_who_asked_under_the_messages_id() -> None:
    grid = InProcessGrid(echo(), 2, {})
    (mark,) = grid.push_messages([Message(RecordDict(), FIRST_NODE + 1, "train", group_id="r5")])
    (reply,) = grid.pull_messages([mark])
    there = reply.metadata
    assert (there.src_node_id, there.dst_node_id) == (FIRST_NODE + 1, SUPERLINK_NODE_ID)
    assert (there.reply_to_message_id, there.group_id) == (mark, "r5")
    assert there.message_id not in ("", mark)
    assert there.message_type == "train"
    assert list(grid.pull_messages([mark])) == []  # a reply is handed out once


# --- nodes are apart ----------------------------------------------------------------------------


def echo() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(message.content, reply_to=message)

    return app


def shared() -> RecordDict:
    return RecordDict(
        {
            "arrays": ArrayRecord({"w": Array(np.arange(3, dtype=np.float32))}),
            "config": ConfigRecord({"list": [1, 2], "word": "a", "bytes": b"b"}),
            "metrics": MetricRecord({"n": 1, "many": [1.0, 2.0]}),
        }
    )


def text(content: RecordDict) -> str:
    """Everything in a message in words, array bytes too."""
    arrays = {k: (v.dtype, v.shape, v.stype, v.data) for k, v in content["arrays"].items()}
    return repr((arrays, dict(content["config"]), dict(content["metrics"])))


def vandal(kept: list[RecordDict]) -> ClientApp:
    """A site that spoils all it was sent, and keeps what it sends to spoil it later."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        content = message.content
        assert text(content) == text(shared())
        content["arrays"]["w"].data = b""
        content["arrays"]["w"].shape = (9,)
        content["arrays"]["more"] = Array(np.zeros(1))
        content["config"]["list"].append(3)
        content["config"]["word"] = "z"
        content["metrics"]["many"][0] = -1.0
        del content["metrics"]["n"]
        content["extra"] = ConfigRecord()
        kept.append(shared())
        return Message(kept[-1], reply_to=message)

    return app


def test_a_site_cannot_change_what_others_are_sent_nor_what_it_has_sent() -> None:
    kept: list[RecordDict] = []
    grid = InProcessGrid(vandal(kept), 3, {})
    content = shared()  # as Flower's strategies do: one content for everybody
    replies = list(
        grid.send_and_receive([Message(content, FIRST_NODE + n, "train") for n in range(3)])
    )
    assert [reply.has_content() for reply in replies] == [True] * 3  # each saw it unspoilt
    assert text(content) == text(shared())
    for own in kept:
        own["arrays"]["w"].data = b""
        own["config"]["list"].append(4)
        own["metrics"]["many"].clear()
    for reply in replies:
        assert text(reply.content) == text(shared())


def test_the_bytes_of_an_array_are_shared_and_not_copied() -> None:
    grid = InProcessGrid(echo(), 1, {})
    content = shared()
    (reply,) = grid.send_and_receive([Message(content, FIRST_NODE, "train")])
    assert reply.content["arrays"]["w"].data is content["arrays"]["w"].data


def test_a_node_keeps_its_own_state_and_knows_its_place() -> None:
    app = ClientApp()

    @app.query("count")
    def count(message: Message, context: Context) -> Message:
        before = context.state.config_records.get("seen", ConfigRecord({"n": 0}))["n"]
        context.state["seen"] = ConfigRecord({"n": before + 1})
        said = {
            "n": before + 1,
            "place": context.node_config["partition-id"],
            "of": context.node_config["num-partitions"],
            "word": context.run_config["word"],
        }
        return Message(RecordDict({"config": ConfigRecord(said)}), reply_to=message)

    grid = InProcessGrid(app, 3, {"word": "x"})
    nodes = list(grid.get_node_ids())
    assert nodes == [FIRST_NODE, FIRST_NODE + 1, FIRST_NODE + 2]
    seen = []
    for node in (nodes[2], nodes[0], nodes[2]):
        (reply,) = grid.send_and_receive([Message(RecordDict(), node, "query.count")])
        seen.append(dict(reply.content["config"]))
    assert seen == [
        {"n": 1, "place": 2, "of": 3, "word": "x"},
        {"n": 1, "place": 0, "of": 3, "word": "x"},
        {"n": 2, "place": 2, "of": 3, "word": "x"},
    ]


def test_a_message_at_which_the_app_raises_leaves_the_nodes_state_as_it_was() -> None:
    """As in Flower's runtime, which takes over a Context when its app has answered."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        state = context.state
        if "seen" not in state:
            state["seen"] = ConfigRecord({"rounds": []})
        state["seen"]["rounds"].append(int(message.metadata.group_id))
        if message.metadata.group_id == "2":
            state["torn"] = ConfigRecord()
            raise ValueError("half way")
        return Message(RecordDict({"seen": state["seen"]}), reply_to=message)

    grid = InProcessGrid(app, 1, {})
    asked = [Message(RecordDict(), FIRST_NODE, "train", group_id=str(n)) for n in (1, 2, 3)]
    first, second, third = grid.send_and_receive(asked)
    assert first.content["seen"]["rounds"] == [1]
    assert second.has_error()
    assert third.content["seen"]["rounds"] == [1, 3]


def test_nodes_that_keep_nothing_need_no_memory() -> None:
    tracemalloc.start()
    grid = InProcessGrid(echo(), 1_000_000, {"word": "x"})
    for place in range(200):
        asked = Message(RecordDict(), FIRST_NODE + 4_999 * place, "train")
        (reply,) = grid.send_and_receive([asked])
        assert reply.has_content()
    del reply, asked
    gc.collect()
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 100_000


def test_a_pulled_message_and_its_reply_are_held_by_nobody_else() -> None:
    grid = InProcessGrid(echo(), 2, {})
    first, second = shared(), shared()
    held = [weakref.ref(first), weakref.ref(second)]
    marks = grid.push_messages(
        [Message(first, FIRST_NODE, "train"), Message(second, FIRST_NODE + 1, "train")]
    )
    del first, second
    gc.disable()  # memory must not wait for the collector
    try:
        (reply,) = grid.pull_messages([marks[0]])
        held.append(weakref.ref(reply.content))
        assert [there() is not None for there in held] == [False, True, True]
        del reply
        assert held[2]() is None
    finally:
        gc.enable()


def test_a_message_that_nobody_pulls_is_dropped_after_its_time_to_live() -> None:
    grid = InProcessGrid(echo(), 1, {})
    lives = [Message(RecordDict(), FIRST_NODE, "train", ttl=ttl) for ttl in (0.01, 60.0)]
    marks = list(grid.push_messages(lives))
    time.sleep(0.02)
    grid.push_messages([])
    assert [len(list(grid.pull_messages([mark]))) for mark in marks] == [0, 1]


def test_an_exception_of_a_client_app_becomes_an_error_reply_of_that_node_alone() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            raise ValueError("no luck")
        return Message(RecordDict(), reply_to=message)

    heard: list[Message] = []
    grid = InProcessGrid(app, 3, {}, heard.append)
    asked = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
    replies = list(grid.send_and_receive(asked))
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert replies[1].error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert "no luck" in (replies[1].error.reason or "")
    assert [r.metadata.src_node_id for r in replies] == list(grid.get_node_ids())
    assert heard == replies


def test_a_message_to_a_node_that_is_not_there_is_never_answered() -> None:
    grid = InProcessGrid(echo(), 1, {})
    asked = [Message(RecordDict(), node, "train") for node in (7, FIRST_NODE, FIRST_NODE + 1)]
    replies = list(grid.send_and_receive(asked))
    assert [reply.metadata.src_node_id for reply in replies] == [FIRST_NODE]
    assert list(grid.pull_messages(["nobody's"])) == []


@pytest.mark.parametrize(("timeout", "answers"), [(None, 3), (60.0, 3), (0.01, 1), (0.0, 0)])
def test_sites_that_come_too_late_do_not_answer(timeout: float | None, answers: int) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        time.sleep(0.02)
        return Message(RecordDict(), reply_to=message)

    grid = InProcessGrid(app, 3, {})
    asked = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
    replies = list(grid.send_and_receive(asked, timeout=timeout))
    assert [r.metadata.src_node_id for r in replies] == list(grid.get_node_ids())[:answers]


def test_an_exception_of_the_server_app_comes_out() -> None:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        raise RuntimeError(f"with {len(list(grid.get_node_ids()))} nodes and {context.run_config}")

    with pytest.raises(RuntimeError, match=r"with 2 nodes and \{'key': 1\}"):
        engine.run_in_process(app, echo(), 2, {"key": 1})
