"""Passes of a site's records through a model, page by page, each record by itself."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedaccord.client.diary import log
from fedaccord.privacy import engines
from fedaccord.privacy.clipping import SubjectOptimizer
from fedaccord.privacy.sampling import EMPTY, MICRO_BATCH
from fedaccord.privacy.views import Views
from fedaccord.tasks import Records

_WARM: set[tuple[object, ...]] = set()  # what has been run blank in this process


@dataclass(frozen=True)
class How:
    """How records pass through a model: no matter for the guarantee, but for time and memory.

    Attributes:
        engine: a name of `privacy.engines.ENGINES`.
        precision: of forward and backward passes: "float64", "float32" or "bfloat16".
        page_rows: records that pass at once, at most.
        measured: whether kernels are chosen by measuring (see `engines.make`).
        device: where they pass; weights are held, and noise is added, on the CPU.
    """

    engine: str = "bookkeeping"
    precision: str = "float64"
    page_rows: int = MICRO_BATCH
    measured: bool = True
    device: str = "cpu"


class Passes:
    """The copy of a model that runs over pages of records; the model itself never sees one.

    What a pass writes besides gradients would leave the site without noise (an embedding with
    `max_norm` shortens the rows that it looks up), or change what other records give (a record that
    makes the model raise halfway leaves it in evaluation mode). So every pass starts from the
    weights that are held, and from a new copy once one has raised.
    """

    def __init__(self, model: nn.Module, how: How, views: Views, max_grad_norm: float) -> None:
        self._model, self._how, self._views, self._bound = model, how, views, max_grad_norm
        self.renew()

    def renew(self) -> None:
        """Take a new copy of the model."""
        dtype = engines.PRECISIONS[self._how.precision]
        self._working = copy.deepcopy(self._model).to(self._how.device, dtype)
        self._parts = engines.make(
            self._how.engine,
            self._views.model(self._working),
            self._views.loss(engines.cross_entropy),
            self._how.measured,
        )

    def warm(self, records: Records, rows: int) -> None:
        """Run a blank page, so that no kernel is ever chosen by how fast private records pass."""
        shape = (rows, *records.inputs.shape[1:])
        key = (type(self._model), len(list(self._model.parameters())), self._how, *shape)
        if not self._how.measured or key in _WARM:
            return
        _WARM.add(key)
        blank = Records(
            inputs=np.zeros((1, *shape[1:]), records.inputs.dtype),
            labels=np.zeros(1, np.int64),
            subjects=np.zeros(1, np.int64),
            groups={},
        )
        try:
            self.clipped_sum(blank, np.where(np.arange(rows) == 0, 0, EMPTY), 0)
        except Exception as fault:  # records of another shape, say: steps are noise alone
            log.warning("a blank page raised %s", type(fault).__name__)
            self.renew()

    def clipped_sum(
        self, records: Records, page: npt.NDArray[np.int64], masks: int
    ) -> torch.Tensor:
        """Sum the clipped gradients of a page's records, dropout's masks drawn from a seed."""
        self._refresh()
        torch.default_generator.manual_seed(masks)
        if torch.cuda.is_available():
            torch.cuda.manual_seed(masks)
        inputs, labels = _page(records.inputs, page), _page(records.labels, page)
        keep = torch.from_numpy(page != EMPTY)
        with torch.enable_grad():
            return self._parts.clipped_sum(inputs, labels, self._bound, keep)

    def _refresh(self) -> None:
        """Bring the copy up to the weights that are held in float64, and back to training mode."""
        self._working.train()
        with torch.no_grad():
            for held, used in zip(_tensors(self._model), _tensors(self._working), strict=True):
                used.copy_(held)


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def add_page(
    passes: Passes,
    optimizer: SubjectOptimizer,
    records: Records,
    page: npt.NDArray[np.int64],
    masks: int,
) -> None:
    """Add the clipped gradients of a page's records; a record that raises contributes zero.

    Of a page that raises, each half is tried with the other half's places empty, until the record
    that raises is alone, so that one subject's record never removes the others. The shape of the
    page, the places on it and dropout's masks stay as they were.
    """
    held = np.flatnonzero(page != EMPTY)
    if len(held) == 0:
        return
    try:
        optimizer.add(passes.clipped_sum(records, page, masks))
    except Exception as fault:  # any fault of the data; the site's own diary has it
        log.warning("%d records raised %s", len(held), type(fault).__name__)
        passes.renew()
        half = len(held) // 2
        for others in (held[half:], held[:half]) if half else ():
            part = page.copy()
            part[others] = EMPTY
            add_page(passes, optimizer, records, part, masks)


def _page(column: npt.NDArray[np.generic], page: npt.NDArray[np.int64]) -> torch.Tensor:
    """Lay a column of the records out on a page; places without a record hold zeros."""
    laid = np.zeros((len(page), *column.shape[1:]), column.dtype)
    laid[page != EMPTY] = column[page[page != EMPTY]]
    return torch.from_numpy(laid)
