"""A site's round without noise of its own: client-level privacy, or no privacy at all."""

from __future__ import annotations

import copy
import secrets

import numpy as np
from torch import nn

from fedaccord.accord import Accord
from fedaccord.client import diary
from fedaccord.client.pull import NOTHING, Pull
from fedaccord.client.train import SeededSource, train_plain
from fedaccord.tasks import Records


def train_plainly(
    model: nn.Module,
    records: Records,
    accord: Accord,
    site: str,
    number: int,
    pull: Pull = NOTHING,
) -> None:
    """Train a model in place for one round, without clip or noise, reproducibly.

    Args:
        model: changed in place.
        records: the site's training records.
        accord: what was agreed.
        site: whose round it is.
        number: the round.
        pull: what the strategy adds to each step.
    """
    q = accord.privacy.sampling_prob
    seed = (accord.seed, number, list(accord.roster).index(site))
    source = SeededSource(*seed)
    masks = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
    train_plain(model, records, q, q * accord.roster[site], accord.training, source, pull, masks)


def train_or_stay(
    model: nn.Module, records: Records | None, accord: Accord, site: str, number: int
) -> None:
    """Train as `train_plainly`; a fault of the data leaves the model as it came.

    Whether a site answers, and in which form, is on record for everybody. So it may not depend on
    records: records that cannot be used give an update of zero, which no one can tell from others
    in the noised mean.

    | data | update |
    |---|---|
    | unreadable (None), or it makes the model raise | zero |
    | it makes weights NaN or infinite | as it is; the coordinator has it contribute zero |

    Args: see `train_plainly`; `records` may be None.
    """
    before = copy.deepcopy(model.state_dict())
    try:
        if records is not None:
            train_plainly(model, records, accord, site, number)
    except Exception:
        diary.log.exception("training of %s failed; its update of round %d is zero", site, number)
        model.load_state_dict(before)


def salt() -> dict[str, str]:
    """Make 256 random bits to be stored beside an update and never sent.

    The ledger, which others read, holds a hash of the stored bytes. Without salt anybody could test
    a guess of the update against it.
    """
    return {"salt": secrets.token_hex(32)}
