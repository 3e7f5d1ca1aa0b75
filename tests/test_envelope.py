"""The envelope: one changed field breaks its signature, and nothing that is none is read."""

import json
from dataclasses import asdict, fields, replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fedaccord.envelope import (
    AHEAD,
    MOST_TEXT,
    SKEW,
    Envelope,
    Refused,
    handover,
    key_in_force,
    keys_led_to,
    opened,
    read,
    refuse_stale,
    refuse_unexpected,
    seal,
)
from fedaccord.evidence import canonical_json
from fedaccord.keys import SigningKey, signed

KEYS = [SigningKey(Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32)) for n in range(4)]
KEY = KEYS[0]
RIGHT = Envelope(
    run="run-1",
    round=3,
    sender="north",
    recipient="coordinator",
    direction="reply",
    kind="train",
    message="m1",
    nonce=7,
    expires=1000.5,
    body="b" * 64,
    accord="a" * 64,
    model="d" * 64,
    shown="",
)
NAMES = [field.name for field in fields(Envelope)]
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
envelopes = st.builds(
    Envelope,
    **dict.fromkeys(NAMES, words)
    | {
        "round": st.integers(0, 2**31 - 1),
        "nonce": st.integers(0, 2**63 - 1),
        "expires": st.floats(0, 2**52, allow_nan=False),
    },
)


def reason(text: str, signature: str | None = None) -> str:
    """Why a text is refused; as if KEY had signed it, unless a signature is given."""
    with pytest.raises(Refused) as found:
        opened(text, signature or KEY.sign(f"envelope\n{text}"), KEY.public)
    return found.value.reason


def changed(**change: object) -> str:
    """The right envelope's text with other values, which a dataclass would not check."""
    return canonical_json(asdict(RIGHT) | change)


@given(envelopes)
def test_a_sealed_envelope_opens_to_itself(envelope: Envelope) -> None:
    sealed = seal(envelope, KEY)
    assert opened(sealed.text, sealed.signature, KEY.public) == envelope


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_field_breaks_the_signature(name: str) -> None:
    value = getattr(RIGHT, name)
    other = value + 1 if isinstance(value, int | float) else f"{value}x"
    signature = seal(RIGHT, KEY).signature
    assert reason(replace(RIGHT, **{name: other}).text(), signature) == "signature"


@given(st.integers(0, 127), st.integers(1, 15))
def test_a_changed_digit_of_the_signature_breaks_it(place: int, by: int) -> None:
    sealed = seal(RIGHT, KEY)
    digits = list(sealed.signature)
    digits[place] = f"{int(digits[place], 16) ^ by:x}"
    assert reason(sealed.text, "".join(digits)) == "signature"


def test_another_key_or_another_kind_of_words_is_no_signature_of_an_envelope() -> None:
    text = RIGHT.text()
    assert reason(text, KEYS[1].sign(f"envelope\n{text}")) == "signature"
    for kind in ("audit\n1\n", "handover of north\n", ""):
        assert reason(text, KEY.sign(f"{kind}{text}")) == "signature"


@pytest.mark.parametrize("name", NAMES)
def test_a_field_other_than_expected_is_named_as_the_reason(name: str) -> None:
    wanted = asdict(RIGHT)
    refuse_unexpected(RIGHT, wanted)
    with pytest.raises(Refused) as found:
        refuse_unexpected(RIGHT, wanted | {name: "something else"})
    assert found.value.reason == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        '"envelope"',
        "{}",
        "[" * 4000,
        RIGHT.text() + " ",
        RIGHT.text() + RIGHT.text(),
        json.dumps(asdict(RIGHT)),  # spaces
        RIGHT.text().replace('"round":3', '"round":3,"round":3'),
        RIGHT.text().replace('"round":3', '"round":03'),
        RIGHT.text().replace('"round":3', '"round":3e0'),
        RIGHT.text().replace("run-1", r"run\u002d1"),
        RIGHT.text().replace("1000.5", "NaN"),
        RIGHT.text().replace("1000.5", "1e999"),
        changed(extra=1),
        canonical_json({k: v for k, v in asdict(RIGHT).items() if k != "model"}),
        changed(round=True),
        changed(round=3.0),
        changed(round="3"),
        changed(round=-1),
        changed(round=2**31),
        changed(nonce=-1),
        changed(nonce=2**63),
        changed(nonce=10**3000),
        changed(expires="1000.5"),
        changed(expires=None),
        changed(expires=-1),
        changed(expires=10**3000),
        changed(body=None),
        changed(body=["b" * 64]),
        changed(run={"run": "run-1"}),
        changed(run="r" * MOST_TEXT),
    ],
)
def test_what_is_no_envelope_is_refused_though_its_sender_signed_it(text: str) -> None:
    assert reason(text) == "envelope"


