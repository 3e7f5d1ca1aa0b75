"""Group counts: what a site sends instead of rows, and how sites are added up.

A site counts, for one model, how many subjects of each group have each pair (true label,
predicted label). The counts of all sites summed are the counts of the pooled rows, so every
figure that is a function of them is the pooled figure, exactly. The same is not true of figures:
two sites that each show a demographic parity difference of 0 can pool to 0.64, because the group
that is common at the strict site is rare at the lenient one. So sites' figures are never
averaged here, and there is no function that does it.

Counts are a release: whoever calls this decides on noise and writes the ledger.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]

# Fairlearn weighs in float64, where a whole number is exact up to here.
LARGEST_TOTAL = 2**53


def count(
    groups: npt.ArrayLike,
    labels: npt.ArrayLike,
    predictions: npt.ArrayLike,
    n_groups: int,
    n_classes: int = 2,
) -> Counts:
    """Count the subjects of each group by true label and predicted label.

    Guarantee: the counts sum to n, are invariant to the order of the rows, and depend on nothing
    but the three arrays. One row is one subject: drawing one record of each is the caller's part.

    | case                            | answer                      |
    |---------------------------------|-----------------------------|
    | no rows                         | all zeros, of the full shape|
    | a group or class without a row  | zeros there                 |
    | a missing value coded as -1     | ValueError                  |
    | floats, even whole ones         | ValueError                  |

    Args:
        groups: The group of each subject, shape (n,), whole numbers in 0 .. n_groups - 1.
        labels: The true class of each subject, shape (n,), whole numbers in 0 .. n_classes - 1.
        predictions: The predicted class of each subject, shape and range of `labels`.
        n_groups: The number of groups in the accord, at least 1.
        n_classes: The number of classes in the task, at least 2.

    Returns:
        Counts indexed [group, label, prediction], shape (n_groups, n_classes, n_classes), int64.

    Raises:
        ValueError: An array is not one-dimensional, not whole numbers, out of range or not as
            long as the others, or a size is too small.
    """
    for name, size, least in (("n_groups", n_groups, 1), ("n_classes", n_classes, 2)):
        if size < least:
            raise ValueError(
                f"{name} is {size}; it must be at least {least}. Take it from the task."
            )
    columns = [
        _codes("groups", groups, "n_groups", n_groups),
        _codes("labels", labels, "n_classes", n_classes),
        _codes("predictions", predictions, "n_classes", n_classes),
    ]
    lengths = [column.size for column in columns]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"groups, labels and predictions have {lengths} rows; the three must be equal. "
            "Pass one row for each subject."
        )
    shape = (n_groups, n_classes, n_classes)
    cells = np.ravel_multi_index(tuple(columns), shape)
    return np.bincount(cells, minlength=int(np.prod(shape))).reshape(shape).astype(np.int64)


def total(parts: Sequence[npt.ArrayLike]) -> Counts:
    """Sum the counts of several sites.

    Guarantee: equal to `count` of the sites' rows put one after another, in any order of sites.

    | case                                    | answer     |
    |-----------------------------------------|------------|
    | one site                                | its counts |
    | a site without a subject (all zeros)    | no effect  |
    | no site at all                          | ValueError |

    Args:
        parts: One array a site, each of shape (groups, classes, classes), whole numbers >= 0.

    Returns:
        The sum, of the same shape, int64.

    Raises:
        ValueError: No site, shapes that differ, or an array that is not counts.
    """
    if len(parts) == 0:
        raise ValueError("parts is empty; it needs at least 1 site. Pass the counts of each site.")
    summed = check(parts[0], "parts[0]")
    for site, part in enumerate(parts[1:], start=1):
        counts = check(part, f"parts[{site}]")
        if counts.shape != summed.shape:
            raise ValueError(
                f"parts[{site}] has shape {counts.shape}; parts[0] has {summed.shape}. "
                "Count with the same n_groups and n_classes at every site."
            )
        # Checked at every step, so that a hostile site cannot overflow the sum.
        summed = check(summed + counts, f"the sum of parts[0] to parts[{site}]")
    return summed


def check(counts: npt.ArrayLike, name: str = "counts") -> Counts:
    """Return `counts` as int64 after checking that it is an array of group counts.

    Guarantee: what is returned has shape (G >= 1, C >= 2, C), no negative cell and a sum of at
    most 2**53, so that no later sum overflows and float64 arithmetic on it is exact.

    Args:
        counts: Counts indexed [group, label, prediction], whole numbers >= 0.
        name: What to call the array in an error.

    Returns:
        A copy, int64.

    Raises:
        ValueError: The array has another shape, fractions, a negative cell or too large a sum.
    """
    array = np.asarray(counts)
    shape = array.shape
    if len(shape) != 3 or shape[0] < 1 or shape[1] < 2 or shape[1] != shape[2]:
        raise ValueError(
            f"{name} has shape {shape}; it must be (groups, classes, classes) with at least "
            "1 group and 2 classes. Make it with fedaccord.fairness.counts.count."
        )
    if array.dtype.kind not in "iu":
        raise ValueError(
            f"{name} has dtype {array.dtype}; counts are whole numbers. "
            "Send them as int64, and round counts with noise before this."
        )
    if array.min() < 0:
        raise ValueError(
            f"{name} holds {array.min()}; a count is at least 0. "
            "Clamp counts with noise at 0 before this, and say so in the report."
        )
    if array.sum(dtype=np.float64) > LARGEST_TOTAL:
        raise ValueError(
            f"{name} sums to {array.sum(dtype=np.float64):.3g}; the most is 2**53, or 9.01e+15. "
            "No site has so many subjects: ask the site that sent it."
        )
    return array.astype(np.int64)


def _codes(name: str, values: npt.ArrayLike, bound_name: str, bound: int) -> npt.NDArray[np.int64]:
    """Return `values` as int64 codes in 0 .. bound - 1, or raise a ValueError that names it."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(
            f"{name} has shape {array.shape}; it must be (n,). Pass one value for each subject."
        )
    if array.size == 0:  # np.array([]) is float64, and no row is no error
        return np.zeros(0, dtype=np.int64)
    if array.dtype.kind not in "biu":
        raise ValueError(
            f"{name} has dtype {array.dtype}; it must be whole numbers. "
            "Pass class codes, not probabilities: take the argmax, or compare with the threshold."
        )
    for extreme in (int(array.min()), int(array.max())):
        if not 0 <= extreme < bound:
            raise ValueError(
                f"{name} holds {extreme}; with {bound_name} = {bound} "
                f"it must lie in 0 .. {bound - 1}. "
                "Give missing or unlisted values a group of their own in the task, "
                "or leave the subject out."
            )
    return array.astype(np.int64)
