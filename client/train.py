"""A round of training at a site: under its privacy plan, or plainly where privacy is off."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from opacus.validators import ModuleValidator
from torch import nn

from fedaccord.accord import TrainingSection
from fedaccord.client.columns import usable
from fedaccord.client.diary import log
from fedaccord.client.passes import How, Passes, add_page
from fedaccord.client.pull import NOTHING, Pull
from fedaccord.errors import AccordError
from fedaccord.privacy import engines
from fedaccord.privacy.clipping import SubjectOptimizer
from fedaccord.privacy.noise import OsSource, Source
from fedaccord.privacy.plan import PrivacyPlan
from fedaccord.privacy.sampling import SubjectSampler, page_shape, pages
from fedaccord.privacy.views import Views
from fedaccord.tasks import Records

USUAL = How()
MAX_WEIGHT = 100.0  # largest magnitude that a model to be trained privately may hold


def refuse_unsafe(model: nn.Module) -> None:
    """Refuse layers that mix subjects, that Opacus cannot take apart, or that keep statistics.

    Raises:
        AccordError: the first such layer, by Opacus' own validator; or the first buffer, since what
            a forward pass writes there would leave the site without noise.
    """
    faults = ModuleValidator.validate(model, strict=False)
    if faults:
        first = str(faults[0]).split("\n")[0]
        raise AccordError(f"model: {first} Choose a model without it (GroupNorm, LayerNorm).")
    trained = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in model.state_dict():
        if name not in trained:
            raise AccordError(
                f"model: {name} is a buffer, which would be released without noise. Choose a model "
                "without it, or register it with persistent=False."
            )


def refuse_weights(model: nn.Module) -> None:
    """Refuse weights under which rounding could carry more than the plan's slack.

    Weights that a coordinator chooses far from any trained ones make large terms cancel, and then
    a record's gradient depends on its place in the batch, so on who else is in it. In float64 and
    below this bound that stays far under the slack. It looks at what was sent, not at records.

    Raises:
        AccordError: the first parameter with a weight that is not finite or above MAX_WEIGHT.
    """
    for name, value in model.named_parameters():
        if not bool((value.abs() <= MAX_WEIGHT).all()):
            raise AccordError(
                f"model: {name} holds a weight that is not finite or above {MAX_WEIGHT:g} in "
                "magnitude, under which rounding is not covered. Send a model that was trained."
            )


def train_private(
    model: nn.Module,
    records: Records | None,
    plan: PrivacyPlan,
    training: TrainingSection,
    entropy: Callable[[], Source] = OsSource,
    how: How = USUAL,
    pull: Pull = NOTHING,
) -> None:
    """Train a model in place for one round under a plan (DP-SGD, Abadi et al. 2016).

    The weights that result are (epsilon, delta)-DP per subject, at the cost of one round of the
    plan's event. Number of steps, message size and shape do not depend on the records; timing does.
    A record's gradient depends on the record and its place on a page of public shape, not on who
    else is there (see `sampling.pages`), so weights that a coordinator chose to make rounding large
    let no subject change another's. Weights themselves are held in float64.

    | data | a step |
    |---|---|
    | nobody drawn | noise alone |
    | a record that makes the model raise | that record contributes zero, the others as ever |
    | no records at all, or unreadable (None) | noise alone |
    | a record whose subject or label is no whole number, or whose inputs are no numbers | without that record (`columns.usable`) |
    | subjects that cannot be told apart (a column of another type) | noise alone |

    Args:
        model: on the CPU; changed in place, and held in float64 meanwhile.
        records: the site's training records, or None.
        plan: the site's reserved plan.
        training: steps, learning rate, momentum.
        entropy: makes a fresh source of randomness for every step.
        how: engine, precision and size of a page.
        pull: what the strategy adds to each released step.

    Raises:
        AccordError: a layer that the engine cannot take apart, or weights that did not move.
    """  # noqa: E501  (a table row cannot be broken)
    dtype, device = next(model.parameters()).dtype, torch.device(how.device)
    model.double()
    views = Views(training.views, training.augmentation)
    passes = Passes(model, how, views, plan.max_grad_norm)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = SubjectOptimizer(_optimizer(trained, training), plan)
    records, sampler = _indexed(plan, records)
    pulled = pull.start(model)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            if records is not None:
                passes.warm(records, page_shape(plan.normaliser, how.page_rows)[1])
            for step in range(plan.steps):
                source = entropy()
                rows = sampler.draw(source)
                # Dropout's masks come from the step's entropy too: no seed of torch's reaches them.
                masks = int(source.uniform(1)[0] * 2**53)
                for page in pages(rows, plan.normaliser, how.page_rows, source):
                    assert records is not None
                    add_page(passes, optimizer, records, page, masks)
                before = [] if step else _copies(model)
                mean = optimizer.noisy_step(source, pulled.add if pulled else None)
                if step == 0:
                    refuse_still(before, model, mean)
    finally:
        model.to(dtype)


def _optimizer(weights: list[nn.Parameter], training: TrainingSection) -> torch.optim.Optimizer:
    """Make the optimiser of a round; under a plan it sees released gradients alone."""
    if training.optimizer == "adam":
        return torch.optim.Adam(weights, training.learning_rate)
    return torch.optim.SGD(weights, training.learning_rate, training.momentum)


def _copies(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def refuse_still(before: list[torch.Tensor], model: nn.Module, released: torch.Tensor) -> None:
    """Refuse a model whose weights stay where they were although a private step was released.

    A known fault: weights were replaced after the optimiser had taken hold of them (adapters moved
    late to another device), and a run pays epsilon for nothing. It looks at the released step,
    noise included, not at records.

    Args:
        before: the trained weights before the step, one tensor a parameter.
        model: after the step.
        released: what the step released, float64 (d,).

    Raises:
        AccordError: the first parameter that did not move where its part of the release is not 0.
    """
    offset = 0
    after = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for (name, value), old in zip(after, before, strict=True):
        part = released[offset : offset + value.numel()]
        offset += value.numel()
        if bool(part.any()) and torch.equal(value.detach().to(old.device, old.dtype), old):
            raise AccordError(
                f"model: {name} did not move in a private step, so training would spend epsilon "
                "for nothing. Build the model before it is trained, and move it to its device "
                "before adapters are added, or freeze the parameter."
            )


def _indexed(plan: PrivacyPlan, records: Records | None) -> tuple[Records | None, SubjectSampler]:
    """Index the usable records by subject; where none can be told to be so, there is nobody."""
    try:
        if records is not None:
            kept = usable(records)
            return kept, plan.sampler(kept.subjects)
    except Exception:
        log.exception("the training records cannot be indexed")
    return None, plan.sampler(np.zeros(0, np.int64))


def train_plain(
    model: nn.Module,
    records: Records,
    sampling_prob: float,
    normaliser: float,
    training: TrainingSection,
    source: Source,
    pull: Pull = NOTHING,
    masks: int = 0,
) -> None:
    """Train a model in place for one round without any protection, for comparison.

    Sampling and normaliser are those of private training; there is no clip and no noise. All chance
    comes from source and masks, so equal ones give equal models.

    Args:
        model: changed in place.
        records: the site's training records.
        sampling_prob: Poisson inclusion of a subject per step.
        normaliser: what the summed gradient is divided by.
        training: steps, learning rate, momentum.
        source: seeded, so that equal runs give equal models.
        pull: what the strategy adds to each step.
        masks: seed of dropout's masks and of views.
    """
    device = next(model.parameters()).device
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, pulled = _optimizer(trained, training), pull.start(model)
    views = Views(training.views, training.augmentation)
    seen, loss = views.model(model.train()), views.loss(engines.cross_entropy)
    sampler = SubjectSampler(records.subjects, sampling_prob)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(masks)
        for _ in range(training.steps):
            rows = sampler.draw(source)
            if len(rows) == 0 and pulled is None:
                continue
            optimizer.zero_grad()
            if len(rows):
                inputs = torch.from_numpy(records.inputs[rows]).to(device)
                labels = torch.from_numpy(records.labels[rows]).to(device)
                (loss(seen(inputs), labels).sum() / normaliser).backward()
            if pulled:
                pulled.add()
            optimizer.step()


class SeededSource:
    """A reproducible source of draws, for training without privacy only."""

    def __init__(self, *seed: int) -> None:
        self._rng = np.random.default_rng(list(seed))

    def uniform(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Draw uniform numbers in [0, 1)."""
        return self._rng.random(count)

    def normal(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Draw standard normal numbers."""
        return self._rng.standard_normal(count)
