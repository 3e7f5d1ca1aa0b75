"""The average over rounds: an exponential moving average of released models."""

import numpy as np
import pytest

from fedaccord.server.averages import follow


def test_the_first_average_is_the_model_itself_and_a_copy():
    model = {"w": np.ones(3, np.float32)}
    first = follow(None, model, 0.9, 1)
    model["w"][:] = 7
    assert (first["w"] == 1).all()


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_it_is_the_weighted_sum_of_all_models(share):
    rng = np.random.default_rng(0)
    models = rng.standard_normal((30, 4))
    average, weights = None, np.zeros(30)
    for number, row in enumerate(models, start=1):
        average = follow(average, {"w": row}, share, number)
        stays = 0.0 if number == 1 else min(share, (1 + number) / (10 + number))
        weights = weights * stays
        weights[number - 1] = 1 - stays
    assert abs(weights.sum() - 1) < 1e-12
    assert np.allclose(average["w"], weights @ models, rtol=0, atol=1e-12)


def test_types_stay_and_whole_numbers_are_the_last_models():
    old = {"w": np.zeros(2, np.float32), "n": np.array([3])}
    new = follow(old, {"w": np.ones(2, np.float32), "n": np.array([5])}, 0.5, 100)
    assert new["w"].dtype == np.float32
    assert (new["w"] == 0.5).all()
    assert (new["n"] == 5).all()
