"""The bench of the conformance suite: real sites on chosen records, and taps that only listen."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import nn, zeros

from fedaccord import accord as accords
from fedaccord import registry
from fedaccord.client.app import app as client_app
from fedaccord.privacy.noise import Floats
from fedaccord.privacy.plan import PrivacyPlan, plan_for
from fedaccord.server.one_run import FIRST_NODE
from fedaccord.simulations.engine import InProcessGrid
from fedaccord.tasks import Records, SiteData, TaskSpec

SITES = ("north", "south")
RUN = "conformance"
Data = SiteData | Exception

# What the probe task hands out at each site, and who asked; filled by a Bench.
_desk: dict[str, Data] = {}
_steps_taken: list[str] = []


class Silence(Exception):
    """A site refused or failed where it should have answered."""


@contextmanager
def planted(target: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace a function, method or property of the installed code for a while.

    A function is replaced in every module of fedaccord that knows it, by whichever import.

    Args:
        target: "module:name" or "module:Class.name".
        make: gets what stands there (of a property its getter), returns what shall stand there.
    """
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original = vars(owner)[name]
    if isinstance(original, property):
        assert original.fget is not None
        new: Any = property(make(original.fget))
    else:
        new = make(original)
    places = [owner]
    if not outer:
        places += [
            known
            for key, known in sys.modules.items()
            if key.startswith("fedaccord") and known is not owner and name in vars(known)
        ]
        places = [place for place in places if vars(place)[name] is original]
    for place in places:
        setattr(place, name, new)
    try:
        yield
    finally:
        for place in places:
            setattr(place, name, original)


@contextmanager
def together(*plants: Any) -> Iterator[None]:
    """Enter several context managers as one."""
    with ExitStack() as stack:
        for plant in plants:
            stack.enter_context(plant)
        yield


class Probe:
    """A task whose records the bench chooses; registered only while the suite runs."""

    sites = SITES

    def __init__(self, features: int) -> None:
        self.spec = TaskSpec(
            name="conformance",
            features=tuple(f"x{place}" for place in range(features)),
            classes=("no", "yes"),
            attributes={"group": ("a", "b")},
            source="made up by fedaccord.conformance.site",
        )

    def site(self, name: str) -> SiteData:
        """Hand out what the bench has put on the desk, or raise it."""
        _steps_taken.append("read")
        found = _desk[name]
        if isinstance(found, Exception):
            raise found
        return found

    def public(self, rows: int, seed: int) -> npt.NDArray[np.float32]:
        """Draw proxy rows from the bounds -1 to 1."""
        rng = np.random.default_rng(seed)
        return rng.uniform(-1, 1, (rows, len(self.spec.features))).astype(np.float32)


def linear(spec: TaskSpec) -> nn.Module:
    """Build a linear classifier: a record's gradient is known in closed form."""
    return nn.Linear(len(spec.features), len(spec.classes))


@contextmanager
def registered() -> Iterator[None]:
    """Let accords name the probe task and the linear model, for as long as the suite runs."""
    here = "fedaccord.conformance.site"
    try:
        registry.TASKS["conformance"] = f"{here}:Probe"
        registry.MODELS["conformance-linear"] = f"{here}:linear"
        yield
    finally:
        registry.TASKS.pop("conformance", None)
        registry.MODELS.pop("conformance-linear", None)
        _desk.clear()
        _steps_taken.clear()


def records(
    inputs: npt.NDArray[Any], labels: Iterable[int], subjects: Iterable[int] | None = None
) -> Records:
    """Make records; everybody is a subject of their own unless said, and group alternates."""
    n = len(inputs)
    return Records(
        inputs=np.asarray(inputs, np.float32),
        labels=np.fromiter(labels, np.int64, n),
        subjects=np.arange(n) if subjects is None else np.fromiter(subjects, np.int64, n),
        groups={"group": np.arange(n) % 2},
    )


def nobody(features: int) -> Records:
    """Make no records."""
    return records(np.zeros((0, features)), [])


