"""The checks of the conformance suite: what each looks at, and when it raises an alarm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import dp_accounting
import numpy as np
from dp_accounting.pld import PLDAccountant
from flwr.app import Message

from fedaccord.conformance import site
from fedaccord.conformance.runs import Lab
from fedaccord.evidence import sha256
from fedaccord.privacy import audit
from fedaccord.privacy.audit import ALPHA
from fedaccord.privacy.noise import Floats
from fedaccord.strategies.encoding import wire_bytes
from fedaccord.strategies.updates import arrays_of

# What a reply to training may hold beside the weights.
SAID = {"site", "run", "round", "head"}


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        alarm: whether something is wrong.
        figure: what it looked at.
        silent: whether a site did not answer at all; an alarm, but it tells nothing of a fault.
    """

    alarm: bool
    figure: str
    silent: bool = False


@dataclass(frozen=True)
class Check:
    """One named check.

    Attributes:
        name: by which a caught fault is reported.
        method: how it looks.
        look: takes the observations, returns what it found.
        statistical: whether it can be wrong by chance, with probability at most `audit.ALPHA`.
    """

    name: str
    method: str
    look: Callable[[Lab], Finding]
    statistical: bool = False

    def run(self, lab: Lab) -> Finding:
        """Look; a site that does not answer is an alarm of every check that needed it."""
        try:
            return self.look(lab)
        except site.Silence as words:
            return Finding(True, f"a site did not answer: {words}", silent=True)


def _p(value: float) -> Finding:
    return Finding(value < ALPHA, f"p = {value:.3g}")


def _least(*values: float) -> Finding:
    """Judge several p-values as one test (Bonferroni)."""
    return _p(min(1.0, min(values) * len(values)))


def _noises(lab: Lab) -> tuple[list[Floats], float]:
    """All releases of noise alone, and the stddev of two steps' noise together."""
    seen = lab.noise
    return [*seen.rounds, seen.south, seen.again], seen.plan.noise_stddev * np.sqrt(2)


def noise_variance(lab: Lab) -> Finding:
    """Hold the variance of released noise to the plan's, above and below."""
    draws, stddev = _noises(lab)
    return _least(*(audit.variance_p(noise, stddev) for noise in draws))


def noise_shape(lab: Lab) -> Finding:
    """Hold the distribution of released noise to a normal one."""
    draws, stddev = _noises(lab)
    return _least(*(audit.shape_p(noise, stddev) for noise in draws))


def noise_coordinates(lab: Lab) -> Finding:
    """Look for dependence between the coordinates of one release."""
    draws, stddev = _noises(lab)
    return _least(*(audit.coordinates_p(noise, stddev) for noise in draws))


def noise_steps(lab: Lab) -> Finding:
    """Look for dependence between two steps of a round."""
    return _p(audit.correlation_p(*lab.noise.steps[:2]))


def noise_rounds(lab: Lab) -> Finding:
    """Look for dependence between two rounds of a site."""
    return _p(audit.correlation_p(*lab.noise.rounds))


def noise_sites(lab: Lab) -> Finding:
    """Look for dependence between two sites in the same round."""
    return _p(audit.correlation_p(lab.noise.rounds[0], lab.noise.south))


def noise_restarts(lab: Lab) -> Finding:
    """Look for dependence between two runs that began with the same global seeds."""
    return _p(audit.correlation_p(lab.noise.rounds[0], lab.noise.again))


def noise_grid(lab: Lab) -> Finding:
    """Hold every released sum to the public grid: its low bits must say nothing of the sum."""
    off = lab.ledger.off_grid
    return Finding(off > 1e-3, f"{off:.2g} grids off")


def sampling_rate(lab: Lab) -> Finding:
    """Hold the inclusion of subjects with one record, and with five, to the declared rate."""
    seen = lab.sampling
    drawn = seen.times > 0
    parts = drawn[:, :40], drawn[:, 40:]
    q = seen.plan.sampling_prob
    return _least(*(audit.binomial_p(int(x.sum()), x.size, q) for x in parts))


def sampling_size(lab: Lab) -> Finding:
    """Hold the variance of the batch size to that of Poisson sampling."""
    drawn = lab.sampling.times > 0
    q = lab.sampling.plan.sampling_prob
    return _p(audit.sizes_p(drawn.sum(axis=1), drawn.shape[1], q))


