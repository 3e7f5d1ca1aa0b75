"""What a kit says: a site's site.toml, the coordinator's coordinator.toml and members.json."""

from __future__ import annotations

import ipaddress
import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
)

from fedaccord import keyfiles
from fedaccord.accord_section import Name
from fedaccord.errors import KitError
from fedaccord.evidence import write_atomic
from fedaccord.faults import Fault, lines, toml

SITE, COORDINATOR = "site.toml", "coordinator.toml"
MEMBERS, HANDOVERS, SIGNING = "members.json", "handovers.json", "signing.key"
TAKEN = ("authority", "coordinator", "requests")  # folders beside the sites' kits
_LABEL = r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)"


def host_and_port(text: str, lowest: int = 1) -> tuple[str, int]:
    """Take an address apart: "fed.example.org:8443", "203.0.113.7:8443", "[2001:db8::7]:8443".

    Args:
        text: the address.
        lowest: port that is allowed; 0 stands for any that is free.

    Raises:
        Fault: no such address.
    """
    host, _, port = text.rpartition(":")
    if not re.fullmatch(r"0|[1-9][0-9]{0,4}", port) or not lowest <= int(port) <= 65535:
        raise Fault(
            f'{toml(text)} is no address: a port from {lowest} to 65535 stands after ":". Write '
            'one like "fed.example.org:8443".'
        )
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        kind = ipaddress.ip_address(bare).version
        if "%" not in bare and (kind == 6) == (bare != host):
            return str(ipaddress.ip_address(bare)), int(port)
    except ValueError:
        named = re.fullmatch(rf"{_LABEL}(\.{_LABEL})*", host) and len(host) <= 253
        if named and not host.rpartition(".")[2].isdigit():
            return host, int(port)
    raise Fault(
        f"{toml(text)} is no address: before the port stands a DNS name, an IPv4 address, or an "
        'IPv6 address in [ ]. Write one like "fed.example.org:8443".'
    )


def _address(text: str) -> str:
    host_and_port(text)
    return text


def _listen(text: str) -> str:
    host_and_port(text, lowest=0)
    return text


def _scrape(text: str) -> str:
    return _listen(text) if text else text


