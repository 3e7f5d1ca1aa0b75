"""A site's round: INTENT, records, RELEASE, in that order, whatever crashes or is asked twice."""

import dataclasses
import json
import math
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, contextmanager

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from wards import Silent

from fedaccord import accord as accords
from fedaccord.client import app, policy
from fedaccord.client.site import Site
from fedaccord.errors import BudgetError, LedgerError
from fedaccord.models.build import build
from fedaccord.privacy.ledger import Cap, Ledger, spent
from fedaccord.simulations.engine import InProcessGrid
from fedaccord.simulations.heart import Heart
from fedaccord.tasks import Records, SiteData

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
torch.set_num_threads(1)  # as a site does for a small model

DECLARED = {
    "name": "small",
    "purpose": "to be tested",
    "task": {"name": "heart"},
    "sites": [{"name": "cleveland", "subjects": 200}],
    "model": {"name": "cnn1d"},
    "rounds": {"rounds": 3},
    "training": {"steps": 2, "learning_rate": 0.5},
    "privacy": {
        "noise_multiplier": 3.0,
        "sampling_prob": 0.1,
        "delta": 1e-5,
        "max_epsilon": 2.0,
    },
    "fairness": {"attributes": ["sex"]},
}
WIDTH = len(Heart.spec.features)


def agreed(**sections):
    """The small accord with some sections changed."""
    return accords.parse(
        {k: v | sections.get(k, {}) if isinstance(v, dict) else v for k, v in DECLARED.items()}
    )


class Ward:
    """A task whose training records are given, or raise; it notes what each reading found."""

    spec, sites = Heart.spec, ("cleveland",)

    def __init__(self, train, ledger=None):
        self.train, self.ledger, self.readings = train, ledger, []

    def site(self, name):
        if self.ledger:
            with closing(sqlite3.connect(self.ledger)) as raw:
                bodies = raw.execute("SELECT body FROM entries ORDER BY seq").fetchall()
            self.readings.append([json.loads(body)["kind"] for (body,) in bodies])
        if isinstance(self.train, Exception):
            raise self.train
        return SiteData(train=self.train, test=self.train)

    def public(self, rows, seed):
        return Heart().public(rows, seed)


def some(n=30, seed=0):
    rng = np.random.default_rng(seed)
    inputs = rng.uniform(-1, 1, (n, WIDTH)).astype(np.float32)
    groups = {"sex": rng.integers(0, 2, n)}
    return Records(inputs, rng.integers(0, 2, n), np.arange(n), groups)


def open_site(folder, train, accord=None):
    accord = accord or agreed()
    file = folder / "cleveland" / "ledger.sqlite"
    return Site(
        name="cleveland",
        accord=accord,
        task=Ward(train, file),
        folder=folder / "cleveland",
        policy=policy.of_site(folder / "cleveland", accord),
        ledger=Ledger(file, "cleveland"),
    )


def reserve(site, run="a"):
    return site.ledger.reserve(run, site.plan, 3, site.terms)


def fresh(site):
    return build("cnn1d", site.task.spec, {}, 0)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def kinds(site):
    """What the ledger has after its key."""
    return [entry["kind"] for entry in site.ledger.entries()][1:]


def message(kind="train", run="a", number=1, scale=1.0):
    """A training message as a coordinator sends it, with the initial weights times a number."""
    InProcessGrid(app.app, 1, {})  # Flower's messages need a run to belong to
    model = build("cnn1d", Heart.spec, {}, 0)
    state = {name: value * scale for name, value in model.state_dict().items()}
    config = ConfigRecord({"run": run, "accord": agreed().digest, "server-round": number})
    return Message(RecordDict({"config": config, "arrays": ArrayRecord(state)}), 1, kind)


def ask(site, **about):
    """Give a site's train handler a message; the reply's content."""
    return app.train_round.__wrapped__(site, message(**about))


def arrays(reply):
    return {name: array.data for name, array in reply.array_records["arrays"].items()}


def test_intent_is_durable_before_any_record_is_read_and_release_comes_last(tmp_path):
    site = open_site(tmp_path, some())
    reserve(site)
    assert site.task.readings == []
    ask(site)
    assert site.task.readings == [["KEY", "RESERVE", "INTENT"]]
    assert kinds(site) == ["RESERVE", "INTENT", "RELEASE"]
    _, held, _, release = site.ledger.entries()
    assert release["plan_digest"] == site.plan.digest == held["plan_digest"]
    assert release["covers"] == "the reserved plan"


