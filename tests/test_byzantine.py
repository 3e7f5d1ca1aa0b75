"""The Byzantine benchmark: attacks stay inside the gates, and the federation is what it says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import byzantine, byzantine_sites
from benchmarks.byzantine_attacks import ATTACKS, BOUND, REACH
from fedaccord.accord import StrategySection
from fedaccord.client.train import SeededSource, train_plain
from fedaccord.strategies.updates import flat


@given(
    st.sampled_from(sorted(ATTACKS)),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 1e-300, 1e-3, 1.0, 1e6, 1e150]),
)
def test_an_attack_passes_every_gate_whatever_honest_sites_send(
    name: str, honest: int, f: int, seed: int, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    sent = ATTACKS[name](scale * rng.standard_normal((honest, 7)), f, rng)
    assert sent.shape == (f, 7)
    assert np.isfinite(sent).all()
    assert (np.linalg.norm(sent.astype(np.float32), axis=1) <= BOUND).all()


def test_the_bound_of_the_attacks_is_the_accords_default() -> None:
    assert StrategySection().max_update_norm == BOUND > REACH


def test_attacks_do_to_three_known_updates_what_their_papers_say() -> None:
    honest = np.array([[0.0, 3.0], [2.0, 3.0], [4.0, 3.0]])
    rng = np.random.default_rng(0)
    spread = np.sqrt(8 / 3)
    found = {name: attack(honest, 2, rng) for name, attack in ATTACKS.items()}
    assert np.allclose(found["ALIE"], [[2 - 1.5 * spread, 3.0]] * 2)
    assert np.allclose(found["IPM x 0.5"], [[-1.0, -1.5]] * 2)
    assert np.allclose(found["IPM x 3"], [[-6.0, -9.0]] * 2)
    assert np.allclose(found["IPM far"], [np.array([-2.0, -3.0]) * REACH / np.sqrt(13)] * 2)
    assert np.array_equal(found["mimic"], honest[[0, 0]])
    lengths = np.linalg.norm(honest, axis=1)
    for row in found["sign flip"] / -REACH:
        assert np.isclose(honest / lengths[:, None] @ row, 1).any()
    assert np.allclose(np.linalg.norm(found["random"], axis=1), REACH)


def test_every_record_is_at_one_of_eleven_sites_whose_labels_are_skewed() -> None:
    of = byzantine_sites.federation(0, rounds=1, steps=1, rate=1.0)
    assert len(of.sites) == 11 and sum(map(len, of.sites)) == 1437
    assert len(np.unique(np.concatenate([site.subjects for site in of.sites]))) == 1437
    top = [np.bincount(site.labels).max() / len(site) for site in of.sites]
    assert np.mean(top) > 0.3  # a tenth without skew
    assert min(map(len, of.sites)) >= byzantine_sites.MIN_SIZE


def test_sites_trained_at_once_are_sites_trained_by_the_clients_own_code() -> None:
    of = byzantine_sites.federation(1, rounds=1, steps=3, rate=0.7)
    model = byzantine_sites.read(of.model())
    found = byzantine_sites.PlainSites(list(of.sites[:3]), of.training).updates(model)
    module = of.model()
    for row, records in zip(found, of.sites[:3], strict=True):
        byzantine_sites.write(module, model)
        train_plain(module, records, 1.0, len(records), of.training, SeededSource(0))
        alone = flat(byzantine_sites.read(module)) - flat(model)
        assert np.abs(alone).max() > 0.01
        assert np.abs(row - alone).max() < 1e-5


@pytest.mark.slow
def test_private_sites_plan_the_epsilon_asked_for_over_all_rounds() -> None:
    of = byzantine_sites.federation(0, rounds=2, steps=2, rate=0.5, epsilon=3.0)
    sites = byzantine_sites.PrivateSites(list(of.sites[:2]), of)
    for plan in sites.plans:
        assert 2.9 < plan.epsilon() <= 3.0 and plan.rounds * plan.steps == 4
    model = byzantine_sites.read(of.model())
    first, second = sites.updates(model), sites.updates(model)
    assert (first != second).all()  # noise is the system's, and never seeded


def test_hostile_sites_change_what_fedavg_makes_and_label_flips_do_too() -> None:
    of = byzantine_sites.federation(0, rounds=2, steps=2, rate=1.0)
    none = byzantine.accuracy(of, "fedavg", byzantine.NONE)
    assert none == byzantine.accuracy(of, "fedavg", byzantine.NONE)
    for attack in ("IPM far", byzantine.LABELS):
        assert byzantine.accuracy(of, "fedavg", attack) != none


def test_an_attack_that_a_gate_would_drop_stops_the_benchmark() -> None:
    with pytest.raises(SystemExit, match="an attack that the gates would drop"):
        byzantine.lies(
            lambda honest, f, rng: np.full((f, 3), np.nan), np.ones((9, 3)), np.random.default_rng()
        )


@pytest.mark.slow
def test_centred_clipping_stays_within_3_points_where_fedavg_falls_by_30() -> None:
    of = byzantine_sites.federation(0, rounds=120, steps=5, rate=1.4)
    clean = byzantine.accuracy(of, "fedavg", byzantine.NONE, clean=True)
    assert clean > 90
    assert byzantine.accuracy(of, "fedavg", "IPM far") < clean - 30
    for attack in (byzantine.NONE, "ALIE", "IPM x 3", "IPM far", "sign flip"):
        assert byzantine.accuracy(of, "centred-clipping", attack) >= clean - 3, attack
