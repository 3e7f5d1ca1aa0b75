"""The probe: does a model, loss and engine bound each subject? Asked of synthetic records only.

It runs before a site writes its INTENT. A first look at private records would be a release of its
own, so nothing private is given to it: inputs come from `Task.public`, labels are drawn.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from fedaccord.errors import AccordError
from fedaccord.privacy import engines
from fedaccord.privacy.plainly import SEEDS, Plain, raised
from fedaccord.privacy.plan import SLACK, PrivacyPlan
from fedaccord.privacy.sampling import MICRO_BATCH, page_shape
from fedaccord.tasks import Task

ROWS = 51  # synthetic records that a probe needs: three of its largest batch
PAGE = 64  # rows of the page that is probed in the plan's precision, where there is no plan
EXACT = 1e-9  # relative to a gradient's norm, in float64, where nothing at all should differ
SAME = 1e-6  # the same for batches of different shapes, whose rounding a deep model magnifies


@dataclass(frozen=True)
class Extent:
    """How much a probe tries: of a large model less, since a pass of it takes seconds."""

    sizes: tuple[int, ...] = (1, 2, 3, 8, 17)  # records in a batch
    seeds: tuple[int, ...] = SEEDS
    others: int = 4  # records that one is replaced by
    leaving: int = 3  # records that leave a page, one at a time
    clips: tuple[float, ...] = (1, 1e-3)  # x max_grad_norm: some gradients whole; all clipped
    rows: int = 2**16  # of a page in the plan's precision, at most


FULL = Extent()
LARGE = 10**6  # weights from which a model is large
BRIEF = Extent(sizes=(1, 2, 5), seeds=SEEDS[:1], others=2, leaving=1, clips=(1,), rows=24)


def extent(model: nn.Module) -> Extent:
    """Say how much a probe of a model tries, by its size."""
    return FULL if sum(p.numel() for p in model.parameters()) < LARGE else BRIEF


def synthetic(task: Task, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the records that a probe needs from what is public about a task.

    Returns:
        Inputs (ROWS, ...) and labels int64 (ROWS,), every class in turn.
    """
    labels = torch.arange(ROWS) % len(task.spec.classes)
    return torch.from_numpy(task.public(ROWS, seed)), labels


def probe(
    model: nn.Module,
    engine: str,
    precision: str,
    loss: engines.Loss,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    plan: PrivacyPlan | None = None,
    page_rows: int = MICRO_BATCH,
) -> None:
    """Refuse a model whose steps would not bound a subject's influence by the plan's sensitivity.

    The model is left as it was: everything runs on copies, and torch's generators are put back.
    A coupling that shows only for records unlike any synthetic one is not found.

    | what is checked | how |
    |---|---|
    | layers and padding that are known to fail | by name |
    | a record's gradient does not depend on its neighbours | float64, training mode, equal dropout masks: one record is replaced, the gradient of the others' losses must stay |
    | norms and clipped sums are right | against plain autograd, record by record, without Opacus |
    | rounding stays within the slack, on a page of the size that training has (of a large model a smaller one) | the plan's precision: one record leaves its place |

    Args:
        model: to be trained; any dtype and device.
        engine: "bookkeeping", "ghost" or "hooks".
        precision: "float64", "float32" or "bfloat16".
        loss: from outputs (float64) and labels to each record's loss (n,).
        inputs: at least ROWS synthetic records.
        labels: int64, one for each.
        plan: for its clip and slack; 1 and the precision's by default.
        page_rows: rows of a page at most.

    Raises:
        AccordError: the first thing that is wrong, by name.
    """  # noqa: E501  (a table row cannot be broken)
    refuse_by_name(model, engine)
    if len(inputs) < ROWS:
        raise AccordError(f"inputs: a probe needs {ROWS} synthetic records, not {len(inputs)}.")
    device = next(model.parameters()).device
    inputs, labels = inputs.to(device), labels.to(device)
    double = inputs.double() if inputs.is_floating_point() else inputs
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        plain, much = Plain(model, loss), extent(model)
        plain.check_repeats(double, labels)
        if engine == "ghost":
            plain.check_once(double, labels)
        check_neighbours(plain, double, labels, much)
        check_gradients(plain, engine, double, labels, much)
        check_rounding(model, engine, precision, loss, (inputs, labels), plan, page_rows, much)


