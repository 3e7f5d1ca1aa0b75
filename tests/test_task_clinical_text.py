"""The task `clinical-text`: masking, division and tokens, of hand-made rows; counts of the real."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedaccord import accord as accords
from fedaccord.data_items import ITEMS
from fedaccord.errors import AccordError, TaskError
from fedaccord.simulations import clinical_text
from fedaccord.tasks import check_fits, load_task

COLUMNS = (
    "sentence_text",
    "tokens",
    "profession",
    "profession_first_index",
    "g_first_index",
    "predicted gender",
    "corpus",
    "data_index",
)
WORDS = ["the", "patient", "said", "she", "saw", "a", "nurse"]


def row(number: int = 1, **change: str) -> dict[str, str]:
    made = {
        "sentence_text": f"The patient said she saw a nurse {number} .",
        "tokens": repr([*WORDS, str(number)]),
        "profession": "patient",
        "profession_first_index": "1",
        "g_first_index": "3",
        "predicted gender": "female",
        "corpus": "pubmed",
        "data_index": str(number),
    }
    return made | change


# --- sentences ----------------------------------------------------------------------------------


def test_the_word_for_the_person_is_masked_and_no_other() -> None:
    assert clinical_text.masked(row()) == "the [MASK] said she saw a nurse 1"
    nurse = row(profession="nurse", profession_first_index="6")
    assert clinical_text.masked(nurse) == "the patient said she saw a [MASK] 1"


def test_the_pronoun_is_masked_too_where_that_is_asked_for() -> None:
    assert clinical_text.masked(row(), True) == "the [MASK] said [MASK] saw a nurse 1"


@pytest.mark.parametrize(
    "change",
    [
        {"profession_first_index": "8"},
        {"profession_first_index": "-1"},
        {"profession_first_index": "one"},
        {"tokens": "['the', "},
        {"tokens": "__import__('os').getcwd()"},
        {"tokens": "5"},
        {"tokens": "[1, 2]"},
    ],
)
def test_a_row_that_is_no_sentence_is_named_in_one_line(change: dict[str, str]) -> None:
    with pytest.raises(TaskError, match=r"^clinical-text: row 7 is not a sentence of BUG: .*fetch"):
        clinical_text.masked(row(7, **change))


@pytest.mark.parametrize(
    ("noun", "label"), [("patient", 1), ("Patient", 1), ("PATIENT", 1), ("nurse", 0)]
)
def test_the_label_is_whether_the_noun_is_patient_in_any_case(noun: str, label: int) -> None:
    found = clinical_text.divide([row(profession=noun, corpus="covid19")])
    assert [s.label for s in found["covid19"]] == [label]
    assert [s.gender for s in found["covid19"]] == [0]


ROWS = [
    row(number, corpus=("pubmed", "covid19", "wikipedia")[number % 3])
    | {"predicted gender": ("female", "male")[number % 2]}
    for number in range(300)
]


def test_corpora_go_to_their_sites_and_wikipedia_is_public() -> None:
    found = clinical_text.divide(ROWS)
    assert {name: len(sentences) for name, sentences in found.items()} | {
        "journal-a": 0,
        "journal-b": 0,
    } == {"covid19": 100, "journal-a": 0, "journal-b": 0, "public": 100}
    assert len(found["journal-a"]) + len(found["journal-b"]) == 100
    # Binomial (100, 1/2): five standard deviations are 25.
    assert 25 < len(found["journal-a"]) < 75


def test_a_sentence_that_stands_twice_is_taken_once_and_is_private_first() -> None:
    for first, second, where in (
        ("pubmed", "covid19", "covid19"),
        ("wikipedia", "covid19", "covid19"),
        ("wikipedia", "pubmed", "journal-"),
        ("pubmed", "pubmed", "journal-"),
    ):
        found = clinical_text.divide([row(corpus=first), row(corpus=second, data_index="2")])
        (name,) = [name for name, sentences in found.items() if sentences]
        assert name.startswith(where) and len(found[name]) == 1


@given(st.permutations(range(30)))
@settings(max_examples=25)
def test_the_division_depends_on_the_sentences_alone(order: list[int]) -> None:
    assert clinical_text.divide([ROWS[n] for n in order]) == clinical_text.divide(ROWS[:30])


def test_every_sentence_is_a_subject_of_its_own() -> None:
    found = clinical_text.divide(ROWS)
    subjects = [s.subject for sentences in found.values() for s in sentences]
    assert len(set(subjects)) == 300 and all(0 <= subject < 2**62 for subject in subjects)


# --- tokens -------------------------------------------------------------------------------------


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with 300 made-up sentences and a tokenizer of 30,522 words, declared as wanted."""
    from transformers import BertTokenizerFast

    monkeypatch.setenv("FEDACCORD_DATA", str(tmp_path))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *map(str, range(300))]
    words += [f"other{number}" for number in range(clinical_text.VOCABULARY - len(words))]
    vocabulary = {word: place for place, word in enumerate(words)}
    BertTokenizerFast(vocab=vocabulary).save_pretrained(tmp_path / "minilm")
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(ROWS)
    (tmp_path / "clinical-text").mkdir()
    (tmp_path / "clinical-text" / "full_BUG.csv").write_text(text.getvalue(), newline="")
    for name, file in (("clinical-text", "full_BUG.csv"), ("minilm", "tokenizer.json")):
        digest = hashlib.sha256((tmp_path / name / file).read_bytes()).hexdigest()
        monkeypatch.setitem(ITEMS, name, dataclasses.replace(ITEMS[name], files={file: digest}))
    # Two files, so that the item stays a folder.
    minilm = dict(ITEMS["minilm"].files) | {"tokenizer_config.json": ""}
    monkeypatch.setitem(ITEMS, "minilm", dataclasses.replace(ITEMS["minilm"], files=minilm))
    clinical_text._tokenised.cache_clear()
    yield tmp_path
    clinical_text._tokenised.cache_clear()


