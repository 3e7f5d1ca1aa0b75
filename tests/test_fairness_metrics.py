"""The audit: Fairlearn's figures on the pooled rows, or None with a reason."""

import json
import re
import warnings

import numpy as np
import pytest
from fairlearn.metrics import (
    MetricFrame,
    demographic_parity_difference,
    demographic_parity_ratio,
    equalized_odds_difference,
    false_positive_rate,
    selection_rate,
    true_positive_rate,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score

from fedaccord.fairness.counts import count, total
from fedaccord.fairness.metrics import audit, parities

DISPARITIES = (
    "demographic_parity_difference",
    "demographic_parity_ratio",
    "equalized_odds_difference",
)
RATES = {
    "accuracy": accuracy_score,
    "selection_rate": selection_rate,
    "true_positive_rate": true_positive_rate,
    "false_positive_rate": false_positive_rate,
}


def names(n_groups):
    return [f"group {g}" for g in range(n_groups)]


def figures(result):
    """Every figure of an audit, with its path."""
    yield "accuracy", result["accuracy"]
    for group, entry in result["by_group"].items():
        for rate in RATES:
            yield f"{group} {rate}", entry[rate]
    for disparity in DISPARITIES:
        yield disparity, result[disparity]


@st.composite
def sites(draw):
    """(rows of each site, n_groups): 2 to 5 groups, 1 to 5 sites; some groups and sites empty."""
    n_groups, n_sites = draw(st.integers(2, 5)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.lists(st.sampled_from([0, 0, 3, 40]), min_size=n_groups, max_size=n_groups))
    group = np.repeat(np.arange(n_groups), sizes)
    label = rng.binomial(1, rng.random(n_groups)[group])
    prediction = rng.binomial(1, rng.random((n_groups, 2))[group, label])
    site = rng.choice(n_sites, group.size, p=rng.dirichlet(np.full(n_sites, 0.5)))
    return [
        (group[site == s], label[site == s], prediction[site == s]) for s in range(n_sites)
    ], n_groups


def counted(parts, n_groups):
    return total([count(*rows, n_groups) for rows in parts])


def pooled_frame(group, label, prediction):
    return MetricFrame(metrics=RATES, y_true=label, y_pred=prediction, sensitive_features=group)


# --- oracle: Fairlearn on the rows themselves ---


@given(sites())
@settings(deadline=None, max_examples=60)
def test_disparities_equal_fairlearns_on_the_pooled_rows(drawn):
    parts, n_groups = drawn
    result = audit(counted(parts, n_groups), names(n_groups), min_group=1)
    group, label, prediction = (np.concatenate(column) for column in zip(*parts, strict=True))
    oracles = {
        "demographic_parity_difference": demographic_parity_difference,
        "demographic_parity_ratio": demographic_parity_ratio,
        "equalized_odds_difference": equalized_odds_difference,
    }
    for name, oracle in oracles.items():
        figure = result[name]
        among = np.isin(group, [int(g.split()[1]) for g in figure["groups"]])
        assert figure["assessable"] == (
            len(figure["groups"]) >= 2
            and not (name.endswith("ratio") and prediction[among].sum() == 0)
        )
        if figure["assessable"]:
            expected = oracle(label[among], prediction[among], sensitive_features=group[among])
            assert figure["value"] == pytest.approx(expected, rel=0, abs=1e-12)


@given(sites(), st.integers(1, 12))
@settings(deadline=None, max_examples=30)
def test_many_tables_at_once_have_the_parity_differences_of_each_by_itself(drawn, least):
    parts, n_groups = drawn
    tables = {f"site {s}": count(*rows, n_groups) for s, rows in enumerate(parts)}
    found = parities(tables, names(n_groups), least)
    assert found.keys() == tables.keys()
    for site, table in tables.items():
        alone = audit(table, names(n_groups), least)
        assert found[site] == (alone["n"], alone["demographic_parity_difference"])


@given(sites())
@settings(deadline=None, max_examples=40)
def test_rates_by_group_equal_fairlearns_on_the_pooled_rows(drawn):
    parts, n_groups = drawn
    result = audit(counted(parts, n_groups), names(n_groups), min_group=1)
    group, label, prediction = (np.concatenate(column) for column in zip(*parts, strict=True))
    if group.size == 0:
        assert not any(figure["assessable"] for _, figure in figures(result))
        return
    frame = pooled_frame(group, label, prediction)
    assert result["accuracy"]["value"] == pytest.approx(frame.overall["accuracy"], abs=1e-12)
    for g, entry in enumerate(result["by_group"].values()):
        least = {
            "true_positive_rate": entry["positives"],
            "false_positive_rate": entry["negatives"],
        }
        for rate in RATES:
            if least.get(rate, entry["n"]) == 0:
                assert entry[rate]["value"] is None
            else:
                expected = frame.by_group.loc[g, rate]
                assert entry[rate]["value"] == pytest.approx(expected, rel=0, abs=1e-12)


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=10)
def test_more_than_two_classes_are_audited_as_class_1_against_the_rest(seed):
    rng = np.random.default_rng(seed)
    group, label, prediction = (rng.integers(0, bound, 300) for bound in (3, 4, 4))
    result = audit(count(group, label, prediction, 3, n_classes=4), names(3), min_group=10)
    expected = equalized_odds_difference(label == 1, prediction == 1, sensitive_features=group)
    assert result["equalized_odds_difference"]["value"] == pytest.approx(expected, abs=1e-12)
    assert result["accuracy"]["value"] == pytest.approx(np.mean(label == prediction), abs=1e-12)
    assert result["positives"] == np.sum(label == 1)


