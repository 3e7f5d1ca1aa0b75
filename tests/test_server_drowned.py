"""A bound on updates that noise alone would pass is refused before anybody reserves."""

from __future__ import annotations

import pytest
import torch
from wards import SPEC, flat, plan, small_accord

from fedaccord import accord as accords
from fedaccord.accord import TrainingSection
from fedaccord.client.passes import How
from fedaccord.client.train import train_private
from fedaccord.errors import AccordError
from fedaccord.models.build import build
from fedaccord.server.drowned import noise_norm, refuse_drowned


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_the_expected_norm_is_that_of_updates_made_of_noise_alone(momentum: float) -> None:
    training = TrainingSection(steps=7, learning_rate=0.3, momentum=momentum)
    model = build("mlp", SPEC, {"hidden": 200}, 0).double()
    before = flat(model)
    noisy = plan(steps=7, sampling_prob=0.5, noise_multiplier=2.0)
    train_private(model, None, noisy, training, how=How(engine="hooks"))
    norm = float(torch.linalg.vector_norm(flat(model) - before))
    # 3,402 coordinates: the norm's relative deviation is 1 / sqrt(2 x 3402) = 0.012.
    assert norm == pytest.approx(noise_norm(noisy, training, before.numel()), rel=0.07)


def test_an_accord_whose_noise_passes_its_bound_is_refused_with_the_norm_to_set() -> None:
    data = small_accord()
    data["sites"] = [{"name": "cleveland", "subjects": 200}, {"name": "va", "subjects": 10}]
    data["strategy"] = {"max_update_norm": 10.0}
    refuse_drowned(accords.parse(data), 10)
    with pytest.raises(AccordError) as fault:
        refuse_drowned(accords.parse(data), 10_000)
    # 3.0 x 1.0 / (0.1 x 10) x 0.5 x sqrt(2 steps x 10,000 weights), with 1.2e-6 of slack
    assert str(fault.value).startswith(
        "strategy.max_update_norm = 10 is below 212, the norm that noise alone gives an update of "
        "site va: all of them would be dropped"
    )
    assert "Set it to 4.2e+02 or more" in str(fault.value)
    for change in ({"enabled": False}, {"noise_multiplier": 0.3}):
        quiet = data | {"privacy": data["privacy"] | change}
        refuse_drowned(accords.parse(quiet), 100)


@pytest.mark.parametrize("name", sorted(accords.bundled()))
def test_no_bundled_accord_drowns_a_site(name: str) -> None:
    refuse_drowned(accords.load(name), 20_000)  # more weights than any of them trains
