"""The chain: what is hashed and signed, who signs from when on, and which heads it extends."""

import dataclasses
import itertools
import json
from contextlib import closing

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedaccord import keys
from fedaccord.errors import LedgerError
from fedaccord.evidence import canonical_json, sha256
from fedaccord.privacy import chain
from fedaccord.privacy.chain import GENESIS, Chain, Head, Row, faults, latest, read_heads
from fedaccord.privacy.ledger import Ledger


def new_key():
    return keys.SigningKey(Ed25519PrivateKey.generate())


KEY, NEXT, STRANGER = new_key(), new_key(), new_key()


def add(rows, key, kind="NOTE", site="ward", **what):
    """Append an entry as the holder of a key would."""
    entry = what | {"kind": kind, "seq": len(rows) + 1, "site": site, "run": ""}
    rows.append(chain.seal(rows[-1].hash if rows else GENESIS, entry, key))


def hand_over(rows, old, new, possession=None):
    agreed = possession or new.sign(chain.handover(new.public, rows[-1].hash))
    add(rows, old, "KEY", public_key=new.public, possession=agreed)


def some(length=8, site="ward"):
    """A ledger with a key that hands over half-way."""
    rows = []
    add(rows, KEY, "KEY", site, public_key=KEY.public)
    while len(rows) < length // 2:
        add(rows, KEY, site=site)
    hand_over(rows, KEY, NEXT)
    while len(rows) < length:
        add(rows, NEXT, site=site)
    return rows


def found(rows, **how):
    return [number for number, _ in faults(rows, **how)]


def checked(rows, where="ledger ward"):
    made = Chain(where)
    made.extend(rows)
    return made


def test_an_entrys_hash_covers_its_whole_body_and_the_hash_before_it():
    previous = "0" * 64
    for row in some():
        assert row.hash == sha256(previous + "\n" + row.body)
        assert row.body == canonical_json(json.loads(row.body))
        previous = row.hash


def test_a_signature_is_ed25519_over_number_hash_and_site():
    row = some()[1]
    words = f"fedaccord ledger v1\nentry\n2\n{row.hash}\nward".encode()
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(KEY.public))
    public.verify(bytes.fromhex(row.signature), words)  # raises where it does not hold


def test_a_signature_is_the_references_of_rfc_8032():
    # RFC 8032, section 7.1, TEST 1: the secret key and its public half.
    secret = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"
    public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    key = keys.SigningKey(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret)))
    assert key.public == public
    assert key.sign("x") == key.sign("x") != key.sign("y")
    assert len(key.sign("x")) == 128


def test_only_one_spelling_of_a_signature_and_of_a_key_is_right():
    good = KEY.sign("x")
    assert keys.signed(KEY.public, good, "x")
    for public, signature, words in (
        (KEY.public, good, "y"),
        (STRANGER.public, good, "x"),
        (KEY.public, good.upper(), "x"),
        (KEY.public.upper(), good, "x"),
        (KEY.public, good + "\n", "x"),
        (KEY.public, f"{good[:2]} {good[2:]}", "x"),
        (KEY.public, good[:-2], "x"),
        (KEY.public, "", "x"),
        (KEY.public, None, "x"),
        ("0" * 64, good, "x"),
    ):
        assert not keys.signed(public, signature, words)


@pytest.mark.parametrize("every", [True, False])
def test_a_ledger_as_it_was_written_has_no_fault(every):
    for length in (2, 3, 8, 40):
        assert found(some(length), every=every) == []
    assert found([], every=every) == []


def test_a_ledger_can_be_checked_in_parts():
    rows = some()
    made = Chain("ledger")
    for row in rows:
        made.extend([row])
    assert made.rows == rows
    assert made.signers == [KEY.public] * 5 + [NEXT.public] * 3  # the old key signs the hand-over
    assert made.key == NEXT.public


