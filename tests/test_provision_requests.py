"""A site's request for its certificate: which are granted, and how each forged one is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as formats
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID
from kitted import (
    HEART,
    SECONDS,
    contents,
    granted,
)

from fedaccord import accord as accords
from fedaccord import authority, enrolment, keyfiles, keys, membership
from fedaccord.enrolment import Request
from fedaccord.envelope import handover
from fedaccord.errors import KitError
from fedaccord.provision import Kits

NAMES = list(HEART.roster)


def signed(kits: Kits, key: keys.SigningKey, **changes: object) -> Request:
    """A request of va, changed and signed by a key."""
    said = enrolment.read(kits.site("va") / "request.json").model_dump() | {"key": key.public}
    said |= changes
    text = enrolment.words(*(said[k] for k in ("site", "csr", "key", "made", "handovers")))
    return Request.model_validate(said | {"signature": key.sign(text)})


def own_key(kits: Kits) -> keys.SigningKey:
    return keys.load(kits.site("va") / "va" / "ledger.key")


def another(kits: Kits) -> keys.SigningKey:
    path = kits.root / "another.key"
    return keys.load(path) if path.exists() else keys.create(path)


def csr(name: str, key: rsa.RSAPrivateKey) -> str:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return request.sign(key, hashes.SHA256()).public_bytes(formats.Encoding.PEM).decode()


def broken_csr(kits: Kits) -> str:
    """A request for va whose own signature does not hold: one byte of its key was changed."""
    pem = authority.ask("va", authority.new_key())
    der = bytearray(x509.load_pem_x509_csr(pem.encode()).public_bytes(formats.Encoding.DER))
    der[-1] ^= 1
    import base64

    body = base64.encodebytes(bytes(der)).decode()
    return f"-----BEGIN CERTIFICATE REQUEST-----\n{body}-----END CERTIFICATE REQUEST-----\n"


LATER = SECONDS + 60
FORGED: dict[str, tuple[Callable[[Kits], Request], str]] = {
    "another's key, no handover": (
        lambda kits: signed(kits, another(kits), made=LATER),
        "is not the one in force",
    ),
    "another's key, at the second of the one that was granted": (
        lambda kits: signed(kits, another(kits)),
        "is not the one in force",
    ),
    "a handover signed by the new key itself": (
        lambda kits: signed(
            kits,
            another(kits),
            made=LATER,
            handovers=[handover("va", another(kits).public, another(kits))],
        ),
        "no handover leads from that to it",
    ),
    "a handover for another site": (
        lambda kits: signed(
            kits,
            another(kits),
            made=LATER,
            handovers=[handover("hungary", another(kits).public, own_key(kits))],
        ),
        "no handover leads from that to it",
    ),
    "sent again": (lambda kits: signed(kits, own_key(kits), made=SECONDS - 1), "is older than"),
    "no site of the accord": (
        lambda kits: signed(kits, another(kits), site="oslo", made=LATER),
        'accord "heart" has no such site',
    ),
    "a csr for another name": (
        lambda kits: signed(
            kits, own_key(kits), made=LATER, csr=authority.ask("hungary", authority.new_key())
        ),
        'its csr is for the name "hungary"',
    ),
    "a csr that its key did not sign": (
        lambda kits: signed(kits, own_key(kits), made=LATER, csr=broken_csr(kits)),
        "is not signed by the key that it is for",
    ),
    "a csr for a key of another kind": (
        lambda kits: signed(
            kits, own_key(kits), made=LATER, csr=csr("va", rsa.generate_private_key(65537, 2048))
        ),
        "is not on the curve P-256",
    ),
    "no csr": (lambda kits: signed(kits, own_key(kits), made=LATER, csr="-"), "cannot be read"),
    "another site's identity key": (
        lambda kits: signed(
            kits,
            keys.load(kits.site("hungary") / "hungary" / "ledger.key"),
            made=LATER,
            handovers=[
                handover(
                    "va", enrolment.read(kits.site("hungary") / "request.json").key, own_key(kits)
                )
            ],
        ),
        "its key is that of hungary",
    ),
    "another site's TLS key": (
        lambda kits: signed(
            kits,
            own_key(kits),
            made=LATER,
            csr=authority.ask("va", keyfiles.load(kits.site("hungary") / "keys" / "tls.key")),
        ),
        "its key is that of hungary",
    ),
    "the coordinator's key": (
        lambda kits: signed(
            kits,
            keys.load(kits.coordinator / "signing.key"),
            made=LATER,
            handovers=[
                handover("va", keys.load(kits.coordinator / "signing.key").public, own_key(kits))
            ],
        ),
        "its key is that of coordinator",
    ),
}


@pytest.mark.parametrize("way", FORGED)
def test_a_forged_request_is_refused_in_one_line_and_changes_nothing(kits: Kits, way: str) -> None:
    forge, said = FORGED[way]
    request = forge(kits)
    before = contents(kits.root)
    with pytest.raises(KitError, match=said) as refused:
        granted(kits, request)
    assert "\n" not in str(refused.value)
    assert contents(kits.root) == before


def test_a_request_that_goes_on_from_the_pinned_key_is_granted(kits: Kits) -> None:
    """The forgeries above differ from this one in what they say alone."""
    new = another(kits)
    steps = [handover("va", new.public, own_key(kits))]
    fresh = authority.ask("va", authority.new_key())
    granted(kits, signed(kits, new, made=LATER, handovers=steps, csr=fresh))
    member = kits.own().members()["va"]
    assert membership.in_force(member, "va") == new.public
    assert member.key == accords.load(kits.own().accord_file).pins["va"]


@pytest.mark.parametrize("field", ["site", "csr", "key", "made", "handovers", "signature"])
def test_a_request_with_any_field_changed_is_no_longer_signed(kits: Kits, field: str) -> None:
    import json

    file = kits.site("va") / "request.json"
    said = json.loads(file.read_text())
    other = json.loads((kits.site("hungary") / "request.json").read_text())
    said[field] = {"made": LATER, "handovers": [{"key": "", "signature": ""}]}.get(
        field, other[field]
    )
    file.write_text(json.dumps(said))
    with pytest.raises(KitError, match="was changed since"):
        enrolment.read(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "Have the site make a new one"),
        ("{}", "site: Field required"),
        (" " * 300_000, "is longer than"),
    ],
)
def test_a_file_that_is_no_request_is_refused_in_one_line(
    tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "request.json").write_text(text)
    with pytest.raises(KitError, match=said) as refused:
        enrolment.read(tmp_path / "request.json")
    assert "\n" not in str(refused.value)
