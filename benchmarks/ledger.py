"""`python -m benchmarks.ledger`: how long a site's ledger takes as it grows.

Each figure is processor time of one process, the least of a few tries: what a site spends, not
what its disk makes it wait. "signatures" is the time that the signatures alone take, one
after the other: no full verification can take less.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedaccord.keys import signed
from fedaccord.privacy.budget import Cap
from fedaccord.privacy.chain import stamp
from fedaccord.privacy.keeping import read_export
from fedaccord.privacy.ledger import Ledger, Terms
from fedaccord.privacy.log import SignedLog
from fedaccord.privacy.plan import PrivacyPlan

PLAN = PrivacyPlan("ward", 100, 1000, 1, 1.0, 40.0, 1.0, 1e-5)
TERMS = Terms(Cap(100.0, 1e-5), "f" * 64)


def took(work: Callable[[], object], tries: int) -> float:
    """Measure the least processor time of some tries, in seconds."""
    best = float("inf")
    for _ in range(tries):
        begin = time.process_time()
        work()
        best = min(best, time.process_time() - begin)
    return best


def fill(place: tuple[Path, str, Path], length: int) -> None:
    """Write a ledger of so many entries in one transaction."""
    with closing(SignedLog(*place)) as log, log.transaction():
        while len(log.read()) < length:
            number = len(log.read())
            log.append(("INTENT", "RELEASE")[number % 2], f"run-{number // 100}", round=number)


def measure(length: int, tries: int) -> list[float]:
    """Measure one length: signatures, verify, open, intend, release; in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "ledger.sqlite", "ward", Path(folder) / "head.json"
        fill(place, length)
        export = Path(folder) / "export.jsonl"
        with closing(Ledger(*place)) as ledger:
            export.write_text(ledger.export())
        chain = read_export(export)
        assert len(chain) == length
        key = chain.key
        words = [(row.signature, stamp("ward", n, row.hash)) for n, row in enumerate(chain.rows, 1)]
        figures = [
            took(lambda: [signed(key, *pair) for pair in words], tries),
            took(lambda: read_export(export), tries),
            took(lambda: Ledger(*place).close(), tries),
        ]
        with closing(Ledger(*place)) as ledger:
            ledger.reserve("a", PLAN, 1, TERMS)
            rounds, done = iter(range(1, 1000)), iter(range(1, 1000))
            figures.append(
                took(lambda: ledger.intend("a", next(rounds), PLAN, TERMS.accord), tries)
            )
            figures.append(took(lambda: ledger.release("a", next(done)), tries))
    return figures


def main() -> None:
    """Measure each length and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--tries", type=int, default=3, help="of each figure (default 3)")
    asked = parser.parse_args()
    table = Table(title="seconds of processor time")
    columns = ("entries", "signatures", "verify", "ratio", "open", "intend", "release")
    for column in columns:
        table.add_column(column, justify="right")
    for length in asked.entries:
        signatures, verify, *others = measure(length, asked.tries)
        cells = [signatures, verify, verify / signatures, *others]
        table.add_row(
            str(length), *(f"{cell:.4f}" if cell < 1 else f"{cell:.2f}" for cell in cells)
        )
    Console().print(table)


if __name__ == "__main__":
    main()
