"""The report of a run: report.json with every figure, and report.html for people."""

from __future__ import annotations

from pathlib import Path

from fedaccord.errors import EvidenceError
from fedaccord.evidence import write_atomic
from fedaccord.reports.facts import HTML, JSON, facts, to_json
from fedaccord.reports.figures import draw
from fedaccord.reports.page import render

__all__ = ["facts", "write_report"]


def write_report(run: Path) -> Path:
    """Write report.json and report.html into a run's folder, from its evidence alone.

    A run that was refused or did not come to its end has a report as well, which says so.

    Args:
        run: the run's folder.

    Returns:
        The path of report.html.

    Raises:
        EvidenceError: not a run's folder, or a file in it that cannot be read.
        AccordError: an accord.toml that does not hold together.
    """
    try:
        content = facts(run)
        page = render(content, draw(content))
    except (LookupError, TypeError, AttributeError, ValueError) as fault:
        raise EvidenceError(
            f"run {run}: a record is not in the form in which it was written "
            f"({type(fault).__name__}: {fault}). `fedaccord verify {run}` names it."
        ) from fault
    write_atomic(run / JSON, to_json(content))
    write_atomic(run / HTML, page)
    return run / HTML
