"""Heads that peers were shown: a ledger that goes back or is used twice is noticed by others."""

import json
import shutil
from contextlib import closing

import pytest

from fedaccord.errors import LedgerError
from fedaccord.evidence import canonical_json
from fedaccord.privacy.budget import Cap
from fedaccord.privacy.chain import read_heads
from fedaccord.privacy.keeping import accept
from fedaccord.privacy.ledger import Ledger, Terms
from fedaccord.privacy.plan import PrivacyPlan
from fedaccord.server.heads import KEYS, SHOWN, Heads

PLAN = PrivacyPlan("ward", 100, 9, 1, 1.0, 40.0, 1.0, 1e-5)
TERMS = Terms(Cap(9.0, 1e-5), "f" * 64)


def opened(folder, site="ward", second=True):
    """A site's ledger; its second place lies outside the folder that is copied."""
    heads = folder.parent / f"heads-{folder.name}" / f"{site}.json" if second else None
    return closing(Ledger(folder / "ledger.sqlite", site, heads))


def said(head, *seen):
    """The words of a reply that carry heads."""
    return {
        "head": canonical_json(head.to_json()),
        "seen": canonical_json([other.to_json() for other in seen]),
    }


def end(folder, site="ward", notes=1):
    """Let a site write some entries; its head."""
    with opened(folder, site) as ledger:
        for _ in range(notes):
            ledger.counts("a", 1, cells=notes)
        return ledger.head()


def copy(tmp_path, name):
    """Copy a site's folder and its second place with it."""
    shutil.copytree(tmp_path / "ward", tmp_path / name)
    shutil.copytree(tmp_path / "heads-ward", tmp_path / f"heads-{name}")


def test_peers_heads_are_kept_in_the_reservation_and_in_each_intent(tmp_path):
    clinic, lab = end(tmp_path / "clinic", "clinic"), end(tmp_path / "lab", "lab")
    with opened(tmp_path / "ward") as ledger:
        mine = ledger.head()
        assert ledger.witness([mine, clinic]) == [clinic]
        ledger.reserve("a", PLAN, 1, TERMS, [clinic])
        assert ledger.seen() == [clinic]
        later = end(tmp_path / "clinic", "clinic")
        intent = ledger.intend("a", 1, PLAN, TERMS.accord, ledger.witness([later, lab, mine]))
        assert intent["seen"] == [later.to_json(), lab.to_json()]
        ledger.intend("a", 2, PLAN, TERMS.accord, [clinic])
        assert ledger.seen() == [later, lab]  # the longest, whatever came last


def test_a_site_goes_on_from_any_head_that_it_once_showed(tmp_path):
    with opened(tmp_path / "ward") as ledger:
        shown = []
        for _ in range(3):
            shown.append(ledger.head())
            ledger.counts("a", 1)
        ledger.rotate()
        shown.append(ledger.head())
        ledger.counts("a", 1)
        assert ledger.witness(shown) == []


def test_an_older_copy_is_stopped_by_what_a_peer_was_shown(tmp_path):
    end(tmp_path / "ward")
    copy(tmp_path, "backup")
    shown = end(tmp_path / "ward")
    with (
        opened(tmp_path / "backup", second=False) as ledger,
        pytest.raises(LedgerError, match=r"shown entry 3 of it .* does not hold \(2 entries\)"),
    ):
        ledger.witness([shown])


def test_of_two_clones_that_both_go_on_each_is_stopped_by_the_others_head(tmp_path):
    end(tmp_path / "ward")
    copy(tmp_path, "clone")
    one, other = end(tmp_path / "ward"), end(tmp_path / "clone", notes=2)
    for folder, own, others in (("ward", one, other), ("clone", other, one)):
        with opened(tmp_path / folder) as ledger:
            assert ledger.witness([own]) == []
            with pytest.raises(LedgerError, match=r"It was cut, restored or cloned\. Stop"):
                ledger.witness([others])
    heads = Heads(["ward", "clinic"])
    assert heads.hear("ward", said(one)) == ""
    assert heads.hear("ward", said(other)) == ""  # it is longer: the site itself will tell
    assert "after it had shown entry 4" in heads.hear("ward", said(one))


def test_a_clone_of_the_same_length_is_named_by_the_coordinator(tmp_path):
    end(tmp_path / "ward")
    copy(tmp_path, "clone")
    with opened(tmp_path / "clone") as ledger:
        ledger.counts("b", 7)
        other = ledger.head()
    one = end(tmp_path / "ward")
    heads = Heads(["ward", "clinic"])
    assert heads.hear("ward", said(one)) == heads.hear("ward", said(one)) == ""
    assert f"entry 3 ({other.hash[:12]})" in heads.hear("ward", said(other))