def test_two_sites_without_a_gap_pool_to_a_gap_of_64_points():
    # Each site selects both groups alike: one 90 % and the other 10 %. The groups' shares differ.
    def site(selected_of_ten, sizes):
        return np.array(
            [[[0, 0], [n - n * selected_of_ten // 10, n * selected_of_ten // 10]] for n in sizes]
        )

    lenient, strict = site(9, (180, 20)), site(1, (20, 180))
    apart = [
        audit(part, names(2), min_group=10)["demographic_parity_difference"]
        for part in (lenient, strict)
    ]
    pooled = audit(total([lenient, strict]), names(2), min_group=10)[
        "demographic_parity_difference"
    ]
    assert [figure["value"] for figure in apart] == [0.0, 0.0]
    assert pooled["value"] == pytest.approx(0.64, abs=1e-12)
    assert pooled["low"] > 0.5


# --- what cannot be assessed ---

# [group, label, prediction]; the third group has no positive, and is small.
NO_POSITIVES = np.array([[[70, 30], [20, 60]], [[60, 10], [25, 40]], [[30, 10], [0, 0]]])


def test_a_group_without_positives_is_not_assessable_where_fairlearn_says_rate_0():
    group, label, prediction = (
        np.repeat(axis, NO_POSITIVES.ravel()) for axis in np.indices((3, 2, 2)).reshape(3, -1)
    )
    frame = pooled_frame(group, label, prediction)
    assert frame.by_group.loc[2, "true_positive_rate"] == 0.0  # the trap
    silent = equalized_odds_difference(label, prediction, sensitive_features=group)
    assert silent == pytest.approx(0.75)

    result = audit(NO_POSITIVES, ["man", "woman", "unknown"], min_group=20)
    rate = result["by_group"]["unknown"]["true_positive_rate"]
    assert (rate["value"], rate["low"], rate["high"]) == (None, None, None)
    assert rate["reason"] == "0 positives, fewer than 20"
    figure = result["equalized_odds_difference"]
    assert figure["value"] == pytest.approx(30 / 100 - 10 / 70)  # the false positive rates
    assert figure["groups"] == ["man", "woman"]
    assert figure["not_assessed"] == [
        {"group": "unknown", "n": 40, "reason": "0 positives, fewer than 20"}
    ]
    assert result["demographic_parity_difference"]["groups"] == ["man", "woman", "unknown"]


def test_equalized_odds_of_one_group_with_positives_is_none_and_not_0():
    figure = audit(NO_POSITIVES[1:], ["woman", "unknown"], min_group=20)[
        "equalized_odds_difference"
    ]
    assert figure["value"] is None
    assert figure["reason"] == (
        "it takes two groups with at least 20 positives and 20 negatives, and there are 1; "
        "unknown: 0 positives, fewer than 20"
    )


@pytest.mark.parametrize("size", [0, 1, 9])
def test_a_group_below_the_minimum_is_none_with_its_size_and_not_0(size):
    counts = np.array([[[40, 10], [10, 40]], [[size, 0], [0, 0]]])
    result = audit(counts, ["man", "woman"], min_group=10)
    assert result["by_group"]["woman"]["n"] == size
    for rate in RATES:
        assert result["by_group"]["woman"][rate]["value"] is None
    for name in DISPARITIES:
        assert result[name]["value"] is None
        assert result[name]["assessable"] is False
        assert result[name]["groups"] == ["man"]
        assert [(entry["group"], entry["n"]) for entry in result[name]["not_assessed"]] == [
            ("woman", size)
        ]
    assert (
        f"woman: {size} subjects, fewer than 10"
        in result["demographic_parity_difference"]["reason"]
    )


def test_a_group_at_the_minimum_is_assessed():
    counts = np.array([[[40, 10], [10, 40]], [[5, 0], [0, 5]]])
    assert audit(counts, ["man", "woman"], min_group=10)["demographic_parity_difference"][
        "assessable"
    ]


def test_a_small_group_does_not_move_the_figures_of_the_others():
    alone = audit(NO_POSITIVES[:2], ["man", "woman"], min_group=41)
    beside = audit(NO_POSITIVES, ["man", "woman", "unknown"], min_group=41)
    for name in DISPARITIES:
        for key in ("value", "low", "high", "groups"):
            assert alone[name][key] == beside[name][key]


def test_nobody_selected_has_a_difference_of_0_and_no_ratio():
    counts = np.array([[[50, 0], [50, 0]], [[50, 0], [50, 0]]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = audit(counts, names(2), min_group=10)
    assert result["demographic_parity_difference"]["value"] == 0.0
    assert result["demographic_parity_difference"]["high"] > 0
    assert result["demographic_parity_ratio"]["value"] is None
    assert "0 / 0" in result["demographic_parity_ratio"]["reason"]


def test_no_subjects_at_all_is_not_assessable_everywhere():
    result = audit(np.zeros((3, 2, 2), int), names(3), min_group=1)
    for path, figure in figures(result):
        assert figure["value"] is None and figure["reason"], path


# --- law ---


@st.composite
def tables(draw):
    """Counts of 1 to 5 groups, with many empty and small cells."""
    shape = (draw(st.integers(1, 5)), *[draw(st.integers(2, 3))] * 2)
    cell = st.one_of(st.just(0), st.integers(0, 12), st.integers(0, 400))
    size = int(np.prod(shape))
    return np.array(draw(st.lists(cell, min_size=size, max_size=size))).reshape(shape)


@given(tables(), st.integers(1, 30), st.sampled_from([0.8, 0.95, 0.99]))
@settings(deadline=None, max_examples=60)
def test_a_figure_is_a_number_inside_its_interval_or_none_with_a_reason(
    counts, min_group, confidence
):
    for path, figure in figures(audit(counts, names(len(counts)), min_group, confidence)):
        if figure["assessable"]:
            assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1, path
            assert figure["reason"] is None, path
        else:
            assert (figure["value"], figure["low"], figure["high"]) == (None, None, None), path
            assert figure["reason"], path


@given(tables(), st.integers(1, 30))
@settings(deadline=None, max_examples=30)
def test_an_audit_survives_strict_json_unchanged(counts, min_group):
    result = audit(counts, names(len(counts)), min_group)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@given(tables(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_the_order_of_groups_does_not_matter(counts, random):
    order = random.sample(range(len(counts)), len(counts))
    here = audit(counts, names(len(counts)), min_group=5)
    there = audit(counts[order], [names(len(counts))[g] for g in order], min_group=5)
    assert there["by_group"] == here["by_group"]
    for name in DISPARITIES:
        assert sorted(there[name]["groups"]) == sorted(here[name]["groups"])
        for key in ("value", "low", "high"):
            assert there[name][key] == pytest.approx(here[name][key], abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((NO_POSITIVES, ["a", "b"], 5), "groups has 2 names; counts has 3 groups"),
        ((NO_POSITIVES, ["a", "b", "b"], 5), "names must differ"),
        ((NO_POSITIVES, ["a", "b", "c"], 0), "min_group is 0; it must be at least 1"),
        ((NO_POSITIVES, ["a", "b", "c"], 5, 95), "confidence is 95; it must lie between 0 and 1"),
        ((NO_POSITIVES * 0, ["a", "b", "c"], 5, 95), "confidence is 95"),
        ((NO_POSITIVES - 1, ["a", "b", "c"], 5), "counts holds -1; a count is at least 0"),
        ((NO_POSITIVES / 2, ["a", "b", "c"], 5), "counts has dtype float64"),
    ],
)
def test_settings_that_make_no_audit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        audit(*arguments)
