"""All that leaves a site in a run, written down, to be compared on neighbouring data."""

from __future__ import annotations

import contextlib
import io
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, Message

from fedaccord.conformance import site
from fedaccord.conformance.site import Bench
from fedaccord.evidence import canonical_json, sha256
from fedaccord.tasks import Records


def reseed() -> None:
    """Set every global generator to the same state."""
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)


def transcript(bench: Bench, kept: Path, data: Records | Exception) -> dict[str, str]:
    """Record all that leaves a site in a run on some data, the mechanism's output set to zeros.

    The site's folder, keys included, is put back first and its clock stands still, so that any
    difference between two transcripts comes from the data. Replies to evaluation are exact counts,
    which are declared "not covered": of them only kind, names and sizes are kept.

    Returns:
        What left, by name: replies, log records, printed text, ledger, stored releases, and the
        state of the global generators.
    """
    site.restore(kept, bench.folder)
    bench.put(data)
    out: dict[str, str] = {}

    def constant(_: Any) -> Any:
        return lambda self, total, *rest, **more: np.zeros(np.size(total))

    reseed()
    with (
        captured() as (log, printed),
        site.clock_stopped(),
        site.planted("fedaccord.privacy.plan:PrivacyPlan.release", constant),
    ):
        out["reply to join"] = shown(bench.ask("query.join"))
        out["reply to reserve"] = shown(bench.ask("query.reserve"))
        for number in (1, 2, 3):
            out[f"reply to train, round {number}"] = shown(bench.ask("train", number=number))
        out["reply to train again, round 1"] = shown(bench.ask("train", number=1))
        out["reply to train, a further round"] = shown(bench.ask("train", number=9))
        out["reply to ledger"] = shown(bench.ask("query.ledger"))
        if not isinstance(data, Exception):  # its evaluation is an error, which is declared
            out["size of the reply to evaluate"] = shown(
                bench.ask("evaluate", number=3), sizes=True
            )
    out["log"] = "\n".join(log)
    out["printed"] = printed.getvalue()
    files = sorted((bench.folder / "sites").rglob("*.safetensors"))
    out["stored releases"] = "\n".join(f"{p.name} {sha256(p.read_bytes())}" for p in files)
    out["state of torch's generator"] = sha256(bytes(torch.get_rng_state().tolist()))
    out["state of numpy's generator"] = repr(np.random.get_state())
    out["state of random's generator"] = sha256(repr(random.getstate()))
    return out


def shown(reply: Message, sizes: bool = False) -> str:
    """Write a reply as text: every record, key, dtype, shape and value, or only their sizes."""
    if reply.has_error():
        return f"error {reply.error.code}: {reply.error.reason}"
    out: dict[str, Any] = {}
    for name, record in reply.content.items():
        for key, value in record.items():
            if isinstance(value, Array):
                data = value.data
                seen: Any = [value.dtype, list(value.shape), len(data), sha256(data)]
            else:
                seen = len(value) if sizes and isinstance(value, list) else repr(value)
            out[f"{name}/{key}"] = seen
    return canonical_json(out)


@contextmanager
def captured() -> Iterator[tuple[list[str], io.StringIO]]:
    """Collect what propagates to the root logger, and what is printed on stdout and stderr."""
    log: list[str] = []
    printed = io.StringIO()

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            trace = repr(record.exc_info[1]) if record.exc_info else ""
            log.append(f"{record.name} {record.levelname} {record.getMessage()} {trace}")

    ear, root = Ear(level=1), logging.getLogger()
    before = root.level
    root.addHandler(ear)
    root.setLevel(1)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            yield log, printed
    finally:
        root.removeHandler(ear)
        root.setLevel(before)