def sampling_pairs(lab: Lab) -> Finding:
    """Look for pairs of subjects, or of steps, that are drawn together or apart too often."""
    return _p(audit.pairs_p(lab.sampling.times > 0, lab.sampling.plan.sampling_prob))


def sampling_empty(lab: Lab) -> Finding:
    """Hold the number of empty steps, with noise alone, to what three subjects must give."""
    sizes, plan = lab.sampling.small, lab.sampling.plan
    if sizes.size != plan.steps:
        return Finding(True, f"{sizes.size} noised steps of {plan.steps}")
    return _p(audit.binomial_p(int((sizes == 0).sum()), sizes.size, (1 - plan.sampling_prob) ** 3))


def sampling_records(lab: Lab) -> Finding:
    """See that no step holds two records of one subject."""
    most = int(lab.sampling.times.max())
    return Finding(most > 1, f"at most {most} of a subject in a step")


def sampling_restarts(lab: Lab) -> Finding:
    """Look for draws that repeat when a run begins with the same global seeds."""
    one, other = lab.sampling.times > 0, lab.sampling.again > 0
    q = lab.sampling.plan.sampling_prob
    same = int((one == other).sum())
    return _p(audit.binomial_p(same, one.size, q**2 + (1 - q) ** 2))


def sensitivity_replay(lab: Lab) -> Finding:
    """Compare released sums of neighbouring data sets under the same recorded randomness."""
    found, alarm = [], False
    for engine, seen in lab.replays.items():
        worst = max(seen.pairs, key=lambda pair: np.nan_to_num(pair.distance, nan=np.inf))
        alarm |= not worst.distance <= seen.plan.sensitivity + seen.tolerance
        share = worst.distance / seen.plan.max_grad_norm
        found.append((np.nan_to_num(share, nan=np.inf), f"{worst.name} ({engine})", share))
    _, where, share = max(found)
    return Finding(alarm, f"{share:.6g} C between {where}")


def sum_oracle(lab: Lab) -> Finding:
    """Compare a released mean of 300 subjects with the formula, at the declared normaliser."""
    errors = [(seen.error, engine) for engine, seen in lab.replays.items()]
    error, engine = max(errors, key=lambda pair: np.nan_to_num(pair[0], nan=np.inf))
    return Finding(not error < 1e-3, f"{error:.2g} C from the closed form ({engine})")


def weights_move(lab: Lab) -> Finding:
    """See that a round moves every weight that it pays for; a site that says otherwise is heard."""
    said = lab.moved.content if lab.moved.has_content() else None
    words = str(said.config_records["config"].get("refused", "")) if said else ""
    if "did not move in a private step" in words:
        return Finding(True, f"the site found it: {words.split(',')[0]}")
    weights = site.released(site.answered(lab.moved))
    still = int((weights == 0).sum())  # a site is sent zeros
    return Finding(still > 0, f"{still} of {weights.size} weights stayed")


def canary_bound(lab: Lab) -> Finding:
    """Hold the claim for one round to the lower bound from subjects with five records."""
    seen = lab.canaries
    claim = seen.plan.epsilon(rounds=1)
    found = audit.epsilon_lower_bound(seen.inside, seen.outside, seen.plan.delta)
    return Finding(
        found.value > claim,
        f"LOWER BOUND epsilon >= {found.value:.2f}, claim {claim:.2f} "
        f"at delta {seen.plan.delta:g}, {found.canaries} canaries",
    )


def canary_gaussian(lab: Lab) -> Finding:
    """Hold one step without sampling to the lower bound on mu of Gaussian DP."""
    seen = lab.gaussian_canaries
    claim = 1 / seen.plan.noise_multiplier
    found = audit.mu_lower_bound(seen.inside, seen.outside, threshold=0.5)
    return Finding(
        found.value > claim,
        f"LOWER BOUND mu >= {found.value:.2f}, claim {claim:.2f}: epsilon >= "
        f"{audit.mu_to_epsilon(found.value, seen.plan.delta):.2f} at delta {seen.plan.delta:g}, "
        f"{found.canaries} canaries",
    )


