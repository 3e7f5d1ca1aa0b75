"""The command `site join`: the long-lived process of a site."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer()
LOG = "logs/site.jsonl"


@app.command()
def join(
    kit: Annotated[Path, typer.Argument(metavar="KIT", help="The site's kit, with site.toml.")],
) -> None:
    """Dial the coordinator and answer what the policy allows, until it is stopped.

    Only the software that is installed here runs; no code comes in. SIGTERM or Ctrl-C stop it
    after the request under way, a second one at once; nothing is lost either way.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # before grpc is imported
    from fedaccord import journal
    from fedaccord.client.app import app as client_app
    from fedaccord.client.link import Attendant
    from fedaccord.kit import SiteKit
    from fedaccord.simulations import display

    own = SiteKit.read(kit)
    display.quiet()
    logging.getLogger("fedaccord.link").propagate = False  # `_say` tells what matters
    attendant = Attendant(own, client_app, _say)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: _stop(attendant))
    log = journal.to_file(own.site / LOG, own.name)
    try:
        attendant.run()
    finally:
        journal.close(log)
    _say("stopped")
    sys.stdout.flush()
    os._exit(0)  # threads of gRPC can hold the interpreter at its end; all that counts is on disk


def _say(words: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S}  {words}", flush=True)


def _stop(attendant: Any) -> None:
    if attendant.stopped.is_set():
        os._exit(1)
    # A handler runs in the middle of whatever this thread does, and may hold its locks.
    threading.Thread(target=attendant.stop, daemon=True).start()
