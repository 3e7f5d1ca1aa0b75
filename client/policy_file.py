"""The file policy.toml: written once with every key explained, then only approvals are edited."""

from __future__ import annotations

import math
import textwrap
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.items import Array

from fedaccord.accord import Accord
from fedaccord.client.policy import SitePolicy, second_head
from fedaccord.client.policy_rules import needed
from fedaccord.errors import PolicyError
from fedaccord.evidence import write_atomic
from fedaccord.privacy.plan import plan_for

HEADER = """\
# What this site takes part in. The file is the site's own: no accord can change it, and whatever
# it does not allow is refused before a record is read. `fedaccord site approve` adds an accord.
"""
SHOWN = {"expires": "2030-12-31"}  # an example for a key that has no value
CAP = """\
# [accords.DIGEST]   # DIGEST: as it stands in approved
# max_epsilon = 0.5
"""
# The strict policy's cap: a site raises it knowing what it does.
STRICT_EPSILON, STRICT_DELTA = 1.0, 1e-6


def text(values: Mapping[str, Any]) -> str:
    """Write a whole policy as TOML, each key under its description.

    Args:
        values: by key; one that is missing or None stands there as a comment.
    """
    parts = [HEADER.rstrip()]
    for key, field in SitePolicy.model_fields.items():
        if key == "accords":
            continue
        value = values.get(key)
        words = textwrap.wrap(str(field.description), 97)
        line = f"{key} = {SHOWN.get(key, '') if value is None else tomlkit.item(value).as_string()}"
        parts.append(
            "\n".join([*(f"# {w}" for w in words), f"# {line}" if value is None else line])
        )
    caps = SitePolicy.model_fields["accords"].description
    tables = [
        f"[accords.{digest}]\nmax_epsilon = {cap['max_epsilon']}\n"
        for digest, cap in values.get("accords", {}).items()
    ]
    return "\n\n".join([*parts, f"# {caps}\n" + ("\n".join(tables) or CAP)])


def strict(folder: Path) -> dict[str, Any]:
    """Return the values of a policy that takes part in nothing yet."""
    defaults = {
        key: field.get_default(call_default_factory=True)
        for key, field in SitePolicy.model_fields.items()
        if not field.is_required()
    }
    return defaults | {
        "max_epsilon": STRICT_EPSILON,
        "delta": STRICT_DELTA,
        "second_head": second_head(folder),
    }


def strict_policy(folder: Path) -> SitePolicy:
    """Return the policy that takes part in nothing yet."""
    return SitePolicy.model_validate(strict(folder))


def simulated(folder: Path, accord: Accord) -> dict[str, Any]:
    """Return the values under which a simulated site takes part in one accord and in no other.

    Args:
        folder: the site's folder, named like the site.
        accord: the accord; its own figures become the bounds.
    """
    site = folder.resolve().name
    # A folder that is named otherwise allows what any of the accord's sites needs.
    here = [s for s in accord.sites if s.name == site] or accord.sites
    privacy, student = accord.privacy, accord.distillation
    plan = plan_for(accord, here[0].name)
    models = {accord.model.name} | ({student.model} if student.enabled else set())
    return strict(folder) | {
        "approved": [accord.digest],
        "max_epsilon": privacy.max_epsilon if privacy.enabled else math.inf,
        "delta": privacy.delta,
        "units": [privacy.unit],
        "min_noise_multiplier": plan.noise_multiplier if plan else 0.0,
        "max_grad_norm": privacy.max_grad_norm,
        "min_subjects": min(s.subjects for s in here),
        "min_records": min(s.records or s.subjects for s in here),
        "models": sorted(models),
        "max_parameters": 10**9,
        "releases": needed(accord),
        "min_cell": accord.fairness.min_group,
    }


def write_simulated(path: Path, accord: Accord) -> None:
    """Write the policy of a simulated site that has none."""
    write_atomic(path, text(simulated(path.parent, accord)))


def write_strict(path: Path) -> None:
    """Write a policy that takes part in nothing yet, for a site to fill in."""
    write_atomic(path, text(strict(path.parent)))


def approve(path: Path, digest: str, words: str) -> bool:
    """Add an accord to the policy's approved ones; comments and order are kept.

    | the file | then |
    |---|---|
    | is not there | is written first, taking part in nothing but what is added |
    | has the digest already | is left as it is |
    | is not a valid policy | is left as it is, and that is raised |

    Args:
        path: of policy.toml.
        digest: the accord's.
        words: a comment beside it, on one line.

    Returns:
        Whether the file was changed.

    Raises:
        PolicyError: a policy.toml that is not valid, or whose form keeps it from being edited.
    """
    if not path.exists():
        write_strict(path)
    held = SitePolicy.read(path).approved
    if digest in held:
        return False
    _edit(path, [*held, digest], digest, words)
    return True


def revoke(path: Path, digest: str) -> bool:
    """Take an accord off the policy's approved ones; comments and order are kept.

    Returns:
        Whether it was there.

    Raises:
        PolicyError: as `approve`, or a policy.toml that is missing.
    """
    held = SitePolicy.read(path).approved
    if digest not in held:
        return False
    _edit(path, [other for other in held if other != digest], digest, "")
    return True


def _edit(path: Path, wanted: list[str], digest: str, words: str) -> None:
    """Add or remove a digest, and write only a file that says what was wanted and nothing else."""
    before = path.read_bytes().decode("utf-8-sig")
    file = tomlkit.parse(before)
    if not file.get("approved") and "#" not in file.get("approved", tomlkit.array()).as_string():
        file["approved"] = tomlkit.array()  # tomlkit cannot add to "[ ]"
    listed = file["approved"]
    assert isinstance(listed, Array)  # SitePolicy.read would not have passed anything else
    if digest in wanted:
        listed.add_line(digest, comment=words)
    else:
        while digest in listed:
            listed.remove(digest)
    after = tomlkit.dumps(file)
    try:
        same = tomllib.loads(after) == tomllib.loads(before) | {"approved": wanted}
    except tomllib.TOMLDecodeError:
        same = False
    if not same:
        raise PolicyError(
            "policy.toml",
            f"{path}: approved cannot be edited in its present form. Edit it by hand.",
        )
    write_atomic(path, after)
