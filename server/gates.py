"""Gates: which replies may reach a strategy, and why the others may not."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

Weights = dict[str, np.ndarray[Any, np.dtype[Any]]]


@dataclass(frozen=True)
class Verdict:
    """What the gate made of one site's reply.

    Attributes:
        site: who was asked.
        reason: why the reply was dropped, or "" if it was accepted.
        weights: the accepted weights.
        norm: L2 norm of the accepted update; None where it may not be on record.
    """

    site: str
    reason: str
    weights: Weights | None = None
    norm: float | None = None


# No site counts more subjects than a roster can declare; sums over all sites stay exact.
LARGEST_COUNT = 10**9
HEADER = 1024  # bytes that the .npy format may put before an array's own


def to_weights(arrays: ArrayRecord) -> Weights:
    """Read an ArrayRecord into numpy arrays by name."""
    return {name: array.numpy() for name, array in arrays.items()}


def to_arrays(weights: Weights) -> ArrayRecord:
    """Pack numpy arrays for a message."""
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in weights.items()})


def told(words: object) -> str:
    """Repeat what a site said, on one line and not without end."""
    return " ".join(str(words).split())[:500]


def norm(update: Weights, base: Weights) -> float:
    """L2 norm over all weights of what a site changed, in float64."""
    squares = (np.sum((update[k].astype(np.float64) - base[k]) ** 2) for k in sorted(base))
    return float(np.sqrt(sum(squares)))


def read(array: Array, like: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | str:
    """Read an array of the shape and dtype of another, or say why it cannot be one.

    What its sender says of it and what its bytes say of themselves must both be right; the length
    is looked at first, so that nobody makes the coordinator allocate more than it asked for.
    """
    wanted = f"{like.dtype}{list(like.shape)}"
    if (array.dtype, tuple(array.shape)) != (str(like.dtype), like.shape):
        return f"is {array.dtype[:32]}{list(array.shape)[:8]}, not {wanted}"
    if len(array.data) > like.nbytes + HEADER:
        return f"has {len(array.data)} bytes, too many for {wanted}"
    try:
        value = array.numpy()
    except Exception as fault:  # numpy raises many kinds, and all mean the same here
        return f"cannot be read ({type(fault).__name__})"
    if not isinstance(value, np.ndarray) or (value.dtype, value.shape) != (like.dtype, like.shape):
        return f"holds something else than the {wanted} that it says"
    return value


def unanswered(reply: Message, site: str, run: str, number: int) -> str:
    """Say why a reply does not answer what a site was asked in a round, or "" if it does."""
    if reply.has_error():
        return f"error: {told(reply.error.reason)}"
    config = dict(reply.content.config_records.get("config", {}))
    if config.get("refused"):
        return f"refused: {told(config['refused'])}"
    said = {key: config.get(key) for key in ("site", "run", "round")}
    if said != {"site": site, "run": run, "round": number}:
        return f"identity: asked {site} for round {number}, got {told(said)}"
    return ""


def inspect(
    reply: Message, site: str, run: str, number: int, base: Weights, max_norm: float | None
) -> Verdict:
    """Decide on one reply to a training message.

    | dropped | reason |
    |---|---|
    | no content | error, or the site's own refusal |
    | another site, run or round than was asked | identity |
    | names, shapes or dtypes other than the global model's, or bytes that are no array | form |
    | NaN or infinity | not finite |
    | update longer than the accord's bound | norm |

    Under client-level privacy updates carry no noise yet, so nothing that depends on their values
    may be on record. There is no bound then, and NaN or infinity passes: the strategy clips, and
    has what is not finite contribute zero.

    Args:
        reply: what came back from the node that was asked.
        site: the site that this node is.
        run: the run's id.
        number: the round.
        base: the global model that the site was given.
        max_norm: L2 bound of an update; None under client-level privacy.
    """
    if reason := unanswered(reply, site, run, number):
        return Verdict(site, reason)
    if set(reply.content.array_records) != {"arrays"}:
        return Verdict(site, "form: exactly one record of arrays is expected")
    arrays = reply.content.array_records["arrays"]
    if set(arrays) != set(base):
        return Verdict(site, "form: names of the weights differ from the global model's")
    weights: Weights = {}
    for name, like in base.items():
        value = read(arrays[name], like)
        if isinstance(value, str):
            return Verdict(site, f"form: {name} {value}")
        if max_norm is not None and not np.isfinite(value).all():
            return Verdict(site, f"not finite: {name}")
        weights[name] = value
    if max_norm is None:
        return Verdict(site, "", weights)
    length = norm(weights, base)
    if length > max_norm:
        return Verdict(site, f"norm: update of L2 norm {length:.4g} is above {max_norm:g}")
    return Verdict(site, "", weights, length)


def gate(
    replies: list[Message],
    sites: Mapping[int, str],
    run: str,
    number: int,
    base: Weights,
    max_norm: float | None,
) -> list[tuple[Verdict, Message]]:
    """Inspect all replies, in order of site; a second reply of a site is dropped.

    A reply of a node that was not asked is dropped too, under the name "node <id>".

    Args:
        replies: in any order.
        sites: the site of each node that was asked.
        run: the run's id.
        number: the round.
        base: the global model that the sites were given.
        max_norm: L2 bound of an update; None under client-level privacy.
    """
    out: list[tuple[Verdict, Message]] = []
    seen: set[int] = set()

    def named(reply: Message) -> str:
        node = reply.metadata.src_node_id
        return sites.get(node, f"node {node}")

    for reply in sorted(replies, key=named):
        node, site = reply.metadata.src_node_id, named(reply)
        if node not in sites:
            out.append((Verdict(site, "identity: this node was not asked"), reply))
            continue
        if node in seen:
            out.append((Verdict(site, "duplicate: the site had already replied"), reply))
            continue
        seen.add(node)
        out.append((inspect(reply, site, run, number, base, max_norm), reply))
    return out


def weighted(verdict: Verdict, reply: Message, weight: int) -> Message:
    """Give a strategy the accepted weights and the roster's weight, and nothing else of a reply."""
    assert verdict.weights is not None
    reply.content = RecordDict(
        {
            "arrays": to_arrays(verdict.weights),
            "metrics": MetricRecord({"num-examples": weight}),
        }
    )
    return reply


