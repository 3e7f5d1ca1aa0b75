"""A task of the user's own data: a table, images or texts that the accord describes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedaccord import own_columns
from fedaccord.accord_task import ImagesSection, OwnSection, TableSection, TextSection
from fedaccord.errors import AccordError, TaskError
from fedaccord.evidence import digest, sha256
from fedaccord.folders import ImageInputs
from fedaccord.folders import digest as digest_of_files
from fedaccord.own_files import Cell, Found, Rows, read, site_file, stamp
from fedaccord.tables import TableInputs
from fedaccord.tasks import Inputs, Records, SiteData, TaskSpec
from fedaccord.texts import TextInputs

# What depends on private records goes to the site's own diary (client/diary.py) and nowhere else.
_diary = logging.getLogger("fedaccord.private")
_LINES = 20  # in the diary; `fedaccord task check` has all


class Encoder(Protocol):
    """How cells become a model's inputs; what it cannot read it leaves out by itself."""

    features: tuple[str, ...]
    shape: tuple[int, ...]
    vocabulary: int

    def encode(
        self, columns: Mapping[str, Sequence[Cell]], folder: Path
    ) -> tuple[Inputs, dict[str, list[str]]]:
        """Return inputs (n, *shape), and by column for each cell "" or why it is unusable."""
        ...

    def draw(self, rows: int, rng: np.random.Generator) -> Inputs:
        """Make up inputs (rows, *shape) from what is declared alone."""
        ...


@dataclass(frozen=True)
class Loaded:
    """What a site's file holds, for the site alone.

    Attributes:
        data: the records that can be used.
        rows: the same records as they stand in the file, training and test ones in file order.
        test: for each of the rows, whether it is one to evaluate on.
        labels: for each of the rows, its class.
        found: the records that were left out, and why.
    """

    data: SiteData
    rows: Rows
    test: npt.NDArray[np.bool_]
    labels: npt.NDArray[np.int64]
    found: tuple[Found, ...]


