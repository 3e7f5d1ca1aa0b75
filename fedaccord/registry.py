"""Names in an accord and the code behind them: literal dicts, imported late, plus entry points."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Any

from fedaccord.errors import AccordError

TASKS = {
    "adult": "fedaccord.simulations.adult:Adult",
    "clinical-text": "fedaccord.simulations.clinical_text:ClinicalText",
    "credit": "fedaccord.simulations.credit:Credit",
    "digits": "fedaccord.simulations.digits:Digits",
    "fashion": "fedaccord.simulations.fashion:Fashion",
    "heart": "fedaccord.simulations.heart:Heart",
    "thyroid": "fedaccord.simulations.thyroid:Thyroid",
}
MODELS = {
    "bag-of-words": "fedaccord.models.text:bag_of_words",
    "cnn1d": "fedaccord.models.tabular:cnn1d",
    "cnn2d": "fedaccord.models.images:cnn2d",
    "mlp": "fedaccord.models.tabular:mlp",
    "resnet18": "fedaccord.models.resnet:resnet18",
    "text": "fedaccord.models.text:text",
    "transformer": "fedaccord.models.transformer:transformer",
}
STRATEGIES = {
    "bulyan": "fedaccord.strategies.flower:bulyan",
    "centred-clipping": "fedaccord.strategies.centred_clipping:centred_clipping",
    "fedadagrad": "fedaccord.strategies.flower:fedadagrad",
    "fedadam": "fedaccord.strategies.flower:fedadam",
    "fedavg": "fedaccord.strategies.flower:fedavg",
    "fedavgm": "fedaccord.strategies.flower:fedavgm",
    "feddyn": "fedaccord.strategies.feddyn:feddyn",
    "fedmedian": "fedaccord.strategies.flower:fedmedian",
    "fedprox": "fedaccord.strategies.flower:fedprox",
    "fedtrimmedavg": "fedaccord.strategies.flower:fedtrimmedavg",
    "fedyogi": "fedaccord.strategies.flower:fedyogi",
    "krum": "fedaccord.strategies.flower:krum",
    "multikrum": "fedaccord.strategies.flower:multikrum",
    "qfedavg": "fedaccord.strategies.flower:qfedavg",
    "scaffold": "fedaccord.strategies.scaffold:scaffold",
}
_KINDS = {"task": TASKS, "model": MODELS, "strategy": STRATEGIES}
_GROUPS = {
    "task": "fedaccord.tasks",
    "model": "fedaccord.models",
    "strategy": "fedaccord.strategies",
}
_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def known(kind: str) -> list[str]:
    """List the names of a kind ("task", "model" or "strategy") without importing what they name."""
    return sorted({*_KINDS[kind], *(point.name for point in entry_points(group=_GROUPS[kind]))})


def nearest(word: str, words: Iterable[str]) -> str:
    """Return "" or a hint that names the known word closest to a mistyped one."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f' Did you mean "{close[0]}"?' if close else ""


def check(kind: str, name: str) -> str:
    """Return the name if it is known.

    Raises:
        AccordError: an unknown name; the message lists the known ones.
    """
    if name in _KINDS[kind]:  # our own need no search through the installed packages
        return name
    if kind == "strategy" and _PATH.fullmatch(name):  # imported by the coordinator, not by a reader
        return name
    names = known(kind)
    if name not in names:
        raise AccordError(
            f'{kind} "{name}" is not known.{nearest(name, names)} '
            f'Known: {", ".join(names)}; others come by the entry point group "{_GROUPS[kind]}".'
        )
    return name


def load(kind: str, name: str) -> Any:
    """Import what a name stands for (FedAccord's own names cannot be taken over by a package).

    Raises:
        AccordError: an unknown name, or a package whose entry point does not load.
    """
    check(kind, name)
    if name in _KINDS[kind]:
        module, attribute = _KINDS[kind][name].split(":")
        return getattr(importlib.import_module(module), attribute)
    if ":" in name:
        return _by_path(kind, name)
    (point, *_) = [p for p in entry_points(group=_GROUPS[kind]) if p.name == name]
    try:
        return point.load()
    except Exception as fault:  # whatever the package's own import raises
        raise AccordError(
            f'{kind} "{name}" cannot be loaded from {point.value}: {type(fault).__name__}: '
            f"{fault}. Mend or reinstall the package that offers it."
        ) from fault


def _by_path(kind: str, path: str) -> Any:
    """Import what "package.module:Name" names."""
    module, attribute = path.split(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as fault:  # whatever the module's own import raises
        raise AccordError(
            f'{kind} "{path}" cannot be loaded: {type(fault).__name__}: {fault}. Install its '
            "package where the coordinator runs, or name another."
        ) from fault
