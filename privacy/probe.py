"""The probe: does a model, loss and engine bound each subject? Asked of synthetic records only.

It runs before a site writes its INTENT. A first look at private records would be a release of its
own, so nothing private is given to it: inputs come from `Task.public`, labels are drawn.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from fedaccord.errors import AccordError
from fedaccord.privacy import engines
from fedaccord.privacy.plan import SLACK, PrivacyPlan
from fedaccord.privacy.sampling import MICRO_BATCH, page_shape
from fedaccord.tasks import Task

SIZES = (1, 2, 3, 8, 17)  # records in a batch
ROWS = 3 * SIZES[-1]  # synthetic records that a probe needs
PAGE = 64  # rows of the page that is probed in the plan's precision, where there is no plan
SEEDS = (1, 2, 3)  # of dropout's masks and other draws in a forward pass
EXACT = 1e-9  # relative to a gradient's norm, in float64, where nothing at all should differ
SAME = 1e-6  # the same for batches of different shapes, whose rounding a deep model magnifies


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
) -> None:
    """Refuse a model whose steps would not bound a subject's influence by the plan's sensitivity.

    The model is left as it was: everything runs on copies, and torch's generators are put back.
    A coupling that shows only for records unlike any synthetic one is not found.

    | what is checked | how |
    |---|---|
    | layers and padding that are known to fail | by name |
    | a record's gradient does not depend on its neighbours | float64, training mode, equal dropout masks: one record is replaced, the gradient of the others' losses must stay |
    | norms and clipped sums are right | against plain autograd, record by record, without Opacus |
    | rounding stays within the slack, on a page of the size that training has | the plan's precision: one record leaves its place |

    Args:
        model: to be trained; any dtype and device.
        engine: "hooks" or "ghost".
        precision: "float64", "float32" or "bfloat16".
        loss: from outputs (float64) and labels to each record's loss (n,).
        inputs: at least ROWS synthetic records.
        labels: int64, one for each.
        plan: for its clip and slack; 1 and the precision's by default.

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
        plain = _Plain(model, loss)
        plain.check_repeats(double, labels)
        if engine == "ghost":
            plain.check_once(double, labels)
        check_neighbours(plain, double, labels)
        check_gradients(model, plain, engine, double, labels)
        check_rounding(model, engine, precision, loss, (inputs, labels), plan)


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


