"""Views: a record's views are one contribution, drawn for each record, of the record's shape."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedaccord.errors import AccordError
from fedaccord.privacy import engines, views
from fedaccord.privacy.probe import probe
from fedaccord.privacy.views import AUGMENTATIONS, Views

torch.set_num_threads(1)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 64, 3)
    ).double()


def batch(count, seed=0):
    rng = np.random.default_rng(seed)
    inputs = torch.from_numpy(rng.uniform(-1, 1, (count, 1, 8, 8)))
    return inputs, torch.from_numpy(rng.integers(0, 3, count))


def of_one(model, loss, inputs, labels):
    """The gradient of one record's loss by plain autograd, float64 (d,)."""
    torch.manual_seed(1)
    total = loss(model(inputs), labels).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))])


@pytest.mark.parametrize("count", [1, 4])
def test_views_that_do_not_differ_change_no_gradient(count):
    model, (inputs, labels) = network(), batch(5)
    seen = Views(count, "none")
    plain = engines.make("bookkeeping", model, measured=False).clipped_sum(inputs, labels, 0.1)
    loss = seen.loss(engines.cross_entropy)
    viewed = engines.make("bookkeeping", seen.model(model), loss, measured=False)
    assert torch.allclose(viewed.clipped_sum(inputs, labels, 0.1), plain, rtol=0, atol=1e-15)


@pytest.mark.parametrize("augmentation", ["noise", "shift", "shift-flip"])
def test_a_records_views_are_averaged_before_they_are_clipped(augmentation):
    model, (inputs, labels) = network(), batch(1)
    seen = Views(5, augmentation)
    viewed, loss = seen.model(model), seen.loss(engines.cross_entropy)
    torch.manual_seed(1)
    views_of_one = AUGMENTATIONS[augmentation](inputs.repeat_interleave(5, 0))
    assert len(torch.unique(views_of_one.flatten(1), dim=0)) > 1
    rows = [of_one(model, engines.cross_entropy, view[None], labels) for view in views_of_one]
    mean = torch.stack(rows).mean(0)
    bound = float(mean.norm()) / 3
    torch.manual_seed(1)
    got = engines.make("bookkeeping", viewed, loss, measured=False).clipped_sum(
        inputs, labels, bound
    )
    assert torch.allclose(got, mean / 3, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("augmentation", ["noise", "shift", "shift-flip"])
def test_the_probe_takes_views_under_bookkeeping_and_refuses_them_where_they_are_not_averaged(
    augmentation,
):
    model, (inputs, labels) = network(), batch(60)
    seen = Views(3, augmentation)
    viewed, loss = seen.model(model), seen.loss(engines.cross_entropy)
    probe(viewed, "bookkeeping", "float64", loss, inputs, labels)
    with pytest.raises(AccordError):
        probe(viewed, "hooks", "float64", loss, inputs, labels)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**20))
def test_a_shift_moves_an_image_as_a_whole_and_lets_zeros_in(height, width, depth, seed):
    torch.manual_seed(seed)
    images = torch.arange(1.0, 1 + 2 * depth * height * width).view(2, depth, height, width)
    moved = views.shifted(images)
    down, right = max(1, height // views.REACH), max(1, width // views.REACH)
    wide = nn.functional.pad(images, (right, right, down, down))
    for image, padded in zip(moved, wide, strict=True):
        assert any(
            torch.equal(image, padded[:, y : y + height, x : x + width])
            for y in range(2 * down + 1)
            for x in range(2 * right + 1)
        )


def test_shifts_and_flips_are_drawn_for_each_image_and_all_of_them_occur():
    torch.manual_seed(0)
    images = torch.arange(64.0).view(1, 1, 8, 8).expand(400, 1, 8, 8)
    assert len(torch.unique(views.shifted(images).flatten(1), dim=0)) == 9
    turned = torch.unique(views.flipped(images).flatten(1), dim=0)
    assert len(turned) == 2
    assert torch.equal(turned[1].view(8, 8).flip(1), turned[0].view(8, 8)) or torch.equal(
        turned[0].view(8, 8).flip(1), turned[1].view(8, 8)
    )


def test_noise_has_the_stated_deviation_and_keeps_the_precision():
    torch.manual_seed(0)
    rows = torch.zeros(200, 500, dtype=torch.bfloat16)
    assert views.noisy(rows).dtype == torch.bfloat16
    assert abs(float(views.noisy(rows.double()).std()) - views.NOISE) < 0.01 * views.NOISE
