"""The task `fashion`: IDX files, shops by a Dirichlet law, and the pictures where they are."""

from __future__ import annotations

import gzip
import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedaccord import accord as accords
from fedaccord import data, data_fashion
from fedaccord.data_items import ITEMS
from fedaccord.errors import AccordError, TaskError
from fedaccord.simulations import fashion
from fedaccord.tasks import Labelled, check_fits, load_task


def packed(array: np.ndarray) -> bytes:
    """Write an array of bytes in the IDX format."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return b"\0\0\x08" + bytes([array.ndim]) + sizes + array.astype(np.uint8).tobytes()


# --- files --------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 2**32))
@settings(max_examples=60)
def test_an_idx_file_gives_the_array_that_was_written(sizes: list[int], seed: int) -> None:
    array = np.random.default_rng(seed).integers(0, 256, sizes).astype(np.uint8)
    found = fashion.idx(packed(array), "made")
    assert found.shape == array.shape and (found == array).all()


def test_an_idx_file_made_by_hand_is_read_row_by_row() -> None:
    raw = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 255])
    assert fashion.idx(raw, "made").tolist() == [[1, 2, 3], [4, 5, 255]]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0\0\x08",
        b"\0\0\x08\x02\0\0\0\x01",  # two sizes declared, one there
        b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0",  # floats
        packed(np.zeros((2, 3)))[:-1],
        packed(np.zeros((2, 3))) + b"\0",
        gzip.compress(packed(np.zeros(3)), mtime=0),
    ],
)
def test_a_file_that_is_no_idx_array_of_bytes_is_refused(raw: bytes) -> None:
    with pytest.raises(TaskError, match=r"^fashion: made (is not|has).*fedaccord data fetch"):
        fashion.idx(raw, "made")


def source(folder: Path) -> None:
    """Write four small files as the system package has them, gzipped."""
    folder.mkdir(parents=True)
    for part, count in (("train", 60), ("t10k", 20)):
        pictures = np.arange(count * 784).reshape(count, 28, 28) % 251
        labels = np.arange(count) % 10
        for what, array in (("images-idx3", pictures), ("labels-idx1", labels)):
            (folder / f"{part}-{what}-ubyte.gz").write_bytes(gzip.compress(packed(array)))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system package with 80 made-up pictures, declared as what is wanted; an empty cache."""
    folder = tmp_path / "system"
    source(folder)
    hashes = {
        name: hashlib.sha256(gzip.decompress((folder / f"{name}.gz").read_bytes())).hexdigest()
        for name in data_fashion.FILES
    }
    monkeypatch.setattr(data_fashion, "SYSTEM", folder)
    monkeypatch.setenv("FEDACCORD_DATA", str(tmp_path / "cache"))
    monkeypatch.setitem(ITEMS, "fashion", _with(hashes))
    for cached in (fashion._part, fashion._divided):
        cached.cache_clear()
    yield folder
    for cached in (fashion._part, fashion._divided):
        cached.cache_clear()


def _with(hashes: dict[str, str]) -> object:
    import dataclasses

    return dataclasses.replace(ITEMS["fashion"], files=hashes)


def test_the_system_package_is_fetched_and_read(installed: Path) -> None:
    data.fetch("fashion")
    task = load_task("fashion", {"shops": 3})
    parts = [p for name in task.sites for p in (task.site(name).train, task.site(name).test)]
    numbers = [int(number) for part in parts for number in part.subjects]
    assert sorted(numbers) == list(range(60))  # every picture at one shop, in one split
    for part in parts:
        assert (part.labels == part.subjects % 10).all()
        assert part.inputs.shape[1:] == (1, 28, 28) and part.inputs.dtype == np.float32
        assert len(part) == 0 or np.abs(part.inputs).max() <= 1
        first = part.groups["scanner"] == 0
        pixels = (part.subjects[first, None] * 784 + np.arange(784)) % 251
        assert np.allclose(part.inputs[first].reshape(-1, 784), pixels / 127.5 - 1, atol=1e-6)
    assert isinstance(task, Labelled)
    inputs, labels = task.labelled()
    assert inputs.shape == (20, 1, 28, 28) and labels.tolist() == [n % 10 for n in range(20)]
    assert (task.public(8, 1) == task.public(16, 1)[:8]).all()


def test_a_file_that_is_not_the_declared_one_is_not_kept(installed: Path) -> None:
    name = "t10k-labels-idx1-ubyte"
    (installed / f"{name}.gz").write_bytes(gzip.compress(packed(np.ones(20))))
    with pytest.raises(TaskError, match=rf"{name} has SHA-256 .* as declared\."):
        data.fetch("fashion")
    assert not data.fetched("fashion")


