"""Engines by name: how the clipped sum of a page of records is computed.

| engine | how | pages in |
|---|---|---|
| "bookkeeping" | one forward and one backward pass (Bu et al. 2022) | all of PRECISIONS |
| "ghost" | finds norms in a first backward pass, sums in a second one | float64 |
| "hooks" | makes each record's gradient, then clips and sums in float64 | all of PRECISIONS |
"""

from __future__ import annotations

from torch import nn

from fedaccord.errors import AccordError
from fedaccord.privacy.bookkeeping import BookkeepingEngine
from fedaccord.privacy.ghost import GhostEngine
from fedaccord.privacy.hooks import HooksEngine
from fedaccord.privacy.passes import PRECISIONS, Engine, Loss, PageEngine, cross_entropy

__all__ = ["ENGINES", "PRECISIONS", "Engine", "Loss", "cross_entropy", "make"]

ENGINES: dict[str, type[PageEngine]] = {
    "bookkeeping": BookkeepingEngine,
    "ghost": GhostEngine,
    "hooks": HooksEngine,
}


def make(engine: str, model: nn.Module, loss: Loss = cross_entropy) -> Engine:
    """Hook an engine to a model; the model's dtype is the precision of its passes.

    Args:
        engine: a name of ENGINES.
        model: of any of PRECISIONS; put into training mode.
        loss: from outputs, as float64, and labels to each record's loss (n,).

    Raises:
        AccordError: a layer that the engine cannot take apart.
    """
    try:
        return ENGINES[engine](model, loss)
    except NotImplementedError as fault:  # Opacus' word for a layer that it cannot take apart
        first = str(fault).splitlines()[0]
        raise AccordError(f"model: {first} Choose a model without it.") from None
