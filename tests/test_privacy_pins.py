"""Pins: where the accord says whose key is whose, heads by other keys do not count."""

import json
from contextlib import closing
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedaccord import accord as accords
from fedaccord import keys
from fedaccord.envelope import handover
from fedaccord.evidence import canonical_json
from fedaccord.privacy.chain import read_heads
from fedaccord.privacy.ledger import Ledger
from fedaccord.privacy.pins import of_pinned, read_handovers, show_handovers, speaks_for
from fedaccord.server.heads import Heads, heads_over


def opened(folder, site):
    return closing(Ledger(folder / "ledger.sqlite", site))


def end(folder, site):
    """Let a site write an entry; its head."""
    with opened(folder, site) as ledger:
        ledger.counts("a", 1, cells=1)
        return ledger.head()


def said(head, *seen):
    """The words of a reply that carry heads."""
    return {
        "head": canonical_json(head.to_json()),
        "seen": canonical_json([other.to_json() for other in seen]),
    }


@pytest.fixture
def ward(tmp_path):
    """The pinned ledger of a site that then changed its key: heads and handovers."""
    before = end(tmp_path / "ward", "ward")
    old = keys.load(tmp_path / "ward" / "ledger.key")
    with opened(tmp_path / "ward", "ward") as ledger:
        new = ledger.rotate()["public_key"]
    after = end(tmp_path / "ward", "ward")
    assert (before.key, after.key) == (old.public, new)
    steps = {"ward": [handover("ward", new, old)]}
    return SimpleNamespace(before=before, after=after, pins={"ward": old.public}, steps=steps)


def test_a_key_speaks_for_a_site_where_the_pinned_one_led_to_it(ward):
    old, new, steps = ward.before.key, ward.after.key, ward.steps
    assert speaks_for("ward", old, ward.pins, {})
    assert not speaks_for("ward", new, ward.pins, {})
    assert speaks_for("ward", new, ward.pins, steps)
    assert speaks_for("ward", old, ward.pins, steps)  # what it signed before is still its own
    assert not speaks_for("lab", new, {"lab": old}, {"lab": steps["ward"]})  # of another name
    assert speaks_for("lab", new, ward.pins, {})  # nobody says whose key is the lab's


def test_heads_made_up_with_another_key_do_not_reach_the_sites(tmp_path, ward):
    clinic, forged = end(tmp_path / "clinic", "clinic"), end(tmp_path / "forged", "ward")
    pins = ward.pins | {"clinic": clinic.key}
    for handovers, shown in (({}, {clinic, ward.before}), (ward.steps, {clinic, ward.after})):
        heads = Heads(["ward", "clinic"], pins, lambda known=handovers: known)
        for head in (ward.before, ward.after, forged):
            assert heads.hear("clinic", said(clinic, head)) == ""
        assert shown <= set(read_heads(heads.words(1)["heads"]))
        assert forged not in read_heads(heads.words(1)["heads"])
        assert json.loads(heads.words(1).get("handovers", "{}")) == handovers
    bare = Heads(["ward", "clinic"])  # a simulation: whoever comes first is believed
    assert bare.hear("clinic", said(clinic, forged)) == ""
    assert forged in read_heads(bare.words(1)["heads"])
    assert bare.words(1).keys() == {"heads"}


def test_a_site_whose_ledger_is_of_another_key_is_named(tmp_path, ward):
    heads = Heads(["ward"], ward.pins)
    reason = heads.hear("ward", said(ward.after))
    assert reason.startswith(f"ledger: its head is signed with the key {ward.after.key[:12]}, to")
    assert heads.record() == {}
    known = Heads(["ward"], ward.pins, lambda: ward.steps)
    assert known.hear("ward", said(ward.after)) == ""
    assert known.record()["ward"]["seq"] == ward.after.seq


def test_handovers_that_come_while_a_run_goes_on_count_from_then_on(ward):
    steps = {}
    heads = Heads(["ward"], ward.pins, lambda: steps)
    assert heads.hear("ward", said(ward.after)) != ""
    steps |= ward.steps
    assert heads.hear("ward", said(ward.after)) == ""


def test_a_site_of_a_deployment_takes_in_heads_by_pinned_keys_alone(tmp_path, ward):
    clinic, forged = end(tmp_path / "clinic", "clinic"), end(tmp_path / "forged", "ward")
    own = end(tmp_path / "copy", "clinic")  # of its own name: its ledger knows its own keys
    shown = [ward.before, ward.after, forged, own]
    pins = ward.pins | {"clinic": clinic.key}
    with opened(tmp_path / "clinic", "clinic") as ledger:
        assert of_pinned(shown, ledger, pins, "{}") == [ward.before, own]
        known = of_pinned(shown, ledger, pins, show_handovers(ward.steps))
        assert known == [ward.before, ward.after, own]
        elsewhere = ward.pins | {"clinic": ward.before.key}  # another key than this ledger's
        assert of_pinned(shown, ledger, elsewhere, "{}") == shown


def test_only_over_the_link_are_keys_checked(tmp_path, ward):
    parsed = accords.load("heart").model_dump()
    site = parsed["sites"][0]["name"]
    parsed["sites"][0]["key"] = ward.before.key
    accord, other = accords.parse(parsed), end(tmp_path / "other", site)
    link = SimpleNamespace(about=lambda: {"link": {"handovers": {}}})
    assert heads_over(link, accord).hear(site, said(other)).startswith("ledger: its head is signed")
    assert heads_over(object(), accord).hear(site, said(other)) == ""


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=60) | st.recursive(
    st.none() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
).map(json.dumps))  # fmt: skip
def test_handovers_of_any_form_are_read_or_left_out(text):
    found = read_handovers(text)
    assert all(isinstance(step, dict) for steps in found.values() for step in steps)
    assert read_handovers(show_handovers(found)) == {k: v for k, v in found.items() if v}
    for site in found:
        assert not speaks_for(site, "b" * 64, {site: "a" * 64}, found)
