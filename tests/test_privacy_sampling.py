"""The sampler: subjects with the declared probability, one record of each, whatever the data."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedaccord.privacy.noise import OsSource
from fedaccord.privacy.plan import PrivacyPlan
from fedaccord.privacy.sampling import EMPTY, SubjectSampler, pages, places

ALPHA = 2e-6  # of each statistical test: 50 of them pass a clean suite 9,999 times in 10,000
DRAWS = 20_000
Q = 0.1
# 20 subjects with one record and 10 with five.
SUBJECTS = np.concatenate([np.arange(20), np.repeat(np.arange(20, 30), 5)])


def plan(sampling_prob=Q):
    return PrivacyPlan(
        site="ward",
        subjects=30,
        rounds=2,
        steps=3,
        sampling_prob=sampling_prob,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        delta=1e-5,
    )


class Given:
    """A source that hands out what it was given, call by call."""

    def __init__(self, *calls):
        self.calls = [np.asarray(call, np.float64) for call in calls]

    def uniform(self, count):
        call = self.calls.pop(0)
        return np.broadcast_to(call, count).copy()

    def normal(self, count):
        raise AssertionError("the sampler draws no noise")


class PerRecord:
    """A mutant: every record is drawn on its own, as Opacus' loader does."""

    def __init__(self, subjects, sampling_prob):
        self.rows, self.sampling_prob = np.arange(len(subjects)), sampling_prob

    def draw(self, source):
        return self.rows[source.uniform(len(self.rows)) < self.sampling_prob]


def inclusions(sampler):
    """How often each subject was in one of DRAWS steps."""
    source = OsSource()
    counts = np.zeros(30, np.int64)
    for _ in range(DRAWS):
        counts[np.unique(SUBJECTS[sampler.draw(source)])] += 1
    return counts


def p_value(counts, q):
    """Chance that independent subjects with inclusion probability q look as odd as this."""
    variance = DRAWS * q * (1 - q)
    squares = ((counts - DRAWS * q) ** 2 / variance).sum()
    each = 2 * min(stats.chi2.sf(squares, len(counts)), stats.chi2.cdf(squares, len(counts)))
    total = stats.binomtest(int(counts.sum()), DRAWS * len(counts), q).pvalue
    return min(1.0, 2 * min(each, total))


def test_every_subject_takes_part_with_the_declared_probability_however_many_records_it_has():
    assert p_value(inclusions(plan().sampler(SUBJECTS)), Q) > ALPHA


@pytest.mark.parametrize(
    "mutant",
    [SubjectSampler(SUBJECTS, Q * 1.1), SubjectSampler(SUBJECTS, Q * 0.9), PerRecord(SUBJECTS, Q)],
    ids=["q x 1.1", "q x 0.9", "per record"],
)
def test_the_same_test_rejects_another_probability_and_sampling_by_record(mutant):
    assert p_value(inclusions(mutant), Q) < ALPHA


def test_each_record_of_a_subject_is_as_likely_as_the_others():
    sampler, source = SubjectSampler(np.zeros(5, np.int64), 1.0), OsSource()
    rows = np.concatenate([sampler.draw(source) for _ in range(DRAWS)])
    counts = np.bincount(rows, minlength=5)
    assert counts.sum() == DRAWS
    assert stats.chisquare(counts).pvalue > ALPHA
    assert stats.chisquare(counts + np.array([400, 0, 0, 0, -400])).pvalue < ALPHA


def test_two_subjects_are_in_the_same_step_as_often_as_independence_says():
    sampler, source = SubjectSampler(np.arange(2), 0.5), OsSource()
    together = sum(len(sampler.draw(source)) == 2 for _ in range(DRAWS))
    assert stats.binomtest(together, DRAWS, 0.25).pvalue > ALPHA
    assert stats.binomtest(together + DRAWS // 20, DRAWS, 0.25).pvalue < ALPHA


@given(
    st.lists(st.integers(-(2**40), 2**40), max_size=60),
    st.floats(0.01, 1.0),
    st.integers(1, 5),
)
@settings(deadline=None)
def test_a_step_holds_at_most_one_record_of_a_subject_and_only_its_own(people, q, times):
    subjects = np.array(people * times, np.int64)
    rows = SubjectSampler(subjects, q).draw(OsSource())
    assert rows.dtype == np.int64
    assert len(np.unique(subjects[rows])) == len(rows) == len(np.unique(rows))
    if q == 1.0:
        assert set(subjects[rows]) == set(people)


@given(
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 4)), max_size=20),
    st.floats(0.01, 1.0),
)
@settings(deadline=None)
def test_a_subject_is_drawn_if_and_only_if_its_own_number_is_below_q(people, q):
    numbers = np.array([number for number, _ in people])
    subjects = np.repeat(np.arange(len(people)), [records for _, records in people])
    rows = plan(q).sampler(subjects).draw(Given(numbers, 0.0))
    assert subjects[rows].tolist() == np.flatnonzero(numbers < q).tolist()


