"""Where the pictures of the task `fashion` come from: the system's package, else torchvision."""

from __future__ import annotations

import contextlib
import gzip
import io
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from fedaccord.errors import TaskError

FILES = tuple(
    f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")
)
SYSTEM = Path("/usr/share/datasets/fashion-mnist")
PACKAGE = "dataset-fashion-mnist"


def gather(folder: Path, progress: Callable[[int], None]) -> None:
    """Write the four files of Fashion-MNIST, unpacked, into an empty folder.

    Nothing is installed, and no root is needed. The first of these that works is taken; whoever
    calls holds the files to their SHA-256.

    | from | when |
    |---|---|
    | /usr/share/datasets/fashion-mnist | the Debian package dataset-fashion-mnist is installed |
    | `apt-get download`, unpacked with dpkg-deb | this is Debian or Ubuntu, with package lists |
    | torchvision.datasets.FashionMNIST | there is internet |

    Args:
        folder: to write to.
        progress: is told how many bytes have come so far.

    Raises:
        TaskError: none of them works.
        OSError: a disk that is full or cannot be written.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fashion-") as temporary:
        ways = (lambda _: SYSTEM, _apt, _torchvision)  # in this order, each only if needed
        places = (way(Path(temporary)) for way in ways)
        found = next((place for place in places if complete(place)), None)
        if found is None:
            raise TaskError(
                f"data fashion: neither apt-get nor torchvision could download it. Go online once, "
                f"install the system package {PACKAGE}, or copy the cache from a machine that has "
                "it."
            )
        for done, name in enumerate(FILES, 1):
            packed = found / f"{name}.gz"
            try:
                with gzip.open(packed) as source, (folder / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
            except (gzip.BadGzipFile, EOFError):
                raise TaskError(f"data fashion: {packed} is damaged. Fetch it again.") from None
            progress(done * 31_000_000 // len(FILES))


def complete(place: Path) -> bool:
    """Tell whether a folder has all four files."""
    return all((place / f"{name}.gz").is_file() for name in FILES)


def _apt(temporary: Path) -> Path:
    """Download and unpack the Debian package; the folder is empty if that does not work."""
    apt, dpkg = shutil.which("apt-get"), shutil.which("dpkg-deb")
    if apt is None or dpkg is None:
        return temporary
    _run([apt, "-q", "download", PACKAGE], temporary)
    for package in temporary.glob(f"{PACKAGE}_*.deb"):
        _run([dpkg, "-x", str(package), "unpacked"], temporary)
    return temporary / "unpacked" / SYSTEM.relative_to("/")


def _run(command: list[str], folder: Path) -> None:
    """Run a tool in a folder; whether it worked is seen from what it leaves there."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=900
        )


def _torchvision(temporary: Path) -> Path:
    """Let torchvision download it; the folder is empty if that does not work."""
    from torchvision.datasets import FashionMNIST

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the mirrors that it tries
            for train in (True, False):
                FashionMNIST(str(temporary), train=train, download=True)
    except (OSError, RuntimeError):  # no connection, or a file that is not the published one
        return temporary
    return temporary / "FashionMNIST" / "raw"
