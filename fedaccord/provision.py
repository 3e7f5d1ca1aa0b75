"""Provisioning: one kit for the coordinator and one a site, made once and then only added to."""

from __future__ import annotations

import ipaddress
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import tomlkit
from cryptography import x509
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fedaccord import __version__, authority, enrolment, keyfiles, keys, kit
from fedaccord.accord import Accord
from fedaccord.accord_task import OwnSection, TextSection
from fedaccord.authority import Key
from fedaccord.envelope import COORDINATOR
from fedaccord.errors import AccordError, KitError
from fedaccord.evidence import write_atomic
from fedaccord.kit import CoordinatorKit, Member

TEMPLATES = Path(__file__).resolve().parent / "templates"
# What a site's kit is sent with, by the template that it is made from.
SENT = {
    "site.toml.j2": kit.SITE,
    "README.md.j2": "README.md",
    "fedaccord-site.service.j2": "fedaccord-site.service",
    "compose.yaml.j2": "compose.yaml",
    "Dockerfile.j2": "Dockerfile",
    "dockerignore.j2": ".dockerignore",
}
DAYS, AUTHORITY_DAYS = 397, 3650
DEMO_ADDRESS = "127.0.0.1:8443"


@dataclass(frozen=True)
class Kits:
    """The folder of all kits of an accord."""

    root: Path

    @property
    def authority(self) -> Path:
        """The authority's folder, which nobody is sent."""
        return self.root / "authority"

    @property
    def coordinator(self) -> Path:
        """The coordinator's kit."""
        return self.root / COORDINATOR

    @property
    def requests(self) -> Path:
        """Where the sites' requests are looked for."""
        return self.root / "requests"

    def site(self, name: str) -> Path:
        """A site's kit, as it is sent."""
        return self.root / name

    def own(self) -> CoordinatorKit:
        """Read the coordinator's kit."""
        return CoordinatorKit.read(self.coordinator)

    def issuer(self) -> tuple[x509.Certificate, Key]:
        """Load the authority's certificate and key.

        Raises:
            KitError: they were taken away, as they should be between two provisionings.
        """
        file, key = self.authority / "ca.pem", self.authority / "ca.key"
        if not file.is_file() or not key.is_file():
            raise KitError(
                f"authority {self.authority}: ca.pem and ca.key are needed to issue a certificate. "
                "Put them back for as long as this takes."
            )
        return authority.read_certificate(file.read_bytes(), str(file)), keyfiles.load(key)


def lay(
    kits: Kits, accord: Accord, addresses: Sequence[str], days: int, now: datetime, demo: bool
) -> list[str]:
    """Make the authority, the coordinator's kit and one kit a site; what is there stays as it is.

    A site's policy is not written here: it is the site's room that knows how.

    Args:
        kits: where.
        accord: its roster says which sites.
        addresses: that the sites dial, "host:port"; none where the coordinator's kit is there.
        days: that the coordinator's certificate holds.
        now: the time, with its time zone.
        demo: whether all keys will be made here, which every kit then says.

    Returns:
        The kits that are new: "coordinator" and names of sites.

    Raises:
        KitError: a site with a reserved name; addresses that are missing or not those of the kit
            that is there; a kit for trying out that is to become a real one, or the reverse.
    """
    for name in accord.roster:
        if name in kit.TAKEN:
            raise KitError(
                f'sites: "{name}" is the name of a folder beside the kits '
                f"({', '.join(kit.TAKEN)}). Rename the site in the accord."
            )
    made = []
    if not (kits.coordinator / kit.HANDOVERS).is_file():  # the last that is written
        _lay_coordinator(kits, accord, addresses, days, now, demo)
        made.append(COORDINATOR)
    own = kits.own()
    if addresses and list(addresses) != own.addresses:
        raise KitError(
            f"--address {' '.join(addresses)}: {kits.coordinator / kit.COORDINATOR} has "
            f"{' '.join(own.addresses)}. Leave it out; to move, change that file and say: "
            f"fedaccord coordinator rotate {kits.coordinator}"
        )
    if demo != own.demo:
        was, remedy = ("with", "Give --demo") if own.demo else ("without", "Leave --demo out")
        raise KitError(f"--out {kits.root}: was made {was} --demo. {remedy}, or another --out.")
    made += [name for name in accord.roster if _lay_site(kits, accord, own, name)]
    return made


