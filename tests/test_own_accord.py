"""[task] of one's own data: one meaning has one digest, and every fault is one sentence."""

from __future__ import annotations

import copy
import tomllib
from typing import Any

import pytest

from fedaccord import accord as accords
from fedaccord.accord import Accord
from fedaccord.errors import AccordError
from fedaccord.reports import agreed

TEXT = """
name = "ours"
purpose = "Test."
sites = [{ name = "north", subjects = 10 }]
model = { name = "mlp" }
rounds = { rounds = 1 }
training = { steps = 1, learning_rate = 0.1 }
privacy = { noise_multiplier = 1.0, sampling_prob = 0.5 }
fairness = { attributes = ["sex"] }

[task]
kind = "table"
dataset = "wards"
file = "{site}.csv"
label = { column = "again", classes = ["no", "yes"] }
attributes = { sex = ["female", "male"] }
inputs.age = { min = 18, max = 110 }
inputs.smoker = { values = ["no", "yes"] }
"""
DATA = tomllib.loads(TEXT)
OTHERS: dict[str, dict[str, Any]] = {
    "images": {"kind": "images", "size": [8, 8]},
    "text": {"kind": "text", "length": 16},
}


def edited(path: str, value: Any) -> dict[str, Any]:
    """The accord with a value set in [task], or (None) removed."""
    out = copy.deepcopy(DATA)
    here = out["task"]
    *tables, key = path.split(".") if path else [""]
    for table in tables:
        here = here.setdefault(table, {})
    if value is None:
        del here[key]
    elif path:
        here[key] = value
    return out


def of_kind(kind: str, **change: Any) -> dict[str, Any]:
    out = copy.deepcopy(DATA)
    del out["task"]["inputs"]
    out["task"] |= OTHERS[kind] | change
    return out


def refusal(data: dict[str, Any]) -> str:
    with pytest.raises(AccordError) as caught:
        accords.parse(data, "a.toml")
    assert "\n" not in str(caught.value), "one fault is one line"
    return str(caught.value)


@pytest.mark.parametrize("kind", ["table", "images", "text"])
def test_an_accord_of_own_data_can_be_written_out_in_full_and_read_again(kind: str) -> None:
    made = accords.parse(DATA if kind == "table" else of_kind(kind))
    again = accords.parse(made.model_dump(mode="json"))
    assert again.digest == made.digest and again == made
    assert made.task.name == "wards"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("inputs.age", {"kind": "number", "min": 18.0, "max": 110, "log": False, "missing": True}),
        ("inputs.smoker", {"kind": "category", "values": ["no", "yes"]}),
        ("attributes", {"sex": {"values": ["female", "male"]}}),
        ("attributes.sex", {"column": "sex", "values": ["female", "male"]}),
        ("test_share", 0.25),
        ("missing_values", ["", "NA", "NaN", "nan", "null"]),
    ],
)
def test_the_short_and_the_long_form_have_one_digest(path: str, value: Any) -> None:
    assert accords.parse(edited(path, value)).digest == accords.parse(DATA).digest


