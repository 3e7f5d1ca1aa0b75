"""Training without privacy, for comparison: it repeats bit for bit and draws from nowhere else."""

import numpy as np
import torch

from fedaccord.accord import TrainingSection
from fedaccord.client import train
from fedaccord.models.build import build
from fedaccord.tasks import Records, TaskSpec

SPEC = TaskSpec("ward", ("a", "b", "c", "d", "e"), ("no", "yes"), {}, "made for tests")


def some(n):
    rng = np.random.default_rng(0)
    inputs = rng.uniform(-1, 1, (n, 5)).astype(np.float32)
    return Records(inputs, rng.integers(0, 2, n), np.arange(n), {})


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def plain(seed, n=40):
    model = build("cnn1d", SPEC, {}, 0)
    training = TrainingSection(steps=5, learning_rate=0.1, momentum=0.5)
    source = train.SeededSource(*seed)
    train.train_plain(model, some(n), 0.3, 12.0, training, source)
    return flat(model)


def test_training_without_privacy_repeats_bit_for_bit_and_leaves_torchs_generator_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = plain((0, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(plain((0, 1, 2)), one)
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert not torch.equal(plain(other), one)


def test_training_without_privacy_on_no_records_changes_nothing():
    assert torch.equal(plain((0, 1, 2), n=0), flat(build("cnn1d", SPEC, {}, 0)))
