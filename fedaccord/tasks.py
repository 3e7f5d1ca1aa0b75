"""What a task is: where records come from, what they mean, and what is public about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from fedaccord import data, registry
from fedaccord.accord import Accord
from fedaccord.accord_task import TaskSection
from fedaccord.errors import AccordError

Inputs = npt.NDArray[np.float32] | npt.NDArray[np.int64]


@dataclass(frozen=True)
class TaskSpec:
    """What is public about a task.

    Attributes:
        name: its name in the registry.
        features: names of the model's inputs, in order.
        classes: names of the label's values, by index.
        attributes: each sensitive attribute with the names of its groups, by index.
        source: where the records come from, under which licence, and whom to cite.
        shape: of one record's inputs: (features,) of a row, (channels, height, width) of an image,
            (positions,) of a text; (number of features,) by default.
        vocabulary: above 0, inputs are whole numbers (tokens) below it, int64, and 0 fills places
            that hold no token; 0: inputs are float32.
        sequence: (steps, channels) where the first steps x channels features of a row are the same
            channels measured at each step in time (all channels of the first step first).
    """

    name: str
    features: tuple[str, ...]
    classes: tuple[str, ...]
    attributes: Mapping[str, tuple[str, ...]]
    source: str
    shape: tuple[int, ...] = ()
    vocabulary: int = 0
    sequence: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Fill the shape of a row in."""
        if not self.shape:
            object.__setattr__(self, "shape", (len(self.features),))

    def blank(self, rows: int) -> Inputs:
        """Make inputs of zeros, (rows, *shape), of the task's dtype."""
        shape = (rows, *self.shape)
        return np.zeros(shape, np.int64) if self.vocabulary else np.zeros(shape, np.float32)


@dataclass(frozen=True)
class Records:
    """Records of a site; row i of every array is the same record.

    Attributes:
        inputs: (n, *shape), float32 inside the task's declared bounds, or int64 tokens.
        labels: int64 (n,), index of a class.
        subjects: int64 (n,), whose record it is; one subject may have many.
        groups: for each sensitive attribute int64 (n,), index of a group.
    """

    inputs: Inputs
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

    def public(self, rows: int, seed: int) -> Inputs:
        """Draw proxy inputs (rows, *shape) from what is public; no private record is in them."""
        ...


@runtime_checkable
class Labelled(Protocol):
    """A task with public records whose labels are public too: a model can be pre-trained there."""

    def labelled(self) -> tuple[Inputs, npt.NDArray[np.int64]]:
        """Read public inputs (n, *shape) and labels (n,); no private record is among them."""
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


def task_of(accord: Accord, home: Path, data: Path | None = None) -> Task:
    """Build the task that an accord agrees on, by name or from its description of own data.

    No private record is read.

    Args:
        accord: the accord.
        home: the accord's folder (`accord.folder`), from which its files are found.
        data: a site's own folder of data sets; None in a simulation and at the coordinator.

    Raises:
        AccordError: as `load_task`, or a tokenizer that cannot be used.
    """
    if isinstance(accord.task, TaskSection):
        return load_task(accord.task.name, accord.task.options)
    from fedaccord.own import OwnTask

    return OwnTask(accord.task, tuple(accord.roster), home, data)


def refuse_missing(task: Task, sites: Iterable[str]) -> None:
    """Refuse a task whose data is not there, before a round would be spent on noise alone.

    A task names what it reads of the cache in `needs`; one of the user's own data looks for each
    site's file in `look`. Files are looked for and not read.

    Args:
        task: the task.
        sites: those that are on this machine.

    Raises:
        TaskError: the first one that is not on this machine; the message says what to do.
    """
    for name in getattr(task, "needs", ()):
        data.path(name)
    if look := getattr(task, "look", None):
        for site in sites:
            look(site)


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
