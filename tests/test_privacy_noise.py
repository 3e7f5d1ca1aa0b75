"""The noise: Gaussian, as large as the plan says, never seeded, never the same twice."""

import copy
import math
import os
import random
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from scipy import stats
from torch import nn

from fedaccord.accord import TrainingSection
from fedaccord.client.train import train_private
from fedaccord.privacy.noise import CHUNK, OsSource, add_noise
from fedaccord.privacy.plan import PrivacyPlan

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

ALPHA = 2e-6  # of each statistical test: 50 of them pass a clean suite 9,999 times in 10,000
DRAWS = 100_000


def plan(noise_multiplier=1.3, max_grad_norm=0.7, steps=2):
    return PrivacyPlan(
        site="ward",
        subjects=50,
        rounds=2,
        steps=steps,
        sampling_prob=0.1,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        delta=1e-5,
    )


def released_noise(agreed):
    """The noise of one released step, in the units of the sum."""
    return agreed.release(np.zeros(DRAWS), OsSource()) * agreed.normaliser


def variance_p(noise, stddev):
    """Chance that Gaussian noise of this standard deviation has a variance as odd as this."""
    squares = float(((noise / stddev) ** 2).sum())
    return 2 * min(stats.chi2.sf(squares, noise.size), stats.chi2.cdf(squares, noise.size))


def correlation_p(one, other):
    """Chance that two independent series correlate as much as these (Fisher's z)."""
    r = float(np.clip(np.corrcoef(one, other)[0, 1], -1 + 1e-15, 1 - 1e-15))
    return 2 * float(stats.norm.sf(abs(np.arctanh(r)) * np.sqrt(len(one) - 3)))


class Fixed:
    """A source with one given number for every draw."""

    def __init__(self, normal):
        self.number = normal

    def uniform(self, count):
        return np.zeros(count)

    def normal(self, count):
        return np.full(count, self.number)


def test_the_stddev_of_a_release_is_noise_multiplier_times_sensitivity():
    agreed = plan()
    stddev = agreed.noise_multiplier * agreed.max_grad_norm * (1 + agreed.slack)
    assert variance_p(released_noise(agreed), stddev) > ALPHA


@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_the_same_test_rejects_noise_that_is_two_per_cent_off(factor):
    assert variance_p(released_noise(plan(1.3 * factor)), plan().noise_stddev) < ALPHA


def test_the_noise_is_normal_with_mean_zero():
    assert stats.kstest(released_noise(plan()) / plan().noise_stddev, "norm").pvalue > ALPHA


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng: rng.laplace(0, np.sqrt(0.5), DRAWS),
        lambda rng: rng.uniform(-np.sqrt(3), np.sqrt(3), DRAWS),
        lambda rng: rng.standard_normal(DRAWS) + 0.03,
        lambda rng: rng.standard_t(10, DRAWS) * np.sqrt(0.8),
    ],
    ids=["Laplace", "uniform", "shifted", "Student"],
)
def test_the_same_test_rejects_other_distributions_of_the_same_variance(draw):
    assert stats.kstest(draw(np.random.default_rng(0)), "norm").pvalue < ALPHA


