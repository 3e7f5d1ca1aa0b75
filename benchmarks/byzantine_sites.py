"""The sites of `benchmarks.byzantine`: skewed records, and their training, all sites at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from fedaccord.accord import TrainingSection
from fedaccord.client.passes import How
from fedaccord.client.train import train_private
from fedaccord.models.build import build
from fedaccord.privacy.accounting import calibrate
from fedaccord.privacy.plan import PrivacyPlan
from fedaccord.simulations import partition, split_plot
from fedaccord.strategies.updates import Weights, flat
from fedaccord.tasks import Records, load_task

Floats = npt.NDArray[np.float64]

F, SITES, ALPHA = 2, 11, 0.3
MIN_SIZE = 20  # records of the smallest site
HIDDEN = 32
DELTA = 1e-4  # as in the accord digits
SAMPLING_PROB = 0.5  # of a subject in a step, under privacy


@dataclass(frozen=True)
class Federation:
    """Sites with skewed records, and how they train.

    Attributes:
        sites: each site's records; the last F are hostile.
        test: images and labels that nobody trains on.
        training: of a site in a round.
        rounds: how many.
        epsilon: each site's own, at DELTA over all rounds; None without privacy.
        seed: of the split and of the first model.
    """

    sites: tuple[Records, ...]
    test: tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]
    training: TrainingSection
    rounds: int
    epsilon: float | None
    seed: int

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sites, in order."""
        return tuple(f"site-{place:02}" for place in range(1, len(self.sites) + 1))

    def model(self) -> nn.Module:
        """Build the first model."""
        return build("mlp", load_task("digits").spec, {"hidden": HIDDEN}, self.seed)


def federation(
    seed: int, rounds: int, steps: int, rate: float, epsilon: float | None = None
) -> Federation:
    """Divide the records of the task digits, all offices together, by Dirichlet(ALPHA) of labels.

    Args:
        seed: of the split and of the first model.
        rounds: of training.
        steps: of a site in a round.
        rate: learning rate.
        epsilon: of each site; None without privacy.
    """
    task: Any = load_task("digits")
    pool = split_plot.pooled(task, task.sites)
    rng = np.random.default_rng(seed)
    parts = partition.dirichlet_labels(pool.labels, SITES, ALPHA, rng, MIN_SIZE, pool.subjects)
    return Federation(
        sites=tuple(_some(pool, part) for part in parts),
        test=task.labelled(),
        training=TrainingSection(steps=steps, learning_rate=rate),
        rounds=rounds,
        epsilon=epsilon,
        seed=seed,
    )


def _some(pool: Records, rows: partition.Indices) -> Records:
    groups = {name: codes[rows] for name, codes in pool.groups.items()}
    return Records(pool.inputs[rows], pool.labels[rows], pool.subjects[rows], groups)


def flipped(records: Records) -> Records:
    """Turn labels round: 0 becomes 9, 1 becomes 8, and so on."""
    return Records(records.inputs, 9 - records.labels, records.subjects, records.groups)


class PlainSites:
    """Sites that train without privacy, each on all its records in every step.

    It is what `client.train.train_plain` does with sampling_prob 1, for the perceptron alone, with
    all sites in one product of matrices; a test holds the two to each other.
    """

    def __init__(self, sites: list[Records], training: TrainingSection) -> None:
        """Lay the records out, (sites, most records of one, pixels); empty places weigh nothing."""
        most = max(map(len, sites))
        pixels = int(np.prod(sites[0].inputs.shape[1:]))
        self._inputs = torch.zeros(len(sites), most, pixels)
        self._labels = torch.zeros(len(sites), most, dtype=torch.int64)
        self._share = torch.zeros(len(sites), most)
        for place, records in enumerate(sites):
            count = len(records)
            self._inputs[place, :count] = torch.from_numpy(records.inputs.reshape(count, pixels))
            self._labels[place, :count] = torch.from_numpy(records.labels)
            self._share[place, :count] = 1 / count
        self._training = training

    def updates(self, model: Weights) -> Floats:
        """Train every site from a model; what that added to the weights, (sites, d)."""
        count = len(self._inputs)
        start = [torch.from_numpy(value) for value in model.values()]
        now = [value.expand(count, *value.shape).clone().requires_grad_() for value in start]
        for _ in range(self._training.steps):
            first, first_bias, last, last_bias = now
            hidden = torch.baddbmm(first_bias[:, None], self._inputs, first.transpose(1, 2)).tanh()
            logits = torch.baddbmm(last_bias[:, None], hidden, last.transpose(1, 2))
            losses = functional.cross_entropy(
                logits.flatten(0, 1), self._labels.flatten(), reduction="none"
            )
            gradients = torch.autograd.grad((losses * self._share.flatten()).sum(), now)
            with torch.no_grad():
                for value, gradient in zip(now, gradients, strict=True):
                    value.sub_(gradient, alpha=self._training.learning_rate)
        with torch.no_grad():
            moved = [(after - before).flatten(1) for after, before in zip(now, start, strict=True)]
            return torch.cat(moved, dim=1).double().numpy()


class PrivateSites:
    """Sites that train as FedAccord's do under their own privacy plan: subject-level DP-SGD."""

    def __init__(self, sites: list[Records], of: Federation) -> None:
        """Calibrate the noise to the federation's epsilon."""
        assert of.epsilon is not None
        steps = of.training.steps
        sigma = calibrate(of.epsilon, DELTA, SAMPLING_PROB, of.rounds * steps)
        self._sites, self._training, self._module = sites, of.training, of.model()
        self.plans = [
            PrivacyPlan(
                site=name,
                subjects=len(records),
                rounds=of.rounds,
                steps=steps,
                sampling_prob=SAMPLING_PROB,
                noise_multiplier=sigma,
                max_grad_norm=1.0,
                delta=DELTA,
            )
            for name, records in zip(of.names, sites, strict=False)
        ]

    def updates(self, model: Weights) -> Floats:
        """Train every site from a model; what that added to the weights, (sites, d)."""
        rows = []
        for records, plan in zip(self._sites, self.plans, strict=True):
            write(self._module, model)
            how = How(measured=False)
            train_private(self._module, records, plan, self._training, how=how)
            rows.append(flat(read(self._module)) - flat(model))
        return np.stack(rows)


def read(module: nn.Module) -> Weights:
    """Copy a model's weights."""
    return {name: value.detach().numpy().copy() for name, value in module.state_dict().items()}


def write(module: nn.Module, weights: Weights) -> None:
    """Put weights into a model."""
    module.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
