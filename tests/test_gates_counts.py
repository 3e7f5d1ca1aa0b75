"""The gate of group counts: what is not as agreed is dropped, and named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedaccord.client.app import app as client_app
from fedaccord.server import gates
from fedaccord.simulations.engine import InProcessGrid

RUN, ROUND = "this-run", 2
GRID = InProcessGrid(client_app, 1, {})  # so that messages can be made
SHAPES = {"sex": (2, 2, 2)}
GOOD = [1, 2, 3, 4, 5, 6, 7, 8]


def counted(cells: object = GOOD, **said: object) -> RecordDict:
    config = ConfigRecord({"site": "va", "run": RUN, "round": ROUND} | said)  # type: ignore[arg-type]
    records = {m: MetricRecord({"sex": list(GOOD)}) for m in ("model", "student")}
    records["model"] = MetricRecord({"sex": cells})  # type: ignore[dict-item]
    return RecordDict({**records, "config": config})


def read(what: RecordDict | Error) -> tuple[str, dict[str, Any]]:
    sections = ("model", "student")
    reply = Message(what, reply_to=Message(RecordDict(), 1, "evaluate"))
    return gates.read_counts(reply, "va", RUN, ROUND, SHAPES, sections)


def test_counts_are_read_by_group_label_and_prediction() -> None:
    table = [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    assert read(counted()) == ("", {"model": {"sex": table}, "student": {"sex": table}})


REFUSED = RecordDict({"config": ConfigRecord({"refused": "No."})})
CONFIG = ConfigRecord({"site": "va", "run": RUN, "round": ROUND})
IDENTITY = "identity: asked va for round 2, got {"
LATE = "late: asked va for round 2, got round 1"
TABLE = MetricRecord({"sex": list(GOOD)})
COUNTS = "form: counts of model by sex"
EXACTLY = "form: counts of exactly model, student are expected"
COUNT_ATTACKS: dict[str, tuple[RecordDict | Error, str]] = {
    "negative": (counted([-1, *GOOD[1:]]), f"{COUNTS} are not whole numbers from 0 up"),
    "a cell too few": (counted(GOOD[:7]), f"{COUNTS} are not [2, 2, 2]"),
    "a cell too many": (counted([*GOOD, 9]), f"{COUNTS} are not [2, 2, 2]"),
    "no cells": (counted([]), f"{COUNTS} are not [2, 2, 2]"),
    "one number": (counted(8), f"{COUNTS} are not [2, 2, 2]"),
    "fractions": (counted([0.5] * 8), f"{COUNTS} are not whole numbers from 0 up"),
    "whole floats": (counted([1.0] * 8), f"{COUNTS} are not whole numbers from 0 up"),
    "a NaN": (counted([np.nan] * 8), f"{COUNTS} are not whole numbers from 0 up"),
    "more than any site has": (counted([2**62, *GOOD[1:]]), f"{COUNTS} sum to more than"),
    "no counts of the student": (RecordDict({"model": TABLE, "config": CONFIG}), EXACTLY),
    "counts of an unknown model": (RecordDict({**counted(), "teacher": TABLE}), EXACTLY),
    "nothing": (RecordDict(), IDENTITY),
    "an earlier round": (counted(round=1), LATE),
    "another site": (counted(site="hungary"), IDENTITY),
    "another run": (counted(run="x"), IDENTITY),
    "a million numbers": (counted([1] * 10**6), "size: 1000"),
    "arrays": (RecordDict({**counted(), "x": ArrayRecord({"x": Array(np.zeros(9))})}), "size: "),
    "an error": (Error(2, "internal error"), "error: internal error"),
    "a refusal": (REFUSED, "refused: No."),
}


@pytest.mark.parametrize("attack", COUNT_ATTACKS)
def test_counts_that_are_not_as_agreed_are_dropped_with_their_reason(attack: str) -> None:
    what, reason = COUNT_ATTACKS[attack]
    said, tables = read(what)
    assert said.startswith(reason)
    assert tables == {}