def test_the_two_halves_of_a_draw_are_independent_in_value_and_in_size():
    whole = DRAWS // CHUNK * CHUNK  # a chunk is cosines, then the sines of the same pairs
    draw = OsSource().normal(DRAWS)[:whole].reshape(-1, 2, CHUNK // 2)
    cosines, sines = draw[:, 0].ravel(), draw[:, 1].ravel()
    assert correlation_p(cosines, sines) > ALPHA
    assert correlation_p(cosines**2, sines**2) > ALPHA
    assert correlation_p(cosines[1:], cosines[:-1]) > ALPHA
    # One radius for both of a pair and no angle: the values look fine, the sizes give it away.
    signs = np.sign(np.random.default_rng(0).uniform(-1, 1, len(cosines)))
    assert correlation_p(cosines, signs * cosines) > ALPHA
    assert correlation_p(cosines**2, (signs * cosines) ** 2) < ALPHA


def test_noise_of_two_steps_rounds_or_sites_does_not_correlate():
    # Every step of every round at every site makes its own source.
    steps = [released_noise(plan()) for _ in range(4)]
    for i in range(4):
        for j in range(i):
            assert correlation_p(steps[i], steps[j]) > ALPHA
    shared = steps[0] + 0.05 * steps[1]
    assert correlation_p(steps[0], shared) < ALPHA
    assert correlation_p(steps[1], shared) < ALPHA


def test_uniform_draws_are_even_multiples_of_2_to_the_minus_53_below_one():
    draws = OsSource().uniform(DRAWS)
    assert draws.min() >= 0
    assert draws.max() < 1
    words = draws * 2.0**53
    assert np.array_equal(words, np.floor(words))
    for part in (words.astype(np.int64) & 255, words.astype(np.int64) >> 45):
        assert stats.chisquare(np.bincount(part, minlength=256)).pvalue > ALPHA
    low = words.astype(np.int64) & 255
    assert stats.chisquare(np.bincount(low & 254, minlength=256) + 1).pvalue < ALPHA


@pytest.mark.parametrize("count", [0, 1, 2, 7, 1_001, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_a_draw_has_as_many_numbers_as_were_asked_for(count):
    assert OsSource().normal(count).shape == OsSource().uniform(count).shape == (count,)


@pytest.mark.parametrize("number", [0.0, 1 - 2.0**-53])
def test_no_uniform_number_makes_infinite_noise(number):
    class Edge(OsSource):
        def uniform(self, count):
            return np.full(count, number)

    assert np.abs(Edge().normal(4)).max() <= 8.58


def test_two_sources_never_share_a_stream():
    streams = {OsSource().uniform(4).tobytes() for _ in range(1_000)}
    assert len(streams) == 1_000


def test_chunks_of_a_draw_do_not_repeat_each_other():
    draw = OsSource().normal(4 * CHUNK + 2).tolist()
    assert len(set(draw)) == len(draw)


def in_child(body):
    """What a forked child computes, as bytes."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, body())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_child_and_its_own_child_draw_what_nobody_else_draws():
    source = OsSource()
    source.uniform(3)

    def draw():
        return source.uniform(4).tobytes() + source.normal(4).tobytes()

    def draw_twice():
        return draw() + in_child(draw)

    said = [in_child(draw), in_child(draw), in_child(draw_twice), draw()]
    numbers = [number for part in said for number in np.frombuffer(part).tolist()]
    assert len(numbers) == 5 * 8
    assert len(set(numbers)) == len(numbers)
    # A stream that knows nothing of forks repeats itself: the test would see it.
    rng = np.random.default_rng()
    twins = [in_child(lambda: rng.random(4).tobytes()) for _ in range(2)]
    assert twins[0] == twins[1] == rng.random(4).tobytes()


def test_a_parent_goes_on_with_its_own_stream_after_a_fork():
    source = OsSource()
    stream = source._stream
    in_child(lambda: source.uniform(1).tobytes())
    source.uniform(1)
    assert source._stream is stream


def test_a_fresh_process_draws_what_the_last_one_did_not():
    code = "from fedaccord.privacy.noise import OsSource; print(OsSource().uniform(4).tolist())"
    said = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert said[0].stdout.startswith("[0.")
    assert said[0].stdout != said[1].stdout


@pytest.mark.parametrize(
    "keep",
    [copy.copy, copy.deepcopy, lambda source: ForkingPickler.dumps(source)],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_source_cannot_be_copied_or_stored(keep):
    with pytest.raises(TypeError, match="never copied or stored"):
        keep(OsSource())


sums = st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=5)


@given(sums, st.floats(-8, 8), st.floats(0.3, 1e3))
@settings(deadline=None)
def test_a_release_is_the_noisy_sum_on_the_plans_public_grid(total, normal, sigma):
    agreed, total = plan(sigma), np.array(total)
    grid = agreed.grid
    got = add_noise(total, agreed.noise_stddev, grid, Fixed(normal))
    noisy = total + agreed.noise_stddev * normal
    assert math.log2(grid).is_integer()
    assert agreed.noise_stddev * 2.0**-21 < grid <= agreed.noise_stddev * 2.0**-20
    assert np.array_equal(got / grid, np.round(got / grid))
    assert np.abs(got - noisy).max() <= grid / 2
    assert np.array_equal(agreed.release(total, Fixed(normal)), got / agreed.normaliser)


def low_bits(values, grid):
    return np.mod(values, grid)


def test_noise_rounded_before_it_is_added_leaks_the_low_bits_of_the_sum_and_ours_does_not():
    agreed = plan()
    grid, rng = agreed.grid, np.random.default_rng(0)
    one = rng.integers(0, 2**20, 100) * grid / 2**12  # any multiples of grid / 4096
    other = rng.integers(0, 2**20, 100) * grid / 2**12

    def leaky(total):
        noise = agreed.noise_stddev * OsSource().normal(100)
        return total + np.round(noise / grid) * grid

    def ours(total):
        return add_noise(total, agreed.noise_stddev, grid, OsSource())

    assert np.array_equal(low_bits(leaky(one), grid), low_bits(one, grid))
    assert not np.array_equal(low_bits(one, grid), low_bits(other, grid))
    assert not low_bits(ours(one), grid).any()
    assert not low_bits(ours(other), grid).any()


def seed_everything():
    torch.manual_seed(7)
    np.random.seed(7)  # the global state is the point
    random.seed(7)


def states():
    return (
        torch.get_rng_state().numpy().tobytes(),
        np.random.get_state()[1].tobytes(),
        random.getstate(),
    )


def small():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(20, 10)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()


def private_round():
    """What one round of noise alone adds to a model."""
    model = small()
    before = weights(model)
    train_private(model, None, plan(), TrainingSection(steps=2, learning_rate=1.0))
    return weights(model) - before


def opacus_round():
    """The same with Opacus' own optimiser and its default source, torch's global generator."""
    model = GradSampleModule(small(), loss_reduction="sum")
    before = weights(model)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        noise_multiplier=1.3,
        max_grad_norm=0.7,
        expected_batch_size=None,
        loss_reduction="sum",
    )
    model(torch.zeros(1, 20)).sum().backward()
    optimizer.step()
    return weights(model) - before


def test_rounds_after_the_same_global_seeds_have_different_noise():
    seed_everything()
    one = private_round()
    seed_everything()
    other = private_round()
    assert np.linalg.norm(one) > 0.1
    assert (one != other).mean() > 0.9
    assert correlation_p(one, other) > ALPHA
    assert correlation_p(one, one) < ALPHA


def test_opacus_default_noise_repeats_exactly_after_the_same_torch_seed():
    seed_everything()
    one = opacus_round()
    seed_everything()
    assert np.linalg.norm(one) > 0.1
    assert np.array_equal(one, opacus_round())


def test_a_private_round_neither_reads_nor_moves_the_global_generators():
    seed_everything()
    before = states()
    private_round()
    assert states() == before