def test_tokens_are_cut_filled_with_0_kept_and_read_again(fetched: Path) -> None:
    task = load_task("clinical-text", {"tokens": 8, "sentences": 50, "held_out": 10})
    data = task.site("covid19")
    assert (len(data.train), len(data.test)) == (50, 10)
    assert data.train.inputs.shape == (50, 8) and data.train.inputs.dtype == np.int64
    assert data.train.inputs[0].tolist() == [2, 5, 4, 7, 8, 9, 10, 3]  # [CLS] the [MASK] .. [SEP]
    longer = load_task("clinical-text", {"tokens": 16}).public(4, 0)
    assert longer.shape == (4, 16) and (longer[:, 11:] == 0).all() and (longer[:, :10] > 0).all()
    assert set(data.train.subjects).isdisjoint(data.test.subjects)
    kept = sorted((fetched / "clinical-text").glob("tokens-*.safetensors"))
    assert len(kept) == 2  # one a length
    clinical_text._tokenised.cache_clear()
    again = task.site("covid19")
    assert (again.train.inputs == data.train.inputs).all()
    for file in kept:  # a damaged file is made anew
        file.write_bytes(file.read_bytes()[:100])
    clinical_text._tokenised.cache_clear()
    assert (task.site("covid19").test.inputs == data.test.inputs).all()
    assert sorted(file.stat().st_size > 100 for file in kept) == [
        False,
        True,
    ]  # that which was read


def test_the_proxy_set_is_wikipedias_and_the_same_for_the_same_seed(fetched: Path) -> None:
    task = load_task("clinical-text", {"tokens": 16})
    drawn = task.public(200, 5)
    assert (drawn[:50] == task.public(50, 5)).all() and (drawn != task.public(200, 6)).any()
    private = [p for name in task.sites for p in (task.site(name).train, task.site(name).test)]
    rows = {tokens.tobytes() for part in private for tokens in part.inputs}
    assert rows.isdisjoint(tokens.tobytes() for tokens in drawn)


def test_a_tokenizer_with_other_words_is_refused(
    fetched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clinical_text, "VOCABULARY", 30_523)
    with pytest.raises(TaskError, match=r"has 30522 tokens, not 30523.*fedaccord data fetch minil"):
        load_task("clinical-text").public(1, 0)


def test_sentences_that_were_not_fetched_are_said_to_be_missing_and_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDACCORD_DATA", str(tmp_path))
    clinical_text._tokenised.cache_clear()
    with pytest.raises(TaskError, match=r"on this machine: fedaccord data fetch clinical-text \(4"):
        load_task("clinical-text").site("covid19")


# --- the task -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"sentences": 9}, {"held_out": 1.5}, {"tokens": 513}, {"tokens": True}, {"mask_pronoun": 1}],
)
def test_an_option_out_of_its_bounds_is_one_line(options: dict[str, object]) -> None:
    name = next(iter(options))
    with pytest.raises(AccordError, match=rf'^task "clinical-text": {name} = .* is n'):
        load_task("clinical-text", options)


def test_an_unknown_site_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(TaskError, match=r'"lancet" is not one of covid19, journal-a, journal-b'):
        load_task("clinical-text").site("lancet")


def test_the_accord_fits_the_task_and_says_what_is_simulated() -> None:
    agreed = accords.load("clinical-text")
    task = load_task("clinical-text", agreed.task.options)
    check_fits(agreed, task)
    assert "simulated" in task.spec.source and "A sentence is a subject" in task.spec.source
    declared = ITEMS["minilm"].files["model.safetensors"]
    assert (agreed.model.pretrained, agreed.model.sha256) == ("minilm", declared)


@pytest.mark.soak  # fedaccord data fetch clinical-text minilm
def test_the_published_sentences_are_counted_as_in_the_source() -> None:
    task = load_task("clinical-text", {"sentences": 100_000, "held_out": 100_000})
    parts = {name: task.site(name) for name in task.sites}
    private = [part for data in parts.values() for part in (data.train, data.test)]
    # 22,787 of PubMed and 3,732 on COVID-19; two of them stand twice.
    assert sum(map(len, private)) == 22_787 + 3_732 - 2
    subjects = Counter(int(number) for part in private for number in part.subjects)
    assert max(subjects.values()) == 1
    assert len(parts["covid19"].train) + len(parts["covid19"].test) == 3_732
    share = np.mean(np.concatenate([part.labels for part in private]))
    assert 0.640 < share < 0.645  # 17,041 of 26,519
    for name, declared in accords.load("clinical-text").roster.items():
        assert abs(declared - len(parts[name].train)) <= 100
