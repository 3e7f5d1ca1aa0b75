"""One's own texts: tokens of a public vocabulary, cut at a length, filled with 0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wards import own_accord

from fedaccord.accord_task import TextSection
from fedaccord.errors import AccordError
from fedaccord.evidence import sha256
from fedaccord.tasks import Task, task_of
from fedaccord.texts import TextInputs

TASK: dict[str, Any] = {
    "kind": "text",
    "dataset": "notes",
    "file": "{site}.csv",
    "text": "note",
    "length": 6,
    "label": {"column": "label", "classes": ["no", "yes"]},
    "attributes": {"sex": ["female", "male"]},
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "patient", "is", "well", "ill", "."]


def task(folder: Path, **change: Any) -> Task:
    return task_of(own_accord(TASK | change), folder)


def tokens(folder: Path, *notes: str, **change: Any) -> tuple[np.ndarray, list[str]]:
    """Tokens of each text in order, and what was left out."""
    rows = {"note": notes, "label": "no", "sex": "male", "split": "train"}
    pd.DataFrame(rows).to_parquet(folder / "north.parquet")
    change = {"file": "{site}.parquet", "split": "split"} | change
    loaded = task(folder, **change).load("north")  # type: ignore[attr-defined]
    return loaded.data.train.inputs, [str(fault) for fault in loaded.found]


def words(vocabulary: int = 64, length: int = 6) -> TextInputs:
    section = TextSection.model_validate(TASK | {"vocabulary": vocabulary, "length": length})
    return TextInputs(section, Path())


@settings(deadline=None)
@given(st.text(max_size=60), st.integers(16, 200), st.integers(2, 12))
def test_any_text_gives_tokens_below_the_vocabulary_and_then_zeros(
    text: str, vocabulary: int, length: int
) -> None:
    found, why = words(vocabulary, length).encode({"note": [text]}, Path())
    assert found.shape == (1, length) and found.dtype == np.int64
    held = found[0] > 0
    assert found.min() >= 0 and found.max() < vocabulary
    assert (np.diff(held.astype(int)) <= 0).all()  # once filled, filled to the end
    assert held.any() == (why["note"] == [""])


def test_a_word_has_one_token_whatever_its_case_and_its_neighbours(tmp_path: Path) -> None:
    found, _ = tokens(tmp_path, "Fever, no cough", "no FEVER", "fever " * 9)
    fever = found[0, 0]
    assert found[1, 1] == fever and (found[2] == fever).all()
    assert found[0, 2] == found[1, 0]  # no
    assert len(set(found[0].tolist())) == 5  # fever , no cough and 0


def test_tokens_are_those_of_any_machine(tmp_path: Path) -> None:
    hashed = 0xE60E3814AF510099  # printf fever | b2sum -l 64
    assert tokens(tmp_path, "fever")[0][0, 0] == 1 + hashed % (8192 - 1)


def test_a_missing_or_empty_text_is_left_out_alone(tmp_path: Path) -> None:
    found, left_out = tokens(tmp_path, "well", "", "NA", " \t ", "ill")
    assert len(found) == 2
    assert [line.split(": ", 1)[1] for line in left_out] == [
        'row 2, column "note": is missing',
        'row 3, column "note": is missing',
        'row 4, column "note": is missing',
    ]


def test_line_breaks_are_kept_in_parquet_and_leave_a_csv_record_out(tmp_path: Path) -> None:
    found, left_out = tokens(tmp_path, "well\nand home", 'said "well"')
    assert (found[0] > 0).sum() == 3 and not left_out
    (tmp_path / "north.csv").write_text(
        'note,label,sex\n"well\nand home",no,male\n"said ""ill"", twice",no,male\n'
    )
    loaded = task(tmp_path).load("north")  # type: ignore[attr-defined]
    assert len(loaded.data.train) + len(loaded.data.test) == 1
    assert [fault.row for fault in loaded.found] == [2, 3]


def test_made_up_texts_have_every_length_and_keep_to_the_vocabulary(tmp_path: Path) -> None:
    drawn = task(tmp_path, vocabulary=40).public(400, 0)
    assert drawn.shape == (400, 6) and drawn.dtype == np.int64
    assert set((drawn > 0).sum(axis=1).tolist()) == {1, 2, 3, 4, 5, 6}
    assert drawn.min() == 0 and drawn.max() == 39
    assert (np.diff((drawn > 0).astype(int), axis=1) <= 0).all()


def saved(folder: Path, vocabulary: list[str] = WORDS) -> str:
    """A small tokenizer of the BERT family, as Hugging Face saves one; its SHA-256."""
    ids = {word: at for at, word in enumerate(vocabulary)}
    pieces = [
        {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
    ]
    special = {w: {"id": w, "ids": [ids[w]], "tokens": [w]} for w in ("[CLS]", "[SEP]")}
    text = json.dumps(
        {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": {"type": "Lowercase"},
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": pieces,
                "pair": pieces,
                "special_tokens": special,
            },
            "model": {
                "type": "WordPiece",
                "unk_token": "[UNK]",
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100,
                "vocab": ids,
            },
        }
    )
    (folder / "bert").mkdir()
    (folder / "bert" / "tokenizer.json").write_text(text)
    return sha256(text)


def test_a_tokenizer_of_hugging_faces_is_read_from_its_one_file(tmp_path: Path) -> None:
    named = {"tokenizer": "bert", "sha256": saved(tmp_path)}
    found, left_out = tokens(tmp_path, "The patient is well.", "ill", "\N{SNOWMAN}", " ", **named)
    assert found.tolist() == [[2, 4, 5, 6, 7, 3], [2, 8, 3, 0, 0, 0], [2, 1, 3, 0, 0, 0]]
    assert len(left_out) == 1
    made = task(tmp_path, **named)
    assert made.spec.vocabulary == len(WORDS) and made.spec.shape == (6,)
    drawn = made.public(50, 0)
    assert (drawn[:, 0] == 2).all() and all(3 in row[1:] for row in drawn)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sha256": "0" * 64}, r"task\.sha256 = 000000000000\.\.\. is not that of the tokenizer"),
        ({"tokenizer": "berd"}, r'task\.tokenizer = "berd": there is no berd/tokenizer\.json'),
        ({"length": 2}, r"task\.length = 2 leaves no room beside the 2 tokens"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_one_line(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(AccordError, match=said) as caught:
        task(tmp_path, **{"tokenizer": "bert", "sha256": saved(tmp_path)} | change)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_fills_with_another_token_than_0_is_refused(tmp_path: Path) -> None:
    digest = saved(tmp_path, ["[CLS]", "[PAD]", "[UNK]", "[SEP]"])
    with pytest.raises(AccordError, match=r'its token 0 is "\[CLS\]"'):
        task(tmp_path, tokenizer="bert", sha256=digest)


def test_a_tokenizer_that_was_not_fetched_says_how_to_fetch_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDACCORD_DATA", str(tmp_path / "empty"))
    with pytest.raises(AccordError, match=r"fedaccord data fetch minilm"):
        task(tmp_path, tokenizer="minilm", sha256="0" * 64)