def test_a_damaged_file_of_the_system_package_is_named(installed: Path) -> None:
    damaged = installed / "train-images-idx3-ubyte.gz"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    with pytest.raises(TaskError, match=r"train-images-idx3-ubyte\.gz is damaged"):
        data.fetch("fashion")


def test_where_nothing_can_be_downloaded_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No tool on the path, and torchvision told that its only mirror is a file that is not there.
    from torchvision.datasets import FashionMNIST

    monkeypatch.setattr(data_fashion, "SYSTEM", tmp_path / "none")
    monkeypatch.setattr(FashionMNIST, "mirrors", [f"file://{tmp_path}/none/"])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FEDACCORD_DATA", str(tmp_path / "cache"))
    with pytest.raises(
        TaskError, match=r"^data fashion: neither .* dataset-fashion-mnist, or copy"
    ):
        data.fetch("fashion")


def test_pictures_that_were_not_fetched_are_said_to_be_missing_and_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDACCORD_DATA", str(tmp_path))
    fashion._part.cache_clear()
    with pytest.raises(TaskError, match=r"not on this machine: fedaccord data fetch fashion \(31"):
        load_task("fashion").public(1, 0)


# --- shops --------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.floats(0.05, 1000))
@settings(max_examples=60)
def test_every_class_is_shared_out_whole(shops: int, alpha: float) -> None:
    parts = fashion.shares(shops, alpha)
    assert parts.shape == (10, shops)
    assert (parts >= 0).all() and np.allclose(parts.sum(axis=1), 1)


@given(st.lists(st.integers(0, 9), max_size=200), st.integers(1, 7), st.floats(0.05, 10))
@settings(max_examples=60, deadline=None)
def test_every_picture_is_at_one_shop(labels: list[int], shops: int, alpha: float) -> None:
    found = fashion.divide(np.array(labels, np.int64), fashion.shares(shops, alpha))
    assert len(found) == shops
    assert sorted(np.concatenate(found).tolist()) == list(range(len(labels)))


def test_the_shares_are_dirichlet_with_the_declared_concentration() -> None:
    # Mean 1 / shops, variance (1 / k)(1 - 1 / k) / (k alpha + 1) (Kotz et al. 2000, chapter 49).
    # 10 classes x 500 shops taken one by one: the ratio's standard error is about 3 %.
    shops = 500
    for alpha, other in ((0.5, 0.7), (2.0, 1.5)):
        ratio = fashion.shares(shops, alpha).var() * shops**2 * (shops * alpha + 1) / (shops - 1)
        assert 0.75 < ratio < 1.25
        # The slightly wrong concentration is told apart.
        wrong = ratio * (shops * other + 1) / (shops * alpha + 1)
        assert not 0.75 < wrong < 1.25


def test_the_default_shares_are_the_same_on_every_machine() -> None:
    first = fashion.shares(5, 1.0)[0].round(6).tolist()
    assert first == [0.280322, 0.129764, 0.003896, 0.501029, 0.084989]


@pytest.mark.parametrize(
    "options", [{"shops": 0}, {"shops": 1001}, {"alpha": 0.01}, {"alpha": "1"}]
)
def test_an_option_out_of_its_bounds_is_one_line(options: dict[str, object]) -> None:
    with pytest.raises(AccordError, match=rf'task "fashion": {next(iter(options))} = .* from '):
        load_task("fashion", options)


def test_an_unknown_shop_is_refused() -> None:
    with pytest.raises(TaskError, match=r'site "shop-9" is not one of shop-1 to shop-5'):
        load_task("fashion").site("shop-9")


def test_the_accord_fits_the_task_and_says_what_is_simulated() -> None:
    agreed = accords.load("fashion")
    task = load_task("fashion", agreed.task.options)
    check_fits(agreed, task)
    assert "simulated" in task.spec.source and "MIT" in task.spec.source
    assert "simulated" in agreed.purpose


@pytest.mark.soak  # fedaccord data fetch fashion
def test_the_published_pictures_are_60000_private_and_10000_public() -> None:
    agreed = accords.load("fashion")
    task = load_task("fashion", agreed.task.options)
    parts = {name: task.site(name) for name in task.sites}
    found = Counter(
        int(label) for d in parts.values() for p in (d.train, d.test) for label in p.labels
    )
    assert found == dict.fromkeys(range(10), 6000)
    assert np.bincount(task.labelled()[1]).tolist() == [1000] * 10
    for name, declared in agreed.roster.items():  # rounded to hundreds
        assert abs(declared - len(parts[name].train)) <= 50