class _Plain:
    """A copy of the model in float64 and training mode, run by plain autograd."""

    def __init__(self, model: nn.Module, loss: engines.Loss) -> None:
        self.model = copy.deepcopy(model).double().train()
        self.loss = loss
        self.trained = [p for p in self.model.parameters() if p.requires_grad]

    def run(
        self, inputs: torch.Tensor, labels: torch.Tensor, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute outputs and each record's loss (n,) with the draws of a seed."""
        torch.manual_seed(seed)
        try:
            outputs = self.model(inputs)
            losses = self.loss(outputs.double(), labels)
        except Exception as fault:
            raise _raised(fault) from None
        if losses.shape != (len(inputs),):
            raise AccordError(
                f"model: the loss has shape {list(losses.shape)} for {len(inputs)} records, so it "
                "couples them. Give each record its own (reduction none)."
            )
        return outputs, losses

    def gradient(self, total: torch.Tensor, again: bool = False) -> torch.Tensor:
        """Flatten the gradient (d,) of a scalar; zero for parameters that it does not reach."""
        if not total.requires_grad:
            raise AccordError(
                "model: the loss does not depend on any trained parameter. Train one."
            )
        found = torch.autograd.grad(total, self.trained, retain_graph=again, allow_unused=True)
        parts = zip(found, self.trained, strict=True)
        return torch.cat(
            [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in parts]
        )

    def gradients(self, inputs: torch.Tensor, labels: torch.Tensor, seed: int) -> torch.Tensor:
        """Compute each record's gradient (n, d), in one batch."""
        losses = self.run(inputs, labels, seed)[1]
        return torch.stack([self.gradient(loss, again=True) for loss in losses])

    def draws(self, inputs: torch.Tensor, labels: torch.Tensor) -> bool:
        """Tell whether a forward pass draws random numbers."""
        with torch.no_grad():
            runs = [self.run(inputs[:8], labels[:8], seed)[1] for seed in SEEDS]
        return any(not torch.equal(runs[0], other) for other in runs[1:])

    def without_dropout(self) -> _Plain:
        """Copy it with every dropout layer at rate 0."""
        other = _Plain(self.model, self.loss)
        for module in other.model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
        return other

    def check_repeats(self, inputs: torch.Tensor, labels: torch.Tensor) -> None:
        """Refuse a pass that keeps a state, or draws from a generator that is not torch's."""
        kept = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        with torch.no_grad():
            one, other = (self.run(inputs[:8], labels[:8], 1)[1] for _ in range(2))
        for name, buffer in self.model.named_buffers():
            if not torch.equal(buffer, kept[name]):
                raise AccordError(
                    f"model: {name} is a buffer that a forward pass changes, so it would carry "
                    "records from step to step. Choose a model without it."
                )
        if not torch.equal(one, other):
            raise AccordError(
                "model: two equal passes differ: it keeps a state, or draws from a generator that "
                "is not torch's. Use torch's alone."
            )

    def check_once(self, inputs: torch.Tensor, labels: torch.Tensor) -> None:
        """Refuse a layer that a forward pass uses twice."""
        uses: dict[str, int] = {}

        def count(name: str) -> None:
            uses[name] = uses.get(name, 0) + 1

        hooks = [
            module.register_forward_hook(lambda *_, name=name: count(name))
            for name, module in self.model.named_modules()
            if any(p.requires_grad for p in module.parameters(recurse=False))
        ]
        with torch.no_grad():
            self.run(inputs[:2], labels[:2], 1)
        for hook in hooks:
            hook.remove()
        for name, times in uses.items():
            if times > 1:
                raise AccordError(
                    f'privacy.engine = "ghost": {name} is used {times} times in a forward pass, '
                    'and its norm is then not known. Choose the engine "hooks".'
                )


def _raised(fault: Exception) -> AccordError:
    """Say that the model or the loss raised on synthetic records, which are nobody's."""
    first = (str(fault) or "nothing said").splitlines()[0][:200]
    return AccordError(
        f"model: a pass over synthetic records raised {type(fault).__name__}: {first}. "
        "Mend the model, or the task's public inputs."
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


def check_neighbours(plain: _Plain, inputs: torch.Tensor, labels: torch.Tensor) -> None:
    """Refuse a forward pass or loss in which a record's gradient depends on its neighbours.

    Raises:
        AccordError: the gradient of the others' losses moved when one record was replaced.
    """
    seeds = SEEDS if plain.draws(inputs, labels) else SEEDS[:1]
    for seed in seeds:
        for size in SIZES[1:]:
            for place in {0, size // 2, size - 1}:
                # Numbers without a relation to each other: no two records' changes cancel.
                weigh = torch.linspace(1, 2, size, dtype=torch.float64).sqrt().to(inputs.device)
                weigh[place] = 0
                others = weigh > 0
                outputs, losses = plain.run(inputs[:size], labels[:size], seed)
                before = plain.gradient((weigh * losses).sum())
                for changed, said in _replaced(inputs, labels, size, place):
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
    model: nn.Module, plain: _Plain, engine: str, inputs: torch.Tensor, labels: torch.Tensor
) -> None:
    """Refuse an engine whose norms or clipped sums are not plain autograd's, record by record.

    Raises:
        AccordError: the parameter whose gradient is wrong, or that is not one for each record.
    """
    quiet = plain.without_dropout()
    if not quiet.draws(inputs, labels):
        ones = [quiet.gradients(inputs[i : i + 1], labels[i : i + 1], 1) for i in range(SIZES[-1])]
        singles = torch.cat(ones)
        for size in SIZES:
            _compare(quiet, engine, singles[:size], inputs[:size], labels[:size], SAME)
        if not plain.draws(inputs, labels):
            return
    for size in SIZES:
        rows = plain.gradients(inputs[:size], labels[:size], 1)
        _compare(plain, engine, rows, inputs[:size], labels[:size], SAME)


def _compare(
    plain: _Plain,
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
        raise _raised(fault) from None
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
) -> None:
    """Refuse a precision in which one record moves a page's sum by more than the plan covers.

    Raises:
        AccordError: the excess over max_grad_norm that was measured, and the slack.
    """
    slack = plan.slack if plan else SLACK[precision]
    clip = plan.max_grad_norm if plan else 1.0
    parts = engines.make(engine, copy.deepcopy(model).to(engines.PRECISIONS[precision]), loss)
    rows = page_shape(plan.normaliser, MICRO_BATCH)[1] if plan else PAGE  # as in training
    places = torch.from_numpy(np.random.default_rng(0).permutation(rows)[: SIZES[-1]])
    inputs, labels = (
        column.new_zeros((rows, *column.shape[1:])).index_copy(
            0, places.to(column.device), column[: SIZES[-1]]
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
        for bound in (clip, clip / 1000):  # some gradients whole, and every one clipped
            whole = page(places, bound)
            for gone in (0, 8, 16):
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
        raise _raised(fault) from None
    finally:
        parts.close()
