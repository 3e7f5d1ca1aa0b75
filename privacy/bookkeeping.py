"""The engine "bookkeeping": per-record clipping in one forward and one backward pass.

The backward pass gives the gradients of activations, which any training needs, and notes for every
weight the parts from which each record's norm and the clipped sum are made (Bu et al. 2022,
"Differentially private optimization on large model at small cost", book-keeping). What a model
does with its trained weights is seen by torch's own mechanism (`__torch_function__`), not by hooks
on layers: a weight that is used twice, or by two layers, is noted twice, and any use of a trained
weight that is not known here is refused by name.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.overrides import resolve_name

from fedaccord.privacy.clipping import factors
from fedaccord.privacy.parts import Part, Whole
from fedaccord.privacy.passes import Keep, Page, PageEngine
from fedaccord.privacy.products import Ways
from fedaccord.privacy.uses import USES

SMALL = 512  # weights up to this size are worked out together
TRIES = 3  # of each kernel when the fastest is looked for
KERNELS: dict[tuple[Any, ...], str] = {}  # the fastest by kind and shapes, in this process
ASKED = ("dtype", "shape", "device", "ndim", "requires_grad", "is_leaf", "layout", "grad_fn")


_now = threading.local()  # .watch: of the forward pass that this thread is in


class _Noted(nn.Parameter):
    """What trained weights are during a forward pass: torch hands over what reads one."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let the watch run the function."""
        with torch._C.DisableTorchFunctionSubclass():
            return _now.watch.run(func, args, kwargs or {})


class Watch:
    """One forward pass: the functions in it that read a trained weight note its parts."""

    def __init__(self, trained: dict[str, nn.Parameter], rows: int, measured: bool) -> None:
        """Watch a page.

        Args:
            trained: the trained weights by name.
            rows: records on the page.
            measured: whether kernels are chosen by measuring; else by rule.
        """
        self.rows, self._measured, self._weights = rows, measured, list(trained.values())
        self._trained = {id(weight): name for name, weight in trained.items()}
        self.parts: dict[int, list[Part]] = {}

    def __enter__(self) -> None:
        self._before = [type(weight) for weight in self._weights]
        for weight in self._weights:
            weight.__class__ = _Noted
        _now.watch = self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for weight, was in zip(self._weights, self._before, strict=True):
            weight.__class__ = was
        _now.watch = None

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run a function of torch that reads a trained weight, by our own."""
        used = [a for a in (*args, *kwargs.values()) if id(a) in self._trained]
        if not used:
            for value in args:  # cat and stack take lists
                if isinstance(value, list | tuple):
                    used += [a for a in value if id(a) in self._trained]
        if _asks(func):
            return func(*args, **kwargs)
        run = USES.get(func) if used else None
        if run is None:
            raise NotImplementedError(
                f"{self._trained[id(used[0])] if used else 'a weight'} is used by "
                f"{resolve_name(func) or func}, of which "
                'the engine "bookkeeping" does not know each record\'s gradient'
            )
        return run(self, func, *args, **kwargs)

    def trained(self, value: Any) -> bool:
        """Tell whether a value is a trained weight."""
        return id(value) in self._trained

    def note(self, weight: torch.Tensor, part: Part) -> None:
        """See `products.Book.note`."""
        self.parts.setdefault(id(weight), []).append(part)

    def choose(self, key: tuple[Any, ...], ways: Ways, like: torch.Tensor) -> Part:
        """See `products.Book.choose`."""
        if not self._measured:
            return next(iter(ways.values()))()
        full = (*key, *like.shape, like.stride(), like.dtype, like.device)
        if full not in KERNELS:
            KERNELS[full] = _fastest(ways, like.new_ones(len(like)))
        return ways[KERNELS[full]]()


def _asks(func: Any) -> bool:
    """Whether a function only asks what a tensor is."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in ASKED
    return name in ("size", "dim", "numel", "is_floating_point", "stride", "is_contiguous")


