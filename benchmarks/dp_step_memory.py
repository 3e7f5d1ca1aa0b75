"""How far the memory of `benchmarks.dp_step`'s ways grows, each in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.dp_step_cases import CASES
from benchmarks.dp_step_methods import make
from fedaccord import devices

STEPS = 3
STATUS, PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def growth(case: str, way: str, clip: float) -> float:
    """Measure in a new process how far its resident set grows in three steps.

    It counts from a model, inputs and labels that are there already. The first step measures
    kernels, where a way does that, and that counts too.

    Args:
        case: name of a case.
        way: name of a way.
        clip: for it.

    Returns:
        Megabytes (2^20 bytes), from set-up to the peak; NaN where the system is not Linux.
    """
    if not PEAK.exists():
        return float("nan")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        return process.submit(_grown, case, way, clip).result()


def _grown(case: str, way: str, clip: float) -> float:
    devices.settle()
    steps = make(way, next(each for each in CASES if each.name == case), clip)
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what set-up freed
    PEAK.write_text("5", encoding="ascii")  # the peak counts from here (man 5 proc)
    before = _kilobytes("VmRSS")
    for _ in range(STEPS):
        steps.step()
        steps.clear()
    return (_kilobytes("VmHWM") - before) / 1024


def _kilobytes(key: str) -> int:
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])
