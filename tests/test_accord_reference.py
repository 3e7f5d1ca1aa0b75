"""heart.toml is the reference of all keys: each is there, explained, with the code's default."""

from __future__ import annotations

import copy
import re
import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import PydanticUndefined

from fedaccord import accord as accords
from fedaccord.accord import Accord

TEXT = accords.bundled()["heart"].read_text(encoding="utf-8")
DATA = tomllib.loads(TEXT)


def field(path: str) -> Any:
    """The pydantic field at a dotted path; a number stands for a list's place."""
    model: Any = Accord
    *tables, key = [part for part in path.split(".") if not part.isdigit()]
    for table in tables:
        annotation = model.model_fields[table].annotation
        inner = [annotation, *getattr(annotation, "__args__", ())]
        model = next(t for t in inner if isinstance(t, type) and issubclass(t, BaseModel))
    return model.model_fields[key]


def table(data: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """The table that a key stands in, and its own name."""
    *tables, key = path.split(".")
    for name in tables:
        data = data.setdefault(name, {})
    return data, key


def documented() -> dict[str, str]:
    """Each key of heart.toml by its path, commented-out ones too, with the comment beside it."""
    out: dict[str, str] = {}
    table, block = "", ""
    for line in TEXT.splitlines():
        header = re.match(r"\[+([a-z]+)\]+\s*(?:# (.*))?$", line)
        key = re.match(r"(?:# )?([a-z_0-9]+) = (.+?)(?:\s+# (.*))?$", line)
        if header:
            table, block = header[1], block + (header[2] or "")
        elif key:
            path = f"{table}.{key[1]}" if table else key[1]
            # The roster's keys are explained once, above its first table.
            out.setdefault(path, key[3] or (block if table == "sites" else ""))
        block = block + line if line.startswith("#") and not key else ("" if not line else block)
    return out


def keys(model: type[BaseModel], path: str = "") -> list[str]:
    out = []
    for name, info in model.model_fields.items():
        inner = [info.annotation, *getattr(info.annotation, "__args__", ())]
        below = [t for t in inner if isinstance(t, type) and issubclass(t, BaseModel)]
        here = f"{path}.{name}" if path else name
        out += keys(below[0], here) if below else [here]
    return out


def test_the_heart_accord_has_every_key_there_is_and_no_other() -> None:
    assert sorted(documented()) == sorted(keys(Accord))


@pytest.mark.parametrize("path", keys(Accord))
def test_every_key_is_explained_by_a_comment(path: str) -> None:
    comment = documented()[path]
    assert comment.strip() != ""
    if path.startswith("sites."):
        assert "roster" in comment


@pytest.mark.parametrize("path", keys(Accord))
def test_a_comment_says_the_default_that_the_code_has(path: str) -> None:
    default = field(path).default
    said = re.search(r"\(default(?:: | )?(.*?)\)", documented()[path])
    if default is PydanticUndefined:
        assert said is None, "a default is documented, and the key is required"
        return
    if path in ("privacy.target_epsilon", "privacy.noise_multiplier"):
        assert default is None  # one of the two must be given; the comments say so
        assert "target_epsilon" in documented()["privacy.noise_multiplier"]
        assert "noise_multiplier" in documented()["privacy.target_epsilon"]
        return
    assert said is not None, "the code has a default, and the comment does not say it"
    if default in (None, {}):
        assert said[1] == "none" or said[1].startswith("all ")
    elif said[1] == "":  # "(default)": what stands on the line
        here, key = table(DATA, path)
        assert default == here[key]
    else:
        assert tomllib.loads(f"value = {said[1]}")["value"] == default


NOISE = ("privacy.target_epsilon", "privacy.noise_multiplier")  # one of them must be there
OPTIONAL = [
    path
    for path in keys(Accord)
    if field(path).default is not PydanticUndefined
    and path not in NOISE
    and not path.startswith("sites.")  # a list of tables; tests/test_accord.py has its default
]


@given(st.sets(st.sampled_from(OPTIONAL)))
def test_a_default_that_is_left_out_has_the_digest_of_one_that_is_written(gone: set[str]) -> None:
    written, left_out = copy.deepcopy(DATA), copy.deepcopy(DATA)
    for path in OPTIONAL:
        for data in (written, left_out):
            here, key = table(data, path)
            here.pop(key, None)
            if field(path).default is not None and (data is written or path not in gone):
                here[key] = field(path).default
    assert accords.parse(left_out).digest == accords.parse(written).digest
    assert accords.parse(written).digest != accords.parse(DATA).digest
