"""`python -m benchmarks.accounting`: what epsilon costs to compute, kept steps against none.

Each row is a plan; times in seconds, the best of three. "alone" is dp-accounting's PLDAccountant
from nothing; "kept" is `accounting.epsilon` of another length of the same plan, whose step is kept;
"ratio" is the one over the other. "odometer" is the time of one reading, the mean over readings.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from dp_accounting.pld import PLDAccountant
from rich.console import Console
from rich.table import Table

from fedaccord.privacy import accounting
from fedaccord.privacy.plan import PrivacyPlan

# sigma, q, steps a round, rounds
PLANS = [(2.0108, 0.1, 10, 22), (2.0, 0.1, 5, 1000), (4.0, 0.01, 50, 1000)]
DELTA = 1e-5
READINGS = 20


def seconds(work: Callable[[], object], times: int = 3) -> float:
    """Time a piece of work, the best of so many."""
    best = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best


def forget() -> None:
    """Empty what the accountant keeps."""
    for kept in (accounting._epsilon, accounting._loss, accounting._step):
        kept.cache_clear()


def alone(plan: PrivacyPlan) -> None:
    """Compute a plan's epsilon with dp-accounting and nothing kept."""
    PLDAccountant().compose(accounting.dp_event(plan.event())).get_epsilon(DELTA)


def first(plan: PrivacyPlan) -> None:
    """Compute a plan's epsilon with ours and nothing kept."""
    forget()
    plan.epsilon()


def main() -> None:
    """Print the table."""
    table = Table("sigma", "q", "rounds x steps", "alone", "first", "kept", "ratio", "odometer")
    for sigma, q, steps, rounds in PLANS:
        plan = PrivacyPlan("va", 130, rounds, steps, q, sigma, 1.0, DELTA)

        slow = seconds(partial(alone, plan))
        whole = seconds(partial(first, plan))
        kept = min(seconds(partial(plan.epsilon, rounds - less), 1) for less in (1, 2, 3))
        began = time.perf_counter()
        for reading in range(READINGS):
            plan.odometer(max(1, rounds * reading // READINGS))
        odometer = (time.perf_counter() - began) / READINGS
        cells = (slow, whole, kept, slow / kept, odometer)
        shown = [f"{cell:.2f}" for cell in cells[:3]] + [f"{cells[3]:.1f}", f"{cells[4]:.2f}"]
        table.add_row(f"{sigma:g}", f"{q:g}", f"{rounds} x {steps}", *shown)
    Console().print(table)


if __name__ == "__main__":
    main()