class OwnTask:
    """A user's own data as a task.

    A record that is at fault is left out by itself, whatever the fault, so that a bad row neither
    silences the other subjects nor shows outside the site. The site finds it by name with
    `fedaccord task check`; while it trains, only its diary says so.
    """

    def __init__(
        self, section: OwnSection, sites: Sequence[str], home: Path, data: Path | None = None
    ) -> None:
        """Describe the task; no private record is read.

        Args:
            section: the accord's [task].
            sites: names of the accord's sites.
            home: the accord's folder, where what is public lies.
            data: a site's own folder of data sets (see `own_files.site_file`).

        Raises:
            AccordError: a tokenizer that cannot be used.
        """
        self.section, self.sites = section, tuple(sites)
        self.home, self.data = home, data
        self.encoder = encoder(section, home)
        one = "" if section.subject else " Each row is taken for a subject of its own."
        self.spec = TaskSpec(
            name=section.dataset,
            features=self.encoder.features,
            classes=tuple(section.label.classes),
            attributes={name: it.names for name, it in section.attributes.items()},
            source=f"{section.source}. Licence: {section.licence}.{one}",
            shape=self.encoder.shape,
            vocabulary=self.encoder.vocabulary,
        )
        if section.public_file is not None:
            self.labelled = self._labelled  # makes it one of tasks.Labelled

    def site(self, name: str) -> SiteData:
        """Read a site's records; those at fault are left out, and its diary says how many.

        Raises:
            TaskError: a file that is missing, cannot be read at all, or lacks a column.
        """
        path = site_file(self.section, name, self.home, self.data)
        key = digest([self.section.model_dump(mode="json"), self.sites, name, str(path.resolve())])
        version = stamp(path)
        if key not in _held or _held[key][0] != version:
            loaded = self.load(name)
            _note(name, loaded.found)
            _held[key] = (version, loaded.data)
        return _held[key][1]

    def look(self, name: str) -> None:
        """Look for a site's file, without reading it.

        Raises:
            TaskError: it is not there; the message, which may travel, names no folder of the site.
        """
        if not site_file(self.section, name, self.home, self.data).is_file():
            file = self.section.file.replace("{site}", name)
            raise TaskError(
                f'task.file = "{file}": site {name} has no such file. Put its records there; '
                "`fedaccord task check` says where it is looked for."
            )

    def load(self, name: str) -> Loaded:
        """Read a site's file with all that is wrong in it; what it returns stays at the site.

        Raises:
            TaskError: as `site`.
        """
        section = self.section
        path = site_file(section, name, self.home, self.data)
        rows, found = self._own(_read(path, section), name)
        missing = section.missing_values
        names, why = own_columns.subjects(rows, section.subject, missing)
        unusable = [(section.subject or "", why)]
        columns = rows.columns
        if section.split is None:
            test = own_columns.held_out(names, section.dataset, section.test_share)
        else:
            test, why = own_columns.split(columns[section.split])
            unusable.append((section.split, why))
        labels, why = own_columns.codes(columns[section.label.column], section.label, missing)
        unusable.append((section.label.column, why))
        groups = {}
        for attribute, it in section.attributes.items():
            groups[attribute], why = own_columns.codes(columns[it.column], it, missing)
            unusable.append((it.column, why))
        good, faults = _judged(rows, unusable)
        subjects = own_columns.identities(names, section.dataset)
        inputs, why_not = self.encoder.encode(rows.take(good).columns, path.parent)
        kept, more = _judged(rows.take(good), list(why_not.items()))
        inputs, places = inputs[kept], np.array(good, np.int64)[kept]
        here, more_still = _one_split(rows, places, subjects, np.array(test, np.bool_), section)
        inputs, places = inputs[here], places[here]
        is_test = np.array(test, np.bool_)[places]
        records = [
            Records(
                inputs[half],
                labels[places[half]],
                subjects[places[half]],
                {attribute: group[places[half]] for attribute, group in groups.items()},
            )
            for half in (~is_test, is_test)
        ]
        return Loaded(
            data=SiteData(*records),
            rows=rows.take(places.tolist()),
            test=is_test,
            labels=labels[places],
            found=tuple(sorted({*found, *faults, *more, *more_still})),
        )

    def _own(self, rows: Rows, name: str) -> tuple[Rows, list[Found]]:
        """Keep a site's own rows; name those that are no site's."""
        column, found = self.section.site_column, list(rows.found)
        if column is None:
            return rows, found
        sites = [own_columns.site_name(cell) for cell in rows.columns[column]]
        for at, site in enumerate(sites):
            if site not in self.sites:
                cell = rows.columns[column][at]
                said = "is missing" if not cell else f'"{cell}" is no site of the accord'
                found.append(rows.fault(at, column, said))
        return rows.take([at for at, site in enumerate(sites) if site == name]), found

    def public(self, rows: int, seed: int) -> Inputs:
        """Draw proxy inputs: from the public file, where one is declared, else made up.

        Made-up inputs are uniform between the declared bounds, over the declared values, pixels or
        tokens; from a file they are drawn without repeats as far as its records go.

        Raises:
            AccordError: a public file that is missing, not the declared one, or has a bad record.
        """
        rng = np.random.default_rng([seed, 0x9E0])
        if self.section.public_file is None:
            return self.encoder.draw(rows, rng)
        inputs, _ = self._published()
        drawn = np.concatenate(
            [rng.permutation(len(inputs)) for _ in range(-(-rows // len(inputs)))]
        )
        return inputs[drawn[:rows]]

    def _labelled(self) -> tuple[Inputs, npt.NDArray[np.int64]]:
        """Read the public file's inputs (n, *shape) and labels (n,)."""
        section = self.section
        inputs, rows = self._published(section.label.column)
        labels, why = own_columns.codes(
            rows.columns[section.label.column], section.label, section.missing_values
        )
        _, faults = _judged(rows, [(section.label.column, why)])
        if faults:
            raise AccordError(f"task.public_file: {faults[0]}. Mend it.")
        return inputs, labels

    def _published(self, *others: str) -> tuple[Inputs, Rows]:
        """Read the public file's inputs, and its rows with some other columns."""
        section = self.section
        assert section.public_file is not None and section.public_sha256 is not None
        path = self.home / section.public_file
        try:
            rows = read(path, [*section.input_columns, *others], section.delimiter)
        except TaskError as fault:
            raise AccordError(f"task.public_file: {fault}") from None
        found = sha256(path.read_bytes())
        if isinstance(section, ImagesSection):
            found = sha256(f"{found}\n{digest_of_files(path.parent, rows.columns[section.path])}")
        if found != section.public_sha256:
            raise AccordError(
                f"task.public_sha256 = {section.public_sha256[:12]}... is not that of "
                f"{section.public_file}, {found}. Restore the file, or declare its own."
            )
        inputs, why = self.encoder.encode(rows.columns, path.parent)
        _, faults = _judged(rows, list(why.items()))
        if faults or rows.found:
            raise AccordError(f"task.public_file: {[*rows.found, *faults][0]}. Mend it.")
        if not len(rows):
            raise AccordError(f"task.public_file: {section.public_file} holds no record. Add some.")
        return inputs, rows


def encoder(section: OwnSection, home: Path) -> Encoder:
    """Choose how cells become inputs.

    Raises:
        AccordError: a tokenizer that cannot be used.
    """
    if isinstance(section, TableSection):
        return TableInputs(section)
    if isinstance(section, ImagesSection):
        return ImageInputs(section)
    assert isinstance(section, TextSection)
    return TextInputs(section, home)


# The records of each site that this process has read, with the version of the file. Changed images
# are seen when the list of them changes.
_held: dict[str, tuple[tuple[int, int], SiteData]] = {}
_last: dict[str, tuple[tuple[int, int], Rows]] = {}


def _read(path: Path, section: OwnSection) -> Rows:
    """Read a file's declared columns; the last one is kept, since many sites may share it."""
    if "{site}" in section.file:
        return read(path, section.columns, section.delimiter)
    key, version = digest([str(path.resolve()), section.columns, section.delimiter]), stamp(path)
    if key not in _last or _last[key][0] != version:
        _last.clear()
        _last[key] = (version, read(path, section.columns, section.delimiter))
    return _last[key][1]


def _judged(
    rows: Rows, unusable: Sequence[tuple[str, Sequence[str]]]
) -> tuple[list[int], list[Found]]:
    """Find the places of rows without a fault, and name the faults of the others."""
    faults = [
        rows.fault(at, column, words)
        for column, why in unusable
        for at, words in enumerate(why)
        if words
    ]
    bad = {fault.row for fault in faults}
    return [at for at, row in enumerate(rows.numbers) if row not in bad], faults


def _one_split(
    rows: Rows,
    places: npt.NDArray[np.int64],
    subjects: npt.NDArray[np.int64],
    test: npt.NDArray[np.bool_],
    section: OwnSection,
) -> tuple[npt.NDArray[np.bool_], list[Found]]:
    """Keep a subject that stands in both splits for training alone; name its other records."""
    own, is_test = subjects[places], test[places]
    twice = is_test & np.isin(own, own[~is_test])
    words = "is of a subject that is also trained on"
    return ~twice, [rows.fault(at, section.split or "", words) for at in places[twice].tolist()]


def _note(name: str, found: Sequence[Found]) -> None:
    """Write what was left out into the site's diary, if one is open."""
    if not found or not _diary.handlers:
        return
    _diary.warning("%d records at fault are left out of %s's data", len(found), name)
    for fault in found[:_LINES]:
        _diary.warning("left out: %s", fault)
    if len(found) > _LINES:
        _diary.warning("left out: %d more; see fedaccord task check", len(found) - _LINES)
