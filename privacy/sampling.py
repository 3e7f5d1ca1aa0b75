"""Poisson sampling of subjects: each is in a step with a declared probability, one record each."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fedaccord.privacy.noise import Source

Indices = npt.NDArray[np.int64]


class SubjectSampler:
    """Draw subjects independently with a declared probability, and one record of each.

    One subject's presence changes a step by at most one record, however many records the subject
    has. The number of draws depends on the data, the probability does not.

    | data | a draw |
    |---|---|
    | no records | always empty |
    | nobody drawn | empty: the step is noise alone |
    | a subject with k records | each with probability sampling_prob / k |
    """

    def __init__(self, subjects: Indices, sampling_prob: float) -> None:
        """Index the records by subject.

        Args:
            subjects: int64 (n,), whose record each row is.
            sampling_prob: probability that a subject takes part in a step, in (0, 1].

        Raises:
            ValueError: subjects that are no column of whole numbers; one row could be drawn twice.
        """
        if subjects.ndim != 1 or not np.issubdtype(subjects.dtype, np.integer):
            raise ValueError(f"subjects: {subjects.dtype}{list(subjects.shape)}, not int64 (n,)")
        self.sampling_prob = sampling_prob
        self._rows = np.argsort(subjects, kind="stable")
        _, self._first, self._records = np.unique(
            subjects[self._rows], return_index=True, return_counts=True
        )

    def draw(self, source: Source) -> Indices:
        """Return the rows of one step, int64 (m,), in order of subject."""
        people = len(self._first)
        drawn = source.uniform(people) < self.sampling_prob
        which = np.floor(source.uniform(people) * self._records).astype(np.int64)
        rows: Indices = self._rows[(self._first + which)[drawn]]
        return rows


EMPTY = -1  # a place without a record
MICRO_BATCH = 256  # rows of a page at most; bounds memory


def places(expected: float) -> int:
    """Say how many places a step's pages have, from what is declared alone.

    Fewer subjects are drawn than that, but for a chance below 1e-15 a step, as long as a site has
    at most a quarter more subjects than it declared.

    Args:
        expected: the declared expected batch, above 0.
    """
    mean = 1.25 * expected
    return math.ceil(mean + 10 * math.sqrt(mean) + 16)


def page_shape(expected: float, largest: int) -> tuple[int, int]:
    """Say how many pages a step has, and how many rows each, from what is declared alone."""
    room = places(expected)
    count = -(-room // largest)
    return count, -(-room // count)


def pages(rows: Indices, expected: float, largest: int, source: Source) -> list[Indices]:
    """Lay a step's records out on pages of one public shape, at places drawn at random.

    Rounding makes a record's gradient depend, in its last digits, on its row and on the number of
    rows. Both are independent of who else is drawn: removing a subject leaves its place empty and
    every other where it is equally likely to be. So one subject never changes another's gradient,
    whatever the weights.

    | drawn | pages |
    |---|---|
    | nobody | none |
    | at most `places(expected)` | as many as those places need, on average a few rows empty |
    | more | of the same shape, twice as many as before until all fit: their number depends on the data |

    Args:
        rows: int64 (m,), what the sampler drew.
        expected: the declared expected batch.
        largest: rows that a page may have at most; bounds memory.
        source: where the places come from.

    Returns:
        Pages of equal length, int64; EMPTY where there is no record.
    """  # noqa: E501  (a table row cannot be broken)
    if len(rows) == 0:
        return []
    count, length = page_shape(expected, largest)
    while count * length < len(rows):
        count *= 2
    laid: Indices = np.full(count * length, EMPTY)
    laid[np.argsort(source.uniform(count * length), kind="stable")[: len(rows)]] = rows
    return list(laid.reshape(count, length))
