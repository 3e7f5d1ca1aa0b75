"""Who may join: a site's request granted, a site revoked, the coordinator's own keys replaced."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from fedaccord import authority, enrolment, keyfiles, keys, kit
from fedaccord.accord import Accord
from fedaccord.enrolment import Request
from fedaccord.envelope import COORDINATOR, handover, keys_led_to
from fedaccord.errors import KitError
from fedaccord.evidence import sync_folder, write_atomic
from fedaccord.kit import CoordinatorKit, Member
from fedaccord.provision import Kits, pin_of, server_certificate


def grant(
    kits: Kits, accord: Accord, request: Request, days: int, now: datetime
) -> tuple[str, bool]:
    """Check a site's request, issue its certificate, and remember its key.

    That the key is the site's own is for people to hear over the telephone; what is checked here:

    | a request | then |
    |---|---|
    | granted before, certificate still there | nothing is changed |
    | made before the one that was granted last | refused: it is an old one, sent again |
    | of a name that is not in the roster, or for another's key | refused |
    | with another key than the pinned one | refused, unless handovers lead from that to it |
    | whose handovers do not go on from those that are known | refused: somebody forked them |
    | of a revoked site | refused |

    Args:
        kits: where.
        accord: its roster, and the keys that it pins already.
        request: as `enrolment.read` checked it.
        days: that the certificate holds.
        now: the time, with its time zone.

    Returns:
        What was done in one line, and whether anything was.

    Raises:
        KitError: as in the table; nothing is changed then.
    """
    own, name = kits.own(), request.site
    members = own.members()
    if name not in accord.roster:
        raise KitError(
            f'request of {name}: accord "{accord.name}" has no such site. Its sites: '
            f"{', '.join(accord.roster)}."
        )
    known, file = members.get(name), kits.site(name) / "site.pem"
    held = known and known.made == request.made and in_force(known, name) == request.key
    if known and held and _issued(file) == known.certificate:
        return f"{name}: granted before; nothing was changed", False
    _refuse_old(request, known)
    pin = pin_of(accord, members, name) or request.key
    _refuse_key(request, pin, known)
    public = authority.asked(request.csr, name)
    _refuse_shared(kits, accord, request, public)
    issued = authority.issue(kits.issuer(), public, name, [], "client", days, now)
    write_atomic(file, authority.certificate_pem(issued))
    members[name] = Member(
        key=pin,
        certificate=authority.fingerprint(issued),
        handovers=request.handovers,
        made=request.made,
    )
    own.write_members(members)
    return (
        f"{name}: certificate until {issued.not_valid_after_utc:%Y-%m-%d}, key {request.key}\n"
        f"  read over the telephone: {enrolment.fingerprint(request.key)}"
    ), True


def _issued(file: Path) -> str:
    """Return the fingerprint of the certificate in a kit, "" where there is none."""
    if not file.is_file():
        return ""
    return authority.fingerprint(authority.read_certificate(file.read_bytes(), str(file)))


def _refuse_old(request: Request, known: Member | None) -> None:
    if known and known.revoked:
        raise KitError(
            f"request of {request.site}: the site is revoked ({known.revoked}). If it may come "
            f'back, set its "revoked" in {kit.MEMBERS} to "" first.'
        )
    if known and request.made < known.made:
        when = datetime.fromtimestamp(known.made, UTC)
        raise KitError(
            f"request of {request.site}: is older than the one of {when:%Y-%m-%d %H:%M:%S} UTC "
            "that was granted. Give the site's last request."
        )


def _refuse_key(request: Request, pin: str, known: Member | None) -> None:
    """Hold a request's key to the pinned one and the handovers that are known."""
    led = keys_led_to(pin, request.site, request.handovers)
    before = keys_led_to(pin, request.site, known.handovers) if known else [pin]
    if led[-1] != request.key or led[: len(before)] != before:
        raise KitError(
            f"request of {request.site}: its key {request.key[:12]}... is not the one in force, "
            f"{before[-1][:12]}..., and no handover leads from that to it. If the site lost its "
            f"key: take its pin out of the accord and its entry out of {kit.MEMBERS}, and have all "
            "sites approve the accord that comes of it."
        )


