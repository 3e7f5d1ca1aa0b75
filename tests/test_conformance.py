"""The conformance suite: silent on the code as it is, and every planted fault caught by name."""

import contextlib
import math

import numpy as np
import pytest
from typer.testing import CliRunner

from fedaccord import cli
from fedaccord.client import app as client_app
from fedaccord.client import train
from fedaccord.conformance import plants, suite
from fedaccord.conformance.checks import BY_NAME, CHECKS
from fedaccord.conformance.data import clipped_sum_in_closed_form, crowd_of
from fedaccord.conformance.faults import FAULTS, Fault
from fedaccord.conformance.runs import laboratory
from fedaccord.conformance.site import planted, replayed, tapped
from fedaccord.privacy import audit, bookkeeping, hooks, noise
from fedaccord.privacy.plan import PrivacyPlan

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

NOISE = "fedaccord.privacy.noise:add_noise"


@pytest.fixture(scope="module")
def clean():
    """One lab for all checks of the code as it is."""
    with laboratory() as lab:
        yield lab


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_every_check_is_silent_on_the_code_as_it_is(check, clean):
    found = check.run(clean)
    assert not found.alarm, found.figure


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_planted_fault_is_caught_by_each_check_that_is_named_for_it(fault):
    outcome = suite.plant(fault)
    assert set(outcome.caught) == set(fault.checks)


def test_there_are_25_faults_or_more_with_names_of_their_own():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 25


def test_every_check_is_shown_to_catch_something():
    assert {name for fault in FAULTS for name in fault.checks} == set(BY_NAME)
    assert len(BY_NAME) == len(CHECKS)


def test_canaries_with_five_records_stay_under_the_claim_and_are_labelled_lower_bounds(clean):
    found = BY_NAME["canary-bound"].run(clean)
    assert found.figure.startswith("LOWER BOUND epsilon >= ")
    assert len(clean.canaries.inside) + len(clean.canaries.outside) == 20_000


def bound_and_claim(lab):
    seen = lab.canaries
    found = audit.epsilon_lower_bound(seen.inside, seen.outside, seen.plan.delta)
    return found.value, seen.plan.epsilon(rounds=1)


def test_a_mutant_that_samples_records_exceeds_the_claim_on_five_records_a_subject(clean):
    bound, claim = bound_and_claim(clean)
    assert 0 < bound < claim
    with laboratory() as lab, plants.drawing(plants.by_record)():
        bound, same_claim = bound_and_claim(lab)
    assert bound > claim == same_claim


def test_a_fault_that_only_stops_the_site_is_not_counted_as_caught():
    def raising(real):
        def add_noise(*args):
            raise ValueError("the fault itself is broken")

        return add_noise

    fault = Fault("broken", "", lambda: planted(NOISE, raising), ("noise-variance",))
    assert suite.plant(fault).caught == {}
    with laboratory() as lab, fault.plant():
        found = BY_NAME["noise-variance"].run(lab)
    assert found.alarm and found.silent


def test_a_planted_function_is_replaced_wherever_it_is_known_and_put_back_after_an_error():
    real = hooks.clipped_sum
    with (
        pytest.raises(ZeroDivisionError),
        planted("fedaccord.privacy.clipping:clipped_sum", lambda _: math.fsum),
    ):
        assert hooks.clipped_sum is math.fsum
        raise ZeroDivisionError
    assert hooks.clipped_sum is real


def test_a_planted_method_and_property_are_put_back():
    release, stddev = PrivacyPlan.release, PrivacyPlan.__dict__["noise_stddev"]
    with (
        planted("fedaccord.privacy.plan:PrivacyPlan.noise_stddev", lambda get: lambda self: 5.0),
        planted("fedaccord.privacy.plan:PrivacyPlan.release", lambda real: None),
    ):
        assert PrivacyPlan("a", 1, 1, 1, 0.5, 1.0, 1.0, 1e-5).noise_stddev == 5.0
        assert PrivacyPlan.release is None
    assert PrivacyPlan.release is release
    assert PrivacyPlan.__dict__["noise_stddev"] is stddev


def test_after_every_fault_the_code_is_as_it_was():
    names = {
        "add_noise": noise,
        "train_private": train,
        "train_and_record": client_app,
        "_optimizer": train,
        "clipped_sum": hooks,
        "_norms": bookkeeping,
    }
    before = {name: getattr(module, name) for name, module in names.items()}
    methods = dict(vars(PrivacyPlan)), dict(vars(noise.OsSource))
    for fault in FAULTS:
        with fault.plant():
            pass
    assert {name: getattr(module, name) for name, module in names.items()} == before
    assert (dict(vars(PrivacyPlan)), dict(vars(noise.OsSource))) == methods


