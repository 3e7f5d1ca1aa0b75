"""The faults of the conformance suite: what is broken, and which checks must catch it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np

from fedaccord.conformance import client, leaks, plants


@dataclass(frozen=True)
class Fault:
    """One way to break the guarantee.

    Attributes:
        name: by which it is reported.
        words: what is wrong.
        plant: breaks the installed code for the duration of a `with` block.
        checks: which are run while it is planted; at least one of them must raise an alarm.
        engines: under which sums are replayed meanwhile.
    """

    name: str
    words: str
    plant: Callable[[], AbstractContextManager[None]]
    checks: tuple[str, ...]
    engines: tuple[str, ...] = ("bookkeeping",)


NOISE = [
    Fault("noise-none", "no noise at all", plants.scaled(0.0), ("noise-variance",)),
    Fault("noise-half", "noise x 0.5", plants.scaled(0.5), ("noise-variance", "canary-gaussian")),
    Fault("noise-0.9", "noise x 0.9", plants.scaled(0.9), ("noise-variance",)),
    Fault("noise-0.98", "noise x 0.98", plants.scaled(0.98), ("noise-variance",)),
    Fault(
        "noise-uniform",
        "uniform noise of the same variance",
        plants.other_noise(lambda n, source: (source.uniform(n) - 0.5) * np.sqrt(12)),
        ("noise-shape",),
    ),
    Fault(
        "noise-neighbours",
        "neighbouring coordinates share noise",
        plants.other_noise(plants.neighbours_share),
        ("noise-coordinates",),
    ),
    Fault(
        "noise-common",
        "1 % of the variance is common to all coordinates",
        plants.other_noise(plants.all_share),
        ("noise-coordinates",),
    ),
    Fault(
        "noise-gridded",
        "the noise, not the result, is rounded to the grid",
        plants.gridded_before,
        ("noise-grid",),
    ),
    Fault(
        "noise-sometimes",
        "an empty step gets no noise",
        plants.only_where_drawn,
        ("noise-variance",),
    ),
    Fault(
        "noise-steps-same",
        "the same noise in each step of a round",
        lambda: plants.reused("step"),
        ("noise-steps",),
    ),
    Fault(
        "noise-rounds-same",
        "the same noise in each round",
        lambda: plants.reused("round"),
        ("noise-rounds",),
    ),
    Fault(
        "noise-sites-same",
        "the same noise at two sites",
        lambda: plants.reused("site"),
        ("noise-sites",),
    ),
    Fault("noise-seeded", "noise from a seeded generator", plants.seeded, ("noise-restarts",)),
]
HOOKS = ("hooks",)  # the engine that clips by `privacy.clipping.clipped_sum`
CLIP = [
    Fault("clip-none", "no clip", plants.clip(plants.no_clip), ("sensitivity-replay",), HOOKS),
    Fault(
        "clip-after-sum",
        "the sum is clipped, not each subject",
        plants.clip(plants.clip_after),
        ("sensitivity-replay", "sum-oracle"),
        HOOKS,
    ),
    Fault(
        "clip-by-layer",
        "each layer is clipped by itself, to the whole bound",
        plants.clip(plants.clip_by_layer),
        ("sensitivity-replay",),
        HOOKS,
    ),
    Fault(
        "nan-kept",
        "a NaN record stays",
        plants.clip(plants.nan_kept),
        ("sensitivity-replay",),
        HOOKS,
    ),
    Fault(
        "infinity-times-zero",
        "an infinite gradient is multiplied by zero",
        plants.clip(plants.times_zero),
        ("sensitivity-replay",),
        HOOKS,
    ),
    Fault(
        "book-clip-none",
        "book-keeping finds every norm to be zero, so nothing is clipped",
        plants.norms(plants.no_norms),
        ("sensitivity-replay", "sum-oracle"),
    ),
    Fault(
        "book-weight-less",
        "book-keeping leaves one weight out of the norms",
        plants.norms(plants.a_weight_less),
        ("sensitivity-replay", "sum-oracle"),
    ),
    Fault(
        "book-page-norm",
        "book-keeping takes a norm from all records of a page",
        plants.norms(plants.of_the_page),
        ("sensitivity-replay", "sum-oracle"),
    ),
    Fault(
        "weights-still",
        "the optimiser holds other tensors than the model, whose weights never move",
        plants.other_tensors,
        ("weights-move",),
    ),
]
SAMPLING = [
    Fault(
        "rate-from-data",
        "the sampling probability follows the number of subjects",
        plants.rate_from_data,
        ("sampling-rate",),
    ),
    Fault(
        "normaliser-from-data",
        "the normaliser follows the number of records",
        plants.with_plan(lambda plan, data: replace(plan, subjects=max(1, len(data or ())))),
        ("sum-oracle",),
    ),
    Fault(
        "draws-shuffled",
        "batches of one size, dealt without replacement",
        plants.shuffled,
        ("sampling-size", "sampling-pairs"),
    ),
    Fault(
        "draws-by-record",
        "records are drawn, not subjects",
        plants.drawing(plants.by_record),
        ("sampling-rate", "sampling-records", "canary-bound"),
    ),
    Fault(
        "draws-not-empty",
        "an empty batch is drawn again",
        plants.drawing(plants.not_empty),
        ("sampling-empty",),
    ),
    Fault(
        "draws-truncated",
        "a batch is cut to 64 records",
        plants.drawing(plants.truncated),
        ("sum-oracle",),
    ),
    Fault("draws-seeded", "draws from a seed", plants.seeded_draws, ("sampling-restarts",)),
]
LEDGER = [
    Fault(
        "steps-more",
        "a step a round more than was reserved",
        plants.with_plan(lambda plan, data: replace(plan, steps=plan.steps + 1)),
        ("ledger-steps",),
    ),
    Fault(
        "epsilon-of-a-round",
        "epsilon of one round is claimed for all",
        leaks.one_round,
        ("ledger-claims",),
    ),
    Fault(
        "release-twice",
        "a retry trains again and sends other bytes",
        leaks.released_twice,
        ("retry-bytes",),
    ),
    Fault(
        "release-unrecorded",
        "a RELEASE is not written",
        leaks.unrecorded("release"),
        ("ledger-complete",),
    ),
    Fault(
        "counts-unrecorded",
        "evaluation counts are not written",
        leaks.unrecorded("counts"),
        ("ledger-complete",),
    ),
    Fault(
        "metric-unrecorded",
        "the raw loss is in the reply",
        leaks.replying(leaks.raw_loss),
        ("ledger-complete", "interference-replies"),
    ),
    Fault(
        "intent-late",
        "records are read before the INTENT",
        leaks.data_first,
        ("ledger-order",),
    ),
    Fault(
        "intent-twice",
        "two INTENTs for one slot",
        leaks.slot_twice,
        ("ledger-slots",),
    ),
]
INTERFERENCE = [
    Fault(
        "state-in-weights",
        "a running mean of inputs is written into a weight",
        leaks.after_training(leaks.running_mean),
        ("interference-replies",),
    ),
    Fault(
        "refusal-quotes",
        "a refusal quotes a record",
        leaks.replying(leaks.quoting),
        ("interference-replies",),
    ),
    Fault(
        "size-of-message",
        "the size of a reply follows the number of records",
        leaks.replying(leaks.padded),
        ("interference-replies",),
    ),
    Fault(
        "entry-quotes",
        "an entry of the ledger gives the number of records",
        leaks.counted_in_entry,
        ("interference-records", "interference-replies"),
    ),
    Fault(
        "log-quotes",
        "a log line gives the number of records",
        leaks.after_training(leaks.log_line),
        ("interference-logs",),
    ),
    Fault(
        "print-quotes",
        "a figure of the records is printed",
        leaks.after_training(leaks.printed),
        ("interference-logs",),
    ),
    Fault(
        "hidden-state",
        "torch's global generator moves with the number of records",
        leaks.after_training(leaks.draw_from_torch),
        ("interference-state",),
    ),
]
CLIENT = [
    Fault(
        "client-weights",
        "sites are weighted by num-examples under client-level privacy",
        client.weighted_by_examples,
        ("client-sensitivity",),
    ),
    Fault(
        "client-denominator",
        "the sum is divided by the sites that replied",
        client.divided_by_replies,
        ("client-denominator",),
    ),
    Fault(
        "client-noise-half",
        "noise x 0.5 under client-level privacy",
        plants.scaled(0.5),
        ("client-variance",),
    ),
    Fault(
        "client-quantile-sign",
        "adaptive clipping moves away from the quantile",
        client.wrong_sign,
        ("client-quantile",),
    ),
]
FAULTS = [*NOISE, *CLIP, *SAMPLING, *LEDGER, *INTERFERENCE, *CLIENT]