def _key(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise Fault(
            f"coordinator_key = {toml(text)} must be 64 characters of 0-9 and a-f. Copy it whole "
            "from the kit as it was sent."
        )
    return text


def _beside(text: str) -> str:
    if not text or Path(text).is_absolute() or ".." in Path(text).parts:
        raise Fault(f"accord = {toml(text)} must name a file inside the kit. Change it.")
    return text


def _several(given: Any) -> Any:
    return [given] if isinstance(given, str) else given


Address = Annotated[str, AfterValidator(_address)]
Addresses = Annotated[list[Address], Field(min_length=1, max_length=16)]


class _Kit(BaseModel):
    """A folder with a TOML file of its own: no unknown key, no silent conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    _folder: Path = PrivateAttr(default=Path())

    @property
    def folder(self) -> Path:
        """Where the kit lies."""
        return self._folder

    @property
    def ca(self) -> Path:
        """The authority's certificate, which both ends hold the other's to."""
        return self.folder / "ca.pem"

    @classmethod
    def _of(cls, file: Path) -> Self:
        if not file.is_file():
            raise KitError(
                f"kit {file.parent}: there is no {file.name} in it. Give a folder that "
                "`fedaccord provision` made."
            )
        try:
            data = tomllib.loads(file.read_text(encoding="utf-8-sig"))
            kit = cls.model_validate(data)
        except tomllib.TOMLDecodeError as fault:
            raise KitError(f"{file} is not TOML: {fault}. Mend that line.") from None
        except UnicodeDecodeError:
            raise KitError(f"{file} is not UTF-8 text. Save it as UTF-8.") from None
        except OSError as fault:
            raise KitError(f"{file} cannot be read: {fault.strerror}. Mend it.") from None
        except ValidationError as faults:
            found = lines(faults, data, cls, file.name, "docs/provision.md explains it")
            raise KitError("\n".join(f"{file}: {line}" for line in found)) from None
        kit._folder = file.parent
        return kit


class SiteKit(_Kit):
    """A site's kit: where the coordinator is, whose key it has, what this site keeps.

    Attributes:
        name: of the site, in the accord's roster and in its certificate.
        coordinator: addresses, tried in turn.
        coordinator_key: public half of the key that the coordinator's envelopes lead back to, hex.
        data: folder of the site's own data sets; "" is `data` in the site's folder.
        accord: file in the kit.
        max_request_mb: most that one request may hold, in 10^6 bytes.
    """

    name: Name
    coordinator: Annotated[Addresses, BeforeValidator(_several)]
    coordinator_key: Annotated[str, AfterValidator(_key)]
    data: str = ""
    accord: Annotated[str, AfterValidator(_beside)] = "accord.toml"
    max_request_mb: int = Field(default=2048, ge=1, le=10**6)

    @classmethod
    def read(cls, folder: Path) -> SiteKit:
        """Read a site's kit, from its folder.

        Raises:
            KitError: no kit, or a site.toml that is not valid; one line a fault.
        """
        return cls._of(folder / SITE)

    @property
    def site(self) -> Path:
        """The site's own folder: policy, ledger, releases, logs."""
        return self.folder / self.name

    @property
    def accord_file(self) -> Path:
        """The accord as it was granted, with every site's key pinned."""
        return self.folder / self.accord

    @property
    def tls_cert(self) -> Path:
        """The certificate that the authority issued to this site."""
        return self.folder / "site.pem"

    @property
    def new_tls_key(self) -> Path:
        """The TLS key as `site init` makes it."""
        return self.folder / "keys" / "tls.key"

    @property
    def tls_key(self) -> Path:
        """The TLS key that the certificate is for.

        Raises:
            KitError: there is none, or no certificate yet.
        """
        return keyfiles.pair(self.tls_cert, self.new_tls_key)

    @property
    def identity_key(self) -> Path:
        """The site's one signing key: its ledger's and its envelopes'."""
        return self.site / "ledger.key"


class Member(BaseModel):
    """What the coordinator knows of one site.

    Attributes:
        key: the identity key that the accord pins, hex.
        certificate: SHA-256 of the DER form of its TLS certificate in force, hex.
        handovers: from the pinned key to the one in force.
        revoked: "", or the date and the reason.
        made: when its last request was made, unix seconds; an older one is refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    key: str = Field(pattern=r"^[0-9a-f]{64}$")
    certificate: str = Field(pattern=r"^[0-9a-f]{64}$")
    handovers: list[dict[str, str]] = Field(default=[], max_length=100)
    revoked: str = ""
    made: int = Field(default=0, ge=0, lt=2**53)


class CoordinatorKit(_Kit):
    """The coordinator's kit: where it listens, its keys, and who its members are.

    Attributes:
        listen: address of this machine; port 0 stands for any that is free.
        addresses: those that the sites dial, which its certificate is for.
        join_wait: seconds that it waits for sites before the first round.
        max_reply_mb: most that one reply may hold, in 10^6 bytes; 0: from the accord's model.
        metrics: "", or the address where metrics of the system are served.
        demo: whether all keys were made in one place, for trying out.
    """

    listen: Annotated[str, AfterValidator(_listen)]
    addresses: Addresses
    join_wait: float = Field(default=60.0, ge=0, le=86_400)
    max_reply_mb: int = Field(default=0, ge=0, le=10**6)
    metrics: Annotated[str, AfterValidator(_scrape)] = ""
    demo: bool = False

    @classmethod
    def read(cls, where: Path) -> CoordinatorKit:
        """Read the coordinator's kit.

        | `where` is | the kit is |
        |---|---|
        | a folder with coordinator.toml | that |
        | the folder of all kits | `coordinator` in it |
        | an accord's file | the file's folder, else `kits/coordinator` beside it |

        Raises:
            KitError: no kit, or a coordinator.toml that is not valid; one line a fault.
        """
        start = where if where.is_dir() else where.parent
        for folder in (start, start / "coordinator", start / "kits" / "coordinator"):
            if (folder / COORDINATOR).is_file():
                return cls._of(folder / COORDINATOR)
        raise KitError(
            f"coordinator {where}: there is no {COORDINATOR} there. Give the folder "
            "kits/coordinator or the accord.toml in it, which `fedaccord provision` made."
        )

    @property
    def accord_file(self) -> Path:
        """The accord with every site's key pinned."""
        return self.folder / "accord.toml"

    @property
    def tls_cert(self) -> Path:
        """The coordinator's certificate."""
        return self.folder / "tls.pem"

    @property
    def new_tls_key(self) -> Path:
        """The TLS key as provisioning makes it."""
        return self.folder / "tls.key"

    @property
    def tls_key(self) -> Path:
        """The TLS key that the certificate is for.

        Raises:
            KitError: there is none, or no certificate.
        """
        return keyfiles.pair(self.tls_cert, self.new_tls_key)

    @property
    def signing_key(self) -> Path:
        """The signing key in force: while a rotation is interrupted, the one that it handed to."""
        from fedaccord import keys

        waiting = self.folder / f"{SIGNING}.next"
        last = self.handovers()[-1:]
        if last and waiting.exists() and keys.load(waiting).public == last[0].get("key"):
            return waiting
        return self.folder / SIGNING

    def handovers(self) -> list[dict[str, str]]:
        """List the handovers from its first signing key to the one in force."""
        return _listed(_json(self.folder / HANDOVERS), self.folder / HANDOVERS)

    def members(self) -> dict[str, Member]:
        """Read who may join, by site; it is edited while the coordinator runs.

        Raises:
            KitError: a members.json that is missing or not valid: nobody may join by it.
        """
        file = self.folder / MEMBERS
        found = _json(file)
        try:
            if not isinstance(found, dict):
                raise TypeError("it is no table of sites")
            return {str(name): Member.model_validate(said) for name, said in found.items()}
        except (ValidationError, TypeError) as fault:
            first = (
                f"{'.'.join(map(str, fault.errors()[0]['loc']))}: {fault.errors()[0]['msg']}"
                if isinstance(fault, ValidationError)
                else fault
            )
            raise KitError(f"{file}: {first}. Restore the file.") from None

    def write_members(self, members: dict[str, Member]) -> None:
        """Write who may join, whole or not at all."""
        said = {name: members[name].model_dump() for name in sorted(members)}
        write_atomic(self.folder / MEMBERS, json.dumps(said, indent=1) + "\n")


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as fault:
        said = fault.strerror if isinstance(fault, OSError) else "is no JSON"
        raise KitError(f"{file}: {said}. Restore the file.") from None


def _listed(found: Any, file: Path) -> list[dict[str, str]]:
    whole = isinstance(found, list) and all(
        isinstance(step, dict) and step.keys() == {"key", "signature"}
        and all(isinstance(word, str) for word in step.values())
        for step in found
    )  # fmt: skip
    if not whole:
        raise KitError(f"{file}: is no list of handovers. Restore the file.")
    return list(found)
