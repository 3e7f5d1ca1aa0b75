"""The fairness audit: Fairlearn's figures from group counts, each with an interval or a reason.

Counts are given to Fairlearn as weighted rows, one row a non-empty cell (group, label,
prediction), so its answers are those for the pooled rows themselves. They are computed from
counts summed over sites and never by averaging the sites' own figures, which is wrong: two sites
at 0 can hide a pooled gap of 0.64.

What `audit` adds is refusal. Fairlearn answers 0.0, silently, for the true positive rate of a
group without a positive, and a difference of 0.0 when there is one group; here a figure that the
data cannot carry is None, with the reason in words. There are no verdicts.
"""

from collections.abc import Mapping, Sequence
from typing import Final, SupportsFloat, TypedDict

import numpy as np
import numpy.typing as npt
from fairlearn.metrics import MetricFrame, selection_rate

from fedaccord.fairness import counts as group_counts
from fedaccord.fairness import intervals

Whole = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

FAVOURABLE: Final = 1
"""The class that is the favourable, or positive, outcome; every other class is not."""


class Figure(TypedDict):
    """One number with its interval: either all three are numbers, or all three are None."""

    value: float | None
    low: float | None
    high: float | None
    assessable: bool
    reason: str | None  # why not, in words; None where assessable


class NotAssessed(TypedDict):
    """A group that a disparity leaves out, and why."""

    group: str
    n: int
    reason: str


class Disparity(Figure):
    """A figure over groups, and which groups it is over."""

    groups: list[str]
    not_assessed: list[NotAssessed]


class GroupFigures(TypedDict):
    """One group's sizes and rates; a rate's intervals hold together over the groups."""

    n: int
    positives: int
    negatives: int
    accuracy: Figure
    selection_rate: Figure
    true_positive_rate: Figure
    false_positive_rate: Figure


class Audit(TypedDict):
    """The answer of `audit`: plain dicts, lists, strings, ints, floats, booleans and None."""

    min_group: int
    confidence: float
    n: int
    positives: int
    accuracy: Figure
    by_group: dict[str, GroupFigures]
    demographic_parity_difference: Disparity
    demographic_parity_ratio: Disparity
    equalized_odds_difference: Disparity


def audit(
    counts: npt.ArrayLike, groups: Sequence[str], min_group: int, confidence: float = 0.95
) -> Audit:
    """Give the accuracy and the group disparities that these counts can carry.

    Guarantee: each disparity equals Fairlearn's on the pooled rows of the groups it lists. Where
    a number is given, low <= value <= high; where it is not, value, low and high are None and
    `reason` says why. No figure rests on fewer than `min_group` subjects in a group (for a true
    or false positive rate: positives or negatives). Each figure's interval has the stated
    confidence by itself, simultaneous over the groups; the figures together have less.

    | case                                    | answer                                        |
    |-----------------------------------------|-----------------------------------------------|
    | a group below min_group                 | its rates are None; it is in `not_assessed`   |
    | fewer than two groups left              | the disparity is None                         |
    | a group with too few positives          | left out of equalized odds, not of parity     |
    | nobody is predicted 1 (Fairlearn: nan)  | the ratio is None; the difference is 0.0      |
    | more than two classes                   | class 1 against the rest; accuracy over all   |
    | no subjects                             | every figure is None                          |

    A disparity over the large groups says nothing about the small ones: show `not_assessed`
    beside it. Intervals cover sampling error only, so counts with privacy noise do not belong
    here as if they were exact.

    Args:
        counts: Counts [group, label, prediction] summed over sites, shape (G, C, C).
        groups: The G groups' names, in the order of the counts, all different.
        min_group: The fewest subjects for a group to be assessed, at least 1.
        confidence: The coverage of each interval, in (0, 1).

    Returns:
        An `Audit`; `json.dumps` takes it as it is.

    Raises:
        ValueError: Counts that are not counts, names that do not match them, or a `min_group` or
            `confidence` out of range.
    """
    counts = group_counts.check(counts)
    names = _names(groups, counts.shape[0])
    if min_group < 1:
        raise ValueError(f"min_group is {min_group}; it must be at least 1. The accord sets it.")
    intervals.check_confidence(confidence)
    cells = _one_against_rest(counts)
    correct, n = np.trace(counts, axis1=1, axis2=2), cells.sum((1, 2))
    everyone = _rates(correct.sum(keepdims=True), n.sum(keepdims=True), 1, confidence, "subjects")
    difference, ratio = _demographic_parity(cells, names, min_group, confidence)
    return Audit(
        min_group=int(min_group),
        confidence=float(confidence),
        n=int(n.sum()),
        positives=int(cells[:, 1].sum()),
        accuracy=everyone[0],
        by_group=_by_group(cells, correct, names, min_group, confidence),
        demographic_parity_difference=difference,
        demographic_parity_ratio=ratio,
        equalized_odds_difference=_equalized_odds(cells, names, min_group, confidence),
    )


