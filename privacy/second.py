"""The second place: where a site keeps its ledger's last head, away from the ledger itself.

A ledger that was cut, or replaced by an older copy, still has a chain without fault. The head in
the second place shows it. Keep it where the ledger's backup does not reach: on another disk, or in
a folder that is not restored together with it.
"""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

from fedaccord.errors import LedgerError
from fedaccord.evidence import canonical_json, write_atomic
from fedaccord.privacy.chain import Head


class SecondPlace:
    """A file that holds one head, which only moves forward."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Head | None:
        """Return the head, or None where there is no file yet.

        Raises:
            LedgerError: a file that holds no head, or one whose signature is not right.
        """
        try:
            head = Head(**json.loads(self.path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as fault:
            raise LedgerError(
                f"second place {self.path}: holds no head of a ledger ({fault}). Look at who "
                "changed it; `fedaccord ledger accept` keeps a new head there."
            ) from None
        if not head.valid:
            raise LedgerError(
                f"second place {self.path}: its head is not signed by the key that it names. Look "
                "at who changed it; `fedaccord ledger accept` keeps a new head there."
            )
        return head

    def advance(self, head: Head) -> None:
        """Keep a head, unless a later one is there: several processes may use one ledger."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            known = self.read()
            if known is None or head.seq > known.seq:
                self.replace(head)

    def replace(self, head: Head) -> None:
        """Keep a head whatever was there: an operator's decision."""
        write_atomic(self.path, canonical_json(head.to_json()) + "\n")
