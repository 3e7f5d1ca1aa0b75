"""The task `digits`: 1,797 handwritten digits of 8 x 8 pixels at four simulated offices.

It needs no download: the images come with scikit-learn. Offices and scanners are simulated, and
the audit by scanner says nothing about people.
"""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np
import numpy.typing as npt

from fedaccord.errors import TaskError
from fedaccord.evidence import sha256
from fedaccord.simulations.scanners import SCANNERS, draw, noise_of, scan, share
from fedaccord.tasks import Records, SiteData, TaskSpec

SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"  # pixels, then labels
SHAPE = (1, 8, 8)
WHITE = 16  # the largest pixel that the source can have
PUBLIC_SHARE = 5  # one image in five is public
TEST_SHARE = 3  # one image in three of an office is held out
# Share of an office's images that went through scanner b: offices are not alike.
OFFICES = {"north": 0.2, "east": 0.4, "south": 0.6, "west": 0.8}
SALT = 0xD161


@cache
def _images() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Read the images once, from -1 to 1, with labels; check that they are the declared ones."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels, labels = found.images.astype(np.uint8), found.target.astype(np.uint8)
    digest = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
    if digest != SHA256:
        raise TaskError(
            f"digits: scikit-learn's load_digits has SHA-256 {digest[:12]}..., not "
            f"{SHA256[:12]}... as declared. Install a scikit-learn with the UCI test images."
        )
    images = (pixels.reshape(-1, *SHAPE) / (WHITE / 2) - 1).astype(np.float32)
    return images, labels.astype(np.int64)


@cache
def _order() -> tuple[int, ...]:
    """Put the images' numbers in an order that depends on nothing but the numbers."""
    return tuple(sorted(range(1797), key=lambda number: sha256(f"digits/{number}")))


def public_numbers() -> tuple[int, ...]:
    """Return the numbers of the images that are declared public: one in five."""
    return _order()[::PUBLIC_SHARE]


def numbers_of(office: str) -> tuple[int, ...]:
    """Return the numbers of an office's private images; every image is at one office or public."""
    rest = [number for place, number in enumerate(_order()) if place % PUBLIC_SHARE]
    return tuple(rest[list(OFFICES).index(office) :: len(OFFICES)])


def _records(office: str, numbers: tuple[int, ...]) -> Records:
    images, labels = _images()
    chosen = np.array(numbers, np.int64)
    drawn = [share(f"digits/scanner/{number}") for number in numbers]
    scanners = np.array([part < OFFICES[office] for part in drawn], np.int64)
    return Records(
        inputs=scan(images[chosen], scanners, noise_of("digits", numbers, SHAPE)),
        labels=labels[chosen],
        subjects=chosen,
        groups={"scanner": scanners},
    )


class Digits:
    """Four simulated offices, 1,437 images; another 360 are the declared public set.

    Each image is taken for a subject of its own. The source had 13 writers and does not say who
    wrote which, so epsilon covers an image and not a writer.

    Citation: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
    Repository, 1998, doi 10.24432/C50P49, CC BY 4.0; the copy of its test set in scikit-learn.
    """

    sites = tuple(OFFICES)
    spec = TaskSpec(
        name="digits",
        features=("pixels",),
        classes=tuple(str(digit) for digit in range(10)),
        attributes={"scanner": SCANNERS},
        source=(
            "UCI Optical Recognition of Handwritten Digits (doi 10.24432/C50P49), CC BY 4.0, E. "
            "Alpaydin and C. Kaynak; the 1,797 test images, as scikit-learn ships them. The four "
            "offices and the two scanners are simulated. An image is a subject: writers are not "
            "named."
        ),
        shape=SHAPE,
    )

    def site(self, name: str) -> SiteData:
        """Read an office's images: two in three to train on, one in three to evaluate on.

        Office, split, scanner and noise are fixed by the SHA-256 of an image's number alone.

        Raises:
            TaskError: an unknown office, or images that are not the declared ones.
        """
        if name not in OFFICES:
            raise TaskError(f'digits: site "{name}" is not one of {", ".join(OFFICES)}. Rename it.')
        numbers = numbers_of(name)
        cut = len(numbers) // TEST_SHARE
        return SiteData(train=_records(name, numbers[cut:]), test=_records(name, numbers[:cut]))

    def public(self, rows: int, seed: int) -> npt.NDArray[np.float32]:
        """Draw proxy images from the declared public ones, each through a scanner drawn anew."""
        return draw(_images()[0][list(public_numbers())], rows, seed, SALT)

    def labelled(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Read the declared public images, each once through either scanner, with labels."""
        images, labels = _images()
        numbers = public_numbers()
        clean, noise = images[list(numbers)], noise_of("digits", numbers, SHAPE)
        parts = [scan(clean, np.full(len(numbers), which), noise) for which in range(len(SCANNERS))]
        return np.concatenate(parts), np.tile(labels[list(numbers)], len(SCANNERS))
