"""A round of training at a site: under its privacy plan, or plainly where privacy is off."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.validators import ModuleValidator
from torch import nn
from torch.nn import functional

from fedaccord.accord import TrainingSection
from fedaccord.errors import AccordError
from fedaccord.privacy.clipping import SubjectOptimizer
from fedaccord.privacy.noise import OsSource, Source
from fedaccord.privacy.plan import PrivacyPlan
from fedaccord.privacy.sampling import SubjectSampler
from fedaccord.tasks import Records

MAX_WEIGHT = 100.0  # largest magnitude that a model to be trained privately may hold
MICRO_BATCH = 256  # records per forward pass; bounds memory, changes no result
log = logging.getLogger("fedaccord.site")

# Inputs need no gradient, which Opacus' hooks are told by torch at every step; they are right.
warnings.filterwarnings("ignore", message="Full backward hook is firing")


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
) -> None:
    """Train a model in place for one round under a plan (DP-SGD, Abadi et al. 2016).

    The weights that result are (epsilon, delta)-DP per subject, at the cost of one round of the
    plan's event. Number of steps, message size and shape do not depend on the records; timing does.
    Forward and backward passes run in float64: in float32 a record's gradient depends on its place
    in the batch, and weights chosen for it let one subject change all the others' (see ROUNDING).

    | data | a step |
    |---|---|
    | nobody drawn | noise alone |
    | a record that makes the model raise | that record contributes zero, the others as ever |
    | no records at all, or unreadable (None) | noise alone |
    | subjects that cannot be told apart (no column of whole numbers) | noise alone |

    Args:
        model: float32 model on any device with float64; changed in place.
        records: the site's training records, or None.
        plan: the site's reserved plan.
        training: steps, learning rate, momentum.
        entropy: makes a fresh source of randomness for every step.
    """
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    wrapped = GradSampleModule(model.double(), loss_reduction="sum")
    sgd = torch.optim.SGD(model.parameters(), training.learning_rate, training.momentum)
    optimizer = SubjectOptimizer(sgd, plan)
    sampler = _sampler(plan, records)
    with torch.random.fork_rng(devices=[]):
        for _ in range(plan.steps):
            source = entropy()
            rows = sampler.draw(source)
            # Dropout's masks: were they known, a subject would change its neighbours' by its place.
            torch.default_generator.manual_seed(int(source.uniform(1)[0] * 2**53))
            for start in range(0, len(rows), MICRO_BATCH):
                assert records is not None
                _accumulate(wrapped, optimizer, records, rows[start : start + MICRO_BATCH], device)
            optimizer.noisy_step(source)
    wrapped.cleanup()
    model.to(dtype)


def _sampler(plan: PrivacyPlan, records: Records | None) -> SubjectSampler:
    """Index the records by subject; what cannot be indexed counts as nobody."""
    nobody = np.zeros(0, np.int64)
    try:
        return plan.sampler(nobody if records is None else records.subjects)
    except Exception:
        log.exception("the subjects of the training records cannot be indexed")
        return plan.sampler(nobody)


def _accumulate(
    model: nn.Module,
    optimizer: SubjectOptimizer,
    records: Records,
    rows: np.ndarray[tuple[int], np.dtype[np.int64]],
    device: torch.device,
) -> None:
    """Add the clipped gradients of some records; a record that raises contributes zero.

    A batch that raises is halved until the record that raises is alone, so that one subject's
    record never removes the others.
    """
    try:
        inputs = torch.from_numpy(records.inputs[rows]).to(device, torch.float64)
        labels = torch.from_numpy(records.labels[rows]).to(device)
        functional.cross_entropy(model(inputs), labels, reduction="sum").backward()
        optimizer.accumulate(len(rows))
    except Exception as fault:  # any fault of the data; the site's own log has it
        _forget_pass(model, optimizer)
        log.warning("a micro-batch of %d records raised %s", len(rows), type(fault).__name__)
        half = len(rows) // 2
        for part in (rows[:half], rows[half:]) if half else ():
            _accumulate(model, optimizer, records, part, device)


def _forget_pass(model: nn.Module, optimizer: SubjectOptimizer) -> None:
    """Take back what a pass that was cut short left on the model.

    Opacus keeps activations on each layer and a count of forward passes on each parameter. Left
    there, they make every later batch raise as well: one record would silence all others.
    """
    optimizer.forget()
    for module in model.modules():
        for mark in ("activations", "max_batch_len"):
            vars(module).pop(mark, None)
    for parameter in model.parameters():
        vars(parameter)["_forward_counter"] = 0
        vars(parameter).pop("_current_grad_sample", None)


def train_plain(
    model: nn.Module,
    records: Records,
    sampling_prob: float,
    normaliser: float,
    training: TrainingSection,
    source: Source,
) -> None:
    """Train a model in place for one round without any protection, for comparison.

    Sampling and normaliser are those of private training; there is no clip and no noise.

    Args:
        model: changed in place.
        records: the site's training records.
        sampling_prob: Poisson inclusion of a subject per step.
        normaliser: what the summed gradient is divided by.
        training: steps, learning rate, momentum.
        source: seeded, so that equal runs give equal models.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(model.parameters(), training.learning_rate, training.momentum)
    sampler = SubjectSampler(records.subjects, sampling_prob)
    for _ in range(training.steps):
        rows = sampler.draw(source)
        if len(rows) == 0:
            continue
        inputs = torch.from_numpy(records.inputs[rows]).to(device)
        labels = torch.from_numpy(records.labels[rows]).to(device)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), labels, reduction="sum")
        (loss / normaliser).backward()
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
