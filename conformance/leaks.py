"""How faults leak records or break the ledger while they are planted in the installed code."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedaccord.conformance.site import Probe, planted, together
from fedaccord.errors import BudgetError, LedgerError
from fedaccord.tasks import Records

Plant = AbstractContextManager[None]

TRAIN = "fedaccord.client.train:train_private"
APP = "flwr.clientapp:ClientApp.__call__"
LEDGER = "fedaccord.privacy.ledger:Ledger"


def after_training(spoil: Callable[[Any, Records], None]) -> Callable[[], Plant]:
    """Do something with model and records once a round is trained."""

    def make(real: Any) -> Any:
        def train(model: Any, records: Records | None, *rest: Any, **more: Any) -> None:
            real(model, records, *rest, **more)
            if records is not None and len(records):
                spoil(model, records)

        return train

    return lambda: planted(TRAIN, make)


def running_mean(model: Any, records: Records) -> None:
    """Write the mean of the inputs into a weight."""
    with torch.no_grad():
        model.bias += float(np.nan_to_num(records.inputs).mean())


def log_line(model: Any, records: Records) -> None:
    """Log the number of records."""
    logging.getLogger("fedaccord.client").info("trained on %d records", len(records))


def printed(model: Any, records: Records) -> None:
    """Print the mean label."""
    print(f"mean label {records.labels.mean():.3f}")


def draw_from_torch(model: Any, records: Records) -> None:
    """Move torch's generator."""
    torch.randperm(len(records))


def replying(spoil: Callable[[Message, Any], RecordDict | None]) -> Callable[[], Plant]:
    """Change what leaves in reply to a training message, given the site's records."""

    def make(real: Any) -> Any:
        def call(self: Any, message: Message, context: Any) -> Message:
            reply: Message = real(self, message, context)
            if message.metadata.message_type == "train" and reply.has_content():
                names = sorted(Probe.sites)
                try:
                    data: Any = Probe(1).site(names[int(context.node_config["partition-id"])]).train
                except Exception as fault:
                    data = fault
                other = spoil(reply, data)
                if other is not None:
                    return Message(other, reply_to=message)
            return reply

        return call

    return lambda: planted(APP, make)


def raw_loss(reply: Message, data: Any) -> None:
    """Put a figure of the records into the reply."""
    if isinstance(data, Records):
        loss = float(np.nan_to_num(data.inputs).std())
        reply.content["metrics"] = MetricRecord({"train-loss": loss})


def padded(reply: Message, data: Any) -> None:
    """Make the reply as long as there are records."""
    if isinstance(data, Records):
        config = reply.content.config_records["config"]
        config["site"] = str(config["site"]) + " " * len(data)


def quoting(reply: Message, data: Any) -> RecordDict | None:
    """Refuse in words that quote a record."""
    if isinstance(data, Records) and len(data) and data.labels.max() > 1:
        words = f"label {data.labels.max()} of subject {data.subjects[data.labels.argmax()]}"
        return RecordDict({"config": ConfigRecord({"refused": words})})
    return None


def data_first() -> Plant:
    """Read the records before the INTENT is written."""

    def make(real: Any) -> Any:
        def intend(self: Any, *args: Any, **more: Any) -> Any:
            Probe(1).site(self.site)
            return real(self, *args, **more)

        return intend

    return planted(f"{LEDGER}.intend", make)


def _swallowing(real: Any) -> Any:
    """Go on where the ledger refuses."""

    def method(self: Any, *args: Any, **more: Any) -> Any:
        try:
            return real(self, *args, **more)
        except (BudgetError, LedgerError):
            return {}

    return method


def _blind(real: Any) -> Any:
    """Find no RELEASE."""
    return lambda self, run, *kinds: [] if "RELEASE" in kinds else real(self, run, *kinds)


def released_twice() -> Plant:
    """Train again when a round is asked for again."""
    return together(
        planted(f"{LEDGER}.find", _blind),
        planted(f"{LEDGER}.intend", _swallowing),
        planted(f"{LEDGER}.release", _swallowing),
    )


def slot_twice() -> Plant:
    """Write two INTENTs in a round."""

    def make(real: Any) -> Any:
        def intend(self: Any, run: str, number: int, *rest: Any, **more: Any) -> Any:
            real(self, run, number, *rest, **more)
            with self._log.transaction():
                return self._log.append("INTENT", run, round=number, slot=number, slots=4, seen=[])

        return intend

    return planted(f"{LEDGER}.intend", make)


def unrecorded(method: str) -> Callable[[], Plant]:
    """Let a method of the ledger write nothing."""
    return lambda: planted(f"{LEDGER}.{method}", lambda _: lambda self, *args, **more: {})


def counted_in_entry() -> Plant:
    """Write the number of records into the RELEASE."""

    def make(real: Any) -> Any:
        def release(self: Any, *args: Any, **more: Any) -> Any:
            try:
                count = len(Probe(1).site(self.site).train)
            except Exception:
                count = 0
            return real(self, *args, **more, records=count)

        return release

    return planted(f"{LEDGER}.release", make)


def one_round() -> Plant:
    """Describe one round where all are asked for."""
    return planted(
        "fedaccord.privacy.plan:PrivacyPlan.event",
        lambda real: lambda self, rounds=None: real(self, 1 if rounds is None else rounds),
    )
