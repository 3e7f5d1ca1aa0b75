"""A whole run under client-level privacy: what is released, what is on record, what is not."""

from __future__ import annotations

import io
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from flwr.app import Message
from safetensors import numpy as safetensors
from scipy import stats
from torch import nn

from fedaccord import accord as accords
from fedaccord import registry
from fedaccord.errors import AccordError
from fedaccord.evidence import sha256
from fedaccord.models.build import build
from fedaccord.privacy.client_level import COVERS, ClientPlan, clipped_sum
from fedaccord.privacy.plan import plan_for
from fedaccord.reports.report import write_report
from fedaccord.reports.verify import verify
from fedaccord.runs import RunFolder
from fedaccord.server import checkpoint, distillation
from fedaccord.simulations import engine
from fedaccord.strategies.client_level import refuse_state
from fedaccord.strategies.updates import Weights, flat, moved, to_weights
from fedaccord.tasks import load_task

ALPHA = 2e-6
TOWNS = [f"town-{n:02d}" for n in range(30)]
UNREADABLE, NOT_FINITE, ASKED = TOWNS[3], TOWNS[7], 26

# Thirty towns whose records follow one rule with noise; one cannot be read, one holds NaN.
TASK = f"""
import math
import zlib

import numpy as np

from fedaccord.tasks import Records, SiteData, TaskSpec

TOWNS = {TOWNS!r}


class Towns:
    sites = tuple(TOWNS)
    spec = TaskSpec(
        name="towns",
        features=tuple(f"x{{n}}" for n in range(10)),
        classes=("no", "yes"),
        attributes={{"side": ("left", "right")}},
        source="made up",
    )

    def site(self, name):
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        train, test = self._records(rng, 40), self._records(rng, 30)
        if name == {UNREADABLE!r}:
            raise OSError("the disk of this town is broken")
        if name == {NOT_FINITE!r}:
            train.inputs[:] = math.nan
        return SiteData(train, test)

    def _records(self, rng, count):
        inputs = rng.uniform(-1, 1, (count, 10)).astype(np.float32)
        labels = (inputs[:, 0] + inputs[:, 1] > 0).astype(np.int64)
        side = rng.integers(0, 2, count)
        return Records(inputs, labels, np.arange(count), {{"side": side}})

    def public(self, rows, seed):
        rng = np.random.default_rng(seed)
        return rng.uniform(-1, 1, (rows, 10)).astype(np.float32)
"""

ACCORD = """
name = "towns"
purpose = "Test."
seed = 3
sites = [{sites}]
task = {{ name = "towns" }}
model = {{ name = "mlp", options = {{ hidden = 256 }} }}
rounds = {{ rounds = 3, spare_rounds = 1, sites_per_round = {asked}, min_sites = 10 }}
training = {{ steps = 5, learning_rate = 0.5 }}
fairness = {{ attributes = ["side"], min_group = 5 }}
distillation = {{ enabled = {student}, options = {{ hidden = 4 }}, steps = 15, proxy_rows = 200 }}

[privacy]
unit = "client"
noise_multiplier = 1.5
clipping_norm = 0.3
{adaptive}
delta = 1e-3
max_epsilon = 20.0
sampling_prob = 0.5
"""