CHANGES = {
    "deleted": lambda rows, i: rows[:i] + rows[i + 1 :],
    "swapped": lambda rows, i: [*rows[:i], rows[i + 1], rows[i], *rows[i + 2 :]],
    "doubled": lambda rows, i: [*rows[: i + 1], rows[i], *rows[i + 1 :]],
    "another site's": lambda rows, i: [*rows[:i], some(site="clinic")[i], *rows[i + 1 :]],
    "signature of another": lambda rows, i: [
        *rows[:i],
        dataclasses.replace(rows[i], signature=rows[i + 1].signature),
        *rows[i + 1 :],
    ],
    "no JSON": lambda rows, i: [*rows[:i], dataclasses.replace(rows[i], body="{"), *rows[i + 1 :]],
    "a list": lambda rows, i: [*rows[:i], dataclasses.replace(rows[i], body="[]"), *rows[i + 1 :]],
    "bytes": lambda rows, i: [*rows[:i], dataclasses.replace(rows[i], body=b"x"), *rows[i + 1 :]],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("place", range(7))
def test_what_was_changed_before_the_end_is_found_at_its_place(change, place):
    rows = some()
    changed = CHANGES[change](rows, place)
    assert min(found(changed)) in (place + 1, place + 2)
    if change != "signature of another" or place in (0, 4):
        # Without each signature: hashes, hand-overs and the last signature cover the rest.
        assert min(found(changed, every=False)) in (place + 1, place + 2)


def test_a_ledger_rewritten_by_a_stranger_is_not_signed():
    forged = []
    add(forged, KEY, "KEY", public_key=KEY.public)
    add(forged, STRANGER)
    assert found(forged) == found(forged, every=False) == [2]


def test_a_fast_check_leaves_no_forged_end():
    rows = some()
    add(rows, STRANGER)
    assert found(rows, every=False) == [9]


def test_a_retired_key_signs_nothing_any_more():
    rows = some()
    add(rows, KEY)
    assert found(rows) == found(rows, every=False) == [9]
    with pytest.raises(LedgerError, match="entry 9 is not signed by the site's key"):
        checked(rows)


def test_a_hand_over_needs_the_old_key_and_the_new_ones_agreement():
    for spoil in (
        lambda rows: hand_over(rows, STRANGER, STRANGER),
        lambda rows: hand_over(rows, NEXT, STRANGER, possession="0" * 128),
        lambda rows: hand_over(
            rows, NEXT, STRANGER, possession=STRANGER.sign(chain.handover(STRANGER.public, GENESIS))
        ),
        lambda rows: add(rows, NEXT, "KEY"),
        lambda rows: add(rows, NEXT, "KEY", public_key=7, possession=None),
    ):
        rows = some()
        spoil(rows)
        assert found(rows) == found(rows, every=False) == [9]
    rows = some()
    hand_over(rows, NEXT, STRANGER)
    assert found(rows) == []


def test_the_first_entry_names_the_key_that_signs_it():
    rows = []
    add(rows, KEY)
    assert 1 in found(rows)
    rows = []
    add(rows, STRANGER, "KEY", public_key=KEY.public)
    assert found(rows) == found(rows, every=False) == [1]


def test_a_head_is_held_by_each_ledger_that_goes_on_from_it_and_by_no_other():
    rows = some()
    ends = [checked(rows[:length]).head() for length in range(1, 9)]
    assert [head.seq for head in ends] == list(range(1, 9))
    for length, head in itertools.product(range(1, 9), ends):
        assert checked(rows[:length]).holds(head) is (head.seq <= length)
    other = rows[:7]
    add(other, NEXT, note="went on otherwise")
    assert checked(other).missing(ends) == ends[7:]


@given(st.integers(1, 8), st.sampled_from(["site", "key", "seq", "hash", "signature"]), st.data())
@settings(max_examples=100, deadline=None)
def test_a_head_with_any_other_site_number_hash_or_signature_is_not_valid(length, name, data):
    rows = some()
    head, other = (checked(rows[:n]).head() for n in (length, length % 8 + 1))
    assert head.valid
    change = {
        "site": st.text().filter(lambda text: text != "ward"),
        "key": st.just(STRANGER.public),
        "seq": st.integers(-(2**70), 2**70).filter(lambda n: n != length),
        "hash": st.sampled_from([other.hash, head.hash.upper() + "!", GENESIS]),
        "signature": st.sampled_from([other.signature, head.signature[:-1] + "g", ""]),
    }[name]
    assert not dataclasses.replace(head, **{name: data.draw(change)}).valid


def test_only_who_has_a_ledgers_key_can_show_that_it_is_cut():
    rows, forged = some(), []
    add(forged, STRANGER, "KEY", public_key=STRANGER.public)
    for _ in range(20):
        add(forged, STRANGER)
    ledger = checked(rows)
    end = ledger.head()
    theirs = [
        checked(forged).head(),  # properly signed by a stranger
        dataclasses.replace(checked(forged).head(), key=NEXT.public),
        dataclasses.replace(end, seq=500),
        dataclasses.replace(end, seq=3),
    ]
    assert ledger.missing(theirs) == []
    assert checked(rows[:6]).missing([*theirs, end]) == [end]


def test_heads_from_outside_that_are_malformed_or_not_signed_are_left_out():
    head = checked(some()).head()
    good = head.to_json()
    bad = [
        good | {"seq": 7},
        good | {"seq": 8.0},
        good | {"seq": True},
        good | {"more": 1},
        good | {"site": "x" * 1000},
        good | {"hash": None},
        {k: v for k, v in good.items() if k != "key"},
        "head",
        7,
        None,
        [good],
    ]
    assert read_heads(canonical_json([*bad, good, *bad])) == [head]
    for text in ("", "{}", "7", "nonsense", canonical_json(good), "[" * 100_000):
        assert read_heads(text) == []


def test_the_longest_head_of_each_site_and_key_is_kept():
    rows = some()
    mine = [checked(rows[:n]).head() for n in (2, 3, 8, 7)]
    theirs = checked(some(4, "clinic")).head()
    assert latest([*mine, theirs]) == [
        theirs,
        *sorted((mine[1], mine[2]), key=lambda head: head.key),
    ]
    assert latest([]) == []


def test_an_entry_taken_apart_and_put_together_is_the_same(tmp_path):
    with closing(Ledger(tmp_path / "ledger.sqlite", "ward")) as ledger:
        ledger.counts("a", 1, words="Grüße, 1e-05", delta=1e-5)
        entries = ledger.entries()
        assert [Row.of(entry).entry for entry in entries] == entries
        assert ledger.export() == "".join(Row.of(entry).line + "\n" for entry in entries)
        assert ledger.head() == Head("ward", entries[0]["public_key"], 2, *_end(entries))


def _end(entries):
    return entries[-1]["hash"], entries[-1]["signature"]