@pytest.mark.parametrize("unguarded", [False, True])
def test_weights_that_never_move_are_found_by_the_site_and_where_it_does_not_look_by_us(unguarded):
    (fault,) = [one for one in FAULTS if one.name == "weights-still"]
    guard = planted("fedaccord.client.train:refuse_still", lambda _: lambda *args: None)
    with laboratory() as lab, guard if unguarded else contextlib.nullcontext(), fault.plant():
        found = BY_NAME["weights-move"].run(lab)
    assert found.alarm and not found.silent
    assert found.figure.startswith("18 of 18 weights" if unguarded else "the site found it")


def test_faults_of_the_clip_are_found_under_the_engine_that_has_them():
    for name, engine in (("clip-none", "hooks"), ("book-clip-none", "bookkeeping")):
        (fault,) = [one for one in FAULTS if one.name == name]
        assert f"({engine})" in suite.plant(fault).caught["sensitivity-replay"].figure


def test_replayed_randomness_repeats_and_a_longer_draw_begins_like_a_shorter_one():
    def draws(count):
        with replayed(noise=True):
            one, other = noise.OsSource(), noise.OsSource()
            return one.uniform(count), one.normal(count), one.uniform(count), other.uniform(count)

    short, long = draws(5), draws(9)
    for a, b in zip(short, long, strict=True):
        assert np.array_equal(a, b[:5])
    assert len({a.tobytes() for a in short}) == 4


def test_a_tap_changes_nothing_and_sees_every_release():
    plan = PrivacyPlan("a", 10, 1, 1, 0.5, 1.0, 1.0, 1e-5)
    total = np.arange(4.0)
    with replayed(noise=True):
        plain = plan.release(total, noise.OsSource())
    with replayed(noise=True), tapped() as tap:
        heard = plan.release(total, noise.OsSource())
    assert np.array_equal(plain, heard)
    assert np.array_equal(tap.totals[0], total) and np.array_equal(tap.means[0], plain)


def test_the_closed_form_of_one_record_is_its_clipped_gradient():
    data = crowd_of(1, 3)  # one loud record: its gradient is as long as the bound
    total = clipped_sum_in_closed_form(data, 0.7)
    assert np.linalg.norm(total) == pytest.approx(0.7)
    side = 1.0 if data.labels[0] == 0 else -1.0  # away from its label's row
    assert np.array_equal(np.sign(total[:3]), -side * np.sign(data.inputs[0]))


def reduced(monkeypatch, checks, faults):
    monkeypatch.setattr(suite, "CHECKS", [BY_NAME[name] for name in checks])
    monkeypatch.setattr(suite, "FAULTS", faults)


def test_the_command_ends_with_0_when_all_is_silent_and_all_is_caught(monkeypatch):
    reduced(monkeypatch, ["noise-variance"], [f for f in FAULTS if f.name == "noise-0.98"])
    done = CliRunner().invoke(cli.app, ["conformance"])
    assert done.exit_code == 0
    assert "0 alarms in 1 checks" in done.output
    assert "1/1 faults caught" in done.output
    assert "alpha 2e-06" in done.output


def test_the_command_ends_with_1_when_a_fault_is_missed(monkeypatch):
    harmless = Fault("harmless", "changes nothing", contextlib.nullcontext, ("noise-variance",))
    reduced(monkeypatch, ["noise-variance"], [harmless])
    done = CliRunner().invoke(cli.app, ["conformance"])
    assert done.exit_code == 1
    assert "MISSED" in done.output
    assert "0/1 faults caught" in done.output


def test_the_command_ends_with_1_when_a_check_is_not_silent(monkeypatch):
    reduced(monkeypatch, ["noise-variance"], [])
    with plants.scaled(0.98)():
        done = CliRunner().invoke(cli.app, ["conformance"])
    assert done.exit_code == 1
    assert "ALARM" in done.output
    assert "1 alarms in 1 checks" in done.output


def test_repetitions_count_the_alarms_of_the_statistical_checks(monkeypatch):
    reduced(monkeypatch, ["noise-variance", "noise-grid"], [])
    monkeypatch.setattr(suite, "STATISTICAL", 1)
    done = CliRunner().invoke(cli.app, ["conformance", "--repetitions", "2"])
    assert (done.exit_code, "0 alarms in 2 clean repetitions" in done.output) == (0, True)
    with plants.scaled(1.02)():
        done = CliRunner().invoke(cli.app, ["conformance", "--repetitions", "2"])
    assert (done.exit_code, "2 alarms (noise-variance)" in done.output) == (1, True)


@pytest.mark.slow
def test_clean_repetitions_of_the_statistical_checks_raise_no_alarm():
    assert [name for names in suite.repeat(2) for name in names] == []


@pytest.mark.soak
def test_200_clean_repetitions_of_the_statistical_checks_raise_no_alarm():
    assert [name for names in suite.repeat(200) for name in names] == []
