"""The rules of a site's policy: what breaks one is refused by that one, before a record is read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wards import small_accord

from fedaccord import accord as accords
from fedaccord.client import policy, policy_file
from fedaccord.client.policy_rules import KINDS, RULES
from fedaccord.errors import AccordError, PolicyError

SITE = "cleveland"
ACCORD: dict[str, Any] = small_accord()
ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Pacific/Auckland"]
OTHER = "ab" * 32
DAY = 24 * 60
Case = dict[str, Any]


def clock(minute: int) -> str:
    """A minute of the day, of any day, as policy.toml has it."""
    return f"{minute % DAY // 60:02}:{minute % 60:02}"


def minute(case: Case) -> int:
    """The minute of the day in the policy's time zone."""
    local = case["now"].astimezone(ZoneInfo(case["policy"]["timezone"]))
    return int(local.hour * 60 + local.minute)


@st.composite
def passing(draw: st.DrawFn) -> Case:
    """An accord, a policy and a moment that go together; bounds are often met exactly."""
    slack = st.sampled_from([1.0, 1.0, 1.5, 4.0])
    accord = copy.deepcopy(ACCORD)
    site, privacy = accord["sites"][0], accord["privacy"]
    site["subjects"] = draw(st.integers(1, 10**6))
    site["records"] = site["subjects"] + draw(st.integers(0, 100))
    privacy["noise_multiplier"] = draw(st.floats(0.4, 50))
    privacy["max_grad_norm"] = draw(st.floats(0.01, 100))
    privacy["delta"] = draw(st.sampled_from([1e-4, 1e-5, 1e-6]))
    accord["fairness"]["min_group"] = draw(st.integers(2, 100))
    accord["distillation"] = {"enabled": draw(st.booleans())}
    parameters = draw(st.integers(2, 10**9))
    case: Case = {
        "accord": accord,
        "kind": draw(st.sampled_from(KINDS)),
        "parameters": parameters,
        "now": draw(st.datetimes(datetime(2024, 1, 2), datetime(2035, 1, 1))).replace(tzinfo=UTC),
        "approve": True,
        "own_cap": draw(st.none() | st.floats(0.1, 10)),
        "policy": {
            "approved": draw(st.sampled_from([[], [OTHER]])),
            "max_epsilon": draw(st.sampled_from([0.5, 8.0, float("inf")])),
            "delta": privacy["delta"] * draw(slack),
            "units": draw(st.sampled_from([["subject"], ["client", "subject"]])),
            "min_noise_multiplier": privacy["noise_multiplier"] / draw(slack),
            "max_grad_norm": privacy["max_grad_norm"] * draw(slack),
            "min_subjects": draw(st.integers(1, site["subjects"])),
            "min_records": draw(st.integers(1, site["records"])),
            "models": ["cnn1d", "mlp"] if accord["distillation"]["enabled"] else ["cnn1d"],
            "max_parameters": parameters + draw(st.integers(0, 5)),
            "releases": ["group counts", "weights"],
            "min_cell": draw(st.integers(1, accord["fairness"]["min_group"])),
            "timezone": draw(st.sampled_from(ZONES)),
            "second_head": "../heads/cleveland.json",
        },
    }
    case["policy"]["delta"] = min(case["policy"]["delta"], 0.09)
    if draw(st.booleans()):  # open a while before until a while after, over midnight too
        before, after = draw(st.integers(0, 700)), draw(st.integers(1, 700))
        case["policy"]["hours"] = f"{clock(minute(case) - before)}-{clock(minute(case) + after)}"
    if draw(st.booleans()):
        local = case["now"].astimezone(ZoneInfo(case["policy"]["timezone"]))
        case["policy"]["expires"] = local.date() + timedelta(days=draw(st.integers(0, 400)))
    return case


