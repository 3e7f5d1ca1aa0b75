"""`fedaccord plan`: what an accord costs, at 80 columns, before anything runs."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from fedaccord import accord as accords
from fedaccord import cli, cli_plan
from fedaccord.privacy import accounting, budget
from fedaccord.privacy.plan import plan_for

ACCORD = """
name = "tiny"
purpose = "Test."
task = {{ name = "heart" }}
sites = [{{ name = "cleveland", subjects = 200 }}, {{ name = "hungary", subjects = 200 }},
         {{ name = "va", subjects = {va} }}]
model = {{ name = "mlp", options = {{ hidden = 4 }} }}
rounds = {{ rounds = {rounds}, spare_rounds = 1, min_sites = 2 }}
training = {{ steps = 2, learning_rate = 0.1 }}
privacy = {{ {privacy}, delta = 1e-4, sampling_prob = 0.1 }}
fairness = {{ attributes = ["sex"] }}
distillation = {{ enabled = false }}
"""
PRIVATE = "noise_multiplier = 1.2, max_epsilon = 2.4"
CLIENT = 'unit = "client", clipping_norm = 1.0, noise_multiplier = 2.0'


@pytest.fixture
def planned(tmp_path, monkeypatch, capsys):
    """Run `fedaccord plan` on an accord in this process; exit code, output, errors."""

    def call(*words: str, privacy: str = PRIVATE, rounds: int = 4, va: int = 130):
        path = tmp_path / "tiny.toml"
        path.write_text(ACCORD.format(privacy=privacy, rounds=rounds, va=va), encoding="utf-8")
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr("sys.argv", ["fedaccord", "plan", str(path), *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (end.value.code or 0, *capsys.readouterr())

    return call


def plans(tmp_path: Path):
    agreed = accords.load(tmp_path / "tiny.toml")
    return [plan_for(agreed, site) for site in agreed.roster]


def cells(out: str, label: str) -> list[str]:
    line = next(line for line in out.splitlines() if line.strip().startswith(label))
    return line.split(label, 1)[1].split()


def flat(out: str) -> str:
    return " ".join(out.split())


def test_each_quantity_is_that_of_the_sites_plan(planned, tmp_path):
    code, out, err = planned()
    first, _, last = plans(tmp_path)
    assert (code, err) == (0, "")
    assert cells(out, "declared subjects") == ["200", "130"]
    assert cells(out, "expected batch, q x subjects") == ["20", "13"]
    assert cells(out, "steps a round x rounds + spare") == ["2", "x", "4+1"] * 2
    assert cells(out, "noise multiplier sigma") == ["1.2", "1.2"]
    assert cells(out, "noise stddev on a step's sum") == [f"{first.noise_stddev:.4f}"] * 2
    for label, how in (
        ("add-or-remove-one, PLD: claim", {}),
        ("add-or-remove-one, RDP: check", {"accountant": "RDP"}),
        ("replace-one, PLD", {"relation": "replace-one"}),
    ):
        right = accounting.show(accounting.epsilon(last.event(), 1e-4, **how))
        assert cells(out, label) == [right, right]
    assert f"at each site: {first.statement()}." in flat(out)


def test_a_subject_at_two_sites_loses_what_both_plans_compose_to(planned, tmp_path):
    _, out, _ = planned()
    event = plans(tmp_path)[0].event()
    both = accounting.show(accounting.epsilon(accounting.compose([event, event]), 1e-4))
    assert f"epsilon {both} (PLD) for a subject at the two costliest sites" in flat(out)


def test_under_client_level_privacy_one_noise_covers_both_sites_of_a_subject(planned, tmp_path):
    code, out, _ = planned(privacy=CLIENT)
    # The sum moves by twice the norm under the same noise: as a Gaussian of half the multiplier,
    # which is more than two independent ones composed.
    gaussian = {"type": "Gaussian", "noise_multiplier": 1.0}
    event = {"type": "SelfComposed", "count": 5, "event": gaussian}
    assert code == 0
    assert f"epsilon {accounting.show(accounting.epsilon(event, 1e-4))} (PLD) for a" in flat(out)
    two = accounting.compose([plans(tmp_path)[0].event()] * 2)
    assert accounting.epsilon(event, 1e-4) > 1.2 * accounting.epsilon(two, 1e-4)
    assert cells(out, "update bound (clipping_norm)") == ["1"]


def test_every_try_is_paid_for_and_a_cap_that_they_pass_is_named(planned, tmp_path):
    _, out, _ = planned("--tries", "3")
    event = plans(tmp_path)[0].event()
    thrice = accounting.epsilon(accounting.compose([event] * 3), 1e-4)
    later = budget.spent([event], [event] * 2, budget.Cap(2.4, 1e-4))
    assert f"epsilon {accounting.show(thrice)} (PLD) where all are reserved" in flat(out)
    assert f"{accounting.show(later)} where later ones" in flat(out)
    assert (thrice > 2.4) == ("Both are above privacy.max_epsilon = 2.4" in flat(out))
    assert "max_epsilon" not in flat(planned()[1])


@pytest.mark.parametrize(("va", "small"), [(130, False), (2, True)])
def test_a_site_that_is_too_small_to_learn_anything_is_named_with_the_ratio(planned, va, small):
    code, out, _ = planned(va=va, rounds=100)
    # sigma * C * (1 + slack) * sqrt(weights) / (q * subjects * C) / sqrt(planned steps)
    ratio = 1.2 * (1 + 1e-4) * math.sqrt(154) / (0.1 * va) / math.sqrt(200)
    assert code == 0
    assert cells(out, "noise / gradient over all steps")[1] == f"{ratio:.2f}"
    assert (ratio > 1) == small == (f"va ({ratio:.2f}): alone nothing can be learned" in flat(out))


def test_spent_so_far_is_the_odometers(planned, tmp_path):
    _, out, _ = planned()
    plan = plans(tmp_path)[0]
    said = [accounting.show(plan.odometer(used)) for used in (1, 3, 5)]
    words = f"epsilon {said[0]} after round 1, {said[1]} after 3, {said[2]} after all 5."
    assert words in flat(out)
    assert "delta / 5 a round" in flat(out)


def test_privacy_off_is_said_and_no_figure_is_given(planned):
    code, out, _ = planned(privacy="enabled = false")
    assert code == 0
    assert "NOT PRIVATE" in out
    assert not re.search(r"epsilon \d|PLD", out)


@pytest.mark.parametrize(
    ("words", "how", "fault"),
    [
        (("--tries", "0"), {}, "--tries = 0 must be 1 to 10000"),
        ((), {"privacy": "noise_multiplier = 0.3", "rounds": 100_000}, "above 300"),
        ((), {"va": 0}, "sites"),
    ],
)
def test_a_wrong_wish_is_one_line_and_exit_code_2(planned, words, how, fault):
    code, _, err = planned(*words, **how)
    assert code == 2
    assert fault in err
    assert err.count("\n") == 1


def test_it_fits_80_columns(planned):
    for line in planned("--tries", "2")[1].splitlines():
        assert len(line.rstrip()) <= 80


def test_sites_that_differ_in_name_alone_share_a_column():
    agreed = accords.load("heart")
    columns = cli_plan.grouped([plan_for(agreed, site) for site in agreed.roster])
    assert list(columns) == ["cleveland, hungary", "switzerland", "va"]