@given(st.lists(st.integers(1, 5_000), min_size=1, max_size=8))
@settings(deadline=None)
def test_the_largest_number_below_one_never_reaches_the_next_subjects_records(records):
    subjects = np.repeat(np.arange(len(records)), records)
    rows = SubjectSampler(subjects, 1.0).draw(Given(0.0, 1 - 2.0**-53))
    assert subjects[rows].tolist() == list(range(len(records)))


@pytest.mark.parametrize("people", [0, 1, 64, 65, 10_000])
def test_the_probability_is_the_plans_for_any_number_of_subjects(people):
    sampler = plan().sampler(np.arange(people))
    edge = np.nextafter(Q, 0)
    assert sampler.sampling_prob == Q
    assert len(sampler.draw(Given(edge, 0.0))) == people
    assert len(sampler.draw(Given(Q, 0.0))) == 0


@pytest.mark.parametrize(
    "subjects", [np.zeros((3, 1), np.int64), np.array([0.0, 1.0]), np.array(["a", "b"], object)]
)
def test_subjects_that_are_no_column_of_whole_numbers_are_refused(subjects):
    with pytest.raises(ValueError, match="subjects: "):
        SubjectSampler(subjects, Q)


def test_the_same_global_seeds_draw_other_subjects():
    sampler, drawn = SubjectSampler(np.arange(200), 0.5), set()
    for _ in range(20):
        torch.manual_seed(7)
        np.random.seed(7)  # the global state is the point
        random.seed(7)
        drawn.add(sampler.draw(OsSource()).tobytes())
    assert len(drawn) == 20


@given(st.integers(0, 700), st.floats(0.05, 2_000), st.integers(1, 300))
@settings(deadline=None)
def test_pages_hold_every_record_once_and_have_a_public_shape(drawn, expected, largest):
    rows = np.arange(10, 10 + drawn)
    laid = pages(rows, expected, largest, OsSource())
    assert sorted(row for page in laid for row in page if row != EMPTY) == rows.tolist()
    assert all(len(page) == len(laid[0]) <= largest for page in laid)
    if 0 < drawn <= places(expected):
        one = pages(rows[:1], expected, largest, OsSource())
        assert [len(page) for page in laid] == [len(page) for page in one]


@pytest.mark.parametrize("expected", [0.1, 1.0, 20.0, 450.0, 1e4, 1e6])
@pytest.mark.parametrize("more", [1.0, 1.25])
def test_more_subjects_than_places_are_drawn_less_often_than_once_in_1e15_steps(expected, more):
    # Poisson's tail is above that of any Poisson sampling of the same mean.
    assert stats.poisson.sf(places(expected), more * expected) < 1e-15
    assert places(expected) < 3 * expected + 60


def where(layout, rows):
    """The places of rows 1 and 2 of those drawn, over many steps: (DRAWS // 4, 2)."""
    found = np.empty((DRAWS // 4, 2), np.int64)
    source = OsSource()
    for step in range(len(found)):
        flat = np.concatenate(layout(rows, source))
        found[step] = [np.flatnonzero(flat == row)[0] for row in (1, 2)]
    return found


def even_p(found, room):
    """Chance that two records at even, distinct places look as odd as this."""
    pairs = found[:, 0] * room + found[:, 1]
    counts = np.bincount(pairs, minlength=room**2)[
        [i for i in range(room**2) if i // room != i % room]
    ]
    return stats.chisquare(counts).pvalue


def test_where_two_records_lie_does_not_tell_whether_a_third_was_drawn():
    def ours(rows, source):
        return pages(rows, 0.05, 256, source)

    def packed(rows, source):
        return [np.concatenate([rows, np.full(room - len(rows), EMPTY)])]

    room = len(np.concatenate(ours(np.array([1]), OsSource())))
    for rows in ([1, 2], [0, 1, 2], [1, 2, 3, 4, 5]):
        assert even_p(where(ours, np.array(rows)), room) > ALPHA
    assert even_p(where(packed, np.array([0, 1, 2])), room) < ALPHA


@given(st.floats(0.01, 300), st.integers(1, 256), st.integers(1, 3_000))
def test_a_page_has_a_public_length_also_where_more_are_drawn_than_there_are_places(
    expected, largest, drawn
):
    one = pages(np.arange(1), expected, largest, OsSource())
    many = pages(np.arange(drawn), expected, largest, OsSource())
    assert {len(page) for page in many} == {len(one[0])}
    assert len(many) % len(one) == 0
    assert sorted(row for page in many for row in page if row != EMPTY) == list(range(drawn))