def judge(case: Case) -> tuple[policy.SitePolicy, accords.Accord]:
    """The policy and the accord of a case; digests are known only now."""
    agreed = accords.parse(case["accord"])
    values = copy.deepcopy(case["policy"])
    values["approved"] += [agreed.digest] if case["approve"] else []
    if case["own_cap"] is not None:
        values["accords"] = {agreed.digest: {"max_epsilon": case["own_cap"]}}
    return policy.SitePolicy.model_validate(values), agreed


def broken(case: Case) -> dict[str, str]:
    own, agreed = judge(case)
    how = {key: case[key] for key in ("kind", "parameters", "now")}
    return own.broken(agreed, SITE, **how)


# --- one way or more to break each rule, and what the sentence must then say ---------------------


def _approved(case: Case, draw: st.DrawFn) -> list[str]:
    case["approve"] = False
    return ["not approved"]


def _expires(case: Case, draw: st.DrawFn) -> list[str]:
    local = case["now"].astimezone(ZoneInfo(case["policy"]["timezone"]))
    case["policy"]["expires"] = local.date() - timedelta(days=draw(st.integers(1, 300)))
    return [str(local.date()), str(case["policy"]["expires"])]


def _hours(case: Case, draw: st.DrawFn) -> list[str]:
    case["kind"] = draw(st.sampled_from(["train", "evaluate"]))
    length = draw(st.integers(1, 1000))
    start = minute(case) + draw(st.integers(1, DAY - length))  # ends now, at the latest
    case["policy"]["hours"] = f"{clock(start)}-{clock(start + length)}"
    return [case["policy"]["hours"], case["policy"]["timezone"], clock(minute(case))]


def _max_epsilon(case: Case, draw: st.DrawFn) -> list[str]:
    case["accord"]["privacy"]["enabled"] = False
    case["policy"]["max_epsilon"], case["own_cap"] = draw(st.floats(0.1, 99)), None
    return ["privacy.enabled = false", f"{case['policy']['max_epsilon']:.2f}"]


def _accords(case: Case, draw: st.DrawFn) -> list[str]:
    case["accord"]["privacy"]["enabled"] = False
    case["policy"]["max_epsilon"], case["own_cap"] = float("inf"), draw(st.floats(0.1, 99))
    return ["privacy.enabled = false", f"{case['own_cap']:.2f}"]


def _delta(case: Case, draw: st.DrawFn) -> list[str]:
    privacy = case["accord"]["privacy"]
    case["policy"]["delta"] = privacy["delta"] * draw(st.sampled_from([0.999, 0.5, 1e-3]))
    return [f"privacy.delta = {privacy['delta']:g}", f"above {case['policy']['delta']:g}"]


def _units(case: Case, draw: st.DrawFn) -> list[str]:
    if draw(st.booleans()):
        case["policy"]["units"] = draw(st.sampled_from([[], ["client"]]))
        return ['privacy.unit = "subject"']
    privacy = case["accord"]["privacy"]
    privacy |= {"unit": "client", "clipping_norm": 1.0}
    del privacy["max_grad_norm"]
    case["policy"]["units"] = ["subject"]
    return ['privacy.unit = "client"', '["subject"]']


def _min_noise_multiplier(case: Case, draw: st.DrawFn) -> list[str]:
    theirs = case["accord"]["privacy"]["noise_multiplier"]
    bound = case["policy"]["min_noise_multiplier"] = theirs * draw(st.sampled_from([1.001, 2.0]))
    return [f"{theirs:g} is below {bound:g}", "privacy.noise_multiplier"]


def _max_grad_norm(case: Case, draw: st.DrawFn) -> list[str]:
    theirs = case["accord"]["privacy"]["max_grad_norm"]
    bound = case["policy"]["max_grad_norm"] = theirs * draw(st.sampled_from([0.999, 0.1]))
    return [f"privacy.max_grad_norm = {theirs:g} is above {bound:g}"]