def ledger_claims(lab: Lab) -> Finding:
    """Recompute epsilon from the accord's own figures; entry, event and statement must agree."""
    entry, accord = lab.ledger.reservation, lab.ledger.bench.accord
    steps = accord.training.steps * accord.reserved_rounds
    sigma, q = accord.privacy.noise_multiplier, accord.privacy.sampling_prob
    book = PLDAccountant()
    book.compose(
        dp_accounting.SelfComposedDpEvent(
            dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma)), steps
        )
    )
    true = book.get_epsilon(accord.privacy.delta)
    said = [entry["epsilon"], lab.ledger.bench.plan.epsilon()]
    wrong = [value for value in said if not abs(value - true) <= 1e-9 * true]
    return Finding(bool(wrong), f"said {min(said):.4f}, recomputed {true:.4f} over {steps} steps")


def ledger_steps(lab: Lab) -> Finding:
    """Count the noised steps of each round against those that the ledger's event pays for."""
    entry = lab.ledger.reservation
    paid = entry["event"].get("count", 0) / entry["rounds"]
    wrong = [ran for ran in lab.ledger.steps if ran != paid]
    return Finding(bool(wrong), f"{lab.ledger.steps} steps ran, {paid:g} a round are paid for")


def ledger_complete(lab: Lab) -> Finding:
    """Find for all that left the site the entry that records it, and nothing that has none."""
    for kind, number, reply in lab.ledger.replies:
        site.answered(reply)
        entries = [e for e in lab.ledger.entries if e.get("round") == number]
        fault = _unrecorded(kind, reply, entries, lab.ledger.stored)
        if fault:
            return Finding(True, f"{kind}, round {number}: {fault}")
    return Finding(False, f"{len(lab.ledger.replies)} replies, each recorded")


def _unrecorded(
    kind: str, reply: Message, entries: list[dict[str, object]], stored: set[str]
) -> str:
    """Name what a reply holds that the ledger's entries of its round do not record."""
    content = reply.content
    said = {key for record in content.config_records.values() for key in record}
    if extra := said - SAID:
        return f"the reply also holds {', '.join(sorted(extra))}"
    if kind == "train":
        digest = sha256(wire_bytes(arrays_of(content)))
        held = [e.get("sha256") for e in entries if e["kind"] == "RELEASE"]
        if held != [digest]:
            return f"{len(held)} RELEASE entries, none of the bytes sent" if held else "no RELEASE"
        if digest not in stored:
            return "the bytes were not stored before they were sent"
        metrics = list(content.metric_records)
        return f"the reply also holds the metrics {', '.join(metrics)}" if metrics else ""
    cells = sum(
        len(v) if isinstance(v, list) else 1
        for record in content.metric_records.values()
        for v in record.values()
    )
    held = [e.get("cells") for e in entries if e["kind"] == "COUNTS"]
    return "" if held == [cells] else f"{cells} counts sent, recorded {held}"


def ledger_order(lab: Lab) -> Finding:
    """See that in each round the INTENT is durable before any record is read."""
    first = [order[0] if order else "nothing" for order in lab.ledger.orders]
    return Finding(set(first) != {"INTENT"}, f"first came {', '.join(first)}")


def ledger_slots(lab: Lab) -> Finding:
    """See that each round has one INTENT and at most one RELEASE, also after a retry."""
    kinds = [(e["kind"], e.get("round")) for e in lab.ledger.entries]
    numbers = sorted({int(n or 0) for kind, n in kinds if kind in ("INTENT", "RELEASE")})
    intents = [kinds.count(("INTENT", n)) for n in numbers]
    releases = [kinds.count(("RELEASE", n)) for n in numbers]
    wrong = set(intents) != {1} or max(releases) > 1
    return Finding(wrong, f"INTENTs a round {intents}, RELEASEs a round {releases}")


def retry_bytes(lab: Lab) -> Finding:
    """Ask for a released round again, with its stored bytes and without: same bytes or refusal."""
    first = site.released(site.answered(lab.ledger.replies[0][2]))
    for case, reply in zip(("again", "bytes lost"), lab.ledger.retry, strict=True):
        if reply.has_content() and reply.content.array_records:
            other = site.released(reply)
            if other.tobytes() != first.tobytes():
                return Finding(True, f"{case}: other bytes for the same round")
    return Finding(False, "same bytes, or a refusal")


