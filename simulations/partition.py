"""Partitioning: which site gets which record, as pure functions of arrays and a generator.

Each function returns one array of record indices a site, sorted. Every record is at exactly one
site, and so is every subject: where `subjects` is given, all records of a subject go together,
since the subject is what differential privacy protects. Splits are then made over subjects: a
share of 0.3 is a share of subjects, and a subject's label is the one that most of its records have
(of several such, the smallest).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Column = npt.NDArray[Any]
Parts = tuple[Indices, ...]

MOST_SITES = 100_000
TRIES = 1_000  # draws of a Dirichlet split until every site has min_size subjects


class PartitionFault(ValueError):
    """Why records cannot be divided as asked; the message is whole."""


def iid(
    records: int, sites: int, rng: np.random.Generator, subjects: Column | None = None
) -> Parts:
    """Divide at random into sites whose numbers of subjects differ by at most one.

    Args:
        records: how many there are, n.
        sites: how many sites, 1 to the number of subjects.
        rng: the randomness.
        subjects: (n,), whose record each is; each record its own by default.

    Raises:
        PartitionFault: fewer subjects than sites.
    """
    units = _Units.of(np.zeros(records, np.int64), subjects)
    _check_sites(sites, units.count)
    return units.parts(np.array_split(rng.permutation(units.count), sites))


def dirichlet_labels(
    labels: Column,
    sites: int,
    alpha: float,
    rng: np.random.Generator,
    min_size: int = 1,
    subjects: Column | None = None,
) -> Parts:
    """Divide each label's records by shares drawn from a symmetric Dirichlet distribution.

    Each label has shares of its own, so sites differ in labels and in size. The split is that of
    Yurochkin et al. 2019 (Bayesian Nonparametric Federated Learning of Neural Networks, section 4)
    and of Li et al. 2022 (Federated Learning on Non-IID Data Silos, section 4). Of a label with m
    subjects, a site with share p gets m p subjects, give or take one.

    Of 11 sites and ten labels alike in number, on average:

    | alpha | a site's most frequent label | its three most frequent |
    |---|---|---|
    | 100 | 12 % of its records | 33 % |
    | 1 | 27 % | 60 % |
    | 0.3 | 41 % | 80 % |
    | 0.1 | 61 % | 95 % |

    Args:
        labels: (n,).
        sites: how many sites, 1 or more.
        alpha: concentration, 0.001 to 1e6.
        rng: the randomness.
        min_size: subjects that each site must have. Splits are drawn until one fits, so shares
            then follow the distribution under that condition; 0 for the distribution itself.
        subjects: (n,), whose record each is; each record its own by default.

    Raises:
        PartitionFault: an argument out of its bounds, or no draw of 1,000 that fits min_size.
    """
    units = _Units.of(labels, subjects)
    _check_dirichlet(sites, alpha, min_size, units.count)
    kinds = units.by_value()

    def draw() -> list[Indices]:
        pieces = [_cut(rng.permutation(of_kind), _shares(sites, alpha, rng)) for of_kind in kinds]
        return [np.concatenate(of_site) for of_site in zip(*pieces, strict=True)]

    return units.parts(_drawn(draw, sites, alpha, min_size))


def dirichlet_sizes(
    records: int,
    sites: int,
    alpha: float,
    rng: np.random.Generator,
    min_size: int = 1,
    subjects: Column | None = None,
) -> Parts:
    """Divide at random into sites whose sizes are drawn from a symmetric Dirichlet distribution.

    Sites differ in size and, but for chance, in nothing else (quantity skew: Li et al. 2022,
    section 4).

    Args:
        records: how many there are, n.
        sites: how many sites, 1 or more.
        alpha: concentration, 0.001 to 1e6; the smaller, the more the sizes differ.
        rng: the randomness.
        min_size: as in `dirichlet_labels`.
        subjects: (n,), whose record each is; each record its own by default.

    Raises:
        PartitionFault: as `dirichlet_labels`.
    """
    units = _Units.of(np.zeros(records, np.int64), subjects)
    _check_dirichlet(sites, alpha, min_size, units.count)

    def draw() -> list[Indices]:
        return _cut(rng.permutation(units.count), _shares(sites, alpha, rng))

    return units.parts(_drawn(draw, sites, alpha, min_size))


def shards(
    labels: Column,
    sites: int,
    per_site: int,
    rng: np.random.Generator,
    subjects: Column | None = None,
) -> Parts:
    """Sort by label, cut into equal shards, deal each site the same number of them.

    With two shards a site most sites know two labels ("pathological" split, McMahan et al. 2017,
    Communication-Efficient Learning of Deep Networks from Decentralized Data, section 3). Shards
    differ by one subject at most; which subjects of a label share a shard is random.

    Args:
        labels: (n,).
        sites: how many sites, 1 or more.
        per_site: shards a site, 1 or more.
        rng: the randomness.
        subjects: (n,), whose record each is; each record its own by default.

    Raises:
        PartitionFault: an argument out of its bounds, or more shards than subjects.
    """
    units = _Units.of(labels, subjects)
    _whole("per_site", per_site, 1, MOST_SITES)
    _whole("sites", sites, 1, MOST_SITES)
    if sites * per_site > units.count:
        raise PartitionFault(
            f"{sites} sites x {per_site} shards = {sites * per_site} is more than the "
            f"{units.count} subjects. Take fewer."
        )
    mixed = rng.permutation(units.count)
    by_label = mixed[np.argsort(units.values[mixed], kind="stable")]
    cut = np.array_split(by_label, sites * per_site)
    dealt = rng.permutation(len(cut)).reshape(sites, per_site)
    return units.parts([np.concatenate([cut[shard] for shard in hand]) for hand in dealt])


def by_column(
    column: Column,
    rng: np.random.Generator,
    sites: int | None = None,
    subjects: Column | None = None,
) -> Parts:
    """Divide by the value of a column: a region, a device, an age.

    | sites | result |
    |---|---|
    | None | a site for each value, in order of value |
    | a number | subjects in order of value, cut into that many runs of equal size; equal values in random order |

    Args:
        column: (n,), numbers or texts that can be put in order.
        rng: the randomness.
        sites: how many sites, or None.
        subjects: (n,), whose record each is; each record its own by default. A subject with
            several values counts by the one that most of its records have.

    Raises:
        PartitionFault: a value that is not a number (NaN), or fewer subjects than sites.
    """  # noqa: E501  (a table row cannot be broken)
    if column.dtype.kind == "f" and bool(np.isnan(column).any()):
        raise PartitionFault("column: holds NaN, which has no order. Replace it or leave it out.")
    units = _Units.of(column, subjects)
    if sites is None:
        return units.parts(units.by_value())
    _check_sites(sites, units.count)
    mixed = rng.permutation(units.count)
    return units.parts(np.array_split(mixed[np.argsort(units.values[mixed], kind="stable")], sites))


def natural(assignment: Indices, sites: int, subjects: Column | None = None) -> Parts:
    """Leave each record at the site where it is; a site may be empty.

    Args:
        assignment: (n,), index of each record's site.
        sites: how many sites, 1 or more.
        subjects: (n,), whose record each is, to check that each is at one site.

    Raises:
        PartitionFault: an index that is no site's, or a subject at two sites.
    """
    _whole("sites", sites, 1, MOST_SITES)
    if len(assignment) and not (assignment.min() >= 0 and assignment.max() < sites):
        wrong = assignment[(assignment < 0) | (assignment >= sites)][0]
        raise PartitionFault(f"assignment: {wrong} is not from 0 to sites - 1 = {sites - 1}.")
    units = _Units.of(assignment, subjects)
    at_home = units.values[units.of_record] == assignment
    if not at_home.all():
        assert subjects is not None
        raise PartitionFault(
            f"subjects: {subjects[~at_home][0]} has records at two sites, and would be protected "
            "at each alone. Give the records to one site, or name the subjects of each site apart."
        )
    return tuple(np.flatnonzero(assignment == site) for site in range(sites))


@dataclass(frozen=True)
class _Units:
    """What is divided: subjects, each with one value.

    Attributes:
        of_record: (n,), index of each record's unit.
        values: (units,), one value a unit.
    """

    of_record: Indices
    values: Column

    @classmethod
    def of(cls, values: Column, subjects: Column | None) -> _Units:
        """Group records by subject; a subject's value is its most frequent one, then the least."""
        if subjects is None:
            return cls(np.arange(len(values)), values)
        if len(subjects) != len(values):
            raise PartitionFault(f"subjects: {len(subjects)} of them for {len(values)} records.")
        names, of_record = np.unique(subjects, return_inverse=True)
        kinds, codes = np.unique(values, return_inverse=True)
        pairs, counts = np.unique(of_record * max(1, len(kinds)) + codes, return_counts=True)
        unit, code = np.divmod(pairs, max(1, len(kinds)))
        order = np.lexsort((code, -counts, unit))
        first = order[np.searchsorted(unit[order], np.arange(len(names)))]
        return cls(of_record, kinds[code[first]])

    @property
    def count(self) -> int:
        """How many units there are."""
        return len(self.values)

    def by_value(self) -> list[Indices]:
        """Return the units of each value, in order of value."""
        order = np.argsort(self.values, kind="stable")
        _, starts = np.unique(self.values[order], return_index=True)
        return np.split(order, starts[1:])

    def parts(self, of_sites: list[Indices]) -> Parts:
        """Turn each site's units into its records, sorted."""
        site = np.zeros(self.count, np.int64)
        for place, units in enumerate(of_sites):
            site[units] = place
        home = site[self.of_record]
        order = np.argsort(home, kind="stable")
        cuts = np.searchsorted(home[order], np.arange(1, len(of_sites)))
        return tuple(np.split(order, cuts))


