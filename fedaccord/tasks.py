"""What a task is: where records come from, what they mean, and what is public about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedaccord import registry
from fedaccord.accord import Accord
from fedaccord.errors import AccordError


@dataclass(frozen=True)
class TaskSpec:
    """What is public about a task.

    Attributes:
        name: its name in the registry.
        features: names of the model's inputs, in order.
        classes: names of the label's values, by index.
        attributes: each sensitive attribute with the names of its groups, by index.
        source: where the records come from, under which licence, and whom to cite.
    """

    name: str
    features: tuple[str, ...]
    classes: tuple[str, ...]
    attributes: Mapping[str, tuple[str, ...]]
    source: str


@dataclass(frozen=True)
class Records:
    """Records of a site; row i of every array is the same record.

    Attributes:
        inputs: float32 (n, features), inside the task's declared bounds.
        labels: int64 (n,), index of a class.
        subjects: int64 (n,), whose record it is; one subject may have many.
        groups: for each sensitive attribute int64 (n,), index of a group.
    """

    inputs: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    subjects: npt.NDArray[np.int64]
    groups: Mapping[str, npt.NDArray[np.int64]]

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.labels)


@dataclass(frozen=True)
class SiteData:
    """A site's private records: those it trains on and those it evaluates on."""

    train: Records
    test: Records


class Task(Protocol):
    """Where records come from; built by name with the options of the accord's [task] table."""

    spec: TaskSpec
    sites: tuple[str, ...]

    def site(self, name: str) -> SiteData:
        """Read a site's private records (at that site only)."""
        ...

    def public(self, rows: int, seed: int) -> npt.NDArray[np.float32]:
        """Draw proxy inputs (rows, features) from what is public; no private record is in them."""
        ...


def load_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """Build a task by name without reading any private record.

    Raises:
        AccordError: an unknown name, or options that the task does not have or cannot take.
    """
    make = registry.load("task", name)
    try:
        task: Task = make(**(options or {}))
    except (TypeError, ValueError) as fault:
        first = str(fault).splitlines()[0]
        raise AccordError(f'task "{name}": {first}. Change task.options.') from None
    return task


def check_fits(accord: Accord, task: Task) -> None:
    """Hold an accord to the task that it names; no private record is read.

    Raises:
        AccordError: a site or an attribute that the task does not have.
    """
    for site in accord.roster:
        if site not in task.sites:
            raise AccordError(
                f'sites: task {task.spec.name} has no site "{site}".'
                f"{registry.nearest(site, task.sites)} Known: {', '.join(task.sites)}."
            )
    for name in accord.fairness.attributes:
        if name not in task.spec.attributes:
            raise AccordError(
                f'fairness.attributes: task {task.spec.name} has no attribute "{name}".'
                f"{registry.nearest(name, task.spec.attributes)} "
                f"Known: {', '.join(task.spec.attributes)}."
            )
