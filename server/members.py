"""Who may come in over the link: every site's certificate and key, re-read when they change."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from cryptography import x509

from fedaccord.authority import fingerprint, name_of
from fedaccord.envelope import Refused, keys_led_to
from fedaccord.errors import KitError
from fedaccord.journal import event
from fedaccord.kit import MEMBERS, CoordinatorKit

log = logging.getLogger("fedaccord.link")
Handovers = Mapping[str, Sequence[Mapping[str, Any]]]


class Members:
    """The sites of an accord, from `members.json` and the accord's pins.

    | who comes | what happens |
    |---|---|
    | a certificate of the authority that is not the one in force for its name | refused |
    | a site that was revoked while the coordinator runs | refused from its next call on |
    | a certificate that expires while the connection is open | the same |
    | `members.json` that cannot be read any longer | what was read last holds; nobody is added |
    """

    def __init__(self, kit: CoordinatorKit, pins: Mapping[str, str]) -> None:
        """Read who is a member.

        Raises:
            KitError: no such file, or one that is no list of members.
        """
        self._kit, self._pins = kit, pins
        self._changed, self._members = -1, kit.members()

    def _refresh(self) -> None:
        try:
            changed = (self._kit.folder / MEMBERS).stat().st_mtime_ns
            if changed != self._changed:
                self._members, self._changed = self._kit.members(), changed
        except (OSError, KitError) as fault:
            event(log, "link.members-unreadable", logging.ERROR, fault=type(fault).__name__)

    def named(self, certificate: bytes) -> str:
        """Tell which site of the accord a certificate names, be it in force or not.

        Args:
            certificate: PEM, as the TLS handshake has checked it against the authority.

        Raises:
            Refused: "certificate": none of them.
        """
        try:
            name = name_of(x509.load_pem_x509_certificate(certificate))
        except ValueError:
            name = ""
        if name not in self._pins:
            raise Refused("certificate", f"{name[:40]!r} is no site of this accord.")
        return name

    def site_of(self, certificate: bytes) -> str:
        """Tell whose certificate it is that a connection was made with, if it may come in with it.

        Args:
            certificate: as for `named`.

        Raises:
            Refused: "certificate" or "revoked".
        """
        self._refresh()
        name, read = self.named(certificate), x509.load_pem_x509_certificate(certificate)
        member = self._members.get(name)
        if member is None:
            raise Refused("certificate", f"{name[:40]!r} is no site of this accord.")
        if member.revoked:
            raise Refused("revoked", f"Site {name} was revoked on {member.revoked}.")
        if datetime.now(UTC) > read.not_valid_after_utc:  # while the connection was open
            raise Refused("certificate", f"The certificate of site {name} has expired.")
        if fingerprint(read) != member.certificate:
            raise Refused(
                "certificate",
                f"The certificate of site {name} is not the one in force. If it was replaced, give "
                "the site its new site.pem.",
            )
        return name

    def key(self, site: str) -> str:
        """Return the public key that a site signs with: the pinned one, or a later one."""
        return self.keys(site)[-1]

    def keys(self, site: str) -> list[str]:
        """List a site's pinned key and the later ones that it handed over to."""
        member = self._members.get(site)
        return keys_led_to(self._pins[site], site, member.handovers if member else ())

    def handovers(self) -> Handovers:
        """Return what leads from the pins to the keys in force, by site, where there is any."""
        return {site: m.handovers for site, m in self._members.items() if m.handovers}