@dataclass
class Seen:
    """A finished run, and what only the coordinator saw of it."""

    folder: Path
    sites: Path
    accord: accords.Accord
    models: list[Weights] = field(default_factory=list)  # the global model before each round
    updates: list[dict[str, np.ndarray]] = field(default_factory=list)  # by site, each round
    sent: list[Weights] = field(default_factory=list)  # every site's weights
    log: str = ""

    def kind(self, kind: str) -> list[dict[str, Any]]:
        return [r for r in RunFolder.open(self.folder).records() if r["kind"] == kind]

    def ledger(self, site: str) -> list[dict[str, Any]]:
        lines = (self.folder / "ledgers" / f"{site}.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in lines.splitlines()]


def run_towns(folder: Path, adaptive: str = "") -> Seen:
    """Run the towns, and note every update as it arrives."""
    sites = ", ".join(f'{{ name = "{name}", subjects = 40 }}' for name in TOWNS)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "towns.toml"
    student = "false" if adaptive else "true"
    text = ACCORD.format(sites=sites, asked=ASKED, adaptive=adaptive, student=student)
    path.write_text(text, encoding="utf-8")
    accord = accords.load(path)
    seen = Seen(folder / "run", folder / "sites", accord)
    spec = load_task("towns").spec
    first = build("mlp", spec, accord.model.options, accord.seed)
    seen.models.append(checkpoint.weights_of(first))

    def note(reply: Message) -> None:
        if reply.metadata.message_type != "train":
            return
        number = int(reply.content.config_records["config"]["round"])  # type: ignore[arg-type]
        if number > len(seen.updates):
            seen.updates.append({})
            if number > 1:
                seen.models.append(checkpoint.load(seen.folder).model)
        base = seen.models[-1]
        change = to_weights(reply.content.array_records["arrays"])
        seen.sent.append(change)
        site = str(reply.content.config_records["config"]["site"])
        seen.updates[-1][site] = flat({name: change[name] for name in base})

    log, root = io.StringIO(), logging.getLogger()
    handler = logging.StreamHandler(log)
    root.addHandler(handler)
    try:
        engine.simulate(path, seen.folder, seen.sites, len(TOWNS), note)
    finally:
        root.removeHandler(handler)
    seen.log = log.getvalue()
    seen.models.append(checkpoint.load(seen.folder).model)
    return seen


@pytest.fixture(scope="module")
def towns(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("towns")
    (folder / "towns_task.py").write_text(TASK, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setitem(registry.TASKS, "towns", "towns_task:Towns")
        yield folder


@pytest.fixture(scope="module")
def fixed(towns: Path) -> Seen:
    return run_towns(towns / "fixed")


@pytest.fixture(scope="module")
def adaptive(towns: Path) -> Seen:
    return run_towns(towns / "adaptive", "target_quantile = 0.6\ncount_noise = 1.3")


@pytest.fixture(params=["fixed", "adaptive"])
def seen(request: pytest.FixtureRequest) -> Seen:
    return request.getfixturevalue(request.param)


# --- what is released ---------------------------------------------------------------------------


def residuals(seen: Seen) -> np.ndarray:
    """What was added to the clipped sums, in units of the noise that the records declare."""
    out = []
    for number, record in enumerate(seen.kind("round")):
        said, base = record["mechanism"], seen.models[number]
        updates = list(seen.updates[number].values())
        with np.errstate(invalid="ignore"):
            total, _ = clipped_sum(updates, updates[0].size, said["clipping_norm"])
        after = {name: seen.models[number + 1][name] for name in base}
        out.append(((flat(after) - flat(base)) * ASKED - total) / said["noise_stddev"])
    return np.concatenate(out)


def chance(draws: np.ndarray) -> float:
    """Two-sided p-value of a chi-square test that the draws have variance 1."""
    statistic = float(np.sum(draws**2))
    return 2 * min(stats.chi2.sf(statistic, draws.size), stats.chi2.cdf(statistic, draws.size))


def test_the_released_mean_is_the_clipped_mean_with_the_declared_noise(seen: Seen) -> None:
    draws = residuals(seen)
    assert draws.size == 3 * ((10 + 1) * 256 + (256 + 1) * 2)
    assert chance(draws) > ALPHA
    for factor in (0.0, 0.5, 0.9, 1.1):  # had the noise been so much of what is declared
        assert chance(draws * factor) < ALPHA, factor
    assert abs(np.corrcoef(draws[:3330], draws[3330:6660])[0, 1]) < 5 / math.sqrt(3330)


def test_the_noise_is_what_the_plan_says_of_the_norm_of_its_round(seen: Seen) -> None:
    plan = plan_for(seen.accord, TOWNS[0])
    assert isinstance(plan, ClientPlan)
    norm = 0.3
    for record in seen.kind("round"):
        said = record["mechanism"]
        assert said["clipping_norm"] == norm
        assert said["asked"] == len(record["invited"]) == ASKED
        assert said["noise_stddev"] == pytest.approx(plan.mean_multiplier * norm, rel=1e-5)
        norm = said["next_clipping_norm"]
    assert (norm == 0.3) == (plan.target_quantile is None)


def test_the_student_is_taught_by_the_noised_models_alone(fixed: Seen) -> None:
    seen, accord, task = fixed, fixed.accord, load_task("towns")
    wants = accord.distillation
    proxy = torch.from_numpy(task.public(wants.proxy_rows, accord.seed))
    teacher = build("mlp", task.spec, accord.model.options, accord.seed)

    def student_of(teachers: Callable[[int], list[Weights]]) -> str:
        student = build("mlp", task.spec, wants.options, accord.seed)
        for number in (1, 2, 3):
            lesson = distillation.Lesson(teacher, proxy, ASKED)
            for weights in teachers(number):
                lesson.hear(weights)
            distillation.distil(student, proxy, lesson.targets(), wants, accord.seed + number)
        return checkpoint.weights_digest(checkpoint.weights_of(student))

    right = seen.kind("round")[-1]["student"]
    assert student_of(lambda number: [seen.models[number]]) == right
    finite = [w for w in seen.sent if all(np.isfinite(v).all() for v in w.values())]
    sites = [moved(seen.models[0], change) for change in finite[:ASKED]]
    assert student_of(lambda _: sites) != right


# --- what is on record --------------------------------------------------------------------------


def texts(folder: Path) -> str:
    files = [p for p in folder.rglob("*") if p.suffix in (".jsonl", ".json", ".html", ".toml")]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def test_no_figure_of_a_single_update_is_in_the_evidence_the_report_or_the_log(seen: Seen) -> None:
    write_report(seen.folder)
    evidence = texts(seen.folder) + seen.log
    assert "configure_train" in seen.log  # the log was caught
    assert seen.folder.name in evidence
    updates = [u for by_site in seen.updates for u in by_site.values()]
    lengths = [float(np.linalg.norm(u)) for u in updates]
    for length in lengths:
        if math.isfinite(length) and length > 0:
            assert f"{length:.12f}"[:11] not in evidence
    public = [checkpoint.weights_digest(model) for model in seen.models]
    for weights in seen.sent:
        if checkpoint.weights_digest(weights) in public:
            continue  # an update of zero: what was sent is the global model itself
        assert checkpoint.weights_digest(weights) not in evidence
        assert sha256(safetensors.save(weights)) not in evidence
    assert '"update_norm"' not in evidence


def test_every_sites_reply_looks_the_same_whatever_its_data_did(seen: Seen) -> None:
    asked = set()
    for record in seen.kind("round"):
        replies = record["replies"]
        assert set(map(json.dumps, replies.values())) == {'{"accepted": true, "reason": ""}'}
        assert record["aggregated"] == record["invited"]
        assert set(record["weights"].values()) == {1}
        asked |= set(replies)
    broken = {site: u for by_site in seen.updates for site, u in by_site.items()}
    if UNREADABLE in asked:
        assert not broken[UNREADABLE].any()
    if NOT_FINITE in asked:
        assert not np.isfinite(broken[NOT_FINITE]).any()
    assert {UNREADABLE, NOT_FINITE} & asked  # else this test saw neither fault


def test_a_release_says_who_sees_it_and_its_hash_is_salted(seen: Seen) -> None:
    for site in TOWNS[:4]:
        releases = [e for e in seen.ledger(site) if e["kind"] == "RELEASE"]
        assert releases
        for entry in releases:
            assert entry["covers"] == COVERS
            name = f"{seen.folder.name}-{entry['round']:05d}.safetensors"
            stored = (seen.sites / site / "releases" / name).read_bytes()
            assert sha256(stored) == entry["sha256"]
            assert sha256(safetensors.save(safetensors.load(stored))) != entry["sha256"]
    sizes = {e["bytes"] for s in TOWNS for e in seen.ledger(s) if e["kind"] == "RELEASE"}
    assert len(sizes) == 1


def test_the_ledgers_epsilon_is_that_of_plain_gaussians_without_amplification(seen: Seen) -> None:
    book = PLDAccountant()
    book.compose(dp_accounting.GaussianDpEvent(1.5), 4)
    for site in TOWNS[:3]:
        (reserved,) = [e for e in seen.ledger(site) if e["kind"] == "RESERVE"]
        assert reserved["epsilon"] == pytest.approx(book.get_epsilon(1e-3), rel=1e-6)
        assert reserved["plan"]["unit"] == "client"


def test_verify_finds_no_fault_and_the_report_says_who_is_not_held_off(seen: Seen) -> None:
    page = write_report(seen.folder).read_text(encoding="utf-8")
    checks = verify(seen.folder)
    assert [fault for check in checks for fault in check.faults] == []
    content = json.loads((seen.folder / "report.json").read_text(encoding="utf-8"))
    assert "per client (whole site)" in content["headline"]
    assert "the coordinator sees un-noised updates" in content["headline"]
    assert any("does not hold against" in line for line in content["not_protected"])
    assert "against\neverybody but the coordinator" in page
    assert "Poisson sampling" not in page


def edited(seen: Seen, folder: Path, change: Callable[[dict[str, Any]], None]) -> list[str]:
    """Change round 2 of a copied run, mend its chain and seal, and verify it."""
    run = shutil.copytree(seen.folder, folder / "run", ignore=shutil.ignore_patterns("report.*"))
    records = RunFolder.open(run).records()
    (run / "rounds.jsonl").unlink()
    book = RunFolder(run)
    for record in records:
        if record["id"] == "round-2":
            change(record)
        book.append({key: value for key, value in record.items() if key != "hash"})
    book.seal()
    return [fault for check in verify(run) for fault in check.faults]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("clipping_norm", 0.1),
        ("noise_stddev", 0.01),
        ("asked", 27),
        ("next_clipping_norm", 3.0),
        ("unclipped", 0.9),
    ],
)
def test_verify_finds_a_changed_figure_of_the_mechanism(
    adaptive: Seen, tmp_path: Path, key: str, value: float
) -> None:
    faults = edited(adaptive, tmp_path, lambda record: record["mechanism"].update({key: value}))
    assert any("mechanism" in fault for fault in faults)


def test_verify_finds_weights_by_size_and_a_norm_that_tells_of_an_update(
    fixed: Seen, tmp_path: Path
) -> None:
    def tell(record: dict[str, Any]) -> None:
        site = record["aggregated"][0]
        record["weights"][site] = 40
        record["replies"][site]["update_norm"] = 0.25

    faults = edited(fixed, tmp_path, tell)
    assert any("weights" in fault for fault in faults)
    assert any("tells of an update" in fault for fault in faults)


# --- what may be trained ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "1.running_mean"),
        (nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)), "0.weight"),
    ],
)
def test_state_that_is_not_trained_is_refused_by_name(model: nn.Module, name: str) -> None:
    with pytest.raises(AccordError, match=f"{name} is not trained"):
        refuse_state(model)


def test_a_model_of_trained_weights_alone_is_not_refused() -> None:
    refuse_state(nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2)))