def test_whole_numbers_may_be_declared_with_or_without_quotes() -> None:
    bare, quoted = (edited("inputs.smoker.values", values) for values in ([0, 1], ["0", "1"]))
    assert accords.parse(bare).digest == accords.parse(quoted).digest


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("name", "heart", "name is a task that FedAccord knows, kind is for data of your own"),
        ("kind", "sheet", 'task.kind = "sheet" must be one of table, images, text. Change it.'),
        ("kind", 3, "task.kind = 3 must be one of"),
        ("kind", None, "task.kind is missing: one of table, images, text, for data of your own."),
        ("dataset", None, 'key "task.dataset" is missing.'),
        ("dataset", "../heart", 'task.dataset = "../heart" must be lower-case letters'),
        ("inputz", 1, 'key "task.inputz" is not known. Did you mean "inputs"? Known here: dataset'),
        ("inputs.age.maxx", 1, 'key "task.inputs.age.maxx" is not known. Did you mean "max"?'),
        ("inputs.age.min", "low", 'task.inputs.age.min = "low" must be a number.'),
        ("inputs.age.min", 110, "min = 110 must be below max = 110. Change one."),
        ("inputs.age.max", None, "a number has min and max, and no values. Declare them."),
        ("inputs.age.values", ["a"], "a category has values, and no min, max or log. Mend it."),
        ("inputs.age.log", True, ""),
        ("inputs", {}, "task.inputs = {} must not be empty. Fill it in."),
        ("inputs.smoker.values", [], "task.inputs.smoker.values = [] must not be empty."),
        ("inputs.smoker.values", ["a", "a"], '["a", "a"] names one twice. Name each once.'),
        ("inputs.smoker.values", [1, "1"], '["1", "1"] names one twice. Name each once.'),
        ("inputs.smoker.values", [" a"], '[" a"] has spaces around a value. Remove them.'),
        ("inputs.again", {"min": 0, "max": 1}, 'column "again" is an input and also the subject'),
        ("file", "wards.csv", "either task.file has {site} in it, or task.site_column names"),
        ("site_column", "ward", "either task.file has {site} in it, or task.site_column names"),
        ("file", "{site}.xlsx", 'the file "{site}.xlsx" must end in .csv or .parquet. Convert it.'),
        ("file", "{sites}.csv", "may hold {site} alone. Rename it."),
        ("delimiter", "::", 'task.delimiter = "::" must be '),
        ("label.classes", ["yes"], "task.label.classes"),
        ("label.values", ["0"], 'names 2, and column "again" has 1 values. Name each.'),
        ("label.bands", [1, 2], 'names 2, and column "again" has 3 bands. Name each.'),
        ("label.bands", [2, 1], "bands = [2.0, 1.0] must rise. Put them in order, each once."),
        ("attributes", {}, "task.attributes = {} must not be empty. Fill it in."),
        ("attributes.sex", {}, 'attribute "sex" needs values or bands. Declare them.'),
        ("attributes.sex", "sex", 'task.attributes.sex = "sex" must be a table.'),
        ("attributes.sex", {"values": ["f"], "bands": [1]}, "has both values and bands."),
        ("attributes.sex", {"values": ["f", "m"], "missing": "m"}, "names one twice. Rename it."),
        ("split", "again", 'of ["again", "again"] two are one column. Give each its own.'),
        ("test_share", 1.0, "task.test_share = 1.0 must be less than 1. Lower it."),
        ("public_file", "open.csv", "public_file and public_sha256 go together"),
        ("public_sha256", "12", "public_sha256 = \"12\" must be a SHA-256: 64 characters"),
        ("outside", "drop", 'task.outside = "drop" must be "refuse" or "clip".'),
    ],
)  # fmt: skip
def test_each_fault_of_a_table_is_one_sentence(path: str, value: Any, said: str) -> None:
    if not said:
        assert accords.parse(edited(path, value)).task.name == "wards"
        return
    words = refusal(edited(path, value))
    assert words.startswith("a.toml: ") and said in words


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (edited("inputs.age", {"min": 0, "max": 1, "log": True}), "log needs min = 0 to be above"),
        (edited("split", "split") | {}, ""),
        (of_kind("images", size=[8]), "task.size"),
        (of_kind("images", size=[8, 0]), "must be at least 1. Raise it."),
        (of_kind("images", channels=2), "task.channels = 2 must be 1 or 3."),
        (of_kind("images", inputs={}), 'key "task.inputs" is not known.'),
        (of_kind("images", path="again"), 'column "again" is an input and also the subject'),
        (of_kind("text", length=1), "task.length = 1 must be at least 2. Raise it."),
        (of_kind("text", tokenizer="minilm"), "task.sha256, of its tokenizer.json, goes with"),
        (of_kind("text", sha256="0" * 64), 'goes with every tokenizer but "words"'),
        (
            of_kind("text", tokenizer="minilm", sha256="0" * 64, vocabulary=100),
            'task.vocabulary = 100 belongs to the tokenizer "words"',
        ),
        (of_kind("text", tokenizer="../x", sha256="0" * 64), "may not be absolute or hold .."),
    ],
)
def test_each_fault_of_the_other_kinds_is_one_sentence(data: dict[str, Any], said: str) -> None:
    if not said:
        assert accords.parse(data).task.name == "wards"
        return
    assert said in refusal(data)


def test_a_split_column_leaves_no_share_to_draw() -> None:
    data = edited("split", "split")
    data["task"]["test_share"] = 0.5
    assert "task.test_share = 0.5 has no meaning beside task.split" in refusal(data)


@pytest.mark.parametrize("kind", ["table", "images", "text"])
def test_every_key_of_own_data_has_a_meaning_on_the_report(kind: str) -> None:
    made: Accord = accords.parse(DATA if kind == "table" else of_kind(kind))
    rows = [row for row in agreed.rows(made) if row["key"].startswith("task.")]
    assert len(rows) > 10
    assert [row["key"] for row in rows if not row["meaning"]] == []


def test_columns_may_be_called_like_keys_of_the_accord() -> None:
    names = ("sites", "options", "name", "kind", "min")
    data = edited("inputs", {name: {"min": 0, "max": 1} for name in names})
    keys = [row["key"] for row in agreed.rows(accords.parse(data))]
    assert {f"task.inputs.{name}.max" for name in names} <= set(keys)
