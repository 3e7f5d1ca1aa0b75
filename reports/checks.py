"""Checks: what was compared, and every fault by the name of its record and its path in it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedaccord.evidence import canonical_json
from fedaccord.runs import Record

EXACT = 1e-12  # absolute, for figures: the same arithmetic elsewhere may differ in the last bit
EPSILON = 1e-9  # relative, for epsilons


@dataclass
class Check:
    """One kind of check: how many values were compared, and what did not hold.

    Attributes:
        name: what was checked.
        checked: how many values.
        faults: a sentence each; empty where all held.
    """

    name: str
    checked: int = 0
    faults: list[str] = field(default_factory=list)

    def holds(self, condition: bool, fault: str) -> bool:
        """Count one comparison, and note the fault where it does not hold."""
        self.checked += 1
        if not condition:
            self.faults.append(fault)
        return condition

    def equal(
        self, where: str, said: Any, right: Any, source: str = "it should be", tolerance: float = 0
    ) -> None:
        """Compare two JSON values leaf by leaf; name the path of every leaf that differs.

        Args:
            where: the file and record, and the path in it.
            said: what is written.
            right: what it should be.
            source: what gives the right value, with a verb ("the counts give").
            tolerance: that two floating-point numbers may differ by, absolute.
        """
        for path, one, other in differences(said, right, tolerance):
            self.faults.append(f"{where}{path} says {show(one)}, {source} {show(other)}")
        self.checked += leaves(right)


def differences(said: Any, right: Any, tolerance: float) -> Iterator[tuple[str, Any, Any]]:
    """List (path, said, right) for every leaf in which two JSON values differ."""
    if isinstance(said, dict) and isinstance(right, dict):
        for key in sorted({*said, *right}):
            if key not in said or key not in right:
                yield f".{key}", said.get(key, NOTHING), right.get(key, NOTHING)
            else:
                for path, *pair in differences(said[key], right[key], tolerance):
                    yield f".{key}{path}", *pair
    elif isinstance(said, list) and isinstance(right, list) and len(said) == len(right):
        for place, (one, other) in enumerate(zip(said, right, strict=True)):
            for path, *pair in differences(one, other, tolerance):
                yield f"[{place}]{path}", *pair
    elif not _same(said, right, tolerance):
        yield "", said, right


class _Nothing:
    """What stands where a key is missing."""

    def __repr__(self) -> str:
        return "nothing"


NOTHING = _Nothing()


def _same(said: Any, right: Any, tolerance: float) -> bool:
    """Compare two leaves: equal, of one type, or two floats within the tolerance."""
    if type(said) is not type(right):
        return False
    if tolerance and isinstance(right, float):
        return math.isclose(said, right, rel_tol=0, abs_tol=tolerance)
    return bool(said == right)


def leaves(value: Any) -> int:
    """Count the leaves of a JSON value."""
    if isinstance(value, dict):
        return sum(leaves(inner) for inner in value.values())
    return sum(leaves(inner) for inner in value) if isinstance(value, list) else 1


def show(value: Any) -> str:
    """Write a value for a fault, cut where it is long."""
    words = repr(value) if value is NOTHING else json.dumps(value, ensure_ascii=False, default=repr)
    return words if len(words) <= 160 else f"{words[:157]}..."


def read_lines(path: Path, check: Check, name: str) -> list[tuple[int, Record]]:
    """Read a file of canonical JSON objects, one a line, and note every line that is not one.

    Args:
        path: the file.
        check: gets a fault for a line that is no JSON object or is not as FedAccord writes it.
        name: how the file is called in a fault.

    Returns:
        (line number, record) of each line that is a JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        check.holds(False, f"{name} cannot be read: {type(fault).__name__}")
        return []
    check.holds(text.endswith("\n"), f"{name} does not end with a whole line")
    out = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not check.holds(isinstance(record, dict), f"{name}: line {number} is no JSON object"):
            continue
        try:
            as_written = canonical_json(record) == line
            out.append((number, record))
        except ValueError:  # NaN or infinity, which FedAccord never writes
            as_written = False
        called = f'record "{record.get("id", record.get("seq"))}" (line {number})'
        check.holds(as_written, f"{name}: {called} is not in the form in which it was written")
    return out