def _refuse_shared(
    kits: Kits, accord: Accord, request: Request, tls: EllipticCurvePublicKey
) -> None:
    """Refuse a key that is another's, identity key or TLS key."""
    own = kits.own()
    theirs = {COORDINATOR: {keys.load(own.signing_key).public}}
    theirs[COORDINATOR] |= {step["key"] for step in own.handovers()}
    for name, pin in accord.pins.items():
        theirs.setdefault(name, set()).add(pin)
    for name, member in own.members().items():
        theirs.setdefault(name, set()).update({member.key, *(s["key"] for s in member.handovers)})
    files = {name: kits.site(name) / "site.pem" for name in accord.roster}
    files |= {COORDINATOR: own.tls_cert, "authority": own.ca}
    for name, file in files.items():
        if name != request.site and file.is_file():
            held = authority.read_certificate(file.read_bytes(), str(file))
            if held.public_key() == tls:
                theirs.setdefault(name, set()).add(request.key)
    for name, held_keys in theirs.items():
        if name != request.site and request.key in held_keys:
            raise KitError(
                f"request of {request.site}: its key is that of {name}. Each makes its own: have "
                "the site say `fedaccord site init` in its own kit."
            )


def revoke(own: CoordinatorKit, site: str, reason: str, now: datetime) -> bool:
    """Let a site join no more; a coordinator that is running sees it without a restart.

    Args:
        own: the coordinator's kit.
        site: a member.
        reason: one line, which the report shows.
        now: the time, with its time zone.

    Returns:
        Whether it was a member until now.

    Raises:
        KitError: no such member, or no reason.
    """
    members = own.members()
    if site not in members:
        known = ", ".join(members) or "none yet"
        raise KitError(f'revoke: no member "{site}". Members: {known}.')
    words = " ".join("".join(c if c.isprintable() else " " for c in reason).split())
    if not words or len(words) > 200:
        raise KitError("--reason must be 1 to 200 characters: it stands in the report. Change it.")
    if members[site].revoked:
        return False
    said = f"{now:%Y-%m-%d}: {words}"
    own.write_members(members | {site: members[site].model_copy(update={"revoked": said})})
    return True


def rotate(kits: Kits, days: int, now: datetime, identity: bool = False) -> str:
    """Make the coordinator a new TLS key and certificate, for the addresses in its kit.

    Interrupted at any point, certificate and key that are read together still belong together.

    Args:
        kits: where; the authority's key must be there.
        days: that the certificate holds.
        now: the time, with its time zone.
        identity: also hand over to a new signing key; the handover is signed with the old one.

    Returns:
        The signing key in force, hex.

    Raises:
        KitError: as `Kits.own` and `Kits.issuer`.
    """
    own = kits.own()
    certificate, key = own.tls_cert, own.new_tls_key
    waiting = keyfiles.settle(certificate, key)
    keyfiles.create(waiting)
    write_atomic(certificate, server_certificate(kits, own, waiting, days, now))
    os.replace(waiting, key)
    sync_folder(own.folder)
    if identity:
        _hand_over(own)
    return keys.load(own.signing_key).public


def _hand_over(own: CoordinatorKit) -> None:
    path, held = own.folder / kit.SIGNING, own.signing_key
    waiting = path.with_name(f"{kit.SIGNING}.next")
    if held == waiting:  # a handover that was interrupted after it counted
        os.replace(waiting, path)
    waiting.unlink(missing_ok=True)
    old, new = keys.load(path), keys.create(waiting)
    steps = [*own.handovers(), handover(COORDINATOR, new.public, old)]
    write_atomic(own.folder / kit.HANDOVERS, json.dumps(steps, indent=1) + "\n")
    os.replace(waiting, path)
    sync_folder(own.folder)


def in_force(member: Member, site: str) -> str:
    """Return the identity key that a member's handovers lead to, hex."""
    return keys_led_to(member.key, site, member.handovers)[-1]


def waiting(kits: Kits) -> list[Request]:
    """Read the requests that lie beside the kits and were not granted yet.

    One that was granted is passed over even where the site's folder has been sent away since: a new
    certificate would shut out the site that has the old one.

    Raises:
        KitError: one that is no request, or was changed since it was signed.
    """
    members = kits.own().members()
    found = [enrolment.read(file) for file in sorted(kits.requests.glob("*.json"))]
    return [one for one in found if one.site not in members or one.made > members[one.site].made]