def read_counts(
    reply: Message,
    site: str,
    run: str,
    number: int,
    shapes: Mapping[str, tuple[int, ...]],
    sections: Collection[str],
) -> tuple[str, dict[str, dict[str, Any]]]:
    """Read the group counts of an evaluation reply, or say why they cannot be used.

    Args:
        reply: what came back from the node that was asked.
        site: the site that this node is.
        run: the run's id.
        number: the round.
        shapes: for each attribute the shape (groups, labels, predictions) of its counts.
        sections: the models that were sent, each of which must be counted.

    Returns:
        The reason or "", and for each model and attribute nested lists of counts.
    """
    if reason := unanswered(reply, site, run, number):
        return reason, {}
    out: dict[str, dict[str, Any]] = {}
    records = reply.content.metric_records
    if set(records) != set(sections):
        return f"form: counts of exactly {', '.join(sorted(sections))} are expected", {}
    for section in sections:
        for name, shape in shapes.items():
            cells = records[section].get(name)
            if not isinstance(cells, list) or len(cells) != int(np.prod(shape)):
                return f"form: counts of {section} by {name} are not {list(shape)}", {}
            if not all(type(cell) is int and cell >= 0 for cell in cells):
                return f"form: counts of {section} by {name} are not whole numbers from 0 up", {}
            if sum(cells) > LARGEST_COUNT:
                return f"form: counts of {section} by {name} sum to more than {LARGEST_COUNT}", {}
            out.setdefault(section, {})[name] = np.reshape(cells, shape).tolist()
    return "", out