def test_a_copy_from_before_a_rotation_is_named_by_the_coordinator(tmp_path):
    end(tmp_path / "ward")
    copy(tmp_path, "backup")
    with opened(tmp_path / "ward") as ledger:
        ledger.counts("a", 1)
        ledger.rotate()
        ledger.counts("a", 1)
        newest = ledger.head()
    heads = Heads(["ward", "clinic"])
    assert heads.hear("ward", said(newest)) == ""
    assert "after it had shown entry 5" in heads.hear("ward", said(end(tmp_path / "backup")))


def test_peers_bring_what_they_hold_to_a_coordinator_that_knows_nothing(tmp_path):
    shown = end(tmp_path / "ward", notes=4)
    heads = Heads(["ward", "clinic"])
    assert heads.hear("clinic", said(end(tmp_path / "clinic", "clinic"), shown)) == ""
    assert shown in read_heads(heads.show(1))
    assert heads.record().keys() == {"clinic"}  # what a site itself showed, not what peers say


def test_a_peer_can_neither_speak_for_a_site_nor_make_up_its_head(tmp_path):
    ward, clinic = end(tmp_path / "ward", notes=3), end(tmp_path / "clinic", "clinic")
    longer = json.loads(said(ward)["head"]) | {"seq": 900}
    heads = Heads(["ward", "clinic"])
    assert heads.hear("clinic", {"head": canonical_json(longer), "seen": "[]"}) == ""
    assert heads.hear("clinic", {"head": "nonsense", "seen": canonical_json([longer])}) == ""
    assert heads.hear("clinic", said(ward)) == ""  # another site's head is not its own
    assert heads.show(1) == "[]"
    assert heads.hear("clinic", said(clinic, ward, clinic)) == ""
    assert heads.hear("ward", said(ward)) == ""
    assert heads.record() == {
        "clinic": {"seq": clinic.seq, "hash": clinic.hash},
        "ward": {"seq": ward.seq, "hash": ward.hash},
    }


def test_a_site_that_goes_on_in_another_run_while_it_is_asked_has_not_gone_back(tmp_path):
    reply = said(end(tmp_path / "ward"))
    later = end(tmp_path / "ward")  # in the other run, where the clinic is shown it
    heads = Heads(["ward", "clinic"])
    assert heads.hear("clinic", said(end(tmp_path / "clinic", "clinic"), later)) == ""
    assert heads.hear("ward", reply) == ""
    assert later in read_heads(heads.show(1))  # from here on it was asked knowing that
    assert f"after it had shown entry {later.seq}" in heads.hear("ward", reply)


def test_where_there_are_many_heads_each_is_shown_in_turn(tmp_path):
    heads, all_of_them = Heads([f"site-{n}" for n in range(SHOWN + 8)]), set()
    for number in range(SHOWN + 8):
        name = f"site-{number}"
        head = end(tmp_path / name, name, notes=0)
        all_of_them.add(head)
        assert heads.hear(name, said(head)) == ""
    turns = [set(read_heads(heads.show(number))) for number in (1, 2)]
    assert [len(turn) for turn in turns] == [SHOWN, SHOWN]
    assert turns[0] | turns[1] == all_of_them


def test_a_reply_without_heads_says_nothing():
    heads = Heads(["ward", "clinic"])
    assert heads.hear("ward", {}) == ""
    assert (heads.show(1), heads.record()) == ("[]", {})


def test_a_peer_cannot_crowd_out_the_heads_of_others(tmp_path):
    clinic, ward = end(tmp_path / "clinic", "clinic"), end(tmp_path / "ward")
    strangers = [end(tmp_path / f"s{n}", f"s{n}", notes=0) for n in range(3)]
    forged = [end(tmp_path / f"w{n}", "ward", notes=0) for n in range(20)]
    heads = Heads(["ward", "clinic"])
    heads.hear("clinic", said(clinic, *strangers, *forged))
    shown = read_heads(heads.show(1))
    assert {head.site for head in shown} == {"ward", "clinic"}
    assert sum(head.site == "ward" for head in shown) == KEYS
    heads.hear("ward", said(ward))
    assert ward in read_heads(heads.show(1))


def test_after_an_operator_wrote_entries_off_their_heads_no_longer_stop_the_site(tmp_path):
    end(tmp_path / "ward")
    copy(tmp_path, "backup")
    gone = end(tmp_path / "ward", notes=3)
    with opened(tmp_path / "backup") as ledger, pytest.raises(LedgerError, match="was cut"):
        ledger.witness([gone])
    place = tmp_path / "backup"
    entry = accept(place / "ledger.sqlite", "ward", place / "head.json", [gone])
    assert entry["kind"] == "LOST"
    with opened(tmp_path / "backup") as ledger:
        assert ledger.witness([gone]) == []
        ledger.counts("a", 9)
        later = ledger.head()
    with opened(tmp_path / "ward") as ledger, pytest.raises(LedgerError, match="was cut"):
        ledger.witness([later])
