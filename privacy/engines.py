"""Engines by name: how the clipped sum of a page of records is computed.

| engine | how | pages in |
|---|---|---|
| "bookkeeping" | one forward and one backward pass (Bu et al. 2022) | all of PRECISIONS |
| "ghost" | finds norms in a first backward pass, sums in a second one | float64 |
| "hooks" | makes each record's gradient, then clips and sums in float64 | all of PRECISIONS |
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from fedaccord.errors import AccordError
from fedaccord.privacy.bookkeeping import BookkeepingEngine
from fedaccord.privacy.ghost import GhostEngine
from fedaccord.privacy.hooks import HooksEngine
from fedaccord.privacy.passes import PRECISIONS, Engine, Loss, PageEngine, cross_entropy

__all__ = ["ENGINES", "PRECISIONS", "Engine", "Loss", "cross_entropy", "make", "resolve"]

ENGINES: dict[str, type[PageEngine]] = {
    "bookkeeping": BookkeepingEngine,
    "ghost": GhostEngine,
    "hooks": HooksEngine,
}


def make(
    engine: str, model: nn.Module, loss: Loss = cross_entropy, measured: bool = True
) -> Engine:
    """Hook an engine to a model; the model's dtype is the precision of its passes.

    Args:
        engine: a name of ENGINES.
        model: of any of PRECISIONS; put into training mode.
        loss: from outputs, as float64, and labels to each record's loss (n,).
        measured: whether "bookkeeping" chooses its kernels by measuring them, once for each shape
            in a process; else by rule, so that equal runs round equally on one machine.

    Raises:
        AccordError: a layer that the engine cannot take apart.
    """
    try:
        return ENGINES[engine](model, loss, measured)
    except NotImplementedError as fault:  # Opacus' word for a layer that it cannot take apart
        first = str(fault).splitlines()[0]
        raise AccordError(f"model: {first} Choose a model without it.") from None


def resolve(
    engine: str, model: nn.Module, loss: Loss, inputs: torch.Tensor, labels: torch.Tensor
) -> tuple[str, str]:
    """Say which engine "auto" is for a model: "bookkeeping", or "hooks" where that does not do.

    It looks at the model and at synthetic records, so that all sites find the same.

    Args:
        engine: a name of ENGINES, which stays, or "auto".
        model: left as it is.
        loss: see `make`.
        inputs: synthetic records (n, ...); two are used.
        labels: (n,).

    Returns:
        The engine, and why it is not the fastest one, or "".
    """
    if engine != "auto":
        return engine, ""
    working = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        parts = make("bookkeeping", working, loss)
        try:
            parts.norms(inputs[:2], labels[:2])
        except (NotImplementedError, ValueError) as fault:
            return "hooks", (str(fault) or type(fault).__name__).splitlines()[0]
        except Exception:  # of the model's own; whoever probes or trains it says so
            return "bookkeeping", ""
        finally:
            parts.close()
    return "bookkeeping", ""
