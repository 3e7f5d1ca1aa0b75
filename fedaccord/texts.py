"""A user's own texts as inputs: tokens of a public vocabulary, never one made from the records."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from fedaccord.accord_task import TextSection
from fedaccord.errors import AccordError, TaskError
from fedaccord.evidence import sha256
from fedaccord.own_columns import Unusable, each, is_missing
from fedaccord.own_files import Cell
from fedaccord.tasks import Inputs

_WORD = re.compile(r"\w+|[^\w\s]")
Cut = Callable[[str, int], list[int]]  # (text, most tokens) -> tokens, none of them 0


class TextInputs:
    """How a text becomes int64 tokens (length,): cut at `length`, filled with 0.

    | text | becomes |
    |---|---|
    | of any length | its first tokens, up to `length` |
    | missing, or with no token in it | the record is left out |
    """

    features: tuple[str, ...] = ("tokens",)

    def __init__(self, section: TextSection, home: Path) -> None:
        """Make the tokenizer ready.

        Raises:
            AccordError: a tokenizer that is not there, is not the declared one, or has another
                token than padding at 0.
        """
        self._section = section
        self.shape: tuple[int, ...] = (section.length,)
        if section.tokenizer == "words":
            self._cut, self.vocabulary = _words(section.vocabulary), section.vocabulary
            self._frame: list[int] = []
        else:
            self._cut, self.vocabulary = _hugging_face(
                _file(section.tokenizer, home), section.sha256 or ""
            )
            self._frame = self._cut("", section.length)  # what it sets around every text
        if section.length <= len(self._frame):
            raise AccordError(
                f"task.length = {section.length} leaves no room beside the {len(self._frame)} "
                "tokens that the tokenizer sets around a text. Raise it."
            )

    def encode(
        self, columns: Mapping[str, Sequence[Cell]], folder: Path
    ) -> tuple[Inputs, dict[str, list[str]]]:
        """Cut texts into tokens (n, length), and say for each "" or why not."""
        column, length = self._section.text, self._section.length
        nothing: tuple[int, ...] = ()
        found, why = each(columns[column], self._read, nothing)
        tokens = np.zeros((len(found), length), np.int64)
        for row, here in enumerate(found):
            tokens[row, : len(here)] = here
        return tokens, {column: why}

    def _read(self, cell: Cell) -> tuple[int, ...]:
        if cell is None or is_missing(cell, self._section.missing_values):
            raise Unusable("is missing")
        tokens = self._cut(cell, self._section.length)
        if len(tokens) <= len(self._frame):
            raise Unusable("has no word in it")
        return tuple(tokens)

    def draw(self, rows: int, rng: np.random.Generator) -> Inputs:
        """Make up texts (rows, length): any tokens, of any length."""
        length, frame = self._section.length, self._frame
        first, last = frame[: len(frame) // 2 + len(frame) % 2], frame[(len(frame) + 1) // 2 :]
        room = max(1, length - len(frame))
        out = np.zeros((rows, length), np.int64)
        for row in out:
            count = int(rng.integers(1, room + 1))
            body = rng.integers(1, self.vocabulary, size=count).tolist()
            made = [*first, *body, *last][:length]
            row[: len(made)] = made
        return out


def _words(vocabulary: int) -> Cut:
    """Cut at words and signs; a word's token is a hash of its lower-case letters (1 and above)."""

    @lru_cache(maxsize=2**16)
    def token(word: str) -> int:
        hashed = hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest()
        return 1 + int.from_bytes(hashed) % (vocabulary - 1)

    def cut(text: str, most: int) -> list[int]:
        tokens = []
        for found in _WORD.finditer(text.lower()):
            tokens.append(token(found[0]))
            if len(tokens) == most:
                break
        return tokens

    return cut


def _file(name: str, home: Path) -> Path:
    """Find a tokenizer.json: in a folder beside the accord, else of what was fetched."""
    beside = home / name / "tokenizer.json"
    if beside.is_file():
        return beside
    from fedaccord import data

    if name in {item.name for item in data.items()}:
        try:
            return data.path(name) / "tokenizer.json"
        except TaskError as fault:
            raise AccordError(f"task.tokenizer: {fault}") from None
    raise AccordError(
        f'task.tokenizer = "{name}": there is no {name}/tokenizer.json beside the accord, and it '
        'is no name of `fedaccord data list`. Put it there, or use "words".'
    )


def _hugging_face(path: Path, wanted: str) -> tuple[Cut, int]:
    """Read a tokenizer of Hugging Face's from its one file, which runs no code of its own."""
    from transformers import PreTrainedTokenizerFast

    try:
        text = path.read_bytes()
    except OSError as fault:
        raise AccordError(f"task.tokenizer: {path}: {fault.strerror}. Put it there.") from None
    if sha256(text) != wanted:
        raise AccordError(
            f"task.sha256 = {wanted[:12]}... is not that of the tokenizer's tokenizer.json, "
            f"{sha256(text)}. Restore the file, or declare its own."
        )
    made = PreTrainedTokenizerFast(tokenizer_file=str(path))  # type: ignore[no-untyped-call]
    zero = str(made.convert_ids_to_tokens(0))
    if "pad" not in zero.lower():
        raise AccordError(
            f'task.tokenizer: its token 0 is "{zero}", not one that fills empty places. '
            "Choose a tokenizer of the BERT family."
        )

    def cut(sentence: str, most: int) -> list[int]:
        found = made(sentence, truncation=True, max_length=most, padding=False)["input_ids"]
        return [int(token) for token in found]

    return cut, len(made)
