"""What the conformance suite observes: each run of the real sites that its checks look at."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Message

from fedaccord.conformance import client, site
from fedaccord.conformance.client import ClientRuns
from fedaccord.conformance.data import (
    REPEATS,
    clipped_sum_in_closed_form,
    crowd_of,
    interfering,
    neighbours,
    unit_rows,
)
from fedaccord.conformance.site import Bench
from fedaccord.conformance.transcript import reseed, transcript
from fedaccord.evidence import sha256
from fedaccord.privacy.noise import Floats
from fedaccord.privacy.plan import PrivacyPlan
from fedaccord.tasks import Records

ENGINES = ("bookkeeping", "hooks")  # whose sums are replayed; "auto" takes one of them


@dataclass(frozen=True)
class NoiseRuns:
    """Noise alone, as sites without records release it, each (100,002,), in units of the sum.

    Attributes:
        rounds: the first two rounds of site north.
        south: the first round of site south.
        again: the first round of north in a new folder, all global seeds set as before.
        steps: noise of the two steps of north's first round, as `PrivacyPlan.release` gave it.
        plan: the plan of both sites.
    """

    rounds: list[Floats]
    south: Floats
    again: Floats
    steps: list[Floats]
    plan: PrivacyPlan


@dataclass(frozen=True)
class SamplingRun:
    """Who was drawn in each step of one long round.

    Attributes:
        times: int64 (steps, subjects), records of a subject in a step; the last ones have several.
        again: the same of another site with the same subjects, all global seeds set as before.
        small: int64 (steps,), batch sizes of a site with three subjects.
        plan: the plan of both sites.
    """

    times: npt.NDArray[np.int64]
    again: npt.NDArray[np.int64]
    small: npt.NDArray[np.int64]
    plan: PrivacyPlan


@dataclass(frozen=True)
class Pair:
    """Two neighbouring data sets and how far their released sums lie apart in L2."""

    name: str
    distance: float


@dataclass(frozen=True)
class ReplayRuns:
    """Runs with recorded randomness under one engine.

    Attributes:
        pairs: neighbouring data sets and their distances.
        tolerance: what the grid and float32 weights may add to a distance.
        error: largest difference between a released mean and the one computed here in closed form,
            relative to the bound of one subject.
        plan: the plan.
    """

    pairs: list[Pair]
    tolerance: float
    error: float
    plan: PrivacyPlan


@dataclass(frozen=True)
class Canaries:
    """Scores of subjects that took part in a round and of subjects that did not.

    Attributes:
        inside: float64 (n,), in units of the bound of one subject.
        outside: float64 (m,).
        plan: the plan.
    """

    inside: Floats
    outside: Floats
    plan: PrivacyPlan


@dataclass(frozen=True)
class LedgerRun:
    """A whole run at one site, seen from outside, beside the ledger that it left.

    Attributes:
        reservation: the entry that `query.reserve` returned.
        orders: for each round, in order, each reading of records and each durable INTENT.
        replies: (kind, round, reply) of every train and evaluate message.
        entries: the ledger afterwards.
        stored: SHA-256 of every stored release file.
        steps: releases of a step in each of the rounds that trained.
        off_grid: largest distance of a step's released sum from the plan's grid, in grids.
        retry: the reply to round 1 asked again, and again with its stored bytes lost.
        bench: the bench.
    """

    reservation: dict[str, Any]
    orders: list[list[str]]
    replies: list[tuple[str, int, Message]]
    entries: list[dict[str, Any]]
    stored: set[str]
    steps: list[int]
    off_grid: float
    retry: list[Message]
    bench: Bench


def drawn(totals: list[Floats], features: int, bound: float) -> npt.NDArray[np.int64]:
    """Read off un-noised sums how often each subject's record is in them.

    Subject i's clipped gradient is `bound` long and lies along the two weights of input i.
    """
    sums = np.array([total[: 2 * features].reshape(2, features)[0] for total in totals])
    return np.rint(np.abs(sums).reshape(-1, features) * np.sqrt(2) / bound).astype(np.int64)


class Lab:
    """Runs that are made when a check asks for them, each once, with whatever fault is planted."""

    def __init__(self, folder: Path, engines: Iterable[str]) -> None:
        self.folder, self._engines = folder, engines

    @cached_property
    def noise(self) -> NoiseRuns:
        """Four rounds without a record: what is released is the noise of two steps."""
        setting = {
            "rounds": 4,
            "steps": 2,
            "noise_multiplier": 1.0,
            "sampling_prob": 0.25,
            "subjects": 40,
        }
        rounds = []
        with site.tapped() as tap:
            for name in ("noise", "noise-again"):
                reseed()
                bench = Bench(self.folder / name, 50_000, 1.0, "auto", **setting)
                bench.start()
                rounds.append(bench.sum_of(bench.train(1)))
                if name == "noise":
                    steps = [mean * bench.plan.normaliser for mean in tap.means[:2]]
                    rounds.append(bench.sum_of(bench.train(2)))
                    south = bench.sum_of(bench.train(1, "south"))
        return NoiseRuns(rounds[:2], south, rounds[2], steps, bench.plan)

    @cached_property
    def sampling(self) -> SamplingRun:
        """200 steps of a site with 50 subjects (40 are declared), and of one with three.

        Ten of the fifty have five records each.
        """
        people, several = 50, 10
        rows = np.repeat(unit_rows(people), [1] * (people - several) + [REPEATS] * several, axis=0)
        subjects = rows.argmax(axis=1)
        many = site.records(rows, subjects % 2, subjects)
        few = site.records(unit_rows(people)[:3], [0, 1, 0])
        found = []
        for name, data in (("first", many), ("again", many), ("small", few)):
            reseed()
            bench = Bench(
                self.folder / f"sampling-{name}",
                people,
                1e-6,
                rounds=1,
                steps=200,
                noise_multiplier=2.0,
                sampling_prob=0.2,
                subjects=40,
            )
            bench.start()
            bench.put(data)
            with site.tapped() as tap:
                bench.train(1)
            found.append(drawn(tap.totals, people, bench.plan.max_grad_norm))
        return SamplingRun(found[0], found[1], found[2].sum(axis=1), bench.plan)

    @cached_property
    def replays(self) -> dict[str, ReplayRuns]:
        """Single steps on neighbouring data sets under the same recorded randomness, by engine."""
        return {engine: self._replay(engine) for engine in self._engines}

    def _replay(self, engine: str) -> ReplayRuns:
        features = 8
        bench = Bench(
            self.folder / f"replay-{engine}",
            features,
            1.0,
            engine,
            rounds=40,
            steps=1,
            noise_multiplier=1.0,
            sampling_prob=1.0,
            subjects=100,
        )
        bench.start()
        numbers = iter(range(1, 41))

        def run(data: Records, noise: bool = True) -> Floats:
            bench.put(data)
            with site.replayed(noise):
                return bench.sum_of(bench.train(next(numbers)))

        crowd = crowd_of(300, features)
        expected = clipped_sum_in_closed_form(crowd, bench.plan.max_grad_norm)
        error = float(np.abs(run(crowd, noise=False) - expected).max())
        pairs = []
        for name, one, other in neighbours(features):
            with np.errstate(all="ignore"):
                distance = float(np.linalg.norm(run(one) - run(other)))
            pairs.append(Pair(name, distance))
        width = 2 * features + 2
        tolerance = np.sqrt(width) * bench.plan.grid + 1e-5 * bench.plan.max_grad_norm
        return ReplayRuns(pairs, float(tolerance), error / bench.plan.max_grad_norm, bench.plan)

    @cached_property
    def canaries(self) -> Canaries:
        """20,000 subjects of five records each, half of them present, over 40 rounds of a plan."""
        return self._canaries("canaries", 500, 40, steps=6, noise=2.0, prob=0.5, each=REPEATS)

    @cached_property
    def gaussian_canaries(self) -> Canaries:
        """20,000 subjects of one record each, half of them present, in steps without sampling."""
        return self._canaries("gaussian", 2000, 10, steps=1, noise=1.0, prob=1.0, each=1)

    def _canaries(
        self, name: str, width: int, rounds: int, steps: int, noise: float, prob: float, each: int
    ) -> Canaries:
        bench = Bench(
            self.folder / name,
            width,
            1e-6,
            rounds=rounds,
            steps=steps,
            noise_multiplier=noise,
            sampling_prob=prob,
            subjects=width // 2,
        )
        bench.start()
        inside, outside = [], []
        for number in range(1, rounds + 1):
            present = np.flatnonzero(np.random.default_rng().random(width) < 0.5)
            rows = np.repeat(unit_rows(width)[present], each, axis=0)
            subjects = np.repeat(present, each)
            bench.put(site.records(rows, np.zeros(len(rows), np.int64), subjects))
            first, second = bench.sum_of(bench.train(number))[: 2 * width].reshape(2, width)
            scores = (second - first) / (np.sqrt(2) * bench.plan.max_grad_norm)
            member = np.isin(np.arange(width), present)
            inside.append(scores[member])
            outside.append(scores[~member])
        return Canaries(np.concatenate(inside), np.concatenate(outside), bench.plan)

    @cached_property
    def ledger(self) -> LedgerRun:
        """Reserve, three rounds with evaluation, retries of the first; then the ledger."""
        bench = site_bench(self.folder / "ledger")
        entry = bench.start()["north"]
        bench.put(crowd_of(20, bench.features))
        replies, orders, steps, means = [], [], [], []
        for number in (1, 2, 3):
            with site.noted() as order, site.tapped() as tap:
                replies.append(("train", number, bench.ask("train", "north", number)))
            orders.append(list(order))
            steps.append(len(tap.means))
            means += tap.means
            replies.append(("evaluate", number, bench.ask("evaluate", "north", number)))
        site.answered(replies[0][2])
        grids = np.concatenate(means) * bench.plan.normaliser / bench.plan.grid
        off = float(np.abs(grids - np.rint(grids)).max())
        files = sorted((bench.folder / "sites").rglob("*.safetensors"))
        stored = {sha256(path.read_bytes()) for path in files}
        retry = [bench.ask("train", "north", 1)]
        for path in files:
            path.unlink()
        retry.append(bench.ask("train", "north", 1))
        entries = bench.entries()
        return LedgerRun(entry, orders, replies, entries, stored, steps, off, retry, bench)

    @cached_property
    def moved(self) -> Message:
        """The reply of a site that trains one round on 20 subjects."""
        bench = site_bench(self.folder / "moved")
        bench.start()
        bench.put(crowd_of(20, bench.features))
        return bench.ask("train", "north", 1)

    @cached_property
    def client(self) -> ClientRuns:
        """Rounds of the coordinator's mean under client-level privacy."""
        return client.observe()

    @cached_property
    def transcripts(self) -> dict[str, dict[str, str]]:
        """All that leaves a site on each of several neighbouring data sets, release aside."""
        bench = site_bench(self.folder / "transcripts")
        bench.start()
        kept = self.folder / "kept"
        shutil.copytree(bench.folder, kept)
        out = {}
        transcript(bench, kept, crowd_of(20, bench.features))  # one-time warnings come here
        for name, data in interfering(bench.features):
            out[name] = transcript(bench, kept, data)
        return out