def _declared(key: str) -> Callable[[Case, st.DrawFn], list[str]]:
    def breaks(case: Case, draw: st.DrawFn) -> list[str]:
        theirs = case["accord"]["sites"][0][key]
        bound = case["policy"][f"min_{key}"] = theirs + draw(st.integers(1, 100))
        return [f"sites[cleveland].{key} = {theirs} is below {bound}"]

    return breaks


def _models(case: Case, draw: st.DrawFn) -> list[str]:
    left = draw(st.sampled_from([[], ["mlp"], ["cnn"], ["resnet", "mlp"], ["cnn1d"]]))
    case["policy"]["models"] = left
    if left == ["cnn1d"]:  # the student comes here too, to be evaluated
        case["accord"]["distillation"]["enabled"] = True
        return ['distillation.model = "mlp"']
    return ['model.name = "cnn1d"']


def _max_parameters(case: Case, draw: st.DrawFn) -> list[str]:
    bound = draw(st.integers(1, case["parameters"] - 1))
    case["policy"]["max_parameters"] = bound
    return [f"{case['parameters']} parameters", f"above {bound}"]


def _releases(case: Case, draw: st.DrawFn) -> list[str]:
    case["policy"]["releases"] = draw(st.sampled_from([[], ["weights"], ["group counts"]]))
    return ["the accord releases"]


def _min_cell(case: Case, draw: st.DrawFn) -> list[str]:
    theirs = case["accord"]["fairness"]["min_group"]
    bound = case["policy"]["min_cell"] = theirs + draw(st.integers(1, 100))
    return [f"fairness.min_group = {theirs} is below {bound}"]


BREAKS = {
    "approved": _approved,
    "expires": _expires,
    "hours": _hours,
    "max_epsilon": _max_epsilon,
    "accords": _accords,
    "delta": _delta,
    "units": _units,
    "min_noise_multiplier": _min_noise_multiplier,
    "max_grad_norm": _max_grad_norm,
    "min_subjects": _declared("subjects"),
    "min_records": _declared("records"),
    "models": _models,
    "max_parameters": _max_parameters,
    "releases": _releases,
    "min_cell": _min_cell,
}


# --- laws ---------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(passing())
def test_what_keeps_every_rule_passes(case: Case) -> None:
    assert broken(case) == {}


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=30)  # 15 rules: 450 violations
@given(data=st.data())
def test_what_breaks_one_rule_is_refused_by_that_rule_in_one_line(
    rule: str, data: st.DataObject
) -> None:
    case = data.draw(passing())
    said = BREAKS[rule](case, data.draw)
    assert list(broken(case)) == [rule]
    own, agreed = judge(case)
    how = {key: case[key] for key in ("kind", "parameters", "now")}
    with pytest.raises(PolicyError) as refusal:
        own.check(agreed, SITE, **how)
    sentence = str(refusal.value)
    assert refusal.value.rule == rule
    assert sentence.startswith(f"Site {SITE} refuses by its rule {rule}: ")
    assert [words for words in said if words not in sentence] == []
    assert "\n" not in sentence


@settings(max_examples=100)
@given(data=st.data(), rules=st.sets(st.sampled_from(sorted(RULES)), min_size=2, max_size=4))
def test_every_broken_rule_is_listed_and_the_first_one_refuses(
    data: st.DataObject, rules: set[str]
) -> None:
    rules -= {"max_epsilon", "accords"}  # these switch privacy off, and other rules with it
    case = data.draw(passing())
    for rule in sorted(rules):
        BREAKS[rule](case, data.draw)
    found = broken(case)
    if "max_grad_norm" in rules and case["accord"]["privacy"].get("unit") == "client":
        rules -= {"max_grad_norm"}  # no gradient of a subject is clipped under that unit
    assert list(found) == [rule for rule in RULES if rule in rules]


