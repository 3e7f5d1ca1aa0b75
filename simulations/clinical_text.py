"""The task `clinical-text`: is the person in a sentence of a biomedical paper a patient?

Sentences are BUG's (Levy et al. 2021), from PubMed abstracts and papers on COVID-19; the word for
the person is masked, and the model says whether it was "patient". The sensitive attribute is the
gender of the pronoun that refers to the person. It is a constructed task on published sentences and
no diagnosis. The two journals are simulated; the papers on COVID-19 are a corpus of their own.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from fedaccord import data
from fedaccord.errors import TaskError
from fedaccord.evidence import digest, sha256, write_atomic
from fedaccord.tasks import Records, SiteData, TaskSpec

SITES = ("covid19", "journal-a", "journal-b")
GROUPS = ("female", "male")
VOCABULARY = 30_522  # of MiniLM's tokenizer; 0 fills places that hold no token
MASK = "[MASK]"  # the tokenizer's own mask token
TEST_SHARE = 5  # one sentence in five of a site is held out
PUBLIC_ROWS = 8192  # sentences of the public set
SALT = 0xC11
Columns = dict[str, npt.NDArray[np.int64]]
COLUMNS = ("tokens", "labels", "gender", "subjects")  # of a site, row by row
VERSION = 1  # of how sentences become tokens: part of the name of what is kept of them


@dataclass(frozen=True)
class Sentence:
    """One sentence of a site or of the public set.

    Attributes:
        text: its words with the person's masked, joined by spaces.
        label: 1 where the masked word was "patient".
        gender: of the pronoun, index of GROUPS.
        subject: a number of 62 bits from the SHA-256 of the sentence as published.
    """

    text: str
    label: int
    gender: int
    subject: int


def masked(row: Mapping[str, str], mask_pronoun: bool = False) -> str:
    """Put a sentence together with the word for the person masked.

    Args:
        row: of BUG, by column: `tokens` (a list, as Python writes it), `profession_first_index` and
            `g_first_index`.
        mask_pronoun: whether the pronoun is masked too.

    Raises:
        TaskError: a row that is no such sentence.
    """
    try:
        words = ast.literal_eval(row["tokens"])
        places = [int(row["profession_first_index"])]
        places += [int(row["g_first_index"])] if mask_pronoun else []
        for place in places:
            if not 0 <= place < len(words):
                raise IndexError(f"word {place} of {len(words)}")
            words[place] = MASK
        return " ".join(words)
    except (ValueError, SyntaxError, TypeError, IndexError, KeyError) as fault:
        raise TaskError(
            f"clinical-text: row {row.get('data_index', '?')} is not a sentence of BUG: {fault}. "
            "Fetch the data again: fedaccord data fetch clinical-text."
        ) from None


def place_of(row: Mapping[str, str]) -> str:
    """Name the site of a row, or "public" (Wikipedia), by its corpus and text alone."""
    if row["corpus"] == "wikipedia":
        return "public"
    if row["corpus"] == "covid19":
        return "covid19"
    return SITES[1 + int(sha256(f"clinical-text/{row['sentence_text']}")[:8], 16) % 2]


def divide(
    rows: Iterable[Mapping[str, str]], mask_pronoun: bool = False
) -> dict[str, list[Sentence]]:
    """Give every sentence to one site or to the public set, in an order fixed by its text alone.

    A sentence that stands more than once in the source is taken once, by the first of covid19,
    pubmed, wikipedia, so that none is at two sites, in two splits, or both private and public.

    Args:
        rows: of BUG, by column.
        mask_pronoun: whether pronouns are masked.
    """
    order = {"covid19": 0, "pubmed": 1, "wikipedia": 2}
    out: dict[str, list[Sentence]] = {name: [] for name in (*SITES, "public")}
    keyed = [(sha256(f"clinical-text/order/{row['sentence_text']}"), row) for row in rows]
    keyed.sort(key=lambda pair: (order[pair[1]["corpus"]], pair[0], pair[1]["data_index"]))
    seen: set[str] = set()
    for key, row in keyed:
        where = place_of(row)
        if key in seen or (where == "public" and len(out[where]) == PUBLIC_ROWS):
            continue
        seen.add(key)
        sentence = Sentence(
            text=masked(row, mask_pronoun),
            label=int(row["profession"].lower() == "patient"),
            gender=GROUPS.index(row["predicted gender"]),
            subject=int(key, 16) >> 194,
        )
        out[where].append(sentence)
    return out


def tokens_of(texts: list[str], folder: Path, length: int) -> npt.NDArray[np.int64]:
    """Turn texts into tokens with the tokenizer of a folder: (n, length), cut or filled with 0.

    Raises:
        TaskError: a tokenizer with another vocabulary.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if len(tokenizer) != VOCABULARY or tokenizer.pad_token_id or tokenizer.mask_token != MASK:
        raise TaskError(
            f"clinical-text: the tokenizer in {folder} has {len(tokenizer)} tokens, not "
            f"{VOCABULARY}. Fetch it again: fedaccord data fetch minilm."
        )
    if not texts:
        return np.zeros((0, length), np.int64)
    made = tokenizer(texts, truncation=True, max_length=length, padding="max_length")
    return np.array(made["input_ids"], np.int64)


