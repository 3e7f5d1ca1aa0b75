"""Gates: which replies may reach a strategy, and why the others may not."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord

from fedaccord.evidence import sha256
from fedaccord.strategies import encoding as encodings
from fedaccord.strategies.encoding import Encoding
from fedaccord.strategies.updates import Weights, arrays_of, config_of, metrics_of

# No site counts more subjects than a roster can declare; sums over all sites stay exact.
LARGEST_COUNT = 10**9
RECORDS = 8  # in a reply, of all kinds
WORDS = 64 * 1024  # bytes of a reply's config and metrics, names included
WANTED = {"train-loss": "train_loss"}  # what a strategy may want, and the metric that holds it
LARGEST_METRIC = 1e6  # a loss beyond would outweigh every other site's in any rule that uses it


@dataclass(frozen=True)
class Verdict:
    """What the gate made of one site's reply.

    Attributes:
        site: who was asked.
        reason: why the reply was dropped, or "" if it was accepted.
        change: the accepted update, decoded, in the dtypes of the global model.
        norm: L2 norm of the accepted update; None where it may not be on record.
        sha256: of the arrays as they travelled (`encoding.wire_bytes`), as the site's RELEASE has
            it; None where it may not be on record.
        metrics: what the strategy wanted to know of the site, by name.
    """

    site: str
    reason: str
    change: Weights | None = None
    norm: float | None = None
    sha256: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def without_change(self) -> Verdict:
        """Return the verdict without the update, to be kept when that is no longer needed."""
        return replace(self, change=None)


def told(words: object) -> str:
    """Repeat what a site said: on one line, not without end, only characters that print."""
    try:
        text = " ".join(str(words)[:5000].split())
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        text = type(words).__name__
    return "".join(c if c.isprintable() else "?" for c in text)[:500]


def norm(change: Weights) -> float:
    """L2 norm over all weights of an update, in float64; no coordinate is larger in magnitude."""
    with np.errstate(over="ignore"):
        squares = (np.sum(change[k].astype(np.float64) ** 2) for k in sorted(change))
        return float(np.sqrt(sum(squares)))


def oversized(reply: Message, most: int, most_words: int = WORDS) -> str:
    """Say what of a reply is too large to be looked at, or "".

    Args:
        reply: any.
        most: bytes that its arrays can need, names and headers included.
        most_words: bytes that all else can need.
    """
    if reply.has_error():
        return ""
    content = reply.content
    if len(content) > RECORDS:
        return f"size: {len(content)} records are more than {RECORDS}"
    arrays = words = 0
    for name, record in content.items():
        words += len(name)
        if isinstance(record, ArrayRecord):
            arrays += sum(len(key) + len(array.data) for key, array in record.items())
        else:
            words += sum(len(key) + _bytes(value) for key, value in record.items())
    if arrays > most:
        return f"size: {arrays} bytes of arrays are more than {most}"
    if words > most_words:
        return f"size: {words} bytes of words and figures are more than {most_words}"
    return ""


def _bytes(value: object) -> int:
    """Estimate the size of a config or metric value, from below; no long list is walked through."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, list):
        return 8 + (len(value) if len(value) > WORDS else sum(map(_bytes, value)))
    return 8


def unanswered(reply: Message, site: str, run: str, number: int) -> str:
    """Say why a reply does not answer what a site was asked in a round, or "" if it does."""
    if reply.has_error():
        return f"error: {told(reply.error.reason)}"
    config = config_of(reply.content)
    if config.get("refused"):
        return f"refused: {told(config['refused'])}"
    said = {key: config.get(key) for key in ("site", "run", "round")}
    round_ = said["round"] if type(said["round"]) is int else None  # True and 1.0 equal 1
    if round_ is not None and (said["site"], said["run"]) == (site, run):
        if round_ == number:
            return ""
        if round_ < number:
            return f"late: asked {site} for round {number}, got round {round_}"
    return f"identity: asked {site} for round {number}, got {told(said)}"


def wanted(reply: Message, wants: str) -> dict[str, float] | str:
    """Read the figure that a strategy wants from a reply, or say why it cannot be used."""
    if wants not in WANTED:
        return {}
    name = WANTED[wants]
    value = metrics_of(reply.content).get("metrics", MetricRecord()).get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"metric: {name} is {told(value)}, not a number"
    if 0 <= value <= LARGEST_METRIC:
        return {name: float(value)}
    return f"metric: {name} is {told(value)}, not between 0 and {LARGEST_METRIC:g}"