def _shares(sites: int, alpha: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Draw the shares of sites, (sites,), which sum to 1."""
    return rng.dirichlet(np.full(sites, alpha))


def _cut(units: Indices, shares: npt.NDArray[np.float64]) -> list[Indices]:
    """Cut units, in the order given, at the rounded sums of shares."""
    places = np.rint(np.cumsum(shares)[:-1] * len(units)).astype(np.int64)
    return np.split(units, np.minimum(places, len(units)))


def _drawn(
    draw: Callable[[], list[Indices]], sites: int, alpha: float, min_size: int
) -> list[Indices]:
    """Draw splits until every site has min_size units."""
    for _ in range(TRIES):
        found = draw()
        if min(map(len, found)) >= min_size:
            return found
    raise PartitionFault(
        f"alpha = {alpha:g} with {sites} sites: none of {TRIES} draws left each site "
        f"min_size = {min_size} subjects. Raise alpha, or take fewer sites or a smaller min_size."
    )


def _check_sites(sites: int, units: int) -> None:
    _whole("sites", sites, 1, MOST_SITES)
    if sites > units:
        raise PartitionFault(f"sites = {sites} is more than the {units} subjects. Take fewer.")


def _check_dirichlet(sites: int, alpha: float, min_size: int, units: int) -> None:
    _whole("sites", sites, 1, MOST_SITES)
    _whole("min_size", min_size, 0, 10**9)
    if not 0.001 <= alpha <= 1e6:
        raise PartitionFault(f"alpha = {alpha:g} must be from 0.001 to 1e6.")
    if sites * min_size > units:
        raise PartitionFault(
            f"{sites} sites x min_size = {min_size} is more than the {units} subjects. Take fewer "
            "sites or a smaller min_size."
        )


def _whole(name: str, value: int, low: int, high: int) -> None:
    """Refuse what is no whole number within bounds."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise PartitionFault(f"{name} = {value!r} must be a whole number.")
    if not low <= value <= high:
        raise PartitionFault(f"{name} = {value} must be from {low} to {high:,}.")


KINDS = "iid, dirichlet:ALPHA, sizes:ALPHA, shards:K, column:NAME or natural"


def divide(
    how: str,
    columns: dict[str, Column],
    sites: int | None,
    rng: np.random.Generator,
    subjects: Column,
    home: Indices,
) -> Parts:
    """Divide as a text says: iid, dirichlet:0.3, sizes:1, shards:2, column:sex, natural.

    Args:
        how: the text; after the colon alpha, shards a site, or a column's name.
        columns: (n,) each, by name; "label" is one of them.
        sites: how many sites; None for as many as there are now, or one a value of the column.
        rng: the randomness.
        subjects: (n,), whose record each is.
        home: (n,), index of the site where each record is now.

    Raises:
        PartitionFault: a text that says nothing of the kind, or as the function that it names.
    """
    name, _, rest = how.partition(":")
    now = int(home.max()) + 1
    count = now if sites is None else sites
    labels = columns["label"]
    if (name, rest) == ("iid", ""):
        return iid(len(labels), count, rng, subjects)
    if name == "dirichlet":
        return dirichlet_labels(labels, count, _number(how, rest), rng, 1, subjects)
    if name == "sizes":
        return dirichlet_sizes(len(labels), count, _number(how, rest), rng, 1, subjects)
    if name == "shards" and rest.isdecimal():
        return shards(labels, count, int(rest), rng, subjects)
    if name == "column":
        if rest not in columns:
            known = ", ".join(columns)
            raise PartitionFault(f'{how}: there is no column "{rest}". Known: {known}.')
        return by_column(columns[rest], rng, sites, subjects)
    if (name, rest) == ("natural", ""):
        if sites is not None:
            raise PartitionFault(f"natural has as many sites as there are, {now}, not {sites}.")
        return natural(home, now, subjects)
    raise PartitionFault(f'"{how}" is not a way to divide records. Give {KINDS}.')


def _number(how: str, text: str) -> float:
    """Read the number after the colon."""
    try:
        return float(text)
    except ValueError:
        raise PartitionFault(f'{how}: "{text}" is not a number. Give {KINDS}.') from None