def _lay_coordinator(
    kits: Kits, accord: Accord, addresses: Sequence[str], days: int, now: datetime, demo: bool
) -> None:
    """Make the authority and the coordinator's kit; interrupted, the next call goes on."""
    toml = kits.coordinator / kit.COORDINATOR
    if not addresses and not toml.is_file():
        raise KitError(
            "--address is missing: where the sites reach the coordinator. Give one or more, like "
            "--address fed.example.org:8443."
        )
    for folder in (kits.authority, kits.coordinator):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (kits.authority / "ca.key").exists():
        keyfiles.create(kits.authority / "ca.key")
    if not (kits.authority / "ca.pem").exists():
        key = keyfiles.load(kits.authority / "ca.key")
        root = authority.found(f"FedAccord {accord.name}", key, AUTHORITY_DAYS, now)
        write_atomic(kits.authority / "ca.pem", authority.certificate_pem(root))
    if not toml.is_file():
        found = [kit.host_and_port(address) for address in addresses]
        here = all(host in ("127.0.0.1", "localhost") for host, _ in found)
        listen = f"{'127.0.0.1' if here else '0.0.0.0'}:{found[0][1]}"
        said = {"accord": accord.name, "addresses": addresses, "listen": listen, "demo": demo}
        write_atomic(toml, render("coordinator.toml.j2", said))
    own = kits.own()
    write_atomic(own.ca, (kits.authority / "ca.pem").read_bytes())
    for path, create in (
        (own.new_tls_key, keyfiles.create),
        (own.folder / kit.SIGNING, keys.create),
    ):
        if not path.exists():
            create(path)
    if not own.tls_cert.exists():
        write_atomic(own.tls_cert, server_certificate(kits, own, own.new_tls_key, days, now))
    if not (own.folder / kit.MEMBERS).exists():
        own.write_members({})
    write_atomic(own.folder / kit.HANDOVERS, "[]\n")


def server_certificate(
    kits: Kits, own: CoordinatorKit, key: Path, days: int, now: datetime
) -> bytes:
    """Issue the coordinator's certificate (PEM), for its addresses and the name "coordinator"."""
    hosts = [kit.host_and_port(address)[0] for address in own.addresses]
    public = keyfiles.load(key).public_key()
    issued = authority.issue(kits.issuer(), public, COORDINATOR, hosts, "server", days, now)
    return authority.certificate_pem(issued)


def _lay_site(kits: Kits, accord: Accord, own: CoordinatorKit, name: str) -> bool:
    """Write what a site's kit lacks; tell whether it is new."""
    folder = kits.site(name)
    new = not (folder / kit.SITE).exists()
    (folder / name).mkdir(parents=True, exist_ok=True)
    signing = keys.load(own.signing_key).public
    found = [kit.host_and_port(address)[0] for address in own.addresses]
    said = {
        "site": name,
        "accord": accord.name,
        "purpose": " ".join("".join(c if c.isprintable() else " " for c in accord.purpose).split()),
        "addresses": own.addresses,
        "coordinator_key": signing,
        "coordinator_fingerprint": enrolment.fingerprint(signing),
        "allowed": found if all(map(_numeric, found)) else [],
        "files": "".join(f", with {file}" for file in beside(accord, Path())),
        "version": __version__,
        "demo": own.demo,
    }
    files = {to: render(template, said) for template, to in SENT.items()}
    for file, text in (files | {"ca.pem": own.ca.read_text()}).items():
        if not (folder / file).exists():
            write_atomic(folder / file, text)
    return new


