"""The commands of the coordinator: who may join (revoke), and its own keys (rotate)."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

coordinator = typer.Typer(
    no_args_is_help=True, help="The coordinator of a deployment: its members and its keys."
)
Where = Annotated[
    Path, typer.Argument(metavar="ACCORD", help="kits/coordinator, or the accord.toml in it.")
]


@coordinator.command()
def revoke(
    accord: Where,
    site: Annotated[str, typer.Argument(help="The site that may join no more.")],
    reason: Annotated[str, typer.Option(help="Why, in one line: it stands in the report.")],
) -> None:
    """Let a site join no more; a coordinator that runs sees it at once."""
    from fedaccord import membership
    from fedaccord.kit import CoordinatorKit

    own = CoordinatorKit.read(accord)
    was = membership.revoke(own, site, reason, datetime.now(UTC))
    said = own.members()[site].revoked
    print(
        f"{site}: revoked ({said})."
        if was
        else f"{site}: was revoked before ({said}); nothing was changed."
    )


@coordinator.command()
def rotate(
    accord: Where,
    key: Annotated[bool, typer.Option("--key", help="Replace the signing key as well.")] = False,
    days: Annotated[int, typer.Option(min=1, max=3650, help="The certificate holds.")] = 397,
) -> None:
    """Make a new TLS key and certificate; --key: hand over to a new signing key too."""
    from fedaccord import authority, enrolment, membership
    from fedaccord.kit import CoordinatorKit
    from fedaccord.provision import Kits

    own = CoordinatorKit.read(accord)
    public = membership.rotate(Kits(own.folder.parent), days, datetime.now(UTC), identity=key)
    held = authority.read_certificate(own.tls_cert.read_bytes(), str(own.tls_cert))
    print(f"coordinator: certificate until {held.not_valid_after_utc:%Y-%m-%d}")
    if key:
        print(f"key {public}\nread over the telephone: {enrolment.fingerprint(public)}")
        print("Sites follow the handover from the key in their site.toml by themselves.")
    print("A coordinator that is running uses it after a restart.")
