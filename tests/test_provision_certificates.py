"""Certificates: what X.509 libraries other than the one at work say of them."""

from __future__ import annotations

import contextlib
import ipaddress
import shutil
import ssl
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from hypothesis import given
from hypothesis import strategies as st
from kitted import ADDRESSES, NOW, granted, laid, made

from fedaccord import authority
from fedaccord.errors import KitError
from fedaccord.kit import host_and_port
from fedaccord.provision import Kits

KEY = authority.new_key()
ROOT = authority.found("FedAccord tests", KEY, 3650, NOW), KEY
TODAY = datetime.now(UTC)

names = st.from_regex(r"[a-z][a-z0-9-]{0,31}", fullmatch=True)
labels = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
domains = st.lists(labels, min_size=1, max_size=4).map(".".join)
hosts = domains.filter(lambda it: not it.split(".")[-1].isdigit()) | st.ip_addresses().map(str)


def written(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@given(name=names, found=st.lists(hosts, max_size=5, unique=True), port=st.integers(1, 65535))
def test_names_and_addresses_parse_back_from_a_certificate(
    name: str, found: list[str], port: int
) -> None:
    assert [host_and_port(written(host, port)) for host in found] == [(h, port) for h in found]
    issued = authority.issue(ROOT, KEY.public_key(), name, found, "server", 1, NOW)
    again = authority.read_certificate(authority.certificate_pem(issued), "it")
    assert sorted(authority.hosts(again)) == sorted({name, *found})
    assert authority.name_of(again) == name
    assert authority.fingerprint(again) == authority.fingerprint(issued)


@given(name=names, other=names)
def test_a_request_is_for_its_own_name_alone(name: str, other: str) -> None:
    pem = authority.ask(name, KEY)
    if name == other:
        assert authority.asked(pem, other) == KEY.public_key()
    else:
        with pytest.raises(KitError, match="A site asks for its own"):
            authority.asked(pem, other)


@pytest.mark.parametrize(
    "text",
    [
        *("", "fed.example.org", ":1", "fed.example.org:0", "a:65536", "a:08443", "a b:1", "-a:1"),
        *("a..b:1", "999.1.1.1:1", "::1:443", "[::1:443", "[203.0.113.7]:1", "[fe80::1%eth0]:1"),
        *("https://a:1", f"{'a' * 64}:1", "ä.org:1", "a:1 ", "a:-1", "a:1_0"),
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no address"):
        host_and_port(text)


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Kits:
    """Kits of one granted site."""
    kits = laid(tmp_path_factory.mktemp("certificates"))
    granted(kits, made(kits, "va"))
    return kits


def held(file: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(file.read_bytes())


def policy(kits: Kits, at: datetime) -> PolicyBuilder:
    return PolicyBuilder().store(Store([held(kits.authority / "ca.pem")])).time(at)


@pytest.mark.parametrize("name", ["coordinator", *ADDRESSES])
def test_the_coordinator_s_certificate_verifies_for_each_of_its_names(
    kits: Kits, name: str
) -> None:
    host = name.split(":")[0]
    subject: x509.GeneralName = x509.DNSName(host)
    if host[0].isdigit():
        subject = x509.IPAddress(ipaddress.ip_address(host))
    own = held(kits.coordinator / "tls.pem")
    chain = policy(kits, NOW).build_server_verifier(subject).verify(own, [])
    assert [it.subject for it in chain] == [own.subject, own.issuer]
    for wrong in (x509.DNSName("fed.example.com"), x509.DNSName("va")):
        with pytest.raises(VerificationError):
            policy(kits, NOW).build_server_verifier(wrong).verify(own, [])


def test_a_site_s_certificate_verifies_as_a_client_s_with_its_name_in_its_time(kits: Kits) -> None:
    own = held(kits.site("va") / "site.pem")
    for at in (NOW - timedelta(minutes=59), NOW, NOW + timedelta(days=396)):
        assert policy(kits, at).build_client_verifier().verify(own, []).subjects == [
            x509.DNSName("va")
        ]
    for at in (NOW - timedelta(minutes=61), NOW + timedelta(days=397, seconds=1)):
        with pytest.raises(VerificationError):
            policy(kits, at).build_client_verifier().verify(own, [])


def test_neither_end_can_play_the_other(kits: Kits) -> None:
    site, own = held(kits.site("va") / "site.pem"), held(kits.coordinator / "tls.pem")
    with pytest.raises(VerificationError):
        policy(kits, NOW).build_server_verifier(x509.DNSName("va")).verify(site, [])
    with pytest.raises(VerificationError):
        policy(kits, NOW).build_client_verifier().verify(own, [])


def test_another_authority_of_the_same_name_is_not_this_one(kits: Kits) -> None:
    key = authority.new_key()
    other = authority.found("FedAccord heart", key, 3650, NOW), key
    forged = authority.issue(other, key.public_key(), "va", [], "client", 397, NOW)
    assert forged.issuer == held(kits.authority / "ca.pem").subject
    with pytest.raises(VerificationError):
        policy(kits, NOW).build_client_verifier().verify(forged, [])


def test_what_the_authority_issued_cannot_issue(kits: Kits) -> None:
    key = authority.new_key()
    site = authority.issue(kits.issuer(), key.public_key(), "va", [], "client", 397, NOW)
    forged = authority.issue((site, key), key.public_key(), "hungary", [], "client", 397, NOW)
    with pytest.raises(VerificationError):
        policy(kits, NOW).build_client_verifier().verify(forged, [site])


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl here")
@pytest.mark.parametrize(
    ("file", "purpose", "good"),
    [
        ("va/site.pem", "sslclient", True),
        ("va/site.pem", "sslserver", False),
        ("coordinator/tls.pem", "sslserver", True),
        ("coordinator/tls.pem", "sslclient", False),
    ],
)
def test_openssl_agrees_on_chain_and_purpose(
    kits: Kits, file: str, purpose: str, good: bool
) -> None:
    command = ["openssl", "verify", "-x509_strict", "-attime", str(int(NOW.timestamp()))]
    command += ["-purpose", purpose, "-CAfile", str(kits.authority / "ca.pem")]
    done = subprocess.run([*command, str(kits.root / file)], capture_output=True, text=True)
    assert (done.returncode == 0) is good, done.stdout + done.stderr


def test_a_certificate_does_not_outlive_its_authority_and_none_is_issued_after_it() -> None:
    short = authority.found("FedAccord tests", KEY, 30, NOW), KEY
    issued = authority.issue(short, KEY.public_key(), "va", [], "client", 397, NOW)
    assert issued.not_valid_after_utc == NOW + timedelta(days=30)
    with pytest.raises(KitError, match="ran out on 2026-12-22"):
        authority.issue(short, KEY.public_key(), "va", [], "client", 397, NOW + timedelta(days=30))


# --- a handshake by Python's own TLS, on today's clock ------------------------------------------


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of three ends, by who issued to them and as what; today."""
    folder = tmp_path_factory.mktemp("ends")
    key = authority.new_key()
    ours = authority.found("FedAccord heart", key, 30, TODAY), key
    other_key = authority.new_key()
    other = authority.found("FedAccord heart", other_key, 30, TODAY), other_key
    (folder / "ca.pem").write_bytes(authority.certificate_pem(ours[0]))
    for file, by, name, usage, at in (
        ("coordinator", ours, "coordinator", "server", TODAY),
        ("va", ours, "va", "client", TODAY),
        ("stranger", other, "va", "client", TODAY),
        ("expired", ours, "va", "client", TODAY - timedelta(days=20)),
    ):
        end = authority.new_key()
        issued = authority.issue(by, end.public_key(), name, [], usage, 10, at)  # type: ignore[arg-type]
        data = authority.key_pem(end) + authority.certificate_pem(issued)
        (folder / f"{file}.pem").write_bytes(data)
    return folder


def handshake(ends: Path, server: str, client: str | None, name: str) -> str:
    """Let two ends greet each other in memory; the common name that the server sees."""
    front = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(ends / "ca.pem"))
    front.verify_mode = ssl.CERT_REQUIRED
    front.load_cert_chain(ends / f"{server}.pem")
    back = ssl.create_default_context(cafile=str(ends / "ca.pem"))
    if client:
        back.load_cert_chain(ends / f"{client}.pem")
    there, here = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = front.wrap_bio(there, here, server_side=True)
    two = back.wrap_bio(here, there, server_hostname=name)
    for _ in range(4):
        for end in (two, one):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    found = one.getpeercert()
    return dict(pair[0] for pair in found["subject"])["commonName"] if found else ""


def test_a_site_and_the_coordinator_shake_hands(ends: Path) -> None:
    assert handshake(ends, "coordinator", "va", "coordinator") == "va"


@pytest.mark.parametrize(
    ("server", "client", "name"),
    [
        ("coordinator", None, "coordinator"),
        ("coordinator", "stranger", "coordinator"),
        ("coordinator", "expired", "coordinator"),
        ("coordinator", "coordinator", "coordinator"),
        ("coordinator", "va", "va"),
        ("va", "va", "va"),
        ("stranger", "va", "va"),
    ],
)
def test_no_other_pair_does(ends: Path, server: str, client: str | None, name: str) -> None:
    with pytest.raises(ssl.SSLError):
        handshake(ends, server, client, name)