def parities(
    tables: Mapping[str, npt.ArrayLike],
    groups: Sequence[str],
    min_group: int,
    confidence: float = 0.95,
) -> dict[str, tuple[int, Disparity]]:
    """Give for each of many tables its subjects and its demographic parity difference.

    Each equals that of `audit` on the table; Fairlearn is asked once for all of them, by its
    control features, which for a thousand sites is minutes less.

    Args:
        tables: Counts [group, label, prediction] by name (of a site), each of shape (G, C, C).
        groups: The G groups' names, in the order of the counts, all different.
        min_group: The fewest subjects for a group to be assessed, at least 1.
        confidence: The coverage of each interval, in (0, 1).

    Raises:
        ValueError: As `audit`.
    """
    out: dict[str, tuple[int, Disparity]] = {}
    large: dict[str, Whole] = {}  # cells of the groups that are large enough, where two are
    for name, counts in tables.items():
        checked = group_counts.check(counts)
        cells = _one_against_rest(checked)
        kept, nothing = _assessed(cells, _names(groups, checked.shape[0]), min_group)
        out[name] = int(cells.sum()), nothing
        if kept.sum() >= 2:
            large[name] = cells[kept]
    if not large:
        return out
    values = _differences(large)
    for name, cells in large.items():
        n = cells.sum((1, 2))
        low, high = intervals.difference_interval(cells[:, :, 1].sum(1), n, confidence)
        total, before = out[name]
        out[name] = total, Disparity(**{**before, **_figure(values[name], low, high)})
    return out


def _differences(tables: Mapping[str, Whole]) -> dict[str, float]:
    """Ask Fairlearn for the difference of selection rates within each of many tables."""
    rows = [
        (place, group, label, prediction, cells[group, label, prediction])
        for place, cells in enumerate(tables.values())
        for group, label, prediction in np.argwhere(cells)
    ]
    place, group, label, prediction, weight = np.array(rows, np.int64).T
    frame = MetricFrame(
        metrics={"selection_rate": selection_rate},
        y_true=label,
        y_pred=prediction,
        sensitive_features=group,
        control_features=place,
        sample_params={"selection_rate": {"sample_weight": weight}},
    )
    found = frame.difference()["selection_rate"]
    return {name: float(found[place]) for place, name in enumerate(tables)}


def _assessed(cells: Whole, names: list[str], min_group: int) -> tuple[Mask, Disparity]:
    """Say which groups are large enough, and what stands where fewer than two of them are."""
    n = cells.sum((1, 2))
    reasons = [_too_few(min_group, subjects=size) for size in n]
    kept, left_out = _split(names, n, reasons)
    nothing = _not_assessable(_fewer_than_two(names, reasons, f"{min_group} subjects"))
    return kept, _over(nothing, names, kept, left_out)


def _by_group(
    cells: Whole, correct: Whole, names: list[str], min_group: int, confidence: float
) -> dict[str, GroupFigures]:
    """Return each group's sizes and rates."""
    n, positives, negatives = cells.sum((1, 2)), cells[:, 1].sum(1), cells[:, 0].sum(1)
    accuracy = _rates(correct, n, min_group, confidence, "subjects")
    selection = _rates(cells[:, :, 1].sum(1), n, min_group, confidence, "subjects")
    tpr = _rates(cells[:, 1, 1], positives, min_group, confidence, "positives")
    fpr = _rates(cells[:, 0, 1], negatives, min_group, confidence, "negatives")
    return {
        name: GroupFigures(
            n=int(n[g]),
            positives=int(positives[g]),
            negatives=int(negatives[g]),
            accuracy=accuracy[g],
            selection_rate=selection[g],
            true_positive_rate=tpr[g],
            false_positive_rate=fpr[g],
        )
        for g, name in enumerate(names)
    }


def _demographic_parity(
    cells: Whole, names: list[str], min_group: int, confidence: float
) -> tuple[Disparity, Disparity]:
    """Return the difference and the ratio of selection rates over groups of `min_group`."""
    kept, nothing = _assessed(cells, names, min_group)
    if kept.sum() < 2:
        return nothing, nothing
    selected, n = cells[kept][:, :, 1].sum(1), cells[kept].sum((1, 2))
    frame = _frame(cells[kept], {"selection_rate": (0, 1)})
    low, high = intervals.difference_interval(selected, n, confidence)
    difference = _figure(frame.difference()["selection_rate"], low, high)
    if selected.any():
        low, high = intervals.ratio_interval(selected, n, confidence)
        ratio = _figure(frame.ratio()["selection_rate"], low, high)
    else:
        ratio = _not_assessable("no subject of these groups is predicted 1, so the ratio is 0 / 0")
    return Disparity(**{**nothing, **difference}), Disparity(**{**nothing, **ratio})


