"""How faults break noise, clip and sampling while they are planted in the installed code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from fedaccord.conformance.site import planted
from fedaccord.privacy.noise import Floats, OsSource, Source
from fedaccord.privacy.plan import PrivacyPlan
from fedaccord.privacy.sampling import Indices, SubjectSampler
from fedaccord.tasks import Records

Plant = AbstractContextManager[None]

NOISE = "fedaccord.privacy.noise:add_noise"
NORMAL = "fedaccord.privacy.noise:OsSource.normal"
CLIP = "fedaccord.privacy.clipping:clipped_sum"
NORMS = "fedaccord.privacy.bookkeeping:_norms"
OPTIMIZER = "fedaccord.client.train:_optimizer"
DRAW = "fedaccord.privacy.sampling:SubjectSampler.draw"
TRAIN = "fedaccord.client.train:train_private"


def scaled(factor: float) -> Callable[[], Plant]:
    """Scale the noise of every sum."""

    def make(real: Any) -> Any:
        return lambda total, stddev, grid, source: real(total, factor * stddev, grid, source)

    return lambda: planted(NOISE, make)


def other_noise(draw: Callable[[int, Source], Floats]) -> Callable[[], Plant]:
    """Add another noise of variance 1 in place of the normal one, scaled as ever."""

    def make(_: Any) -> Any:
        return lambda total, stddev, grid, source: (
            np.round((total + stddev * draw(total.size, source)) / grid) * grid
        )

    return lambda: planted(NOISE, make)


def neighbours_share(count: int, source: Source) -> Floats:
    """Draw noise of which each coordinate shares half with the next one."""
    drawn = source.normal(count + 1)
    return (drawn[1:] + drawn[:-1]) / np.sqrt(2)


def all_share(count: int, source: Source) -> Floats:
    """Draw noise of which a hundredth of the variance is common to all coordinates."""
    own, common = source.normal(count), source.normal(1)
    return np.sqrt(0.99) * own + 0.1 * common


def gridded_before() -> Plant:
    """Round the noise to the grid and leave the sum as it is."""

    def make(_: Any) -> Any:
        return lambda total, stddev, grid, source: (
            total + np.round(stddev * source.normal(total.size) / grid) * grid
        )

    return planted(NOISE, make)


def only_where_drawn() -> Plant:
    """Add noise only where the sum is not zero."""

    def make(real: Any) -> Any:
        def add_noise(total: Floats, stddev: float, grid: float, source: Source) -> Floats:
            return real(total, stddev, grid, source) if total.any() else np.zeros(total.size)

        return add_noise

    return planted(NOISE, make)


@contextmanager
def reused(kind: str) -> Iterator[None]:
    """Draw the same normal numbers again: in the next step, the next round, or at the next site."""
    kept: dict[tuple[Any, ...], Floats] = {}
    now: dict[str, Any] = {"site": "", "step": 0, "calls": {}}

    def begin(real: Any) -> Any:
        def train(model: Any, records: Any, plan: PrivacyPlan, *rest: Any, **more: Any) -> None:
            now.update(site=plan.site, step=0)
            now["calls"][plan.site] = now["calls"].get(plan.site, 0)
            if kind == "step":
                kept.clear()
            real(model, records, plan, *rest, **more)

        return train

    def make(real: Any) -> Any:
        def normal(self: OsSource, count: int) -> Floats:
            site = now["site"]
            now["step"] += 1
            now["calls"][site] += 1
            key = {
                "step": (count,),
                "round": (count, site, now["step"]),
                "site": (count, now["calls"][site]),
            }[kind]
            if key not in kept:
                kept[key] = real(self, count)
            return kept[key].copy()

        return normal

    with planted(TRAIN, begin), planted(NORMAL, make):
        yield


def seeded() -> Plant:
    """Draw noise from numpy's global generator."""
    return planted(NORMAL, lambda _: lambda self, count: np.random.standard_normal(count))


def seeded_draws() -> Plant:
    """Draw subjects with numpy's global generator."""

    def make(real: Any) -> Any:
        def draw(self: SubjectSampler, source: Source) -> Indices:
            return real(self, _Global())

        return draw

    return planted(DRAW, make)


class _Global:
    """Draws from numpy's global generator, which anybody can seed."""

    def uniform(self, count: int) -> Floats:
        return np.random.random(count)

    def normal(self, count: int) -> Floats:
        return np.random.standard_normal(count)


def _rows_of(gradients: list[torch.Tensor], keep: torch.Tensor | None) -> torch.Tensor:
    """Per-subject gradients as one matrix (n, d), rows without a record zero."""
    flat = torch.cat([g.reshape(len(g), -1).double() for g in gradients], dim=1)
    return flat if keep is None else torch.where(keep[:, None], flat, torch.zeros_like(flat))


def clip(sum_rows: Callable[[torch.Tensor, list[int], float], torch.Tensor]) -> Callable[[], Plant]:
    """Replace how a page's gradients (n, d), of parameters of some widths, become a sum."""

    def make(_: Any) -> Any:
        def clipped_sum(
            gradients: list[torch.Tensor], max_grad_norm: float, keep: torch.Tensor | None = None
        ) -> torch.Tensor:
            widths = [g[0].numel() if len(g) else 0 for g in gradients]
            return sum_rows(_rows_of(gradients, keep), widths, max_grad_norm)

        return clipped_sum

    return lambda: planted(CLIP, make)


def _finite(flat: torch.Tensor) -> torch.Tensor:
    kept = torch.isfinite(flat).all(dim=1, keepdim=True)
    return torch.where(kept, flat, torch.zeros_like(flat))


