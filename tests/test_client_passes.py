"""A pass over records leaves nothing but gradients, whatever a model writes or how it raises."""

import copy

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from safetensors import torch as safetensors
from torch import nn
from wards import Silent, Watched

from fedaccord import accord as accords
from fedaccord.accord import TrainingSection
from fedaccord.client import app, policy, train
from fedaccord.client.site import Site
from fedaccord.evidence import canonical_json
from fedaccord.keys import create
from fedaccord.privacy import engines
from fedaccord.privacy.chain import Head, stamp
from fedaccord.privacy.ledger import Ledger
from fedaccord.privacy.probe import probe
from fedaccord.simulations.engine import InProcessGrid
from fedaccord.simulations.heart import Heart
from fedaccord.tasks import Records

torch.set_num_threads(1)
ENGINES = ("hooks", "ghost")


def plan(steps=1):
    return Watched("ward", 40, 1, steps, 1.0, 1.0, 1.0, 1e-5)


def probed(model, engine, inputs):
    """Hold a model to all that a site asks of it before it trains."""
    train.refuse_unsafe(model)
    labels = torch.arange(len(inputs)) % 2
    probe(model, engine, "float64", engines.cross_entropy, inputs, labels, plan())
    train.refuse_weights(model)


class Words(nn.Module):
    """A model whose forward pass writes its weights: too long rows that it looks up get shorter."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(100, 8, max_norm=50.0)
        self.out = nn.Linear(24, 2)

    def forward(self, x):
        return self.out(self.rows(x.long().clamp(0, 99)).flatten(1))


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_forward_pass_writes_into_the_weights_does_not_leave_the_site(engine):
    model = Words()
    with torch.no_grad():
        model.rows.weight.fill_(60.0)  # as a coordinator may send them: of norm 170
    probed(model, engine, torch.arange(180).reshape(60, 3).float() % 100)
    with torch.no_grad():
        model.rows.weight.fill_(60.0)
    words = np.full((1, 3), 7, np.float32)
    data = Records(words, np.zeros(1, np.int64), np.arange(1), {})
    train.train_private(
        model, data, plan(), TrainingSection(steps=1, learning_rate=1e-4), how=train.How(engine)
    )
    norms = torch.linalg.vector_norm(model.rows.weight.detach(), dim=1)
    assert norms.min() > 160  # one at 50 would say, without noise, that the word was there


class Halfway(nn.Module):
    """A model that leaves something behind if a record makes it raise halfway."""

    def __init__(self, how):
        super().__init__()
        self.how, self.first, self.last = how, nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        if self.how == "evaluation mode":
            self.eval()
        elif self.how == "no gradients":
            torch.set_grad_enabled(False)
        elif self.how == "frozen":
            self.first.weight.requires_grad_(False)
        else:
            kept, self.first = self.first, nn.Identity()
        if x.abs().max() > 1e6:
            raise ValueError("strange")
        self.train()
        torch.set_grad_enabled(True)
        if self.how == "taken apart":
            self.first = kept
        self.first.weight.requires_grad_(True)
        return self.last(torch.tanh(self.first(x)))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", ["evaluation mode", "no gradients", "frozen", "taken apart"])
def test_a_record_that_makes_a_model_raise_halfway_silences_nobody_else(how, engine):
    inputs = np.random.default_rng(0).uniform(-1, 1, (30, 4)).astype(np.float32)
    inputs[29] = 1e9
    model = Halfway(how)
    probed(model, engine, torch.rand(60, 4) * 2 - 1)
    sums = []
    for size in (29, 30):
        agreed = plan(steps=3)
        data = Records(inputs[:size], np.arange(size) % 2, np.arange(size), {})
        rate = TrainingSection(steps=3, learning_rate=0.1)
        before = torch.is_grad_enabled()
        train.train_private(copy.deepcopy(model), data, agreed, rate, Silent, train.How(engine))
        assert torch.is_grad_enabled() == before
        sums.append(np.array(agreed.totals))
    assert np.linalg.norm(sums[0], axis=1).min() > 1
    np.testing.assert_allclose(sums[1], sums[0], rtol=0, atol=1e-9)


def small():
    """An accord of two sites of the heart task."""
    return accords.parse(
        {
            "name": "small",
            "purpose": "made for tests",
            "task": {"name": "heart"},
            "sites": [{"name": name, "subjects": 200} for name in ("cleveland", "va")],
            "model": {"name": "cnn1d"},
            "rounds": {"rounds": 2},
            "training": {"steps": 1, "learning_rate": 0.1},
            "privacy": {"noise_multiplier": 3.0, "sampling_prob": 0.1, "max_epsilon": 5.0},
            "fairness": {"attributes": ["sex"]},
        }
    )


@pytest.fixture
def site(tmp_path):
    folder, agreed = tmp_path / "cleveland", small()
    ledger = Ledger(folder / "ledger.sqlite", "cleveland")
    yield Site("cleveland", agreed, Heart(), folder, policy.of_site(folder, agreed), ledger)
    ledger.close()


def test_tied_weights_are_trained_and_released_like_others(site):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            width = len(Heart.spec.features)
            self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
            self.second.weight = self.first.weight
            self.out = nn.Linear(width, 2)

        def forward(self, x):
            return self.out(self.second(torch.tanh(self.first(x))))

    model = Tied()
    train.refuse_unsafe(model)
    site.ledger.reserve("a", site.plan, 2, site.terms)
    payload = app.train_and_record(site, model, "a", 1)
    released = safetensors.load(payload)
    assert released["arrays/first.weight"].any()
    assert torch.equal(released["arrays/first.weight"], released["arrays/second.weight"])
    assert site.ledger.entries()[-1]["kind"] == "RELEASE"


def test_heads_that_somebody_makes_up_do_not_fill_a_ledger(site, tmp_path):
    InProcessGrid(app.app, 1, {})  # Flower's messages need a run to belong to

    def made_up(name, number):
        key = create(tmp_path / f"{name}-{number}.key")
        return Head(name, key.public, 1, "0" * 64, key.sign(stamp(name, 1, "0" * 64)))

    heads = [made_up(name, n) for n in range(100) for name in ("elsewhere", "cleveland", "va")]
    shown = canonical_json([head.to_json() for head in heads])
    asked = {"run": "a", "accord": site.accord.digest, "heads": shown}
    message = Message(RecordDict({"config": ConfigRecord(asked)}), 1, "query.reserve")
    reply = app.reserve.__wrapped__(site, message)
    assert "refused" not in reply.config_records["config"]
    kept = site.ledger.entries()[-1]["seen"]
    assert {head["site"] for head in kept} == {"va"}  # a peer; of "cleveland" it knows its own keys
    assert len(kept) == app.MOST_HEADS


def test_another_accord_with_the_same_plan_cannot_train_on_a_runs_reservation(site):
    InProcessGrid(app.app, 1, {})
    site.ledger.reserve("a", site.plan, 2, site.terms)
    other = small().model_copy(update={"purpose": "another"})
    policy_file = site.folder / "policy.toml"
    policy_file.unlink()
    taken = Site(
        "cleveland", other, Heart(), site.folder, policy.of_site(site.folder, other), site.ledger
    )
    assert taken.plan == site.plan
    state = safetensors.load(safetensors.save(taken_model(taken).state_dict()))
    asked = ConfigRecord({"run": "a", "accord": other.digest, "server-round": 1})
    content = RecordDict({"config": asked, "arrays": ArrayRecord(torch_state_dict=state)})
    with pytest.raises(app.BudgetError, match="has reserved run a for accord"):
        app.train_round.__wrapped__(taken, Message(content, 1, "train"))
    with pytest.raises(app.BudgetError, match="has no reservation for run a"):
        app.evaluate.__wrapped__(taken, Message(content, 1, "evaluate"))
    assert [e["kind"] for e in site.ledger.entries()] == ["KEY", "RESERVE"]
    first = app.train_and_record(site, taken_model(site), "a", 1)
    assert app.stored_release(site, "a", 1) == first
    with pytest.raises(app.BudgetError, match="has reserved run a for accord"):  # nor read a round
        app.train_round.__wrapped__(taken, Message(content, 1, "train"))


def taken_model(site):
    from fedaccord.models.build import build

    return build("cnn1d", site.task.spec, {}, 0)
