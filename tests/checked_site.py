"""Two sites with kits, keys, policies and records of their own, and a coordinator that listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import tomlkit
from wards import OWN_TABLE

from fedaccord import accord as accords
from fedaccord import authority, keyfiles, keys, membership, provision
from fedaccord.client import enrol, policy_file
from fedaccord.client.check import Finding
from fedaccord.kit import CoordinatorKit, SiteKit
from fedaccord.objects import Store
from fedaccord.provision import Kits
from fedaccord.server.audit_log import AuditLog
from fedaccord.server.desks import Desks
from fedaccord.server.link_service import serve
from fedaccord.server.members import Members
from fedaccord.server.metrics import Metrics
from fedaccord.server.watch import Watch

NOW = datetime.now(UTC)
PLANTED = "Ada Byron"  # a subject's name in the records
ROWS = "".join(
    f"p{n},{ward},{'yes' if n % 3 else 'no'},{'male' if n % 2 else 'female'},{20 + n % 60},no\n"
    for n in range(60)
    for ward in ("north", "south")
    if n % 2 == (ward == "north")
).replace("p0,", f"{PLANTED},")
TABLE = f"patient,ward,again,sex,age,smoker\n{ROWS}"


def enrolled(root: Path) -> Kits:
    """Kits of sites north and south, whose policies approve the accord."""
    (root / "ours.toml").write_text(OWN_TABLE.replace("subjects = 40", "subjects = 20", 1))
    accord, kits = accords.load(root / "ours.toml"), Kits(root / "kits")
    provision.lay(kits, accord, ["127.0.0.1:1"], 397, NOW, demo=False)
    for name in accord.roster:
        request = enrol.init(SiteKit.read(kits.site(name)), int(NOW.timestamp()))
        membership.grant(kits, accord, request, 397, NOW)
    final, _ = provision.finish(kits, accord, root / "ours.toml")
    for name in final.roster:
        own = kits.site(name) / name
        (own / "policy.toml").unlink(missing_ok=True)
        policy_file.write_simulated(own / "policy.toml", final)
        (own / "data" / "wards").mkdir(parents=True)
        (own / "data" / "wards" / "wards.csv").write_text(TABLE)
    return kits


@contextmanager
def listening(kits: Kits, folder: Path) -> Iterator[int]:
    """A coordinator of these kits with run "ours-1": its port."""
    own = CoordinatorKit.read(kits.coordinator)
    here = own.model_copy(update={"listen": "127.0.0.1:0"})
    accord, key = accords.load(own.accord_file), keys.load(own.signing_key)
    audit = AuditLog(folder / "audit", key)
    members, store = Members(here, accord.pins), Store(folder / "spool")
    watch = Watch(audit, Metrics())
    server, port = serve(here, Desks(accord, "ours-1", members, key, store, 10**6, watch))
    try:
        yield port
    finally:
        server.stop(0).wait()
        audit.close()


def edit(file: Path, **keys: object) -> None:
    """Set keys of a TOML file."""
    text = tomlkit.parse(file.read_text())
    text.update(keys)
    file.write_text(tomlkit.dumps(text))


def issue(kits: Kits, kit: SiteKit, name: str = "north", days: int = 397, by=None) -> None:
    """Put another certificate into a kit."""
    key = keyfiles.load(kit.new_tls_key)
    made = authority.issue(by or kits.issuer(), key.public_key(), name, [], "client", days, NOW)
    kit.tls_cert.write_bytes(authority.certificate_pem(made))


def at(kit: SiteKit, port: int) -> SiteKit:
    """The kit with a coordinator on this machine."""
    return kit.model_copy(update={"coordinator": [f"127.0.0.1:{port}"]})


def fails(found: Finding, *words: str) -> None:
    """Hold a finding to failing with these words, and its remedy to naming a command."""
    assert found.state == "fail", found
    assert all(word in found.found for word in words), found
    assert "`" in found.remedy