@cache
def _tokenised(length: int, mask_pronoun: bool) -> dict[str, Columns]:
    """Read every site's sentences and the public ones as tokens; kept beside the data."""
    source, tokenizer = data.read("clinical-text"), data.read("minilm", "tokenizer.json")
    folder = data.path("minilm")
    made_from = [VERSION, length, mask_pronoun, sha256(source), sha256(tokenizer)]
    kept = data.path("clinical-text").with_name(f"tokens-{digest(made_from)[:24]}.safetensors")
    found = _kept(kept)
    if found is not None:
        return found
    rows = csv.DictReader(io.StringIO(source.decode("utf-8"), newline=""))
    out = {
        name: {
            "tokens": tokens_of([s.text for s in sentences], folder, length),
            "labels": np.array([s.label for s in sentences], np.int64),
            "gender": np.array([s.gender for s in sentences], np.int64),
            "subjects": np.array([s.subject for s in sentences], np.int64),
        }
        for name, sentences in divide(rows, mask_pronoun).items()
    }
    _keep(kept, out)
    return out


def _kept(file: Path) -> dict[str, Columns] | None:
    """Read what an earlier run kept; None where there is nothing, or it is damaged."""
    try:
        arrays = safetensors.load(file.read_bytes())
        return {
            name: {column: arrays[f"{name}/{column}"].astype(np.int64) for column in COLUMNS}
            for name in (*SITES, "public")
        }
    except (OSError, KeyError, SafetensorError):
        return None


def _keep(file: Path, made: Mapping[str, Columns]) -> None:
    """Keep tokens for the next run; a folder that cannot be written costs that run a minute."""
    arrays = {f"{name}/{column}": made[name][column] for name in made for column in COLUMNS}
    arrays |= {name: part.astype(np.uint16) for name, part in arrays.items() if "tokens" in name}
    with contextlib.suppress(OSError):
        # It writes an array as it lies in memory, which for a transposed one is wrong.
        ordered = {name: np.ascontiguousarray(part) for name, part in arrays.items()}
        write_atomic(file, safetensors.save(ordered))


def _records(part: Columns, rows: slice) -> Records:
    return Records(
        inputs=part["tokens"][rows],
        labels=part["labels"][rows],
        subjects=part["subjects"][rows],
        groups={"gender": part["gender"][rows]},
    )


class ClinicalText:
    """Papers on COVID-19 and two simulated journals; the label is whether the person is a patient.

    Each sentence is taken for a subject of its own. The source does not say which paper a sentence
    is from or who wrote it, so epsilon covers a sentence and not a paper, an author, or a person
    that several sentences speak of.

    Citation: Levy, Lazar and Stanovsky, Collecting a Large-Scale Gender Bias Dataset for
    Coreference Resolution and Machine Translation, Findings of EMNLP 2021, MIT licence.
    """

    sites = SITES
    needs = ("clinical-text", "minilm")

    def __init__(
        self,
        sentences: int = 10_000,
        held_out: int = 500,
        tokens: int = 48,
        mask_pronoun: bool = False,
    ) -> None:
        """Declare the task; nothing is read.

        Args:
            sentences: a site trains on at most, 10 to 100,000.
            held_out: sentences that a site evaluates on at most, 10 to 100,000.
            tokens: of a sentence, 8 to 512; longer ones are cut.
            mask_pronoun: whether the pronoun is masked too, so that its gender is not an input.

        Raises:
            ValueError: an option out of its bounds.
        """
        for name, value, low, high in (
            ("sentences", sentences, 10, 100_000),
            ("held_out", held_out, 10, 100_000),
            ("tokens", tokens, 8, 512),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name} = {value} is not a whole number from {low} to {high}")
        if not isinstance(mask_pronoun, bool):
            raise ValueError(f"mask_pronoun = {mask_pronoun} is neither true nor false")
        self._sentences, self._held_out = sentences, held_out
        self._tokens, self._mask = tokens, mask_pronoun
        self.spec = TaskSpec(
            name="clinical-text",
            features=tuple(f"token {place}" for place in range(1, tokens + 1)),
            classes=("another person", "patient"),
            attributes={"gender": GROUPS},
            source=(
                "BUG (Levy, Lazar and Stanovsky, Findings of EMNLP 2021), MIT licence: sentences "
                "of PubMed abstracts and of papers on COVID-19; public set: of Wikipedia. The two "
                "journals are simulated. Gender is the pronoun's. A sentence is a subject: papers "
                "and people are not named. Tokenizer: all-MiniLM-L6-v2, Apache-2.0."
            ),
            shape=(tokens,),
            vocabulary=VOCABULARY,
        )

    def site(self, name: str) -> SiteData:
        """Read a site's sentences: four in five to train on, one in five to evaluate on.

        Site and split are fixed by corpus and SHA-256 of the sentence alone.

        Raises:
            TaskError: an unknown site, or data that is not on this machine.
        """
        if name not in SITES:
            known = ", ".join(SITES)
            raise TaskError(f'clinical-text: site "{name}" is not one of {known}. Rename it.')
        part = _tokenised(self._tokens, self._mask)[name]
        cut = len(part["labels"]) // TEST_SHARE
        return SiteData(
            train=_records(part, slice(cut, cut + self._sentences)),
            test=_records(part, slice(0, min(cut, self._held_out))),
        )

    def public(self, rows: int, seed: int) -> npt.NDArray[np.int64]:
        """Draw proxy sentences of Wikipedia, persons masked, with repetition."""
        tokens = _tokenised(self._tokens, self._mask)["public"]["tokens"]
        places = np.random.default_rng([seed, SALT]).random(rows) * len(tokens)
        return tokens[places.astype(np.int64)]