def _factor(flat: torch.Tensor, bound: float) -> torch.Tensor:
    return bound / torch.clamp(flat.norm(dim=1, keepdim=True), min=bound)


def no_clip(flat: torch.Tensor, widths: list[int], bound: float) -> torch.Tensor:
    """Sum without a clip."""
    return _finite(flat).sum(dim=0)


def clip_after(flat: torch.Tensor, widths: list[int], bound: float) -> torch.Tensor:
    """Clip the sum."""
    total = _finite(flat).sum(dim=0, keepdim=True)
    return (total * _factor(total, bound))[0]


def clip_by_layer(flat: torch.Tensor, widths: list[int], bound: float) -> torch.Tensor:
    """Clip each parameter by itself."""
    parts = torch.split(_finite(flat), widths, dim=1)
    return torch.cat([(part * _factor(part, bound)).sum(dim=0) for part in parts])


def nan_kept(flat: torch.Tensor, widths: list[int], bound: float) -> torch.Tensor:
    """Clip and sum what is not finite as well."""
    return (flat * _factor(flat, bound)).sum(dim=0)


def times_zero(flat: torch.Tensor, widths: list[int], bound: float) -> torch.Tensor:
    """Multiply what is not finite by zero."""
    finite = torch.isfinite(flat).all(dim=1, keepdim=True)
    safe = torch.where(finite, _factor(flat, bound), torch.zeros_like(flat[:, :1]))
    return (flat * safe).sum(dim=0)


def norms(change: Callable[[Any, list[Any], int], torch.Tensor]) -> Callable[[], Plant]:
    """Replace the norms of a page's records under book-keeping; the first argument finds them."""
    return lambda: planted(NORMS, lambda real: lambda parts, rows: change(real, parts, rows))


def no_norms(real: Any, parts: list[Any], rows: int) -> torch.Tensor:
    """Find every norm that is finite to be 0, so that nothing is clipped."""
    found: torch.Tensor = real(parts, rows)
    return torch.where(torch.isfinite(found), torch.zeros_like(found), found)


def a_weight_less(real: Any, parts: list[Any], rows: int) -> torch.Tensor:
    """Leave the first weight out of the norms."""
    found: torch.Tensor = real(parts[1:], rows)
    return found


def of_the_page(real: Any, parts: list[Any], rows: int) -> torch.Tensor:
    """Take the root mean square of the page's norms for each of them."""
    found: torch.Tensor = real(parts, rows)
    kept = found[torch.isfinite(found)]
    mean = kept.square().mean().sqrt() if len(kept) else found.new_zeros(())
    return torch.where(torch.isfinite(found), mean, found)


def other_tensors() -> Plant:
    """Let the optimiser hold copies, as where a model moves to a device after adapters came."""

    def make(real: Any) -> Any:
        return lambda weights, training: real(
            [nn.Parameter(weight.detach().clone()) for weight in weights], training
        )

    return planted(OPTIMIZER, make)


def rate_from_data() -> Plant:
    """Choose the sampling probability that gives the declared batch with the real subjects."""

    def make(_: Any) -> Any:
        def sampler(self: PrivacyPlan, subjects: Indices) -> SubjectSampler:
            people = max(1, len(np.unique(subjects)))
            return SubjectSampler(subjects, min(1.0, self.normaliser / people))

        return sampler

    return planted("fedaccord.privacy.plan:PrivacyPlan.sampler", make)


def with_plan(change: Callable[[PrivacyPlan, Records | None], PrivacyPlan]) -> Callable[[], Plant]:
    """Train under another plan than the reserved one."""

    def make(real: Any) -> Any:
        def train(
            model: Any, records: Records | None, plan: PrivacyPlan, *rest: Any, **more: Any
        ) -> None:
            real(model, records, change(plan, records), *rest, **more)

        return train

    return lambda: planted(TRAIN, make)


def drawing(draw: Callable[[Any, SubjectSampler, Source], Indices]) -> Callable[[], Plant]:
    """Replace how a step's rows are drawn; the first argument draws as ever."""
    return lambda: planted(DRAW, lambda real: lambda self, source: draw(real, self, source))


def _rows(sampler: SubjectSampler) -> Indices:
    return sampler._rows  # the faults know what they break


def by_record(real: Any, sampler: SubjectSampler, source: Source) -> Indices:
    """Draw each record by itself."""
    rows = _rows(sampler)
    return rows[source.uniform(len(rows)) < sampler.sampling_prob]


@contextmanager
def shuffled() -> Iterator[None]:
    """Deal subjects out in batches of one size, each once an epoch, as a DataLoader does."""
    dealt: dict[int, list[int]] = {}

    def draw(real: Any, sampler: SubjectSampler, source: Source) -> Indices:
        people = len(sampler._first)
        size = round(people * sampler.sampling_prob)
        waiting = dealt.setdefault(id(sampler), [])
        if len(waiting) < size:
            waiting[:] = np.argsort(source.uniform(people)).tolist()
        chosen, waiting[:] = waiting[:size], waiting[size:]
        return _rows(sampler)[sampler._first[chosen]]

    with drawing(draw)():
        yield


def not_empty(real: Any, sampler: SubjectSampler, source: Source) -> Indices:
    """Draw until somebody is drawn."""
    rows: Indices = real(sampler, source)
    while len(rows) == 0 and len(_rows(sampler)):
        rows = real(sampler, source)
    return rows


def truncated(real: Any, sampler: SubjectSampler, source: Source) -> Indices:
    """Keep the first 64."""
    return real(sampler, source)[:64]