def joined(one: Records, other: Records) -> Records:
    """Append records; row i of every array stays the same record."""
    return Records(
        inputs=np.concatenate([one.inputs, other.inputs]),
        labels=np.concatenate([one.labels, other.labels]),
        subjects=np.concatenate([one.subjects, other.subjects]),
        groups={k: np.concatenate([one.groups[k], other.groups[k]]) for k in one.groups},
    )


_ACCORD = """
name = "conformance"
purpose = "Made up: to see whether faults are found."
task = {{ name = "conformance", options = {{ features = {features} }} }}
model = {{ name = "conformance-linear" }}
rounds = {{ rounds = {rounds} }}
training = {{ steps = {steps}, learning_rate = {learning_rate} }}
fairness = {{ attributes = ["group"] }}
distillation = {{ enabled = false }}

[privacy]
noise_multiplier = {noise_multiplier}
sampling_prob = {sampling_prob}
max_epsilon = 100.0
engine = "{engine}"

[[sites]]
name = "north"
subjects = {subjects}

[[sites]]
name = "south"
subjects = {subjects}
"""


class Bench:
    """Two sites that answer messages through the installed ClientApp, on records that we choose.

    Nothing of a site is imitated: policy, ledger, training and messages are those of a run.
    """

    def __init__(
        self, folder: Path, features: int, rate: float, engine: str = "auto", **plan: float
    ) -> None:
        """Write the accord of two sites and make their nodes.

        Args:
            folder: an empty or new folder of its own.
            features: inputs of the linear model; it has 2 x features + 2 weights.
            rate: the learning rate, of SGD.
            engine: `privacy.engine` of the accord.
            plan: rounds, steps, noise_multiplier, sampling_prob, subjects (declared, each site).
        """
        self.folder, self.features = folder, features
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "accord.toml"
        about = {"features": features, "learning_rate": repr(rate), "engine": engine}
        text = _ACCORD.format(**about, **plan)
        path.write_text(text, encoding="utf-8")
        self.accord = accords.load(path)
        config: dict[str, Any] = {"accord": str(path), "run": "", "sites": str(folder / "sites")}
        self._grid = InProcessGrid(client_app, len(SITES), config)
        for site in SITES:
            self.put(nobody(features), site)

    @property
    def plan(self) -> PrivacyPlan:
        """The plan of site north, whose figures are those of south as well."""
        plan = plan_for(self.accord, SITES[0])
        assert isinstance(plan, PrivacyPlan)
        return plan

    @property
    def base(self) -> dict[str, Any]:
        """The weights that every round is sent: zeros."""
        return {"weight": zeros(2, self.features), "bias": zeros(2)}

    def put(self, train: Records | Exception, site: str = "north") -> None:
        """Choose a site's training records; its evaluation records are always the same four."""
        rows = np.linspace(-1, 1, 4 * self.features).reshape(4, self.features)
        test = records(rows, [0, 1, 1, 0])
        _desk[site] = train if isinstance(train, Exception) else SiteData(train=train, test=test)

    def ask(self, kind: str, site: str = "north", number: int = 0) -> Message:
        """Send a site one message and return its reply, whatever it is."""
        config = ConfigRecord({"run": RUN, "accord": self.accord.digest, "server-round": number})
        content = RecordDict({"config": config})
        if kind in ("train", "evaluate"):
            section = "arrays" if kind == "train" else "model"
            content[section] = ArrayRecord(self.base)
        node = FIRST_NODE + SITES.index(site)
        (reply,) = self._grid.send_and_receive([Message(content, node, kind)])
        return reply

    def start(self) -> dict[str, dict[str, Any]]:
        """Have both sites join and reserve; return their ledgers' entries."""
        entries = {}
        for site in SITES:
            said = answered(self.ask("query.join", site))
            if said.content.config_records["config"].get("reason"):
                raise Silence(str(said.content.config_records["config"]["reason"]))
            reply = answered(self.ask("query.reserve", site))
            entries[site] = json.loads(str(reply.content.config_records["config"]["entry"]))
        return entries

    def train(self, number: int, site: str = "north") -> Floats:
        """Have a site train one round; return the released weights, float64 (2 x features + 2,)."""
        return released(answered(self.ask("train", site, number)))

    def sum_of(self, weights: Floats) -> Floats:
        """Recover the sum of all steps of a round, noise included, from the released weights."""
        return -weights / self.accord.training.learning_rate * self.plan.normaliser

    def entries(self, site: str = "north") -> list[dict[str, Any]]:
        """Ask a site for its ledger."""
        said = answered(self.ask("query.ledger", site)).content.config_records["config"]
        return [json.loads(line) for line in str(said["ledger"]).splitlines()]


