"""The conformance suite: checks that are silent on right code, and their runs on planted faults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fedaccord.conformance.checks import BY_NAME, CHECKS, Check, Finding
from fedaccord.conformance.faults import FAULTS, Fault
from fedaccord.conformance.runs import laboratory
from fedaccord.conformance.site import planted

__all__ = ["CHECKS", "FAULTS", "STATISTICAL", "Outcome", "clean", "faults", "plant", "repeat"]

STATISTICAL = sum(check.statistical for check in CHECKS)


@dataclass(frozen=True)
class Outcome:
    """What became of a planted fault: the checks that caught it, with their figures."""

    fault: Fault
    caught: dict[str, Finding]


def clean() -> Iterator[tuple[Check, Finding]]:
    """Run every check on the installed code as it is; none should raise an alarm."""
    with laboratory() as lab:
        for check in CHECKS:
            yield check, check.run(lab)


def plant(fault: Fault) -> Outcome:
    """Run the checks that a fault names while it is planted; tell which of them caught it.

    A site that stops is no catch. The site's own probe of the model (`privacy.probe`), which would
    refuse some of these faults before INTENT, is left out meanwhile: here the checks are tested.
    """
    no_probe = planted("fedaccord.client.site:probe", lambda _: lambda *args, **more: None)
    with laboratory(fault.engines) as lab, no_probe, fault.plant():
        found = {name: BY_NAME[name].run(lab) for name in fault.checks}
    caught = {name: one for name, one in found.items() if one.alarm and not one.silent}
    return Outcome(fault, caught)


def faults() -> Iterator[Outcome]:
    """Plant every fault, one at a time."""
    return map(plant, FAULTS)


def repeat(times: int) -> Iterator[list[str]]:
    """Run the statistical checks on the code as it is, again and again; yield the alarms."""
    for _ in range(times):
        with laboratory() as lab:
            yield [c.name for c in CHECKS if c.statistical and c.run(lab).alarm]
