"""What is wrong with a user's own data, found at the site before it trains: one line a fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from fedaccord.accord import Accord
from fedaccord.faults import toml
from fedaccord.own import Loaded, OwnTask
from fedaccord.tasks import SiteData

ENOUGH = 0.9  # of the declared training subjects: declared sizes are rounded
LEAK_ROWS = 20  # fewer records say nothing of a column that goes with the label


def sizes(accord: Accord, site: str, data: SiteData) -> list[str]:
    """Say where a site has clearly fewer training subjects than it declares, or none to test."""
    declared = accord.roster[site]
    found = len(np.unique(data.train.subjects))
    faults = []
    if found < ENOUGH * declared:
        faults.append(
            f"sites[{site}].subjects = {declared}, and the site has {found} training subjects that "
            "can be used. Declare about as many, or mend the records."
        )
    if not len(data.test):
        faults.append(f"site {site}: has no record to evaluate on. Add some to its test split.")
    return faults


def columns(task: OwnTask, loaded: Mapping[str, Loaded]) -> list[str]:
    """Name the input columns that say nothing, or say the label, over all loaded sites.

    | column | fault |
    |---|---|
    | one value in every record | constant |
    | one value for each class and one class for each value, in 20 records or more | is the label |
    """
    section, faults = task.section, []
    labels = [int(label) for one in loaded.values() for label in one.labels]
    for column in section.input_columns:
        cells = [cell for one in loaded.values() for cell in one.rows.columns[column]]
        if len(set(cells)) == 1 and len(cells) > 1:
            faults.append(f"column {toml(column)}: has one value in all records. Remove it.")
        pairs = set(zip(cells, labels, strict=True))
        one_to_one = len(pairs) == len(set(cells)) == len(set(labels)) > 1
        if one_to_one and len(cells) >= LEAK_ROWS:
            faults.append(
                f"column {toml(column)}: is the label {toml(section.label.column)} by another "
                "name, record by record. Remove it from the inputs."
            )
    return faults


def shared(task: OwnTask, loaded: Mapping[str, Loaded]) -> list[str]:
    """Name the sites that have subjects in common, which would be trained on twice.

    Without a column of subjects nobody can be recognised, and nothing is said.
    """
    if task.section.subject is None:
        return []
    own = {
        name: np.union1d(one.data.train.subjects, one.data.test.subjects)
        for name, one in loaded.items()
    }
    faults = []
    for first, second in combinations(own, 2):
        both = np.intersect1d(own[first], own[second])
        if len(both):
            who = sorted(
                {
                    str(loaded[first].rows.columns[task.section.subject][at])
                    for at, subject in enumerate(_subjects(loaded[first]))
                    if subject in both
                }
            )
            faults.append(
                f"sites {first} and {second}: have {len(both)} subjects in common "
                f"({_some(who)}), each protected at each site alone. Keep each at one site."
            )
    return faults


def _subjects(loaded: Loaded) -> list[int]:
    """List the subject of each of the rows."""
    out = np.empty(len(loaded.test), np.int64)
    out[~loaded.test] = loaded.data.train.subjects
    out[loaded.test] = loaded.data.test.subjects
    return [int(subject) for subject in out]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
