"""What tests of a site share: a made-up task, a source without noise, a plan that watches."""

import json
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from fedaccord import accord as accords
from fedaccord.accord import TrainingSection
from fedaccord.privacy.plan import PrivacyPlan
from fedaccord.reports.verify import verify
from fedaccord.tasks import Records, TaskSpec

WIDTH = 13  # odd, so that rows of a batch lie differently in memory
SPEC = TaskSpec("ward", tuple(f"f{i}" for i in range(WIDTH)), ("a", "b"), {}, "made for tests")
OWN_TABLE = """
name = "ours"
purpose = "Predict readmission from what is known at discharge."
sites = [{ name = "north", subjects = 40 }, { name = "south", subjects = 30 }]
model = { name = "mlp" }
rounds = { rounds = 2 }
training = { steps = 2, learning_rate = 0.5 }
privacy = { noise_multiplier = 2.0, sampling_prob = 0.2 }
fairness = { attributes = ["sex"] }

[task]
kind = "table"
dataset = "wards"
file = "wards.csv"
site_column = "ward"
subject = "patient"
label = { column = "again", classes = ["no", "yes"] }
attributes = { sex = ["female", "male"] }
inputs.age = { min = 18, max = 110 }
inputs.smoker = { values = ["no", "yes"] }
"""  # an accord over one CSV with a site column
Call = Callable[..., tuple[int, str, str]]  # the fixture `called`: exit code, output, errors
STEP = TrainingSection(steps=1, learning_rate=1.0)


class Silent:
    """A source that draws everybody's first record and no noise."""

    def uniform(self, count):
        return np.zeros(count)

    def normal(self, count):
        return np.zeros(count)


class Watched(PrivacyPlan):
    """A plan that notes the sums that it is given to release; its grid is as good as none."""

    grid = 2.0**-60

    def release(self, total, source):
        self.__dict__.setdefault("totals", []).append(total.copy())
        return super().release(total, source)

    @property
    def total(self):
        return sum(self.totals)


def plan(**change):
    declared = {
        "site": "ward",
        "subjects": 40,
        "rounds": 1,
        "steps": 1,
        "sampling_prob": 1.0,
        "noise_multiplier": 1.0,  # Silent makes none of it
        "max_grad_norm": 1.0,
        "delta": 1e-5,
    }
    return Watched(**declared | change)


def toml(value):
    """Write a value of an accord as TOML on one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


def faults(run):
    """What `verify` finds in a run, but for a report that was not written."""
    return [fault for found in verify(run) for fault in found.faults if "report" not in fault]


def some(n, seed=0):
    rng = np.random.default_rng(seed)
    inputs = rng.uniform(-1, 1, (n, WIDTH)).astype(np.float32)
    return Records(inputs, rng.integers(0, 2, n), np.arange(n), {})


def flat(model):
    return torch.cat([p.detach().flatten().double().clone() for p in model.parameters()])


def small_accord():
    """An accord of one site, as a dict that a test may change."""
    return {
        "name": "small",
        "purpose": "to be tested",
        "task": {"name": "heart"},
        "sites": [{"name": "cleveland", "subjects": 200, "records": 260}],
        "model": {"name": "cnn1d"},
        "rounds": {"rounds": 3},
        "training": {"steps": 2, "learning_rate": 0.5},
        "privacy": {"noise_multiplier": 3.0, "sampling_prob": 0.1, "delta": 1e-5},
        "fairness": {"attributes": ["sex"], "min_group": 10},
    }


def own_accord(task):
    """An accord of one site over a [task] of its own data."""
    data = small_accord() | {"task": task, "sites": [{"name": "north", "subjects": 10}]}
    return accords.parse(data | {"model": {"name": "mlp"}})


def steep():
    """A deep perceptron whose weights a coordinator chose: terms cancel for equal inputs."""
    rng, layers = np.random.default_rng(1), []
    for _ in range(5):
        layers += [nn.Linear(16, 16), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(16, 2))
    for parameter in model.parameters():
        values = np.zeros(parameter.shape)
        if parameter.dim() == 2:
            half = rng.uniform(30, 100, (len(parameter), 8))
            values = np.concatenate([half, -half], axis=1)[:, rng.permutation(16)]
        parameter.data.copy_(torch.from_numpy(values))
    return model
