"""A site's request for its certificate: what it says, and what its signature covers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedaccord.accord_section import Name
from fedaccord.errors import KitError
from fedaccord.evidence import canonical_json, sha256
from fedaccord.keys import signed

FILE = "request.json"
MOST = 256 * 1024  # bytes of a request
Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Request(BaseModel):
    """What a site sends once: its certificate request and the public half of its signing key.

    Attributes:
        site: its name in the roster.
        csr: certificate request for the site's TLS key (PEM).
        key: identity key in force, hex.
        made: unix seconds; larger than in the site's earlier requests.
        handovers: from the site's first identity key to the one in force.
        signature: by the key, over all of this.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    site: Name
    csr: str = Field(max_length=8192)
    key: Hex
    made: int = Field(ge=0, lt=2**53)
    handovers: list[dict[str, str]] = Field(max_length=100)
    signature: str = Field(pattern=r"^[0-9a-f]{128}$")


def words(site: str, csr: str, key: str, made: int, handovers: list[dict[str, str]]) -> str:
    """What a site signs of its request; no other kind of signed words begins like this."""
    said = {"site": site, "csr": sha256(csr), "key": key, "made": made, "handovers": handovers}
    return f"request\n{canonical_json(said)}"


def read(file: Path) -> Request:
    """Read a request and check that the key in it signed it.

    Raises:
        KitError: a file that is missing, too long, no request, or changed since it was signed.
    """
    try:
        with file.open("rb") as opened:
            data = opened.read(MOST + 1)
        if len(data) > MOST:
            raise KitError(f"request {file}: is longer than {MOST} bytes. Give a request.json.")
        request = Request.model_validate(json.loads(data))
    except OSError as fault:
        raise KitError(
            f"request {file}: {fault.strerror}. Give the request.json that a site sent."
        ) from None
    except ValidationError as faults:
        first = faults.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise KitError(
            f"request {file}: {where}: {first['msg']}. Have the site make a new one."
        ) from None
    except (ValueError, RecursionError):
        raise KitError(f"request {file}: is no JSON. Give the file as the site sent it.") from None
    text = words(request.site, request.csr, request.key, request.made, request.handovers)
    if not signed(request.key, request.signature, text):
        raise KitError(
            f"request {file}: was changed since {request.site} signed it. Have it sent again."
        )
    return request


def fingerprint(key: str) -> str:
    """Shorten a public key to what can be read over the telephone: 128 bits of its SHA-256.

    Whoever wants to pass another key off as this one has to find one with the same 128 bits.
    """
    mark = sha256(bytes.fromhex(key))[:32]
    return " ".join(mark[n : n + 4] for n in range(0, 32, 4))