def refuse_by_name(model: nn.Module, engine: str) -> None:
    """Refuse layers that are known to break the bound, whatever their numbers show.

    Raises:
        AccordError: batch normalisation; a convolution that pads with other than zeros, whose
            gradients Opacus takes for those with zeros; under "ghost" one parameter in two layers.
    """
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        tracks = getattr(module, "track_running_stats", False)
        if isinstance(module, _BatchNorm) or tracks:
            raise AccordError(
                f"model: {name} is a {type(module).__name__}, which mixes records and keeps their "
                "statistics. Choose GroupNorm or LayerNorm."
            )
        if isinstance(module, _ConvNd) and module.padding_mode != "zeros":
            raise AccordError(
                f'model: {name} has padding_mode "{module.padding_mode}", of which Opacus computes '
                'other gradients than it trains. Choose "zeros", or pad before the layer.'
            )
        for key, parameter in module.named_parameters(recurse=False):
            here = f"{name}.{key}".lstrip(".")
            first = owners.setdefault(id(parameter), here)
            if first != here and engine == "ghost" and parameter.requires_grad:
                raise AccordError(
                    f'privacy.engine = "ghost": {first} and {here} are one tied parameter, whose '
                    'norm it does not know. Choose the engine "hooks".'
                )


def _replaced(
    inputs: torch.Tensor, labels: torch.Tensor, size: int, place: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Replace one record of a batch by others: a strange one, an empty one, one at the bounds."""
    others = [inputs[size + place], torch.zeros_like(inputs[0])]
    if inputs.is_floating_point():
        others += [inputs.amax(dim=0), inputs.amin(dim=0)]
    for other in others:
        changed, said = inputs[:size].clone(), labels[:size].clone()
        changed[place] = other
        said[place] = labels[place + 1]  # another class, since they come in turn
        yield changed, said


def check_neighbours(
    plain: Plain, inputs: torch.Tensor, labels: torch.Tensor, much: Extent = FULL
) -> None:
    """Refuse a forward pass or loss in which a record's gradient depends on its neighbours.

    Raises:
        AccordError: the gradient of the others' losses moved when one record was replaced.
    """
    seeds = much.seeds if plain.draws(inputs, labels) else SEEDS[:1]
    for seed in seeds:
        for size in much.sizes[1:]:
            for place in {0, size // 2, size - 1}:
                # Numbers without a relation to each other: no two records' changes cancel.
                weigh = torch.linspace(1, 2, size, dtype=torch.float64).sqrt().to(inputs.device)
                weigh[place] = 0
                others = weigh > 0
                outputs, losses = plain.run(inputs[:size], labels[:size], seed)
                before = plain.gradient((weigh * losses).sum())
                for changed, said in itertools.islice(
                    _replaced(inputs, labels, size, place), much.others
                ):
                    outputs_now, losses_now = plain.run(changed, said, seed)
                    after = plain.gradient((weigh * losses_now).sum())
                    forward = _differ(outputs[others], outputs_now[others])
                    if (
                        forward
                        or _differ(losses[others], losses_now[others])
                        or _differ(before, after)
                    ):
                        raise AccordError(
                            f"model: in a batch of {size} records, replacing one changes the "
                            f"others' gradients: the {'forward pass' if forward else 'loss'} "
                            "couples records (a mean over the batch, mixup, a contrastive loss, "
                            "ids or noise shared by the batch). Compute each record by itself."
                        )


def _differ(one: torch.Tensor, other: torch.Tensor, bound: float = EXACT) -> bool:
    """Tell whether two tensors differ by more than rounding; infinities count as a difference."""
    if one.shape != other.shape:
        return True
    apart = torch.linalg.vector_norm((one - other).double()).item()
    return not apart <= bound * max(torch.linalg.vector_norm(one.double()).item(), 1e-12)


def check_gradients(
    plain: Plain, engine: str, inputs: torch.Tensor, labels: torch.Tensor, much: Extent = FULL
) -> None:
    """Refuse an engine whose norms or clipped sums are not plain autograd's, record by record.

    Raises:
        AccordError: the parameter whose gradient is wrong, or that is not one for each record.
    """
    quiet = plain.without_dropout()
    if not quiet.draws(inputs, labels):
        ones = [
            quiet.gradients(inputs[i : i + 1], labels[i : i + 1], 1) for i in range(much.sizes[-1])
        ]
        singles = torch.cat(ones)
        for size in much.sizes:
            _compare(quiet, engine, singles[:size], inputs[:size], labels[:size], SAME)
        if not plain.draws(inputs, labels):
            return
    for size in much.sizes:
        rows = plain.gradients(inputs[:size], labels[:size], 1)
        _compare(plain, engine, rows, inputs[:size], labels[:size], SAME)


def _compare(
    plain: Plain,
    engine: str,
    rows: torch.Tensor,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    bound: float,
) -> None:
    """Hold an engine's norms and clipped sum of a batch to the gradients of its records (n, d)."""
    norms = torch.linalg.vector_norm(rows, dim=1)
    clip = float(norms.median()) or 1.0
    wanted = (rows * (clip / norms.clamp(min=clip))[:, None]).sum(dim=0).cpu()
    parts = engines.make(engine, copy.deepcopy(plain.model), plain.loss)
    try:
        torch.manual_seed(1)
        found_norms = parts.norms(inputs, labels)
        torch.manual_seed(1)
        found = parts.clipped_sum(inputs, labels, clip)
    except Exception as fault:
        raise raised(fault) from None
    finally:
        parts.close()
    if not _differ(norms.cpu(), found_norms, bound) and not _differ(wanted, found, bound):
        return
    apart, offset, worst = (wanted - found).abs(), 0, (-1.0, "")
    for name, parameter in plain.model.named_parameters():
        if parameter.requires_grad:
            here = apart[offset : offset + parameter.numel()].max().item()
            offset += parameter.numel()
            worst = max(worst, (here, name))
    raise AccordError(
        f"model: in a batch of {len(rows)} records the engine {engine!r} finds other gradients "
        f"than autograd does record by record, most of all of {worst[1]}. A layer is used in a way "
        "that Opacus does not see (its weight read by another layer, a batch axis that is not "
        "first, a size that depends on the batch). Change the model."
    )


def check_rounding(
    model: nn.Module,
    engine: str,
    precision: str,
    loss: engines.Loss,
    records: tuple[torch.Tensor, torch.Tensor],
    plan: PrivacyPlan | None,
    page_rows: int = MICRO_BATCH,
    much: Extent = FULL,
) -> None:
    """Refuse a precision in which one record moves a page's sum by more than the plan covers.

    Raises:
        AccordError: the excess over max_grad_norm that was measured, and the slack.
    """
    slack = plan.slack if plan else SLACK[precision]
    clip = plan.max_grad_norm if plan else 1.0
    parts = engines.make(engine, copy.deepcopy(model).to(engines.PRECISIONS[precision]), loss)
    rows = page_shape(plan.normaliser, page_rows)[1] if plan else PAGE  # as in training
    rows = min(rows, much.rows)
    there = min(rows, much.sizes[-1])
    places = torch.from_numpy(np.random.default_rng(0).permutation(rows)[:there])
    inputs, labels = (
        column.new_zeros((rows, *column.shape[1:])).index_copy(
            0, places.to(column.device), column[:there]
        )
        for column in records
    )

    def page(kept: torch.Tensor, bound: float) -> torch.Tensor:
        torch.manual_seed(1)
        mask = torch.zeros(rows, dtype=torch.bool)
        mask[kept] = True
        return parts.clipped_sum(inputs, labels, bound, mask)

    try:
        torch.manual_seed(1)
        if not torch.isfinite(parts.norms(inputs, labels)[places]).any():
            raise AccordError(
                f'privacy.precision = "{precision}": no synthetic record has a finite gradient. '
                "Choose a finer precision."
            )
        for bound in (clip * share for share in much.clips):
            whole = page(places, bound)
            for gone in {0, there // 2, there - 1} if much.leaving > 1 else {0}:
                rest = page(torch.cat([places[:gone], places[gone + 1 :]]), bound)
                own = page(places[gone : gone + 1], bound)
                others = torch.linalg.vector_norm(whole - rest - own).item() / bound
                moved = torch.linalg.vector_norm(own).item() / bound + others
                if not moved <= 1 + slack or not others <= slack:
                    raise AccordError(
                        f'privacy.precision = "{precision}": one record moves a sum by up to '
                        f"{moved:.6g} times max_grad_norm, the others' part by {others:.2g}; the "
                        f"noise covers {slack:g}. Choose a finer precision or another model."
                    )
    except AccordError:
        raise
    except Exception as fault:
        raise raised(fault) from None
    finally:
        parts.close()