def test_a_long_text_is_refused_before_its_signature_is_looked_at() -> None:
    assert reason("x" * 5000, "") == "envelope"


@given(st.text(max_size=200) | st.binary(max_size=20).map(repr) | st.lists(words).map(json.dumps))
def test_any_text_is_an_envelope_or_refused(text: str) -> None:
    try:
        assert read(text).text() == text
    except Refused as refusal:
        assert refusal.reason == "envelope"


@pytest.mark.parametrize(
    ("last", "now", "expected"),
    [
        (6, 1000.0, ""),
        (7, 1000.0, "nonce"),  # a replay
        (8, 1000.0, "nonce"),  # out of order
        (6, 1000.5 + SKEW - 0.01, ""),
        (6, 1000.5 + SKEW + 0.01, "expired"),
        (6, 1000.5 - AHEAD - SKEW + 0.01, ""),
        (6, 1000.5 - AHEAD - SKEW - 0.01, "clock"),
    ],
)
def test_a_nonce_counts_up_and_a_time_runs_out(last: int, now: float, expected: str) -> None:
    if not expected:
        refuse_stale(RIGHT, last, now)
        return
    with pytest.raises(Refused) as found:
        refuse_stale(RIGHT, last, now)
    assert found.value.reason == expected


def steps(*by: int) -> list[dict[str, str]]:
    """Handovers of "north" to keys 1, 2, ..., each signed by the key of this number."""
    return [handover("north", KEYS[n + 1].public, KEYS[signer]) for n, signer in enumerate(by)]


def test_a_chain_of_handovers_leads_to_its_last_key() -> None:
    assert key_in_force(KEY.public, "north", []) == KEY.public
    assert keys_led_to(KEY.public, "north", steps(0, 1, 2)) == [key.public for key in KEYS]
    # A key that was pinned later needs no step before it.
    assert key_in_force(KEYS[1].public, "north", steps(0, 1, 2)) == KEYS[3].public
    back = [*steps(0), handover("north", KEY.public, KEYS[1])]
    assert key_in_force(KEY.public, "north", back) == KEY.public


@pytest.mark.parametrize(
    ("chain", "last"),
    [
        (steps(1, 1, 2), 0),  # the new key signs for itself
        (steps(0, 0, 2), 1),  # a key that was handed over signs again
        (steps(0, 1, 1), 2),
        (steps(3, 1, 2), 0),
        ([*steps(0), {}, *steps(0, 1)[1:]], 1),
        ([{"key": KEYS[1].public, "signature": None}], 0),
        ([{"key": None, "signature": ""}], 0),
        ([handover("south", KEYS[1].public, KEY)], 0),  # of another name
    ],
)
def test_a_step_that_the_key_before_did_not_sign_ends_the_chain(chain: list, last: int) -> None:
    assert key_in_force(KEY.public, "north", chain) == KEYS[last].public


def test_a_chain_is_followed_a_hundred_steps_and_no_further() -> None:
    chain = [handover("north", KEYS[1 - n % 2].public, KEYS[n % 2]) for n in range(101)]
    assert len(keys_led_to("0" * 64, "north", chain)) == 1
    assert key_in_force(KEY.public, "north", [*steps(0, 1)[:1]]) == KEYS[1].public
    assert signed(KEYS[0].public, chain[100]["signature"], f"handover of north\n{KEYS[1].public}")