def released(reply: Message) -> Floats:
    """Flatten the weights of a reply: the matrix first, the bias last."""
    arrays = reply.content.array_records["arrays"]
    parts = [arrays[name].numpy().ravel() for name in ("weight", "bias")]
    return np.concatenate(parts).astype(np.float64)


def answered(reply: Message) -> Message:
    """Return a reply that answers.

    Raises:
        Silence: it is an error or a refusal.
    """
    if reply.has_error():
        raise Silence(f"error: {reply.error.reason}")
    config = reply.content.config_records.get("config")
    if config is not None and config.get("refused"):
        raise Silence(f"refused: {config['refused']!s}")
    return reply


class Tap:
    """What went into and came out of `PrivacyPlan.release`, step by step."""

    def __init__(self) -> None:
        self.totals: list[Floats] = []
        self.means: list[Floats] = []


@contextmanager
def tapped() -> Iterator[Tap]:
    """Listen to every release of a step, faulty or not, and change nothing."""
    tap = Tap()

    def listen(real: Any) -> Any:
        def release(self: PrivacyPlan, total: Floats, *rest: Any, **more: Any) -> Floats:
            tap.totals.append(np.array(total, np.float64))
            mean: Floats = real(self, total, *rest, **more)
            tap.means.append(np.array(mean, np.float64))
            return mean

        return release

    with planted("fedaccord.privacy.plan:PrivacyPlan.release", listen):
        yield tap


@contextmanager
def noted() -> Iterator[list[str]]:
    """List in order when records are read and when an INTENT is on the disk."""
    _steps_taken.clear()

    def note(real: Any) -> Any:
        def intend(*args: Any, **more: Any) -> Any:
            entry = real(*args, **more)
            _steps_taken.append("INTENT")
            return entry

        return intend

    with planted("fedaccord.privacy.ledger:Ledger.intend", note):
        yield _steps_taken


@contextmanager
def replayed(noise: bool) -> Iterator[None]:
    """Make the mechanism's randomness the same at every call, so that sums can be compared exactly.

    The k-th draw of each kind of the j-th source of a round is always the same, and a longer draw
    begins like a shorter one, so that a further subject takes nobody else's coin.

    Args:
        noise: whether normal draws are replayed too; else they are zeros.
    """
    made = [0]

    def begin(real: Any) -> Any:
        def __init__(self: Any, *args: Any, **more: Any) -> None:
            real(self, *args, **more)
            made[0] += 1
            self.replay = {"source": made[0], "uniform": 0, "normal": 0}

        return __init__

    def generator(source: Any, kind: str) -> np.random.Generator:
        source.replay[kind] += 1
        key = [source.replay["source"], kind == "normal", source.replay[kind]]
        return np.random.default_rng(key)

    def uniform(self: Any, count: int) -> Floats:
        return generator(self, "uniform").random(count)

    def normal(self: Any, count: int) -> Floats:
        drawn = generator(self, "normal").standard_normal(count)
        return drawn if noise else np.zeros(count)

    source = "fedaccord.privacy.noise:OsSource"
    with together(
        planted(f"{source}.__init__", begin),
        planted(f"{source}.uniform", lambda _: uniform),
        planted(f"{source}.normal", lambda _: normal),
    ):
        yield


class _Noon(datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        """Return noon of one day."""
        return cls(2026, 1, 1, 12, tzinfo=tz or UTC)


@contextmanager
def clock_stopped() -> Iterator[None]:
    """Stop the clock by which ledgers date their entries."""
    with planted("fedaccord.privacy.ledger:datetime", lambda _: _Noon):
        yield


def restore(copy: Path, folder: Path) -> None:
    """Put a folder back as its copy is."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(copy, folder)
