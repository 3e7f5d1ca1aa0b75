"""Files of private keys: 0600 from their first byte, never overwritten, refused if others read."""

from __future__ import annotations

import os
from pathlib import Path

from fedaccord import authority
from fedaccord.authority import Key
from fedaccord.errors import KitError
from fedaccord.evidence import sync_folder, write_private


def create(path: Path) -> Key:
    """Make a TLS key in a new file of mode 0600, in a folder of mode 0700 if that is new.

    The file holds the whole key, or is not there if this is interrupted.

    Raises:
        FileExistsError: a file is there already; it is not overwritten.
    """
    key = authority.new_key()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_private(path, authority.key_pem(key))
    return key


def load(path: Path) -> Key:
    """Read a TLS key.

    Raises:
        KitError: no such file, one that others may read, or one that is no P-256 key.
    """
    try:
        mode, pem = path.stat().st_mode & 0o077, path.read_bytes()
    except FileNotFoundError:
        raise KitError(f"key {path}: no such file. Restore it, or rotate to a new one.") from None
    except OSError as fault:
        raise KitError(f"key {path}: cannot be read: {fault.strerror}. Mend it.") from None
    if os.name == "posix" and mode:
        raise KitError(f"key {path}: others may read it. Say: chmod 600 {path}")
    return authority.read_key(pem, str(path))


def pair(certificate: Path, key: Path) -> Path:
    """Find the key that a certificate is for: `key`, or the one that waits to replace it.

    A rotation writes the new key beside the old one, as NAME.next, and then the certificate: so the
    two that are read together belong together, whenever it is interrupted.

    Raises:
        KitError: neither of them, or a certificate that is missing; the line says what to do.
    """
    if not certificate.is_file():
        raise KitError(
            f"certificate {certificate}: no such file. Put the one here that the coordinator "
            "issued."
        )
    held = authority.read_certificate(certificate.read_bytes(), str(certificate))
    waiting = key.with_name(f"{key.name}.next")
    for path in (waiting, key):
        if path.exists() and authority.fits(held, load(path)):
            return path
    if not key.exists():
        load(key)
    raise KitError(
        f"certificate {certificate}: is for another key than {key}. Put the one here that was "
        "issued for the last request, or make a new request."
    )


def settle(certificate: Path, key: Path) -> Path:
    """Put the key that a certificate is for in its place, and free the place where the next waits.

    Returns:
        Where the next key waits until its certificate is there.
    """
    waiting = key.with_name(f"{key.name}.next")
    if waiting.exists() and certificate.is_file():
        held = authority.read_certificate(certificate.read_bytes(), str(certificate))
        if authority.fits(held, load(waiting)):
            os.replace(waiting, key)
    waiting.unlink(missing_ok=True)
    sync_folder(key.parent)
    return waiting