def test_a_site_without_a_slot_reads_nothing(tmp_path):
    site = open_site(tmp_path, some())
    with pytest.raises(BudgetError, match="no slot left of 0"):
        ask(site)
    assert site.task.readings == []


@pytest.mark.parametrize(
    "change",
    [
        {"privacy": {"noise_multiplier": 0.3}},
        {"privacy": {"sampling_prob": 1.0}},
        {"training": {"steps": 2_000}},
        {"rounds": {"rounds": 300}},
        {"privacy": {"enabled": False, "noise_multiplier": None}},
    ],
    ids=["less noise", "larger q", "more steps", "more rounds", "no privacy"],
)
def test_a_run_that_was_reserved_under_one_plan_cannot_train_under_another(
    tmp_path, change, set_policy
):
    reserve(open_site(tmp_path, some()))
    other = agreed(**change)
    set_policy(tmp_path / "cleveland", other, max_epsilon=math.inf)
    site = open_site(tmp_path, some(), other)
    with pytest.raises(BudgetError, match="has reserved plan"):
        ask(site)
    with pytest.raises(BudgetError, match="has reserved plan"):
        reserve(site)
    assert site.task.readings == []
    assert kinds(site) == ["RESERVE"]


def test_a_round_asked_again_sends_the_same_bytes_whatever_came_with_the_request(tmp_path):
    site = open_site(tmp_path, some())
    reserve(site)
    first = ask(site)
    again = ask(site, scale=17.0)
    assert arrays(first) == arrays(again)
    assert kinds(site) == ["RESERVE", "INTENT", "RELEASE"]
    assert len(site.task.readings) == 1


@pytest.mark.parametrize("how", ["altered", "lost"])
def test_a_release_whose_stored_bytes_are_gone_is_never_made_again(tmp_path, how):
    site = open_site(tmp_path, some())
    reserve(site)
    ask(site)
    (stored,) = (site.folder / "releases").iterdir()
    if how == "lost":
        stored.unlink()
    else:
        payload = bytearray(stored.read_bytes())
        payload[-1] ^= 1
        stored.write_bytes(payload)
    with pytest.raises(BudgetError, match="its stored bytes are lost"):
        ask(site)
    assert len(site.task.readings) == 1


def poisoned(row, **change):
    """Some records with one that is broken."""
    data = some()
    for name, value in change.items():
        getattr(data, name)[row] = value
    return data


BROKEN = {
    "a label that does not exist": poisoned(3, labels=99),
    "not a number": poisoned(3, inputs=np.nan),
    "infinite": poisoned(3, inputs=np.inf),
    "unreadable": OSError("disk of patient 7"),
    "nobody": some(0),
    "one patient fewer": some(29),
    "other patients": some(30, seed=1),
    "subjects that are none": dataclasses.replace(some(), subjects=np.zeros((30, 2), np.int64)),
}


def say_everything(folder, train):
    """All that leaves a site in two rounds, but for the arrays, and all that its ledger holds."""
    site = open_site(folder, train)
    reserve(site)
    out = []
    for number in (1, 2):
        app.train_and_record(site, fresh(site), "a", number, (), Silent)
        reply = ask(site, number=number)
        said = dict(reply.config_records["config"])
        del said["head"]  # a signed hash of the noised bytes and of times
        out.append(said)
        out.append(
            {k: (a.shape, a.dtype, len(a.data)) for k, a in reply.array_records["arrays"].items()}
        )
    changing = ("hash", "signature", "public_key", "time", "sha256")
    out += [{k: v for k, v in e.items() if k not in changing} for e in site.ledger.entries()]
    return out, weights_of(reply)


def weights_of(reply):
    return b"".join(arrays(reply).values())


def test_nothing_but_the_noised_arrays_depends_on_the_records(tmp_path):
    said, sent = say_everything(tmp_path / "as it is", some())
    different = 0
    for name, train in BROKEN.items():
        other, bytes_ = say_everything(tmp_path / name, train)
        assert other == said, name
        different += bytes_ != sent
    assert different == len(BROKEN)  # the records did reach the arrays
    assert len(said) == 4 + 6


def test_unreadable_records_make_a_round_of_noise_alone(tmp_path, caplog):
    site = open_site(tmp_path, OSError("disk of patient 7"))
    reserve(site)
    reply = ask(site)
    assert kinds(site) == ["RESERVE", "INTENT", "RELEASE"]
    assert "patient" not in str(reply)
    sent = reply.array_records["arrays"].to_torch_state_dict()
    assert {tensor.dtype for tensor in sent.values()} == {torch.float32}
    assert sent.keys() == fresh(site).state_dict().keys()
    moved = [value.flatten() for value in sent.values()]
    # two steps of noise 3.0 over the declared 20, at a learning rate of 0.5
    assert torch.cat(moved).std().item() == pytest.approx(0.5 * 2**0.5 * 3.0 / 20, rel=0.2)