def _numeric(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def render(template: str, said: Mapping[str, object]) -> str:
    """Fill a template in; a name that it lacks is a fault of ours, and raised."""
    return _templates().get_template(template).render(said)


@cache
def _templates() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True
    )


def missing(kits: Kits, accord: Accord) -> list[str]:
    """List the sites whose key is not known yet."""
    members = kits.own().members()
    return [name for name in accord.roster if name not in members]


def pin_of(accord: Accord, members: Mapping[str, Member], name: str) -> str:
    """Return the key that is pinned for a site, or ""; in the accord, else by its first request.

    Raises:
        KitError: the two differ.
    """
    known = members[name].key if name in members else ""
    pin = accord.pins.get(name, known)
    if known and pin != known:
        raise KitError(
            f"sites[{name}].key = {pin[:12]}...: {kit.MEMBERS} has {known[:12]}... for the site. "
            "Put the pin back, or take the site off members.json and have it send its request."
        )
    return pin


def finish(kits: Kits, accord: Accord, file: Path) -> tuple[Accord, bool]:
    """Write the accord with every site's key into all kits, with the public files that it names.

    Args:
        kits: where; no site's key may be missing.
        accord: as `file` has it.
        file: the accord; its comments are kept.

    Returns:
        The accord that all must approve, and whether it differs from the one in the kits.

    Raises:
        KitError: a pin that is not the known one, or a public file that is missing.
        AccordError: an accord whose form keeps the pins from being written into it.
    """
    own = kits.own()
    members = own.members()
    pins = {name: pin_of(accord, members, name) for name in accord.roster}
    text = pinned(file.read_text(encoding="utf-8-sig"), pins)
    final = Accord.model_validate(tomllib.loads(text))
    before = own.accord_file.read_text() if own.accord_file.exists() else None
    for folder in (own.folder, *(kits.site(name) for name in accord.roster)):
        for name in beside(accord, file.parent):
            _copy(file.parent / name, folder / name)
        if not (folder / "accord.toml").exists() or (folder / "accord.toml").read_text() != text:
            write_atomic(folder / "accord.toml", text)
    return final, before != text


def pinned(text: str, pins: Mapping[str, str]) -> str:
    """Write sites' keys into an accord's text, and nothing else; comments and order are kept.

    Raises:
        AccordError: the text's form keeps it from being edited.
    """
    wanted = tomllib.loads(text)
    for site in wanted["sites"]:
        site["key"] = pins[site["name"]]
    file = tomlkit.parse(text)
    sites: Any = file["sites"]  # tables of their own, or inline ones in a list
    for table in sites:
        if "key" not in table:
            table["key"] = pins[table["name"]]
    after = tomlkit.dumps(file)
    try:
        same = tomllib.loads(after) == wanted
    except tomllib.TOMLDecodeError:
        same = False
    if not same:
        raise AccordError(
            "accord: [[sites]] cannot be edited in its present form. Write each site as a table "
            "of its own, or add its key by hand:\n"
            + "\n".join(f'{name}: key = "{key}"' for name, key in pins.items())
        )
    return after


def beside(accord: Accord, home: Path) -> list[str]:
    """List the public files that an accord names by a path seen from its own folder.

    They are held to a SHA-256 in the accord, so each end notices a changed one. Records
    (task.file) are never among them, and weights are named by a path of each machine.
    """
    task = accord.task
    files = []
    if isinstance(task, OwnSection) and task.public_file is not None:
        files.append(task.public_file)
    if isinstance(task, TextSection):
        tokenizer = f"{task.tokenizer}/tokenizer.json"
        if (home / tokenizer).is_file():
            files.append(tokenizer)
    return files


def _copy(source: Path, target: Path) -> None:
    if not source.is_file():
        raise KitError(
            f"task: the public file {source} that the accord names is missing. Put it beside the "
            "accord."
        )
    if source.resolve() == target.resolve():
        return
    if not target.exists() or target.read_bytes() != source.read_bytes():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
