"""The audit of a federation: figures over all sites from summed counts, and for each site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedaccord.fairness import counts as group_counts
from fedaccord.fairness.metrics import audit, parities

Tables = Mapping[str, Mapping[str, Any]]  # site -> attribute -> counts [group][label][prediction]


def audit_sites(
    tables: Tables,
    groups: Mapping[str, Sequence[str]],
    min_group: int,
    confidence: float,
) -> dict[str, Any]:
    """Audit one model over all sites that sent counts.

    Figures over all sites come from the summed counts, so they are those of the pooled rows. The
    mean accuracy weighs every site alike, whatever its size.

    Args:
        tables: counts by site and attribute, each (groups, labels, predictions).
        groups: names of each attribute's groups, in the order of the counts.
        min_group: subjects that a group needs for a figure.
        confidence: of every interval.

    Returns:
        {"accuracy": {"mean", "pooled", "sites"}, "attributes": {name: {"all": Audit,
        "sites": {site: {"n", "demographic_parity_difference"}}}}}, plain JSON values.
    """
    first = next(iter(groups))
    accuracy = {site: _accuracy(np.asarray(row[first])) for site, row in sorted(tables.items())}
    known = [value for value in accuracy.values() if value is not None]
    out: dict[str, Any] = {}
    for name, names in groups.items():
        arrays = {site: np.asarray(row[name], np.int64) for site, row in sorted(tables.items())}
        single = parities(arrays, names, min_group, confidence)
        nobody = np.zeros((len(names), 2, 2), np.int64)
        pooled = group_counts.total(list(arrays.values()) or [nobody])
        out[name] = {
            "all": audit(pooled, names, min_group, confidence),
            "sites": {
                site: {"n": n, "demographic_parity_difference": figure}
                for site, (n, figure) in single.items()
            },
        }
    mean = sum(known) / len(known) if known else None
    over_all = out[first]["all"]["accuracy"]["value"]
    return {"accuracy": {"mean": mean, "pooled": over_all, "sites": accuracy}, "attributes": out}


def _accuracy(counts: np.ndarray[Any, np.dtype[np.int64]]) -> float | None:
    """Share of a site's evaluation subjects that are predicted right; None without subjects."""
    total = int(counts.sum())
    return float(np.trace(counts, axis1=1, axis2=2).sum() / total) if total else None
