"""A GPU trains as the CPU does: one private round without noise, within rounding."""

import numpy as np
import pytest
import torch
from wards import Silent, plan

from fedaccord import data
from fedaccord.accord import TrainingSection
from fedaccord.client.passes import How
from fedaccord.client.train import train_private
from fedaccord.models.build import build, trained
from fedaccord.models.pretrained import Pretrained
from fedaccord.tasks import Records, TaskSpec

gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device here; this runs where there is one"
)
STEP = TrainingSection(steps=2, learning_rate=0.5)
MINILM = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
IMAGES = TaskSpec("images", (), ("a", "b", "c"), {}, "made for tests", shape=(1, 28, 28))
TEXTS = TaskSpec("texts", (), ("a", "b"), {}, "made for tests", shape=(32,), vocabulary=30_522)


def records(spec, count=24):
    rng = np.random.default_rng(0)
    inputs = rng.uniform(-1, 1, (count, *spec.shape)).astype(np.float32)
    if spec.vocabulary:
        inputs = rng.integers(1, spec.vocabulary, (count, *spec.shape))
    return Records(inputs, rng.integers(0, len(spec.classes), count), np.arange(count), {})


def moved(spec, make, device):
    """How far one round without noise moves the trained weights, float64 (d,)."""
    model = make()
    before = {name: value.clone() for name, value in trained(model).items()}
    agreed = plan(subjects=24, steps=2, max_grad_norm=0.1)
    how = How("bookkeeping", "float32", 16, device=device)
    train_private(model, records(spec), agreed, STEP, Silent, how)
    return torch.cat([(v - before[n]).flatten().double() for n, v in trained(model).items()])


def text(**options):
    if "minilm" in {item.name for item in data.items()} and data.fetched("minilm"):
        weights = Pretrained("minilm", MINILM)
        return build("text", TEXTS, {"tuning": "lora", "layers": 2}, 0, weights)
    return build("text", TEXTS, {"tuning": "full", "width": 32, "layers": 1, "heads": 2}, 0)


@gpu
@pytest.mark.parametrize(
    ("spec", "make"),
    [(IMAGES, lambda: build("cnn2d", IMAGES, {}, 0)), (TEXTS, text)],
    ids=["cnn2d", "text"],
)
def test_a_private_round_on_a_gpu_is_the_cpus_within_rounding(spec, make):
    there, here = (moved(spec, make, device) for device in ("cuda", "cpu"))
    assert here.norm() > 0
    assert (there - here).norm() < 1e-3 * here.norm()
