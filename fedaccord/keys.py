"""A site's ed25519 signing key: made once at the site, kept 0600, never sent."""

from __future__ import annotations

import os
import re
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization as formats
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedaccord.errors import LedgerError
from fedaccord.evidence import write_private

# What is signed says what it is, so that no signature can be taken for another kind's.
CONTEXT = "fedaccord ledger v1\n"


class SigningKey:
    """One ed25519 key pair (RFC 8032): signatures are deterministic, and 64 bytes long."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        public = private.public_key()
        self.public = public.public_bytes(formats.Encoding.Raw, formats.PublicFormat.Raw).hex()

    def sign(self, words: str) -> str:
        """Sign a text; the signature is 128 hex digits."""
        return self._private.sign((CONTEXT + words).encode()).hex()

    def pem(self) -> bytes:
        """Serialise the private key (PKCS 8, PEM, not encrypted: the file's mode protects it)."""
        return self._private.private_bytes(
            formats.Encoding.PEM, formats.PrivateFormat.PKCS8, formats.NoEncryption()
        )


def signed(public: str, signature: str, words: str) -> bool:
    """Tell whether a signature of a text was made with the key of this public half.

    Both are lower-case hex: one signature has one spelling, so that no edit of it passes.
    """
    try:
        if not (re.fullmatch("[0-9a-f]{64}", public) and re.fullmatch("[0-9a-f]{128}", signature)):
            return False
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        key.verify(bytes.fromhex(signature), (CONTEXT + words).encode())
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def create(path: Path) -> SigningKey:
    """Make a key in a new file of mode 0600: the whole file, or none where it is interrupted.

    Raises:
        FileExistsError: a key is there already; it is not overwritten.
    """
    key = SigningKey(Ed25519PrivateKey.generate())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_private(path, key.pem())
    return key


def load(path: Path) -> SigningKey:
    """Read a key.

    Raises:
        LedgerError: no such file, one that others may read, or one that is no ed25519 key.
    """
    try:
        mode = path.stat().st_mode & 0o077
        private = formats.load_pem_private_key(path.read_bytes(), None)
    except FileNotFoundError:
        raise LedgerError(
            f"key {path}: no such file, and the ledger beside it is signed with it. Restore the "
            "key, or the ledger and its key together; a new key cannot sign for the old one."
        ) from None
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as fault:
        raise LedgerError(f"key {path}: cannot be used: {fault}. Restore the file.") from None
    if os.name == "posix" and mode:
        raise LedgerError(f"key {path}: others may read it. Say: chmod 600 {path}")
    if not isinstance(private, Ed25519PrivateKey):
        raise LedgerError(f"key {path}: is no ed25519 key. Restore the file.")
    return SigningKey(private)
