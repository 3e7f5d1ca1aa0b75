"""What makes a record evidence: canonical JSON, digests, durable writes and the build's hash."""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

ROOMS = (
    "client",
    "conformance",
    "fairness",
    "models",
    "privacy",
    "reports",
    "server",
    "simulations",
    "strategies",
)


def canonical_json(value: Any) -> str:
    """Serialise a value so that equal values give equal text (sorted keys, no spaces, no NaN).

    Raises:
        ValueError: NaN or infinity, which JSON does not have; write "infinite" instead.
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def sha256(data: bytes | str) -> str:
    """Return the SHA-256 of bytes or UTF-8 text, in hex."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def digest(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON, in hex."""
    return sha256(canonical_json(value))


def sync_folder(folder: Path) -> None:
    """Make a folder's entries (a new or renamed file) survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_private(path: Path, data: bytes) -> None:
    """Write a new file of mode 0600 from its first byte on: the whole of it, or none.

    Raises:
        FileExistsError: a file is there already; it is not overwritten.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.unlink(missing_ok=True)  # of a process that was killed and had the same number
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # unlike a rename, it does not replace what is there
    finally:
        temporary.unlink()
    sync_folder(path.parent)


def write_atomic(path: Path, data: bytes | str, mode: int = 0o666) -> None:
    """Write a whole file or none of it: a temporary file, fsync, rename, fsync of the folder.

    Args:
        path: the file; its folder is made where there is none.
        data: all that it will hold.
        mode: of a new file, less the umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(temporary, "wb", opener=lambda name, how: os.open(name, how, mode)) as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """Append one line and return only when it is on the disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


@cache
def build_hash() -> str:
    """Hash FedAccord's own source files as they lie on this machine.

    It names the code that a site says it ran. It is no proof that it ran: a site's operator can
    change both.
    """
    package = Path(__file__).resolve().parent
    root = package if (package / "strategies").is_dir() else package.parent
    files = {f"fedaccord/{file.name}": file for file in package.glob("*.py")}
    for room in ROOMS:
        files |= {f"fedaccord/{room}/{file.name}": file for file in (root / room).glob("*.py")}
    return digest({name: sha256(file.read_bytes()) for name, file in files.items()})
