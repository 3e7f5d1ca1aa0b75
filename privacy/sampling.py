"""Poisson sampling of subjects: each is in a step with a declared probability, one record each."""

from __future__ import annotations

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
