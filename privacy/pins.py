"""Pins: whose heads count, once the accord says which key is whose."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedaccord.envelope import MOST_HANDOVERS, keys_led_to
from fedaccord.evidence import canonical_json
from fedaccord.privacy.chain import Head
from fedaccord.privacy.ledger import Ledger

Handovers = Mapping[str, Sequence[Mapping[str, Any]]]


def speaks_for(site: str, key: str, pins: Mapping[str, str], handovers: Handovers) -> bool:
    """Tell whether a key is a site's own, as far as the accord says whose key is whose.

    Guarantee: for a pinned site no key passes but the pinned one and those that it handed over
    to, each signed by the one before.

    | case | outcome |
    |---|---|
    | the accord pins no key for the site | any key |
    | handovers that are not signed by the key before them | end there |

    Args:
        site: name in the roster.
        key: public half, hex.
        pins: the pinned key of each site that has one, hex.
        handovers: of each site that has changed its key, in order (see `envelope.handover`).
    """
    pin = pins.get(site)
    return pin is None or key in keys_led_to(pin, site, handovers.get(site, ()))


def show_handovers(handovers: Handovers) -> str:
    """Write handovers as a request carries them."""
    return canonical_json({site: list(steps) for site, steps in handovers.items() if steps})


def read_handovers(text: str) -> dict[str, list[dict[str, Any]]]:
    """Read handovers that came from outside; what has another form is left out.

    Their signatures are checked where they are followed, from a pin.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return {
        site: [step for step in steps[:MOST_HANDOVERS] if isinstance(step, dict)]
        for site, steps in (found.items() if isinstance(found, dict) else ())
        if isinstance(steps, list)
    }


def of_pinned(
    heads: Iterable[Head], ledger: Ledger, pins: Mapping[str, str], handovers: str
) -> list[Head]:
    """Leave out heads of peers that no key signed which the accord's pins lead to.

    | the site's own ledger | heads of peers that count |
    |---|---|
    | has the key that is pinned for it: a deployment | by a pinned key, or one it handed over to |
    | has other keys: a simulation of a pinned accord | all |

    Heads of the site itself always count: its ledger knows its own keys.

    Args:
        heads: as a request shows them.
        ledger: the site's own.
        pins: the pinned key of each site that has one, hex.
        handovers: as `show_handovers` wrote them.
    """
    keys = {e["public_key"] for e in ledger.entries() if e["kind"] == "KEY"}
    if pins.get(ledger.site) not in keys:
        return list(heads)
    known = read_handovers(handovers)
    return [
        head
        for head in heads
        if head.site == ledger.site or speaks_for(head.site, head.key, pins, known)
    ]
