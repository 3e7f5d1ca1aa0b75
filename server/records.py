"""What a run has on record: the words of its start, plans, replies, and of who came back."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

from fedaccord.accord import Accord
from fedaccord.evidence import build_hash
from fedaccord.models.build import parameter_count, trained
from fedaccord.privacy import accounting, engines, tradeoff
from fedaccord.privacy.plan import Plan
from fedaccord.privacy.probe import synthetic
from fedaccord.privacy.views import Views
from fedaccord.server import checkpoint
from fedaccord.server.admission import Place
from fedaccord.server.gates import Verdict
from fedaccord.tasks import Task

PACKAGES = ("flwr", "torch", "opacus", "dp-accounting", "fairlearn", "numpy")


def start(
    accord: Accord, task: Task, model: torch.nn.Module, student: torch.nn.Module | None
) -> dict[str, Any]:
    """Say what is run, by which code, on which task, from which weights."""
    return {
        "id": "start",
        "kind": "start",
        "accord": accord.digest,
        "private": accord.privacy.enabled,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "build": build_hash(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "task": {
            "name": task.spec.name,
            "source": task.spec.source,
            "inputs": math.prod(task.spec.shape),
            "classes": list(task.spec.classes),
            "groups": {k: list(v) for k, v in task.spec.attributes.items()},
        },
        "model": {
            "name": accord.model.name,
            "parameters": parameter_count(model),
            "stay": parameter_count(model) - _travelling(model),
            "weights": checkpoint.weights_digest(checkpoint.weights_of(model)),
        },
        "gradients": gradients(accord, task, model),
        "student": None
        if student is None
        else {"name": accord.distillation.model, "parameters": parameter_count(student)},
    }


def _travelling(model: torch.nn.Module) -> int:
    """Count the weights that travel: those that are neither frozen nor stay at their site."""
    names = trained(model)
    return sum(weight.numel() for name, weight in model.named_parameters() if name in names)


def gradients(accord: Accord, task: Task, model: torch.nn.Module) -> dict[str, str] | None:
    """Say how each subject's gradient is made and cut; None where none is.

    Every site works it out by itself, from the accord, and finds the same.
    """
    how = accord.privacy
    if not how.enabled or how.unit != "subject":
        return None
    views = Views(accord.training.views, accord.training.augmentation)
    records = synthetic(task, accord.seed)
    loss = views.loss(engines.cross_entropy)
    engine, why = engines.resolve(how.engine, views.model(model), loss, *records)
    return {"asked": how.engine, "engine": engine, "why": why, "precision": how.precision}


def plan(place: Place, reserved: Plan | None) -> dict[str, Any]:
    """Say what a site reserved and what it costs, by every measure that the report gives."""
    record: dict[str, Any] = {
        "id": f"plan/{place.site}",
        "kind": "plan",
        "site": place.site,
        "entry": place.entry,
    }
    if reserved is None:
        return record | {"statement": "no privacy guarantee: privacy.enabled = false"}
    return record | {
        "statement": reserved.statement(),
        "noise_stddev": reserved.noise_stddev,
        "expected_batch": reserved.normaliser,
        "epsilon": {
            "PLD": reserved.epsilon(),
            "RDP": reserved.epsilon(accountant="RDP"),
            "replace-one": accounting.epsilon(reserved.event(), reserved.delta, "replace-one"),
        },
        "membership": tradeoff.membership(reserved.event()),
    }


def back(site: str, number: int) -> dict[str, Any]:
    """Say that a site which had been away answered, and is invited again."""
    return {
        "id": f"back/{site}/{number}",
        "kind": "back",
        "site": site,
        "round": number,
    }


def resumed(number: int, round_: int, cut: int, absent: list[str]) -> dict[str, Any]:
    """Say that the run goes on in another process, and after which round.

    Args:
        number: how often this run has been resumed, with this time.
        round_: the last round that had finished.
        cut: bytes of an unfinished last line that were removed.
        absent: sites that had reserved and did not answer now; they are away until they do.
    """
    return {
        "id": f"resume-{number}",
        "kind": "resume",
        "round": round_,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "build": build_hash(),
        "packages": {name: version(name) for name in PACKAGES},
        "cut": cut,
        "absent": absent,
    }


def replies(verdicts: Iterable[Verdict], invited: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Say of every site that was invited what became of its reply.

    The first reply of a site counts; that there were more is on record too.
    """
    out: dict[str, dict[str, Any]] = {}
    for verdict in verdicts:
        said: dict[str, Any] = {"accepted": not verdict.reason, "reason": verdict.reason}
        if verdict.norm is not None:  # without noise an update leaves no mark on the record
            said |= {"update_norm": verdict.norm, "sha256": verdict.sha256}
        first = out.setdefault(verdict.site, said)
        if first is not said:
            first["further"] = [*first.get("further", []), verdict.reason]
    nothing = {"accepted": False, "reason": "no answer"}
    return {site: out.get(site, dict(nothing)) for site in sorted(invited)}


def strangers(verdicts: Iterable[Verdict], invited: Iterable[str]) -> list[str]:
    """Name the nodes that replied although nobody had asked them."""
    return sorted({verdict.site for verdict in verdicts} - set(invited))
