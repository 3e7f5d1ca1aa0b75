"""The clip: one subject moves a step's sum by at most max_grad_norm, whatever it holds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from wards import Silent

from fedaccord.privacy import engines
from fedaccord.privacy.clipping import SubjectOptimizer, clipped_sum, factors
from fedaccord.privacy.plan import SLACK, PrivacyPlan

torch.set_num_threads(1)


class Fine(PrivacyPlan):
    """A plan whose grid is as good as none."""

    grid = 2.0**-60


PLAN = Fine(
    site="ward",
    subjects=1,
    rounds=1,
    steps=1,
    sampling_prob=1.0,
    noise_multiplier=1.0,
    max_grad_norm=1.0,
    delta=1e-5,
)
SPECIAL = [0.0, -0.0, 1.0, 1e30, -1e30, 1e-30, 5e-324, 1e-310, 1e200, np.inf, -np.inf, np.nan]
numbers = st.one_of(st.sampled_from(SPECIAL), st.floats(-1e3, 1e3), st.floats())


@st.composite
def gradients(draw):
    """Per-subject gradients (n, 5) of two parameters, n from 0 to 8, and a bound."""
    n = draw(st.integers(0, 8))
    rows = draw(st.lists(st.lists(numbers, min_size=5, max_size=5), min_size=n, max_size=n))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    bound = draw(st.sampled_from([1e-3, 0.5, 1.0, 1e3]))
    return torch.tensor(rows, dtype=torch.float64).reshape(n, 5).to(dtype), bound


def total(rows, bound):
    """The clipped sum of rows as two parameters of shapes (2,) and (3, 1)."""
    return clipped_sum([rows[:, :2], rows[:, 2:].reshape(len(rows), 3, 1)], bound)


# A byte stands for a number, which is quicker to draw: the special ones and a spread of others.
BYTES = np.array(
    SPECIAL + list(np.geomspace(1e-12, 1e6, 122)) + list(-np.geomspace(1e-9, 9e5, 122))
)


@st.composite
def pages(draw):
    """A page with empty places and possibly many equal rows, and the place of one record."""
    n = draw(st.integers(1, 8))
    said = draw(st.binary(min_size=5 * n, max_size=5 * n))
    rows = torch.from_numpy(BYTES[np.frombuffer(said, np.uint8)].reshape(n, 5))
    rows = rows.to(draw(st.sampled_from([torch.float32, torch.float64])))
    rows = rows.repeat(draw(st.sampled_from([1, 1, 1, 1, 300])), 1)
    keep = np.random.default_rng(draw(st.integers(0, 99))).uniform(size=len(rows)) < 0.8
    bound = draw(st.sampled_from([1e-3, 0.5, 1.0, 1e3]))
    return rows, torch.from_numpy(keep), draw(st.integers(0, len(rows) - 1)), bound


@pytest.mark.slow
@given(pages())
@settings(deadline=None, max_examples=10_000)
def test_any_neighbouring_gradients_move_the_sum_by_at_most_the_bound_and_the_slack(drawn):
    rows, keep, place, bound = drawn
    parts = [rows[:, :2], rows[:, 2:].reshape(len(rows), 3, 1)]
    keep[place] = True
    whole = clipped_sum(parts, bound, keep)
    keep[place] = False
    moved = torch.linalg.vector_norm(whole - clipped_sum(parts, bound, keep)).item()
    assert torch.isfinite(whole).all()
    # In float32 the plan allows more; sums are in float64 whatever the gradients are in.
    assert moved <= bound * (1 + 1e-6) <= bound * (1 + SLACK["float32"])


@given(gradients(), st.lists(numbers, min_size=5, max_size=5))
@settings(deadline=None, max_examples=300)
def test_adding_or_removing_one_row_moves_the_sum_by_at_most_the_bound(drawn, extra):
    rows, bound = drawn
    more = torch.cat([rows, torch.tensor([extra], dtype=torch.float64).to(rows.dtype)])
    moved = torch.linalg.vector_norm(total(more, bound) - total(rows, bound)).item()
    assert moved <= bound * (1 + 1e-9)


def test_the_same_law_catches_a_clip_after_the_sum():
    row, bound = torch.tensor([[100.0, 0, 0, 0, 0]], dtype=torch.float64), 1.0
    more = torch.cat([row, -2 * row])
    late = [rows.sum(dim=0) * bound / rows.sum(dim=0).norm() for rows in (row, more)]
    assert torch.linalg.vector_norm(late[1] - late[0]) > bound * (1 + 1e-6)
    moved = torch.linalg.vector_norm(total(more, bound) - total(row, bound))
    assert moved <= bound * (1 + 1e-6)


def test_a_factor_is_at_most_one_and_zero_for_what_is_not_finite_or_not_kept():
    norms = torch.tensor([0.0, 0.5, 1.0, 4.0, np.inf, np.nan, 0.5], dtype=torch.float64)
    keep = torch.tensor([True] * 6 + [False])
    assert factors(norms, 1.0, keep).tolist() == [1, 1, 1, 0.25, 0, 0, 0]


@given(gradients())
@settings(deadline=None, max_examples=300)
def test_the_sum_is_the_sum_over_subjects_alone(drawn):
    rows, bound = drawn
    alone = sum((total(row[None], bound) for row in rows), torch.zeros(5, dtype=torch.float64))
    assert torch.allclose(total(rows, bound), alone, rtol=1e-12, atol=1e-12 * bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mutant_that_multiplies_by_a_zero_mask_is_caught_by_the_law(dtype):
    row = torch.tensor([[float("inf"), 1, 0, 0, 0]], dtype=dtype)
    mutant = (row * torch.isfinite(row).all(dim=1, keepdim=True)).sum(dim=0)  # 0 * inf
    assert torch.isnan(mutant).any()
    assert total(row, 1.0).tolist() == [0.0] * 5


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_a_gradient_with_one_coordinate_that_is_not_finite_contributes_zero(bad):
    rows = torch.tensor([[3.0, 4.0, 0, 0, 0], [1, 1, 1, 1, bad], [0, 0, 0, 0.3, 0]])
    assert torch.allclose(total(rows, 1.0), torch.tensor([0.6, 0.8, 0, 0.3, 0]).double())


@pytest.mark.parametrize(
    ("row", "bound", "expected"),
    [
        ([3.0, 4.0], 5.0, [3.0, 4.0]),  # on the bound
        ([3.0, 4.0], 6.0, [3.0, 4.0]),  # below it
        ([3.0, 4.0], 1.0, [0.6, 0.8]),  # above it
        ([3e30, 4e30], 1.0, [0.6, 0.8]),  # its square is beyond float32
        ([0.0, 0.0], 1.0, [0.0, 0.0]),
    ],
)
def test_a_gradient_contributes_itself_or_itself_scaled_to_the_bound(row, bound, expected):
    got = clipped_sum([torch.tensor([row], dtype=torch.float32)], bound)
    assert torch.allclose(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-7)


def test_nobody_gives_a_sum_of_zeros_of_the_models_size():
    got = clipped_sum([torch.zeros(0, 4, 3), torch.zeros(0, 2)], 1.0)
    assert got.dtype == torch.float64
    assert got.tolist() == [0.0] * 14


def test_the_bound_is_over_all_parameters_together():
    rows = torch.full((1, 5), 1.0)
    assert torch.linalg.vector_norm(total(rows, 1.0)).item() == pytest.approx(1.0, rel=1e-12)


def squares(outputs, _):
    return outputs.square().sum(dim=1)


def step(model, batches):
    """One step of the optimiser without noise; the sum that it released."""
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer = SubjectOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), PLAN)
    parts = engines.make("hooks", model, squares)
    for batch in batches:
        optimizer.add(parts.clipped_sum(batch, torch.zeros(len(batch)), PLAN.max_grad_norm))
    optimizer.noisy_step(Silent())
    return before - torch.cat([p.detach().flatten() for p in model.parameters()])


def fresh():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def test_a_step_is_the_sum_over_its_micro_batches_and_leaves_nothing_behind():
    inputs = torch.from_numpy(np.random.default_rng(0).standard_normal((12, 3)))
    whole, parts = step(fresh(), [inputs]), step(fresh(), inputs.split([5, 1, 6]))
    assert torch.allclose(whole, parts, atol=1e-12)
    assert torch.linalg.vector_norm(whole) > 1
    assert torch.equal(step(fresh(), []), torch.zeros_like(whole))


def test_a_sum_is_released_once_and_a_dropped_one_never():
    model = fresh()
    optimizer = SubjectOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), PLAN)
    some = torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    optimizer.add(some)
    assert torch.equal(optimizer.noisy_step(Silent()), some)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert not optimizer.noisy_step(Silent()).any()  # nobody was drawn
    optimizer.add(some)
    optimizer.discard()
    assert not optimizer.noisy_step(Silent()).any()
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), after)


class Folded(nn.Module):
    """A model that lays a record's two halves into the batch: Opacus sees two records."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, rows):
        return self.layer(rows.reshape(-1, 2)).reshape(len(rows), -1)


def test_a_layer_that_folds_parts_of_a_record_into_the_batch_cannot_pass_the_clip():
    with pytest.raises(ValueError, match="one gradient for each record"):
        step(Folded().double(), [torch.ones(3, 4, dtype=torch.float64)])
