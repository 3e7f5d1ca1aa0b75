"""The task `fashion`: 70,000 pictures of clothes, 28 x 28 pixels, at simulated shops.

Pictures and labels are Zalando's. Shops (label skew by a Dirichlet distribution) and scanners are
simulated, and the audit by scanner says nothing about people. The source's 10,000 test pictures
are the declared public set; its 60,000 training pictures are the shops' private ones.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy.special import gammaincinv

from fedaccord import data
from fedaccord.errors import TaskError
from fedaccord.evidence import sha256
from fedaccord.simulations.scanners import SCANNERS, draw, noise_of, scan, share
from fedaccord.tasks import Records, SiteData, TaskSpec

SHAPE = (1, 28, 28)
CLASSES = (
    "t-shirt or top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
TEST_SHARE = 5  # one picture in five of a shop is held out
MAX_SHOPS = 1000
# Share of a shop's pictures that went through scanner b: from the first shop to the last.
SCANNER_B = (0.2, 0.8)
SALT = 0xFA5


def idx(raw: bytes, name: str) -> npt.NDArray[np.uint8]:
    """Read an array of bytes in the IDX format (LeCun's, of MNIST).

    | bytes | result |
    |---|---|
    | 0 0 8 d, then d sizes of 4 bytes (big end first), then that many bytes | uint8, those sizes |
    | anything else, or cut short | TaskError |

    Args:
        raw: the file's bytes.
        name: of the file, for the error.

    Raises:
        TaskError: bytes that are not such an array.
    """
    remedy = "Fetch it again: fedaccord data fetch fashion."
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        raise TaskError(f"fashion: {name} is not an IDX array of bytes. {remedy}")
    start = 4 + 4 * raw[3]
    sizes = [int.from_bytes(raw[at : at + 4], "big") for at in range(4, start, 4)]
    if len(raw) - start != math.prod(sizes):
        raise TaskError(
            f"fashion: {name} has {len(raw) - start} bytes of content, not {math.prod(sizes)} as "
            f"its sizes {sizes} say. {remedy}"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(sizes)


@cache
def _part(name: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Read pictures and labels of a part ("train" or "t10k") of the source once."""
    files = [f"{name}-{what}-ubyte" for what in ("images-idx3", "labels-idx1")]
    pictures, labels = (idx(data.read("fashion", file), file) for file in files)
    return pictures.reshape(-1, *SHAPE), labels.astype(np.int64)


def _scaled(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    return (pixels / 127.5 - 1).astype(np.float32)


def shares(shops: int, alpha: float) -> npt.NDArray[np.float64]:
    """Divide each class among the shops: (classes, shops), rows sum to 1, Dirichlet(alpha).

    Each share is a gamma variable by the inverse of its distribution function, from the SHA-256 of
    class and shop; so it is the same on every machine and with every library. The split is that of
    Hsu, Qi and Brown, Measuring the Effects of Non-Identical Data Distribution, 2019, section 3.
    """
    uniform = [
        [max(share(f"fashion/share/{kind}/{shop}"), 2.0**-53) for shop in range(shops)]
        for kind in range(len(CLASSES))
    ]
    drawn = gammaincinv(alpha, np.array(uniform))
    parts: npt.NDArray[np.float64] = drawn / drawn.sum(axis=1, keepdims=True)
    return parts


def divide(
    labels: npt.NDArray[np.int64], parts: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int64], ...]:
    """Give every picture to one shop, class by class, in an order fixed by its number alone.

    Args:
        labels: (n,), index of a class.
        parts: (classes, shops), as `shares` makes them.

    Returns:
        The numbers of each shop's pictures, in that order.
    """
    keys = np.array([sha256(f"fashion/{number}") for number in range(len(labels))])
    order = np.argsort(keys, kind="stable")
    mine: list[list[npt.NDArray[np.int64]]] = [[] for _ in range(parts.shape[1])]
    for kind, row in enumerate(parts):
        of_kind = order[labels[order] == kind]
        cuts = np.rint(np.cumsum(row)[:-1] * len(of_kind)).astype(np.int64)
        for shop, piece in enumerate(np.split(of_kind, cuts)):
            mine[shop].append(piece)
    out = [np.concatenate(pieces) for pieces in mine]
    return tuple(piece[np.argsort(keys[piece], kind="stable")] for piece in out)


@cache
def _divided(shops: int, alpha: float) -> tuple[npt.NDArray[np.int64], ...]:
    return divide(_part("train")[1], shares(shops, alpha))


class Fashion:
    """Simulated shops that share 60,000 pictures of clothes; the label is the kind of garment.

    Each picture is a subject of its own: nobody is in it.

    Citation: Xiao, Rasul and Vollgraf, Fashion-MNIST, 2017, arXiv:1708.07747, MIT licence.
    """

    needs = ("fashion",)

    def __init__(self, shops: int = 5, alpha: float = 1.0) -> None:
        """Declare the shops; nothing is read.

        Args:
            shops: how many sites there are, 1 to 1000: shop-1, shop-2 ...
            alpha: of the Dirichlet distribution over shops, 0.05 to 1000; the smaller, the more a
                shop's classes differ from another's.

        Raises:
            ValueError: an option out of its bounds.
        """
        if isinstance(shops, bool) or not isinstance(shops, int) or not 1 <= shops <= MAX_SHOPS:
            raise ValueError(f"shops = {shops} is not a whole number from 1 to {MAX_SHOPS}")
        if isinstance(alpha, bool | str) or not 0.05 <= alpha <= 1000:
            raise ValueError(f"alpha = {alpha} is not a number from 0.05 to 1000")
        self._alpha = float(alpha)
        self.sites = tuple(f"shop-{place}" for place in range(1, shops + 1))
        self.spec = TaskSpec(
            name="fashion",
            features=("pixels",),
            classes=CLASSES,
            attributes={"scanner": SCANNERS},
            source=(
                "Fashion-MNIST (arXiv:1708.07747), MIT licence, Zalando SE: H. Xiao, K. Rasul and "
                f"R. Vollgraf. The {shops} shops (Dirichlet {self._alpha:g} over classes) and the "
                "two scanners are simulated. Public set: the source's 10,000 test pictures."
            ),
            shape=SHAPE,
        )

    def site(self, name: str) -> SiteData:
        """Read a shop's pictures: four in five to train on, one in five to evaluate on.

        Shop, split, scanner and noise are fixed by the SHA-256 of a picture's number; the shop
        depends on its class besides.

        Raises:
            TaskError: an unknown shop, or pictures that are not on this machine.
        """
        if name not in self.sites:
            known = f"{self.sites[0]} to {self.sites[-1]}"
            raise TaskError(f'fashion: site "{name}" is not one of {known}. Rename it.')
        place, count = self.sites.index(name), len(self.sites)
        numbers = _divided(count, self._alpha)[place]
        low, high = SCANNER_B
        portion = low + (high - low) * (place / (count - 1) if count > 1 else 0.5)
        cut = len(numbers) // TEST_SHARE
        return SiteData(
            train=_records(numbers[cut:], portion), test=_records(numbers[:cut], portion)
        )

    def public(self, rows: int, seed: int) -> npt.NDArray[np.float32]:
        """Draw proxy pictures from the source's test pictures, each through a scanner."""
        return draw(_scaled(_part("t10k")[0]), rows, seed, SALT)

    def labelled(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Read the public pictures with labels: each once, every other one through scanner b."""
        pictures, labels = _part("t10k")
        numbers = range(len(labels))
        scanners = np.arange(len(labels)) % len(SCANNERS)
        noise = noise_of("fashion/public", numbers, SHAPE)
        return scan(_scaled(pictures), scanners, noise), labels


def _records(numbers: npt.NDArray[np.int64], portion: float) -> Records:
    pictures, labels = _part("train")
    drawn = [share(f"fashion/scanner/{number}") for number in numbers]
    scanners = np.array([part < portion for part in drawn], np.int64)
    noise = noise_of("fashion", list(numbers), SHAPE)
    return Records(
        inputs=scan(_scaled(pictures[numbers]), scanners, noise),
        labels=labels[numbers],
        subjects=numbers.astype(np.int64),
        groups={"scanner": scanners},
    )