def site_bench(folder: Path) -> Bench:
    """Make a bench whose plan has three rounds of two steps, and a spare one."""
    return Bench(
        folder,
        8,
        0.1,
        rounds=4,
        steps=2,
        noise_multiplier=2.0,
        sampling_prob=0.5,
        subjects=24,
    )


@contextmanager
def laboratory(engines: Iterable[str] = ENGINES) -> Iterator[Lab]:
    """Make a lab in a temporary folder, with a home of its own, and clean up after it.

    Args:
        engines: under which sums are replayed.
    """
    home = os.environ.get("FEDACCORD_HOME")
    loggers = [logging.getLogger(), logging.getLogger("flwr")]  # what they say belongs to no run
    handlers = [logger.handlers for logger in loggers]
    for logger in loggers:
        logger.handlers = [logging.NullHandler()]
    with tempfile.TemporaryDirectory(prefix="fedaccord-conformance-") as name, site.registered():
        os.environ["FEDACCORD_HOME"] = str(Path(name) / "home")
        try:
            yield Lab(Path(name), engines)
        finally:
            for logger, known in zip(loggers, handlers, strict=True):
                logger.handlers = known
            os.environ.pop("FEDACCORD_HOME")
            if home is not None:
                os.environ["FEDACCORD_HOME"] = home