def inspect(
    reply: Message,
    site: str,
    run: str,
    number: int,
    base: Weights,
    max_norm: float | None,
    encoding: Encoding = "float32",
    wants: str = "",
) -> Verdict:
    """Decide on one reply to a training message.

    | dropped | reason |
    |---|---|
    | no content | error |
    | the site's own refusal | refused |
    | more bytes than an honest reply can need, before any is parsed | size |
    | another site, run or round than was asked | identity, or late for an earlier round |
    | names, shapes or dtypes other than agreed, or bytes that are no array | form |
    | NaN or infinity | not finite |
    | update longer than the accord's bound, which so bounds each coordinate | norm |
    | a figure that the strategy wants is missing, or out of 0 to 1,000,000 | metric |

    All else that a reply holds is ignored: weights come from the roster.

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
        encoding: how updates travel, as the accord says.
        wants: the figure that the strategy asked for, a key of `WANTED`; "" for none.
    """
    most = encodings.most_bytes(base, encoding)
    if reason := oversized(reply, most) or unanswered(reply, site, run, number):
        return Verdict(site, reason)
    wire = encodings.received(arrays_of(reply.content), base, encoding)
    if isinstance(wire, str):
        return Verdict(site, told(wire))
    change = encodings.decode(wire, base, encoding)
    metrics = wanted(reply, wants)
    if isinstance(metrics, str):
        return Verdict(site, metrics)
    if max_norm is None:
        return Verdict(site, "", change, metrics=metrics)
    length = norm(change)
    odd = [] if np.isfinite(length) else [k for k, v in change.items() if not np.isfinite(v).all()]
    if odd:
        return Verdict(site, f"not finite: {odd[0]}")
    if not length <= max_norm:
        words = f"{length:.4g}" if float(f"{length:.4g}") > max_norm else repr(length)
        return Verdict(site, f"norm: update of L2 norm {words} is above {max_norm:g}")
    return Verdict(site, "", change, length, sha256(encodings.serialised(wire)), metrics)


def gate(
    replies: Iterable[Message],
    sites: Mapping[int, str],
    run: str,
    number: int,
    base: Weights,
    max_norm: float | None,
    encoding: Encoding = "float32",
    wants: str = "",
) -> Iterator[tuple[Verdict, Message]]:
    """Inspect replies as they arrive: one in, its verdict out, nothing kept but who replied.

    The first reply of a node counts, whatever it is. A reply of a node that was not asked is
    dropped under the name "node <id>".

    Args:
        replies: in any order.
        sites: the site of each node that was asked.
        run: the run's id.
        number: the round.
        base: the global model that the sites were given.
        max_norm: L2 bound of an update; None under client-level privacy.
        encoding: how updates travel, as the accord says.
        wants: the figure that the strategy asked for, a key of `WANTED`; "" for none.
    """
    seen: set[int] = set()
    for reply in replies:
        node = reply.metadata.src_node_id
        site = sites.get(node, f"node {node}")
        if node not in sites:
            yield Verdict(site, "identity: this node was not asked"), reply
        elif node in seen:
            yield Verdict(site, "duplicate: the site had already replied"), reply
        else:
            seen.add(node)
            yield inspect(reply, site, run, number, base, max_norm, encoding, wants), reply


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
    cells = len(sections) * sum(int(np.prod(shape)) for shape in shapes.values())
    if reason := oversized(reply, 0, WORDS + 8 * cells) or unanswered(reply, site, run, number):
        return reason, {}
    out: dict[str, dict[str, Any]] = {}
    records = metrics_of(reply.content)
    if set(records) != set(sections):
        return f"form: counts of exactly {', '.join(sorted(sections))} are expected", {}
    for section in sections:
        for name, shape in shapes.items():
            found = records[section].get(name)
            if not isinstance(found, list) or len(found) != int(np.prod(shape)):
                return f"form: counts of {section} by {name} are not {list(shape)}", {}
            if not all(type(cell) is int and cell >= 0 for cell in found):
                return f"form: counts of {section} by {name} are not whole numbers from 0 up", {}
            if sum(found) > LARGEST_COUNT:
                return f"form: counts of {section} by {name} sum to more than {LARGEST_COUNT}", {}
            out.setdefault(section, {})[name] = np.reshape(found, shape).tolist()
    return "", out