def _fastest(ways: Ways, ones: torch.Tensor) -> str:
    """Measure norm and sum by each way; it runs once for each shape."""
    alone = ones.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter  # the first ignores other programs
    best: dict[str, float] = {}
    for name, make in ways.items():
        for _ in range(TRIES):
            start = clock()
            make().total(ones)
            if ones.is_cuda:
                torch.cuda.synchronize(ones.device)
            took = clock() - start
            best[name] = min(best.get(name, took), took)
    return min(best, key=lambda name: best[name])


class BookkeepingEngine(PageEngine):
    """One forward and one backward pass a page; see the module."""

    def _hook(self, model: nn.Module) -> Any:
        return model

    def _run(self, inputs: torch.Tensor, labels: torch.Tensor) -> list[tuple[str, Part | None]]:
        """Run forwards and backwards; the part of each trained weight, or None where none came."""
        self._forget()  # what somebody else left there
        watch = Watch(self._trained, len(inputs), self._measured)
        with torch.enable_grad():
            with watch:
                losses = self._losses(inputs, labels)
            losses.sum().backward()
        found: list[tuple[str, Part | None]] = []
        for name, parameter in self._trained.items():
            if parameter.grad is not None:
                raise ValueError(
                    f'{name} is reached by a way that the engine "bookkeeping" does not see'
                )
            parts = watch.parts.pop(id(parameter), [])
            found.append((name, _together(parts)))
        return found

    @torch.no_grad()
    def _page_norms(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return _norms([part for _, part in _joined(self._run(inputs, labels))], len(inputs))

    @torch.no_grad()
    def _page_sum(self, page: Page, max_grad_norm: float, keep: Keep) -> torch.Tensor:
        found = _joined(self._run(*page))
        norms = _norms([part for _, part in found], len(page[0]))
        finite = torch.isfinite(norms)
        weights = factors(norms, max_grad_norm, keep)
        sizes = [p.numel() for p in self._trained.values()]
        total = torch.empty(sum(sizes), dtype=torch.float64)
        places = dict(zip(self._trained, total.split(sizes), strict=True))
        if self._place["dtype"] != torch.float64:
            weights = weights.to(torch.float32)
        weights = weights.to(self._place["device"])
        for names, part in found:
            if part is None:
                for name in names:
                    places[name].zero_()
                continue
            if not finite.all():
                part.empty(~finite.to(weights.device))
            made = part.total(weights)
            if len(names) == 1:
                places[names[0]].view(made.shape).copy_(made)
                continue
            for name, piece in zip(
                names, made.split([places[name].numel() for name in names]), strict=True
            ):
                places[name].copy_(piece)
        if not torch.isfinite(total.sum()):
            raise ValueError("the clipped sum is not finite")
        return total

    def _forget(self) -> None:
        for parameter in self._trained.values():
            parameter.grad = None


Found = list[tuple[list[str], Part | None]]  # the part of a weight, or of several small ones


def _joined(found: list[tuple[str, Part | None]]) -> Found:
    """Join the gradients of small weights, so that all have one norm and one sum."""
    small = [(name, p) for name, p in found if isinstance(p, Whole) and p.size <= SMALL]
    if len(small) < 2:
        return [([name], part) for name, part in found]
    names = {name for name, _ in small}
    rows = torch.cat([part.each() for _, part in small], dim=1)
    rest: Found = [([name], part) for name, part in found if name not in names]
    return [([name for name, _ in small], Whole(rows)), *rest]


def _together(parts: list[Part]) -> Part | None:
    """Join the parts of a weight that is used several times: their gradients add up."""
    if len(parts) < 2:
        return parts[0] if parts else None
    total = parts[0].each()
    for part in parts[1:]:
        total = total + part.each()
    return Whole(total)


def _norms(parts: list[Part | None], records: int) -> torch.Tensor:
    """Each record's norm over all weights, float64 (n,) on the CPU."""
    squares = [part.squares for part in parts if part is not None]
    if not squares:
        return torch.zeros(records, dtype=torch.float64)
    return torch.stack(squares).cpu().double().sum(0).sqrt()
