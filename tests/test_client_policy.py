"""A site's policy: its own cap wins, and what is not valid is one line."""

import pytest

from fedaccord import accord as accords
from fedaccord.client import policy
from fedaccord.errors import AccordError, BudgetError


def agreed(**privacy):
    """A small accord with some keys of [privacy] changed."""
    declared = {"noise_multiplier": 3.0, "sampling_prob": 0.1, "delta": 1e-5, "max_epsilon": 2.0}
    return accords.parse(
        {
            "name": "small",
            "purpose": "to be tested",
            "task": {"name": "heart"},
            "sites": [{"name": "cleveland", "subjects": 200}],
            "model": {"name": "cnn1d"},
            "rounds": {"rounds": 3},
            "training": {"steps": 2, "learning_rate": 0.5},
            "privacy": declared | privacy,
            "fairness": {"attributes": ["sex"]},
        }
    )


def test_the_sites_own_cap_wins_over_every_later_accords(tmp_path):
    assert policy.of_site(tmp_path, agreed()).cap.epsilon == 2.0
    assert policy.of_site(tmp_path, agreed(max_epsilon=50.0)).cap.epsilon == 2.0
    (tmp_path / "policy.toml").write_text("max_epsilon = 0.5\ndelta = 1e-6\n")
    own = policy.of_site(tmp_path, agreed(max_epsilon=50.0))
    assert (own.cap.epsilon, own.cap.delta) == (0.5, 1e-6)
    with pytest.raises(BudgetError, match=r"privacy\.delta = 1e-05 is above 1e-06"):
        own.check(agreed(), "cleveland")


def test_an_accord_without_privacy_is_refused_at_a_site_with_a_cap(tmp_path):
    plain = agreed(enabled=False, noise_multiplier=None)
    (tmp_path / "policy.toml").write_text("max_epsilon = 3.0\ndelta = 1e-5\n")
    with pytest.raises(BudgetError, match=r"epsilon infinite .* site cleveland has a cap of 3\.00"):
        policy.of_site(tmp_path, plain).check(plain, "cleveland")
    (tmp_path / "policy.toml").write_text("max_epsilon = inf\ndelta = 1e-5\n")
    policy.of_site(tmp_path, plain).check(plain, "cleveland")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"max_epsilon = -1\ndelta = 1e-5", "max_epsilon = -1: Input should be greater than 0"),
        (b"max_epsilon = nan\ndelta = 1e-5", "max_epsilon = nan: Input should be greater than 0"),
        (b"max_epsilon = 3\ndelta = 0.5", "delta = 0.5: Input should be less than 0.1"),
        (b"max_epsilon = 3", "delta = .*: Field required"),
        (b"max_epsilon = 3\ndelta = 1e-5\ncap = 9", "cap = 9: Extra inputs are not permitted"),
        (b"max_epsilon: 3", "line 1"),
        (b"\xff\xfe", "codec can't decode"),
    ],
)
def test_a_policy_that_is_not_valid_is_one_line_that_names_the_fault(tmp_path, text, says):
    (tmp_path / "policy.toml").write_bytes(text)
    with pytest.raises(AccordError, match=says) as fault:
        policy.of_site(tmp_path, agreed())
    assert "\n" not in str(fault.value)
    assert "http" not in str(fault.value)
    assert str(fault.value).startswith(str(tmp_path / "policy.toml"))
    assert str(fault.value).endswith("Mend it; nothing was released.")
