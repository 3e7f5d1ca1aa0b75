"""What a strategy adds to a site's gradients: after the noise, exactly, and within bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import nn
from wards import SPEC, Silent, Watched, flat, plan, some

from fedaccord.accord import TrainingSection
from fedaccord.client.passes import How
from fedaccord.client.pull import NOTHING, Pull, pull_of
from fedaccord.client.train import SeededSource, train_plain, train_private
from fedaccord.errors import AccordError
from fedaccord.models.build import build
from fedaccord.tasks import Records

TRAINING = TrainingSection(steps=3, learning_rate=0.25)


def model() -> nn.Module:
    return build("mlp", SPEC, {"hidden": 3}, 0)


def correction(of: nn.Module, size: float = 0.1) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(1)
    return {
        n: torch.from_numpy(rng.normal(0, size, tuple(p.shape))) for n, p in of.named_parameters()
    }


def released(pull: Pull) -> tuple[list[np.ndarray], torch.Tensor]:
    """The sums that a private round gave to the mechanism, and the model that came of it."""
    net, watched = model(), plan(steps=3)
    assert isinstance(watched, Watched)
    train_private(net, some(20), watched, TRAINING, Silent, How(engine="hooks"), pull)
    return watched.totals, flat(net)


def test_under_privacy_a_correction_is_added_to_each_released_mean_and_to_nothing_before_it() -> (
    None
):
    added = correction(model())
    plain, without = released(NOTHING)
    sums, moved = released(Pull(0.0, added))
    assert np.array_equal(plain[0], sums[0])  # the first step starts from the same weights
    step = torch.cat([added[n].flatten() for n, _ in model().named_parameters()])
    net, rate = flat(model()), TRAINING.learning_rate
    by_hand = net - rate * sum(torch.from_numpy(total) / 40 for total in sums) - 3 * rate * step
    assert torch.allclose(moved, by_hand, atol=1e-6)  # weights end as float32
    assert not torch.allclose(moved, without, atol=1e-3)


def test_a_pull_costs_no_sensitivity_whatever_it_is() -> None:
    """One subject more moves the first sum by the same with a pull as without."""
    every = some(21)
    for pull in (NOTHING, Pull(0.5, correction(model(), 30.0))):
        sums = []
        for n in (20, 21):
            watched = plan(steps=1)
            few = Records(every.inputs[:n], every.labels[:n], every.subjects[:n], {})
            train_private(model(), few, watched, TRAINING, Silent, How(engine="hooks"), pull)
            sums.append(watched.totals[0])
        assert 0.1 < np.linalg.norm(sums[1] - sums[0]) <= 1.0 + 1e-9


def test_a_proximal_term_pulls_to_the_weights_that_came() -> None:
    def distance(mu: float) -> float:
        net = model()
        start = flat(net)
        train_plain(net, some(40), 1.0, 40.0, TRAINING, SeededSource(0), Pull(mu, {}))
        return float((flat(net) - start).norm())

    far = [distance(mu) for mu in (0.0, 0.5, 2.0)]
    assert far[0] > far[1] > far[2] > 0


def test_the_gradient_of_the_proximal_term_is_that_of_half_the_squared_distance() -> None:
    net = model()
    started = Pull(0.7, {}).start(net)
    assert started is not None
    first = flat(net)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    started.add()
    grads = torch.cat([p.grad.flatten().double() for p in net.parameters() if p.grad is not None])
    assert torch.allclose(grads, 0.7 * (flat(net) - first), atol=1e-6)


def message(**content: ConfigRecord | ArrayRecord) -> RecordDict:
    return RecordDict({"config": ConfigRecord({}), **content})


def test_a_message_that_asks_for_nothing_adds_nothing() -> None:
    assert pull_of(message(), model(), TRAINING) == NOTHING
    assert NOTHING.start(model()) is None


@pytest.mark.parametrize("mu", [-0.1, 4.1, float("nan"), float("inf"), "1", [0.1], b"1"])
def test_a_proximal_term_that_would_run_away_is_refused(mu: object) -> None:
    asked = message(config=ConfigRecord({"proximal-mu": mu}))  # type: ignore[dict-item]
    with pytest.raises(AccordError, match=r"proximal-mu = .* must be from 0 to 1 / .* is 4\."):
        pull_of(asked, model(), TRAINING)
    assert pull_of(message(config=ConfigRecord({"proximal-mu": 4.0})), model(), TRAINING).mu == 4.0


@pytest.mark.parametrize("fault", ["name", "shape", "nan", "infinite", "huge", "whole numbers"])
def test_a_correction_that_does_not_fit_is_refused_by_name(fault: str) -> None:
    net = model()
    sent = correction(net)
    name = next(iter(sent))
    if fault == "name":
        sent["other"] = sent[name]
        name = "other"
    elif fault == "shape":
        sent[name] = sent[name][:1]
    elif fault == "whole numbers":
        sent[name] = torch.ones(sent[name].shape, dtype=torch.int64)
    else:
        sent[name] = sent[name].clone()
        sent[name].flatten()[0] = {"nan": np.nan, "infinite": -np.inf, "huge": 134.0}[fault]
    with pytest.raises(AccordError, match=rf"the correction of {name} is not .* above 133\.333"):
        pull_of(message(correction=ArrayRecord(sent)), net, TRAINING)


def test_a_correction_that_fits_is_taken_as_it_is() -> None:
    net = model()
    sent = correction(net)
    pull = pull_of(message(correction=ArrayRecord(sent)), net, TRAINING)
    assert pull.correction.keys() == sent.keys()
    assert all(torch.equal(pull.correction[name], sent[name]) for name in sent)


def test_a_correction_acts_in_a_step_that_draws_nobody_too() -> None:
    """SCAFFOLD divides an update by all of a round's steps, so all have to be corrected."""
    net = model()
    before, added = flat(net), correction(net)
    train_plain(net, some(5), 1e-9, 1.0, TRAINING, SeededSource(0), Pull(0.0, added))
    step = torch.cat([added[n].flatten() for n, _ in net.named_parameters()])
    assert torch.allclose(flat(net) - before, -3 * 0.25 * step, atol=1e-6)
