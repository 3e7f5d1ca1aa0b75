"""A site's personal model (Ditto): trained on its records without noise, stored there, never sent.

Nothing that leaves the site reads it: it is trained after a round's update is on record, and only
`fedaccord site personal` takes it out of the site's folder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors
from torch import nn

from fedaccord import evidence
from fedaccord.client import diary, local
from fedaccord.client.client_level import salt, train_plainly
from fedaccord.client.columns import usable
from fedaccord.client.pull import Pull
from fedaccord.client.site import Site
from fedaccord.errors import RunError
from fedaccord.models.build import staying, trained
from fedaccord.privacy.ledger import Ledger
from fedaccord.tasks import Records

FOLDER = "personal"
NOT_COVERED = "not covered"


@dataclass(frozen=True)
class Personal:
    """A site's own model, as it is stored.

    Attributes:
        run: the run that it belongs to.
        accord: the accord's digest.
        round: the last round that it was trained in.
        weights: all that training changes of the model, by name.
    """

    run: str
    accord: str
    round: int
    weights: dict[str, torch.Tensor]

    def put(self, model: nn.Module) -> None:
        """Put the weights into a model of the same architecture; its frozen weights stay."""
        with torch.no_grad():
            for name, value in (trained(model) | staying(model)).items():
                value.copy_(self.weights[name])

    def to_bytes(self, further: dict[str, str] | None = None) -> bytes:
        """Serialise it as safetensors, with some words more beside it."""
        about = {"run": self.run, "accord": self.accord, "round": f"{self.round:06d}"}
        return safetensors.save(self.weights, about | (further or {}))


def path_of(folder: Path, run: str) -> Path:
    """Say where a site's folder holds the personal model of a run."""
    return folder / FOLDER / f"{run}.safetensors"


def stored(folder: Path, run: str) -> Personal | None:
    """Read the personal model of a run; None: there is none.

    Raises:
        SafetensorError, KeyError, ValueError: the file is damaged.
    """
    path = path_of(folder, run)
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Personal(about["run"], about["accord"], int(about["round"]), weights)


def advance(site: Site, run: str, number: int, sent: ArrayRecord) -> None:
    """Train the site's personal model for one round, where the accord wants one.

    It minimises the site's own loss plus personal/2 |v - w|^2, w being what the site starts the
    round with: the weights that it was sent, and its own of `model.local` (Ditto, Li et al. 2021,
    algorithm 1). Each round takes `training.steps` steps without clip or noise, and its chance
    comes from the accord's seed. Call it once the round's release is on record. It never raises,
    and changes nothing but its own file: what goes wrong here is for the site's diary alone.

    | case | the stored model |
    |---|---|
    | the first round that the site trains in | starts from w |
    | a round that it was trained in before (the request is a retry) | stays |
    | killed after the release | is trained in that round when the request comes again |
    | a record that is not usable (`columns.usable`), not finite, or of no known class | is trained without that record |
    | records that cannot be read, a model that raises, weights that are not finite | stays |

    Args:
        site: the site.
        run: the run's id.
        number: the round.
        sent: the global model's weights, as the request for the round has them.
    """  # noqa: E501  (a table row cannot be broken)
    if not site.accord.training.personal:
        return
    try:
        held = stored(site.folder, run)
        if held is None or held.round < number:
            _train(site, run, number, sent, held)
    except Exception:
        diary.log.exception("the personal model was not trained in round %d of %s", number, run)


def _train(site: Site, run: str, number: int, sent: ArrayRecord, held: Personal | None) -> None:
    accord = site.accord
    model = site.model("model", sent)
    local.put_back(model, site.folder, run, number)
    anchor = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    if held:
        held.put(model)
    records = _sound(site.task.site(site.name).train, len(site.task.spec.classes))
    pull = Pull(accord.training.personal, {}, anchor)
    train_plainly(model.to(site.device), records, accord, site.name, number, pull)
    weights = {
        name: value.detach().cpu().clone().contiguous()
        for name, value in (trained(model) | staying(model)).items()
    }
    if not all(bool(torch.isfinite(value).all()) for value in weights.values()):
        diary.log.warning("the personal model is not finite after round %d of %s", number, run)
        return
    made = Personal(run, accord.digest, number, weights)
    evidence.write_atomic(path_of(site.folder, run), made.to_bytes(), mode=0o600)


def _sound(records: Records, classes: int) -> Records:
    """Leave out each record that would spoil the weights for all others: there is no clip here."""
    kept = usable(records)
    inputs = kept.inputs
    if inputs.dtype.kind == "f":
        inputs = inputs.astype(np.float32, copy=False)
    good = np.isfinite(inputs.reshape(len(inputs), -1)).all(axis=1)
    good &= (kept.labels >= 0) & (kept.labels < classes)
    return Records(inputs[good], kept.labels[good], kept.subjects[good], {})


def find(folder: Path, run: str) -> Personal:
    """Read the personal model that a site holds of a run, for its operator.

    Raises:
        RunError: no name of a run, none held of it, or a file that is damaged.
    """
    path = path_of(folder, run)
    held = sorted(p.stem for p in (folder / FOLDER).glob("*.safetensors"))
    if not re.fullmatch(r"[^/\\]{1,150}", run) or not path.is_file():
        said = (
            f"It holds those of {', '.join(held)}. Give one of these."
            if held
            else ("It holds none: training.personal of the accord makes sites train one.")
        )
        raise RunError(f"site {folder}: holds no personal model of run {run[:150]!r}. {said}")
    try:
        found = stored(folder, run)
        assert found is not None
        return found
    except (SafetensorError, KeyError, ValueError, OSError) as fault:
        raise RunError(
            f"site {folder}: {path.name} is damaged ({type(fault).__name__}). Remove it; it is "
            "made anew in the run's next round."
        ) from None


def release(ledger: Ledger, found: Personal) -> bytes:
    """Put the export of a personal model on record, and return the bytes that may then leave.

    The ledger is read by others, so its hash is salted: nobody can test a guess of the model
    against it but who holds the file.

    Args:
        ledger: the site's.
        found: the model.

    Raises:
        LedgerError: the ledger knows of no round of the run, or cannot be written.
    """
    payload = found.to_bytes(salt())
    ledger.personal(
        found.run,
        accord=found.accord,
        what="personal model",
        sha256=evidence.sha256(payload),
        bytes=len(payload),
        covers=NOT_COVERED,
    )
    return payload
