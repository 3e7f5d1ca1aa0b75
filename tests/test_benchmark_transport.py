"""The transport benchmark: what it carries is as large as it says, and nothing travels for free."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from benchmarks import transport
from benchmarks import transport_apps as apps
from fedaccord.objects import take_apart
from fedaccord.simulations.engine import InProcessGrid


@pytest.mark.parametrize(
    ("model", "size"), [("0.1 MB", 1e5), ("LoRA", 1.2e6), ("20 MB", 2e7), ("100 MB", 1e8)]
)
def test_a_model_is_as_large_as_its_name_says(model: str, size: float) -> None:
    assert 4 * sum(apps.MODELS[model]) == pytest.approx(size, rel=0.02)


def test_no_part_of_a_reply_equals_one_of_the_request_or_of_another_site() -> None:
    grid = InProcessGrid(apps.client_app, 2, {})
    values = {f"layer{n}": Array(value) for n, value in enumerate(apps.weights("0.1 MB"))}
    content = RecordDict(
        {"arrays": ArrayRecord(values), "config": ConfigRecord({"server-round": 1})}
    )
    asked = [Message(content, node, "train") for node in grid.get_node_ids()]
    sent = set(take_apart(asked[0]).parts)
    replies = [take_apart(reply) for reply in grid.send_and_receive(asked)]
    assert len(replies) == 2
    seen = [set(parcel.parts) for parcel in replies]
    assert not (seen[0] & sent or seen[1] & sent or seen[0] & seen[1])


def test_a_rounds_seconds_are_the_median_without_the_first() -> None:
    assert transport.taken([9.0, 1.0, 3.0, 2.0], 5.0) == transport.Taken(2.0, 5.0)
    assert transport.taken([9.0], None).seconds == 9.0


def test_the_table_says_what_is_wanted_and_what_was_found() -> None:
    link = {"0.1 MB": transport.Taken(0.1, 8e5)}
    table = transport.show(
        link, {"0.1 MB": transport.Taken(7.0, 2e6)}, {"0.1 MB": transport.in_process("0.1 MB", 2)}
    )
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells[2:5] == ["0.100", "7.00", "70.0"] and cells[5] == ">= 20, link <= 0.2 s"
    assert cells[6:] == ["0.80 MB", "2.00 MB"] and np.isfinite(float(cells[1]))
