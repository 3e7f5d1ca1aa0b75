"""Certificates of an accord: its authority, requests for one, and what it issues (X.509)."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as formats
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedaccord.errors import KitError

Key = ec.EllipticCurvePrivateKey
Usage = Literal["client", "server"]
EARLY = timedelta(hours=1)  # a certificate holds from before it was made: clocks differ
USAGES = {"client": ExtendedKeyUsageOID.CLIENT_AUTH, "server": ExtendedKeyUsageOID.SERVER_AUTH}


def new_key() -> Key:
    """Make a key for TLS on the curve P-256."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: Key) -> bytes:
    """Serialise a private key (PKCS 8, PEM, not encrypted: the file's mode protects it)."""
    return key.private_bytes(
        formats.Encoding.PEM, formats.PrivateFormat.PKCS8, formats.NoEncryption()
    )


def read_key(pem: bytes, where: str) -> Key:
    """Read a private key.

    Raises:
        KitError: no P-256 key.
    """
    try:
        key = formats.load_pem_private_key(pem, None)
    except (ValueError, TypeError) as fault:
        raise KitError(f"key {where}: cannot be used: {fault}. Restore the file.") from None
    if not isinstance(key, Key) or not isinstance(key.curve, ec.SECP256R1):
        raise KitError(f"key {where}: is no key on the curve P-256. Restore the file.")
    return key


def read_certificate(pem: bytes, where: str) -> x509.Certificate:
    """Read one certificate.

    Raises:
        KitError: none that can be read.
    """
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as fault:
        raise KitError(f"certificate {where}: cannot be read: {fault}. Restore the file.") from None


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """Serialise a certificate."""
    return certificate.public_bytes(formats.Encoding.PEM)


def fingerprint(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of a certificate's DER form, in hex: it names this one and no other."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def fits(certificate: x509.Certificate, key: Key) -> bool:
    """Tell whether a certificate is for a key."""
    return certificate.public_key() == key.public_key()


def hosts(certificate: x509.Certificate) -> list[str]:
    """List the DNS names and IP addresses that a certificate is for."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    addresses = found.get_values_for_type(x509.IPAddress)
    return [*found.get_values_for_type(x509.DNSName), *map(str, addresses)]


def name_of(certificate: x509.Certificate | x509.CertificateSigningRequest) -> str:
    """Return the common name, "" unless there is exactly one."""
    found = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if len(found) == 1 else ""


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def found(name: str, key: Key, days: int, now: datetime) -> x509.Certificate:
    """Make an authority's own certificate, which can issue to ends and to no other authority.

    Args:
        name: of the authority.
        key: its own.
        days: that it holds.
        now: the time, with its time zone.
    """
    public = key.public_key()
    return (
        x509.CertificateBuilder()
        .subject_name(_subject(name))
        .issuer_name(_subject(name))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLY)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )


def ask(name: str, key: Key) -> str:
    """Make a certificate request for a name (PEM), signed with the key that it is for."""
    request = x509.CertificateSigningRequestBuilder().subject_name(_subject(name))
    return request.sign(key, hashes.SHA256()).public_bytes(formats.Encoding.PEM).decode()


def asked(pem: str, name: str) -> ec.EllipticCurvePublicKey:
    """Check a certificate request and return the public key that it is for.

    Only the key is taken from it: names, usage and dates are the authority's to set.

    Raises:
        KitError: no request, one that its own key did not sign, for another name, or for a key
            that is not on P-256.
    """
    try:
        request = x509.load_pem_x509_csr(pem.encode())
        own, public, said = request.is_signature_valid, request.public_key(), name_of(request)
    except (ValueError, TypeError, x509.UnsupportedGeneralNameType) as fault:
        raise KitError(
            f"request of {name}: its csr cannot be read: {fault}. Have the site make a new one."
        ) from None
    if not own:
        raise KitError(
            f"request of {name}: its csr is not signed by the key that it is for. Have the site "
            "make a new one."
        )
    if said != name:
        raise KitError(
            f'request of {name}: its csr is for the name "{said[:40]}". A site asks for its own.'
        )
    if not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name != "secp256r1":
        raise KitError(f"request of {name}: its TLS key is not on the curve P-256. Use site init.")
    return public


def issue(
    authority: tuple[x509.Certificate, Key],
    public: ec.EllipticCurvePublicKey,
    name: str,
    addresses: Sequence[str],
    usage: Usage,
    days: int,
    now: datetime,
) -> x509.Certificate:
    """Issue a certificate to an end: a site (client) or the coordinator (server).

    | asked | then |
    |---|---|
    | for longer than the authority's own certificate holds | it ends with that |
    | by an authority whose certificate has run out | refused |

    Args:
        authority: its certificate and key.
        public: the key that it is for.
        name: common name, and the first DNS name.
        addresses: further DNS names and IP addresses.
        usage: "client" or "server".
        days: that it holds.
        now: the time, with its time zone.

    Raises:
        KitError: the authority's certificate has run out.
    """
    own, key = authority
    if now >= own.not_valid_after_utc:
        raise KitError(
            f"authority: its certificate ran out on {own.not_valid_after_utc:%Y-%m-%d}. Provision "
            "anew in another folder."
        )
    names = [_host(host) for host in dict.fromkeys([name, *addresses])]
    issuer = own.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    by = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer)
    return (
        x509.CertificateBuilder()
        .subject_name(_subject(name))
        .issuer_name(own.subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLY)
        .not_valid_after(min(now + timedelta(days=days), own.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([USAGES[usage]]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(by, critical=False)
        .sign(key, hashes.SHA256())
    )


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)
