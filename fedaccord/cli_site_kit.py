"""The commands of a site on its own keys: init makes them, rotate replaces them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedaccord.enrolment import Request

app = typer.Typer()
KitFolder = Annotated[Path, typer.Argument(metavar="KIT", help="The site's kit, with site.toml.")]


@app.command()
def init(kit: KitFolder) -> None:
    """Make this site's keys, and the request for its certificate; keys never leave."""
    from fedaccord import enrolment
    from fedaccord.client import enrol
    from fedaccord.kit import SiteKit

    own = SiteKit.read(kit)
    _show(kit, enrol.init(own, int(time.time())))
    print(f"the coordinator's key in site.toml: {enrolment.fingerprint(own.coordinator_key)}")


@app.command()
def rotate(
    kit: KitFolder,
    key: Annotated[
        bool, typer.Option("--key", help="Replace the identity key too, which signs the ledger.")
    ] = False,
) -> None:
    """Make a new TLS key, and a request for its certificate; --key: a new identity key as well."""
    from fedaccord.client import enrol
    from fedaccord.kit import SiteKit

    _show(kit, enrol.rotate(SiteKit.read(kit), int(time.time()), identity=key))
    if key:
        print("Until the request is granted, the coordinator refuses what the new key signs.")


def _show(kit: Path, request: Request) -> None:
    from fedaccord import enrolment

    print(
        f"{kit / enrolment.FILE}: send it to the coordinator. It holds no secret.\n"
        f"key {request.key}\n"
        f"read over the telephone: {enrolment.fingerprint(request.key)}\n"
        "The certificate that comes back goes here as site.pem."
    )
