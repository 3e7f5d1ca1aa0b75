"""A site's own keys: made here, asked a certificate for, replaced; none of them ever leaves."""

from __future__ import annotations

import json
import os
from pathlib import Path

from fedaccord import authority, enrolment, keyfiles, keys
from fedaccord.client.policy import FILE as POLICY
from fedaccord.client.policy import SitePolicy, second_head
from fedaccord.enrolment import Request
from fedaccord.envelope import handover
from fedaccord.errors import KitError
from fedaccord.evidence import sync_folder, write_atomic
from fedaccord.keys import SigningKey
from fedaccord.kit import SiteKit
from fedaccord.privacy.ledger import Ledger


def init(kit: SiteKit, now: int) -> Request:
    """Make the site's TLS key and identity key where it has none, and its request.

    | there is | then |
    |---|---|
    | a key already | it is kept |
    | a request for these keys | it is kept, byte by byte |
    | a ledger without its key | refused |

    Args:
        kit: the site's.
        now: unix seconds.

    Raises:
        KitError: as above, or a key that others may read.
        LedgerError: an identity key that cannot be used.
    """
    if not kit.new_tls_key.exists():
        keyfiles.create(kit.new_tls_key)
    _finish(kit)
    if not kit.identity_key.exists():
        if (kit.site / "ledger.sqlite").exists():
            raise KitError(
                f"key {kit.identity_key}: no such file, and the ledger beside it is signed with "
                "it. Restore the key, or the ledger and its key together."
            )
        keys.create(kit.identity_key)
    return _request(kit, now)


def rotate(kit: SiteKit, now: int, identity: bool = False) -> Request:
    """Make a new TLS key and a request for it; the old one serves until the certificate is there.

    Args:
        kit: the site's.
        now: unix seconds.
        identity: also hand over to a new identity key, in the ledger and for the coordinator. Both
            handovers are signed with the old key before that is deleted; interrupted in between,
            the next `init` or `rotate` finishes it.

    Raises:
        KitError: a site that has no keys yet, or a key that others may read.
        LedgerError: a ledger that does not hold.
        PolicyError: a policy that is not valid, and so does not say where the ledger's head is.
    """
    if not kit.new_tls_key.exists() or not kit.identity_key.exists():
        raise KitError(
            f"kit {kit.folder}: has no keys to replace. Make them: fedaccord site init {kit.folder}"
        )
    _finish(kit)
    keyfiles.create(keyfiles.settle(kit.tls_cert, kit.new_tls_key))
    if identity:
        os.link(kit.identity_key, _before(kit))
        sync_folder(_before(kit).parent)
        ledger = _ledger(kit)
        try:
            ledger.rotate()
        finally:
            ledger.close()
        _finish(kit)
    return _request(kit, now)


def _waiting(kit: SiteKit) -> Path:
    """Where a new TLS key waits for its certificate."""
    return kit.new_tls_key.with_name("tls.key.next")


def _before(kit: SiteKit) -> Path:
    """Where the old identity key is kept until it has signed the handover."""
    return kit.folder / "keys" / "ledger.key.before"


def _finish(kit: SiteKit) -> None:
    """Sign the handover of a rotation that was begun, and let the old key go."""
    before = _before(kit)
    if not before.exists():
        return
    _ledger(kit).close()  # puts the key in force in its place
    old, new = keys.load(before), keys.load(kit.identity_key)
    if new.public != old.public:
        _hand_over(kit, old, new.public)
    before.unlink()
    sync_folder(before.parent)


def _hand_over(kit: SiteKit, old: SigningKey, new: str) -> None:
    steps = handovers(kit)
    if not steps or steps[-1]["key"] != new:
        steps.append(handover(kit.name, new, old))
        write_atomic(_handovers(kit), json.dumps(steps, indent=1) + "\n")


def _handovers(kit: SiteKit) -> Path:
    return kit.folder / "keys" / "handovers.json"


def handovers(kit: SiteKit) -> list[dict[str, str]]:
    """List the handovers from the site's first identity key to the one in force.

    Raises:
        KitError: a list that cannot be read.
    """
    file = _handovers(kit)
    try:
        return [dict(step) for step in json.loads(file.read_bytes())] if file.exists() else []
    except (ValueError, TypeError):
        raise KitError(f"{file}: is no list of handovers. Restore the file.") from None


def _ledger(kit: SiteKit) -> Ledger:
    """Open the site's ledger, or begin it, with its second place."""
    policy = kit.site / POLICY
    named = SitePolicy.read(policy).second_head if policy.exists() else second_head(kit.site)
    return Ledger(kit.site / "ledger.sqlite", kit.name, kit.site / named)


def _request(kit: SiteKit, now: int) -> Request:
    """Write the request for the keys as they are, unless it is there."""
    waiting = _waiting(kit)
    tls = keyfiles.load(waiting if waiting.exists() else kit.new_tls_key)
    own, steps = keys.load(kit.identity_key), handovers(kit)
    file, made = kit.folder / enrolment.FILE, now
    if file.exists():
        try:
            held = enrolment.read(file)
            if (held.site, held.key, held.handovers) == (kit.name, own.public, steps) and (
                authority.asked(held.csr, kit.name) == tls.public_key()
            ):
                return held
            made = max(now, held.made + 1)
        except KitError:
            pass  # it is of no use, and written anew
    csr = authority.ask(kit.name, tls)
    signature = own.sign(enrolment.words(kit.name, csr, own.public, made, steps))
    request = Request(
        site=kit.name, csr=csr, key=own.public, made=made, handovers=steps, signature=signature
    )
    write_atomic(file, json.dumps(request.model_dump(), indent=1) + "\n")
    return request