CHILD = """
import importlib.util, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, os.path.dirname(sys.argv[1]))  # for wards.py
spec = importlib.util.spec_from_file_location("rounds_of_a_site", sys.argv[1])
these = importlib.util.module_from_spec(spec)
spec.loader.exec_module(these)
folder, how = Path(sys.argv[2]), sys.argv[3]


class Deadly(these.Silent):
    steps = 0

    def normal(self, count):
        Deadly.steps += 1
        if how == "in a step" and Deadly.steps == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        while how == "before RELEASE" and not (folder / "go").exists():
            time.sleep(0.01)
        return super().normal(count)


site = these.open_site(folder, these.some())
these.reserve(site)
print("reserved", flush=True)
these.app.train_and_record(site, these.fresh(site), "a", 1, (), Deadly)
print("not killed", flush=True)
"""


def start_child(folder, how):
    command = [sys.executable, "-c", CHILD, __file__, str(folder), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def check_after_the_kill(folder, child):
    """The reopened ledger has used the slot and spent the plan; the round is refused."""
    assert child.wait(timeout=60) == -signal.SIGKILL
    assert "not killed" not in child.stdout.read()
    site = open_site(folder, some())
    assert kinds(site) == ["RESERVE", "INTENT"]
    before = spent(site.ledger.entries(), Cap(9.0, 1e-5))
    assert before == pytest.approx(site.plan.epsilon(), rel=1e-3)
    with pytest.raises(BudgetError, match="already used its slot for round 1 of run a"):
        ask(site)
    assert site.task.readings == []
    ask(site, number=2)
    ask(site, number=3)
    with pytest.raises(BudgetError, match="no slot left of 3"):
        ask(site, number=4)
    assert spent(site.ledger.entries(), Cap(9.0, 1e-5)) == before


def test_kill_9_in_a_step_uses_the_slot(tmp_path):
    check_after_the_kill(tmp_path, start_child(tmp_path, "in a step"))


def test_kill_9_between_storing_and_releasing_uses_the_slot(tmp_path):
    child = start_child(tmp_path, "before RELEASE")
    assert child.stdout.readline() == "reserved\n"
    file = tmp_path / "cleveland" / "ledger.sqlite"
    with closing(sqlite3.connect(file, isolation_level=None, timeout=60)) as raw:
        while raw.execute("SELECT count(*) FROM entries").fetchone() != (3,):
            time.sleep(0.01)
        raw.execute("BEGIN IMMEDIATE")  # now the child cannot write its RELEASE
        (tmp_path / "go").touch()
        stored = tmp_path / "cleveland" / "releases" / "a-00001.safetensors"
        while not stored.exists():
            assert child.poll() is None
            time.sleep(0.01)
        child.kill()
        child.wait()
        raw.execute("ROLLBACK")
    check_after_the_kill(tmp_path, child)


@contextmanager
def full_disk():
    """No file of this process may grow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_where_the_intent_cannot_be_written_nothing_is_read_or_trained(tmp_path):
    site = open_site(tmp_path, some())
    reserve(site)
    model = fresh(site)
    before = weights(model).clone()
    with full_disk(), pytest.raises(LedgerError, match="Nothing was released"):
        app.train_and_record(site, model, "a", 1)
    assert site.task.readings == []
    assert torch.equal(weights(model), before)
    assert kinds(site) == ["RESERVE"]
    assert not (site.folder / "releases").exists()


def test_two_plans_that_pass_the_cap_together_are_refused_before_anything_is_read(
    tmp_path, set_policy
):
    one = open_site(tmp_path, some()).plan.epsilon()
    set_policy(tmp_path / "cleveland", agreed(), max_epsilon=1.2 * one)
    site = open_site(tmp_path, some())
    reserve(site, "a")
    with pytest.raises(BudgetError) as refusal:
        reserve(site, "b")
    assert re.fullmatch(
        r"This plan needs epsilon \d+\.\d\d; site cleveland has \d+\.\d\d of \d+\.\d\d left at "
        r"delta 1e-05\. Plan fewer rounds, raise privacy\.noise_multiplier, or ask the site to "
        r"raise its cap\.",
        str(refusal.value),
    )
    with pytest.raises(BudgetError, match="no slot left of 0 reserved for run b"):
        ask(site, run="b")
    assert site.task.readings == []
