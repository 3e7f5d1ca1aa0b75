"""Kits for tests: provisioned without the command line, on a clock that the test sets."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from fedaccord import accord as accords
from fedaccord import membership, provision
from fedaccord.accord import Accord
from fedaccord.client import enrol
from fedaccord.enrolment import Request
from fedaccord.kit import SiteKit
from fedaccord.provision import Kits

HEART = accords.load("heart")
HEART_FILE = accords.find("heart")
ADDRESSES = ["fed.example.org:8443", "203.0.113.7:8443"]
NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
SECONDS = int(NOW.timestamp())


def laid(root: Path, accord: Accord = HEART) -> Kits:
    """Kits as they are sent: no site has made its keys."""
    kits = Kits(root)
    provision.lay(kits, accord, ADDRESSES, 397, NOW, demo=False)
    return kits


def made(kits: Kits, name: str, now: int = SECONDS) -> Request:
    """A site's keys, made in its kit, and its request."""
    return enrol.init(SiteKit.read(kits.site(name)), now)


def granted(kits: Kits, request: Request, accord: Accord = HEART) -> str:
    """Grant a request; what was said of it."""
    return membership.grant(kits, accord, request, 397, NOW)[0]


def enrolled(root: Path, accord: Accord = HEART) -> Kits:
    """Kits of sites that have all made their keys and been granted."""
    kits = laid(root, accord)
    for name in accord.roster:
        granted(kits, made(kits, name), accord)
    return kits


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path from there."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
