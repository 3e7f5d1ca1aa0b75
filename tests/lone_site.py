"""One site with records of a test's choice and a coordinator's messages to it; small whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from wards import small_accord, toml

from fedaccord import accord as accords
from fedaccord.accord import Accord
from fedaccord.client import app, diary, policy
from fedaccord.client.site import Site
from fedaccord.models.build import agreed, trained
from fedaccord.privacy.ledger import Ledger
from fedaccord.reports.report import write_report
from fedaccord.simulations import engine
from fedaccord.simulations.engine import InProcessGrid
from fedaccord.simulations.heart import Heart
from fedaccord.tasks import Records, SiteData

WIDTH = len(Heart.spec.features)
NAME = "cleveland"
SITES = ["cleveland", "va"]  # of the accord that `written` writes


def accord_of(private: bool = False, **tables: Any) -> Accord:
    """The small accord, its tables changed; every step takes every subject unless told."""
    data = small_accord()
    data["model"] = {"name": "cnn1d", "options": {"channels": 2, "kernel": 3, "groups": 2}}
    data["privacy"] |= {"enabled": private}
    for table, keys in tables.items():
        data[table] = data.get(table, {}) | keys
    return accords.parse(data)


def some(count: int = 40, seed: int = 0) -> Records:
    """Records whose label can be learned from their inputs."""
    rng = np.random.default_rng(seed)
    inputs = rng.uniform(-1, 1, (count, WIDTH)).astype(np.float32)
    labels = (inputs[:, :3].sum(axis=1) + 0.3 * rng.standard_normal(count) > 0).astype(np.int64)
    return Records(inputs, labels, np.arange(count), {"sex": rng.integers(0, 2, count)})


class Ward:
    """A task whose records are given, or raise."""

    spec, sites = Heart.spec, (NAME,)

    def __init__(self, records: Records | Exception) -> None:
        self.records = records

    def site(self, name: str) -> SiteData:
        if isinstance(self.records, Exception):
            raise self.records
        return SiteData(train=self.records, test=self.records)

    def public(self, rows: int, seed: int) -> Any:
        return Heart().public(rows, seed)


def opened(folder: Path, accord: Accord, records: Records | Exception) -> Site:
    """A site that has reserved run "a"."""
    own = folder / NAME
    site = Site(
        name=NAME,
        accord=accord,
        task=Ward(records),  # type: ignore[arg-type]
        folder=own,
        policy=policy.of_site(own, accord),
        ledger=Ledger(own / "ledger.sqlite", NAME, own / "head.json"),
    )
    site.ledger.reserve("a", site.plan, accord.reserved_rounds, site.terms)
    return site


def initial(accord: Accord) -> torch.nn.Module:
    """The model as the seed gives it."""
    return agreed(accord.model, Heart.spec, accord.seed)


def message(accord: Accord, kind: str, number: int, weights: dict[str, torch.Tensor]) -> Message:
    """A request for a round of run "a", with a model's weights."""
    InProcessGrid(app.app, 1, {})  # Flower's messages need a run to belong to
    config = ConfigRecord({"run": "a", "accord": accord.digest, "server-round": number})
    arrays = ArrayRecord({name: Array(value.numpy()) for name, value in weights.items()})
    section = "arrays" if kind == "train" else "model"
    return Message(RecordDict({"config": config, section: arrays}), 1, kind)


def asked(
    site: Site, number: int, weights: dict[str, torch.Tensor] | None = None, kind: str = "train"
) -> RecordDict:
    """Ask a site for a round, or to evaluate a model; the seed's unless one is given."""
    weights = trained(initial(site.accord)) if weights is None else weights
    handler = app.train_round if kind == "train" else app.evaluate
    with diary.privacy_diary(site.folder):
        return handler.__wrapped__(site, message(site.accord, kind, number, weights))


def sent(reply: RecordDict) -> dict[str, np.ndarray[Any, Any]]:
    """The update in a reply."""
    return {name: array.numpy() for name, array in reply.array_records["arrays"].items()}


def written(folder: Path, **tables: Any) -> Path:
    """An accord's file, two hospitals and two rounds."""
    data = small_accord() | {
        "sites": [{"name": name, "subjects": 100} for name in SITES],
        "model": {"name": "cnn1d", "options": {"channels": 2, "kernel": 3}},
        "rounds": {"rounds": 2},
        "distillation": {"enabled": False},
    }
    data["privacy"] = data["privacy"] | {"enabled": False}
    for table, keys in tables.items():
        data[table] = data[table] | keys
    folder.mkdir(exist_ok=True)
    (folder / "accord.toml").write_text("".join(f"{k} = {toml(v)}\n" for k, v in data.items()))
    return folder / "accord.toml"


def run_of(folder: Path, **tables: Any) -> tuple[Path, list[bytes]]:
    """A finished run, and the bytes of every reply in it."""
    replies: list[bytes] = []

    def note(reply: Message) -> None:
        for record in reply.content.values():
            for name, value in record.items():
                raw = value.data if hasattr(value, "data") else str(value).encode()
                replies.append(name.encode() + b"=" + bytes(raw))

    run = folder / "run"
    engine.simulate(written(folder, **tables), run, folder / "sites", 2, note)
    write_report(run)
    return run, replies