def client_variance(lab: Lab) -> Finding:
    """Hold the variance of the noise on the coordinator's sum to the plan's."""
    seen = lab.client
    return _p(audit.variance_p(seen.noise, seen.plan.noise_stddev))


def client_sensitivity(lab: Lab) -> Finding:
    """Compare sums with and without one site that sends a long update and a million examples."""
    moved, bound = lab.client.moved, lab.client.plan.clipping_norm
    return Finding(not moved <= bound * (1 + 1e-5), f"{moved / bound:.6g} clipping norms")


def client_denominator(lab: Lab) -> Finding:
    """Compare the mean of ten replies of twenty asked with the sum over twenty."""
    share = lab.client.missing
    return Finding(not abs(share - 1) < 1e-3, f"{share:.4g} of what it must be")


def client_quantile(lab: Lab) -> Finding:
    """See that the clipping norm reaches the true median from 0.1 x and from 10 x."""
    ends = lab.client.norms
    wrong = [end for end in ends if not 0.9 <= end <= 1.1]
    return Finding(bool(wrong), f"{ends[0]:.3g} and {ends[1]:.3g} of the median")


def _interference(*names: str) -> Callable[[Lab], Finding]:
    """Make a check that compares parts of the transcripts on neighbouring data."""

    def look(lab: Lab) -> Finding:
        first, *others = lab.transcripts
        base, compared = lab.transcripts[first], 0
        for other in others:
            for part in lab.transcripts[other]:
                if not part.startswith(names):
                    continue
                compared += 1
                if lab.transcripts[other][part] != base[part]:
                    return Finding(True, f"{part} differs between {first} and {other}")
        return Finding(False, f"{compared} comparisons, all byte-identical")

    return look


CHECKS = [
    Check("noise-variance", "chi-square, both ways", noise_variance, True),
    Check("noise-shape", "Kolmogorov-Smirnov", noise_shape, True),
    Check("noise-coordinates", "autocorrelation", noise_coordinates, True),
    Check("noise-steps", "correlation", noise_steps, True),
    Check("noise-rounds", "correlation", noise_rounds, True),
    Check("noise-sites", "correlation", noise_sites, True),
    Check("noise-restarts", "correlation", noise_restarts, True),
    Check("noise-grid", "arithmetic", noise_grid),
    Check("sampling-rate", "binomial, both ways", sampling_rate, True),
    Check("sampling-size", "exact dispersion, both ways", sampling_size, True),
    Check("sampling-pairs", "binomial, every pair", sampling_pairs, True),
    Check("sampling-empty", "binomial, both ways", sampling_empty, True),
    Check("sampling-records", "count", sampling_records),
    Check("sampling-restarts", "binomial, both ways", sampling_restarts, True),
    Check("sensitivity-replay", "record and replay", sensitivity_replay),
    Check("sum-oracle", "closed form", sum_oracle),
    Check("weights-move", "comparison", weights_move),
    Check("canary-bound", "canaries", canary_bound, True),
    Check("canary-gaussian", "canaries", canary_gaussian, True),
    Check("ledger-claims", "recomputation", ledger_claims),
    Check("ledger-steps", "count", ledger_steps),
    Check("ledger-complete", "comparison", ledger_complete),
    Check("ledger-order", "order of events", ledger_order),
    Check("ledger-slots", "count", ledger_slots),
    Check("retry-bytes", "comparison", retry_bytes),
    Check("interference-replies", "non-interference", _interference("reply", "size")),
    Check("interference-logs", "non-interference", _interference("log", "printed")),
    Check("interference-records", "non-interference", _interference("stored", "reply to ledger")),
    Check("interference-state", "non-interference", _interference("state")),
    Check("client-variance", "chi-square, both ways", client_variance, True),
    Check("client-sensitivity", "replay", client_sensitivity),
    Check("client-denominator", "closed form", client_denominator),
    Check("client-quantile", "convergence", client_quantile),
]
BY_NAME = {check.name: check for check in CHECKS}