@pytest.mark.parametrize("kind", ["join", "reserve"])
def test_outside_its_hours_a_site_still_says_whether_it_would_take_part(kind: str) -> None:
    own = {"max_epsilon": 9.0, "delta": 1e-4, "second_head": "h.json", "hours": "20:00-06:00"}
    agreed = accords.parse(ACCORD)
    noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    policy_ = policy.SitePolicy.model_validate(own)
    assert "hours" not in policy_.broken(agreed, SITE, kind=kind, parameters=1, now=noon)
    assert "hours" in policy_.broken(agreed, SITE, kind="train", parameters=1, now=noon)


@pytest.mark.parametrize(
    ("hours", "moment", "is_open"),
    [
        ("20:00-06:00", "2026-07-01T17:59", False),  # 19:59 in Berlin, in summer
        ("20:00-06:00", "2026-07-01T18:00", True),
        ("20:00-06:00", "2026-07-02T03:59", True),
        ("20:00-06:00", "2026-07-02T04:00", False),
        ("20:00-06:00", "2026-01-01T18:59", False),  # in winter an hour later
        ("20:00-06:00", "2026-01-01T19:00", True),
        ("08:00-17:00", "2026-01-01T07:00", True),
        ("08:00-17:00", "2026-01-01T15:59", True),
        ("08:00-17:00", "2026-01-01T16:00", False),
        ("08:00-24:00", "2026-01-01T22:59", True),
        ("08:00-24:00", "2026-01-01T23:00", False),
        ("00:00-24:00", "2026-01-01T23:00", True),
        ("00:00-00:01", "2026-01-01T23:00", True),
    ],
)
def test_hours_are_those_of_the_time_zone(hours: str, moment: str, is_open: bool) -> None:
    values = {"max_epsilon": 9.0, "delta": 1e-4, "second_head": "h.json", "hours": hours}
    own = policy.SitePolicy.model_validate(values | {"timezone": "Europe/Berlin"})
    now = datetime.fromisoformat(moment).replace(tzinfo=UTC)
    found = own.broken(accords.parse(ACCORD), SITE, kind="train", parameters=1, now=now)
    assert ("hours" not in found) == is_open


def test_noise_that_the_accord_asks_for_by_its_epsilon_is_held_to_the_same_bound() -> None:
    agreed = accords.load("heart")  # target_epsilon = 3.0, which takes the multiplier 2.0108
    values = policy_file.simulated(Path(SITE), agreed)
    how: dict[str, Any] = {"kind": "train", "parameters": 1, "now": datetime.now(UTC)}
    for bound, said in ((2.0108, []), (2.0109, ["min_noise_multiplier"])):
        own = policy.SitePolicy.model_validate(values | {"min_noise_multiplier": bound})
        assert list(own.broken(agreed, SITE, **how)) == said


def test_an_accord_that_is_not_approved_does_not_have_its_model_built() -> None:
    def count() -> int:
        raise AssertionError("the model was built")

    agreed = accords.parse(ACCORD)
    values = policy_file.simulated(Path(SITE), agreed)
    how: dict[str, Any] = {"kind": "join", "parameters": count, "now": datetime.now(UTC)}
    with pytest.raises(PolicyError, match="not approved"):
        policy.SitePolicy.model_validate(values | {"approved": []}).check(agreed, SITE, **how)
    with pytest.raises(AssertionError, match="built"):
        policy.SitePolicy.model_validate(values).check(agreed, SITE, **how)


def test_a_site_that_the_accord_does_not_list_and_a_time_without_a_zone_are_not_judged() -> None:
    agreed = accords.parse(ACCORD)
    own = policy.SitePolicy.model_validate(policy_file.simulated(Path(SITE), agreed))
    with pytest.raises(AccordError, match='site "va" is not among the sites'):
        own.check(agreed, "va", kind="join", parameters=1, now=datetime.now(UTC))
    with pytest.raises(ValueError, match="no time zone"):
        own.check(agreed, SITE, kind="join", parameters=1, now=datetime(2026, 1, 1))
    with pytest.raises(ValueError, match="unknown kind"):
        own.check(agreed, SITE, kind="look", parameters=1, now=datetime.now(UTC))
