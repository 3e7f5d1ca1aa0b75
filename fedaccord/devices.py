"""Where and with what a model is trained: the device, its threads, and how memory is kept."""

from __future__ import annotations

import ctypes
import os
import sys
import zlib
from typing import TYPE_CHECKING

from fedaccord.errors import AccordError

if TYPE_CHECKING:
    import torch

DEVICE = "FEDACCORD_DEVICE"  # a site's own choice; an accord has no say in it
THREADED = 50_000  # weights from which a second thread pays; below, handing work over costs more
# Of glibc's mallopt (malloc.h): no block gets pages of its own, and freed ones are kept.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def settle(weights: int = 0) -> None:
    """Prepare this process for training: threads, and an allocator that keeps its pages.

    By default glibc returns every large temporary tensor to the system and asks for it again, which
    costs up to a third of a step. Elsewhere than on glibc nothing is changed.

    Args:
        weights: of the model; small models run on one thread.
    """
    import torch

    torch.set_num_threads(1 if weights < THREADED else os.cpu_count() or 1)
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_M_TOP_PAD, 2**26)


def device(site: str, precision: str) -> torch.device:
    """Choose where a site's records pass through a model.

    | machine | device |
    |---|---|
    | FEDACCORD_DEVICE is set | that one |
    | CUDA | one of its GPUs, by the site's name: several sites share one |
    | Apple's MPS, precision other than float64, which it does not have | it |
    | others | the CPU |

    Args:
        site: name of the site.
        precision: of the passes, as in the accord.

    Raises:
        AccordError: FEDACCORD_DEVICE names a device that is not there.
    """
    import torch

    if asked := os.environ.get(DEVICE, ""):
        try:
            there = torch.device(asked)
            torch.zeros(1, device=there)
        except (RuntimeError, AssertionError, NotImplementedError) as fault:
            first = (str(fault) or type(fault).__name__).splitlines()[0][:200]
            raise AccordError(
                f'{DEVICE} = "{asked}" cannot be used: {first}. Say cpu, cuda, cuda:1 or mps, or '
                "leave it out."
            ) from None
        return there
    if torch.cuda.is_available():
        return torch.device("cuda", zlib.crc32(site.encode()) % torch.cuda.device_count())
    if precision != "float64" and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
