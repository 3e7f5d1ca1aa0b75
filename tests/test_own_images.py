"""One's own images: any depth and size in, one shape in [-1, 1] out, nothing outside the folder."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from wards import own_accord

from fedaccord.errors import AccordError
from fedaccord.own import OwnTask
from fedaccord.tasks import Labelled, Task, task_of

TASK: dict[str, Any] = {
    "kind": "images",
    "dataset": "scans",
    "file": "{site}/list.csv",
    "label": {"column": "label", "classes": ["well", "ill"]},
    "attributes": {"sex": ["female", "male"]},
    "size": [8, 8],
}


def task(folder: Path, **change: Any) -> Task:
    return task_of(own_accord(TASK | change), folder)


def listed(folder: Path, *paths: str, name: str = "north") -> Path:
    """A list of images, each labelled by its place."""
    (folder / name).mkdir(exist_ok=True)
    rows = [f"{path},{['well', 'ill'][at % 2]},male" for at, path in enumerate(paths)]
    (folder / name / "list.csv").write_text("\n".join(["path,label,sex", *rows]) + "\n")
    return folder


def save(pixels: np.ndarray, path: Path, mode: str | None = None, **how: Any) -> None:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **how)


def one(folder: Path, **change: Any) -> np.ndarray:
    """The inputs of the only image, wherever the split put it."""
    data = task(folder, **change).site("north")
    found = np.concatenate([data.train.inputs, data.test.inputs])
    assert len(found) == 1
    return found[0]


RAMP = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)


@pytest.mark.parametrize("end", ["png", "bmp", "tif"])
def test_pixels_of_the_declared_size_are_scaled_and_not_changed(end: str, tmp_path: Path) -> None:
    listed(tmp_path, f"a.{end}")
    save(RAMP, tmp_path / "north" / f"a.{end}")
    found = one(tmp_path)
    assert found.shape == (1, 8, 8) and found.dtype == np.float32
    assert found[0] == pytest.approx(RAMP / 127.5 - 1, abs=1e-6)
    assert (found.min(), found.max()) == (-1, 1)


def test_sixteen_bits_keep_their_depth(tmp_path: Path) -> None:
    listed(tmp_path, "a.png")
    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    save(deep, tmp_path / "north" / "a.png")
    found = one(tmp_path)
    assert found[0] == pytest.approx(deep / 32767.5 - 1, abs=1e-6)
    assert len(np.unique(found)) == 64  # clipped to 8 bits nearly all would be white


def test_colours_become_grey_and_grey_becomes_three_channels(tmp_path: Path) -> None:
    listed(tmp_path, "a.png")
    colours = np.zeros((8, 8, 3), np.uint8)
    colours[..., 0] = 255
    save(colours, tmp_path / "north" / "a.png")
    assert one(tmp_path, channels=3)[:, 0, 0].tolist() == [1, -1, -1]
    grey = one(tmp_path)
    assert grey.shape == (1, 8, 8) and grey[0, 0, 0] == pytest.approx(76 / 127.5 - 1)
    listed(tmp_path, "b.png")
    save(RAMP, tmp_path / "north" / "b.png")
    wide = one(tmp_path, channels=3)
    assert (wide[0] == wide[1]).all() and (wide[1] == wide[2]).all()


@pytest.mark.parametrize(
    ("fit", "middle"), [("stretch", False), ("crop", True)], ids=["stretched", "cropped"]
)
def test_another_size_is_stretched_or_its_middle_is_cut_out(
    fit: str, middle: bool, tmp_path: Path
) -> None:
    listed(tmp_path, "a.png")
    wide = np.zeros((16, 48), np.uint8)
    wide[:, 16:32] = 255  # the middle third
    save(wide, tmp_path / "north" / "a.png")
    found = one(tmp_path, fit=fit)[0]
    assert found.shape == (8, 8)
    assert (found[:, 3:5] > 0.9).all()
    assert (found[:, 1:7].min() == 1) == middle  # antialiasing blurs the very edge
    assert (found[:, 0].max() < -0.99) != middle


def test_an_image_that_cannot_be_used_is_left_out_alone_and_named_at_the_site(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = ["cut.png", "none.png", "text.png", "float.tif", "anim.gif", "../out.png", "link.png"]
    bad += [str(tmp_path / "out.png"), "", "north/\N{SNOWMAN}" * 2000]
    listed(tmp_path, "a.png", *bad, "b.png")
    own = tmp_path / "north"
    for name in ("a.png", "b.png", "cut.png", "../out.png"):
        save(RAMP, own / name)
    (own / "cut.png").write_bytes((own / "a.png").read_bytes()[:70])
    (own / "text.png").write_text("no image")
    save(np.ones((8, 8), np.float32), own / "float.tif")
    save(RAMP, own / "anim.gif")
    (own / "link.png").symlink_to(tmp_path / "out.png")
    made = task(tmp_path)
    data = made.site("north")
    assert len(data.train) + len(data.test) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [str(fault) for fault in made.load("north").found]  # type: ignore[attr-defined]
    assert len(found) == len(bad)
    said = ("cannot be decoded", "no such file", "cannot be decoded", 'of the kind "F"')
    said += ("cannot be decoded", "lies outside", "lies outside", "lies outside", "names no file")
    for line, words in zip(found, said, strict=False):
        assert words in line and "\n" not in line
    assert capfd.readouterr() == ("", "")


def test_an_image_of_too_many_pixels_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedaccord import folders

    listed(tmp_path, "a.png")
    save(RAMP, tmp_path / "north" / "a.png")
    monkeypatch.setattr(folders, "MOST_PIXELS", 63)
    made = task(tmp_path)
    assert isinstance(made, OwnTask)
    assert [fault.words for fault in made.load("north").found] == [
        '"a.png" has more than 63 pixels'
    ]


def test_made_up_images_are_uniform_pixels_of_the_declared_shape(tmp_path: Path) -> None:
    made = task(tmp_path, size=[4, 6], channels=3)
    drawn = made.public(50, 1)
    assert drawn.shape == (50, 3, 4, 6) == (50, *made.spec.shape) and drawn.dtype == np.float32
    assert -1 <= drawn.min() < -0.99 < 0.99 < drawn.max() <= 1


def test_public_images_are_held_to_a_hash_of_the_list_and_of_the_files(tmp_path: Path) -> None:
    listed(tmp_path, "a.png", "b.png", name="open")
    save(RAMP, tmp_path / "open" / "a.png")
    save(RAMP.T, tmp_path / "open" / "b.png")

    def sha(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    files = [sha((tmp_path / "open" / name).read_bytes()) for name in ("a.png", "b.png")]
    listing = sha((tmp_path / "open" / "list.csv").read_bytes())
    whole = sha(f"{listing}\n{sha(chr(10).join(files).encode())}".encode())
    made = task(tmp_path, public_file="open/list.csv", public_sha256=whole)
    assert made.public(5, 0).shape == (5, 1, 8, 8)
    assert isinstance(made, Labelled)
    assert made.labelled()[1].tolist() == [0, 1]
    save(RAMP, tmp_path / "open" / "b.png")
    with pytest.raises(AccordError, match=r"task\.public_sha256 = .* is not that of open/list"):
        made.public(5, 0)