def _equalized_odds(cells: Whole, names: list[str], min_group: int, confidence: float) -> Disparity:
    """Return the larger of the TPR and FPR differences, over groups with enough of both labels."""
    reasons = [
        _too_few(min_group, positives=positives, negatives=negatives)
        for negatives, positives in cells.sum(2)
    ]
    kept, left_out = _split(names, cells.sum((1, 2)), reasons)
    if kept.sum() < 2:
        floor = f"{min_group} positives and {min_group} negatives"
        return _over(_not_assessable(_fewer_than_two(names, reasons, floor)), names, kept, left_out)
    cells_kept = cells[kept]
    # A true positive rate is the selection rate among positives. Fairlearn's own function for it
    # goes through sklearn's confusion matrix: the same number, at 1 ms a group.
    frame = _frame(cells_kept, {"true_positive_rate": (1,), "false_positive_rate": (0,)})
    negatives, positives = cells_kept.sum(2).T
    low, high = intervals.equalized_odds_interval(
        cells_kept[:, 1, 1], positives, cells_kept[:, 0, 1], negatives, confidence
    )
    return _over(_figure(frame.difference().max(), low, high), names, kept, left_out)


def _frame(cells: Whole, rates: dict[str, tuple[int, ...]]) -> MetricFrame:
    """Return Fairlearn's frame of selection rates, each among the true labels that it names."""
    group, label, prediction = np.nonzero(cells)
    weight = cells[group, label, prediction]
    return MetricFrame(
        metrics=dict.fromkeys(rates, selection_rate),
        y_true=label,
        y_pred=prediction,
        sensitive_features=group,
        sample_params={
            name: {"sample_weight": weight * np.isin(label, among)} for name, among in rates.items()
        },
    )


def _rates(
    successes: Whole, trials: Whole, least: int, confidence: float, unit: str
) -> list[Figure]:
    """Return each group's rate, with intervals that hold together over the groups assessed."""
    kept = trials >= least
    figures = [_not_assessable(_too_few(least, **{unit: size})) for size in trials]
    if kept.any():
        x, n = successes[kept], trials[kept]
        low, high = intervals.rate_intervals(x, n, confidence)
        for i, g in enumerate(np.flatnonzero(kept)):
            figures[g] = _figure(x[i] / n[i], low[i], high[i])
    return figures


def _one_against_rest(counts: Whole) -> Whole:
    """Merge classes into the favourable one and the rest, shape (G, 2, 2)."""
    merge = np.eye(2, dtype=np.int64)[(np.arange(counts.shape[1]) == FAVOURABLE).astype(int)]
    merged: Whole = np.einsum("gij,ia,jb->gab", counts, merge, merge)
    return merged


def _figure(value: SupportsFloat, low: SupportsFloat, high: SupportsFloat) -> Figure:
    """Return an assessable figure; the interval is stretched where rounding left the value out."""
    number = float(value)
    return Figure(
        value=number,
        low=min(float(low), number),
        high=max(float(high), number),
        assessable=True,
        reason=None,
    )


def _not_assessable(reason: str) -> Figure:
    """Return a figure without a number."""
    return Figure(value=None, low=None, high=None, assessable=False, reason=reason)


def _over(figure: Figure, names: list[str], kept: Mask, left_out: list[NotAssessed]) -> Disparity:
    """Return the figure with the groups that it is over, and those that it is not."""
    return Disparity(
        **figure,
        groups=[name for name, keep in zip(names, kept, strict=True) if keep],
        not_assessed=[NotAssessed(**entry) for entry in left_out],
    )


def _too_few(least: int, **sizes: int) -> str:
    """Return which of these sizes are below the least, in words, or nothing where none is."""
    small = [f"{size} {unit}" for unit, size in sizes.items() if size < least]
    return f"{' and '.join(small)}, fewer than {least}" if small else ""


def _fewer_than_two(names: list[str], reasons: list[str], floor: str) -> str:
    """Return why there is no disparity, group by group."""
    small = [f"{name}: {reason}" for name, reason in zip(names, reasons, strict=True) if reason]
    met = len(names) - len(small)
    return "; ".join([f"it takes two groups with at least {floor}, and there are {met}", *small])


def _split(names: list[str], n: Whole, reasons: list[str]) -> tuple[Mask, list[NotAssessed]]:
    """Return which groups have no reason against them, and a list of those that do."""
    left_out = [
        NotAssessed(group=name, n=int(size), reason=reason)
        for name, size, reason in zip(names, n, reasons, strict=True)
        if reason
    ]
    return np.array([not reason for reason in reasons]), left_out


def _names(groups: Sequence[str], n_groups: int) -> list[str]:
    """Return the group names as strings, after checking that they fit the counts."""
    names = [str(name) for name in groups]
    if len(names) != n_groups:
        raise ValueError(
            f"groups has {len(names)} names; counts has {n_groups} groups. "
            "Pass the accord's groups, in its order."
        )
    if len(set(names)) < len(names):
        raise ValueError(f"groups is {names}; names must differ. Rename the doubled one.")
    return names
