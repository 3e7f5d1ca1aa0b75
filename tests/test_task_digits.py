"""The task `digits` and the simulated scanners: fixed by numbers alone, and run end to end."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from fedaccord import accord as accords
from fedaccord.errors import TaskError
from fedaccord.simulations import digits, engine, scanners
from fedaccord.tasks import Labelled, Records, check_fits, load_task

TASK = load_task("digits")
SITES = ("north", "east", "south", "west")
SOURCE = load_digits()
DATA = {name: TASK.site(name) for name in SITES}
PARTS = [part for data in DATA.values() for part in (data.train, data.test)]
PUBLIC = set(digits.public_numbers())


# --- who has which image ------------------------------------------------------------------------


def test_every_image_is_at_one_office_in_one_split_or_public() -> None:
    private = [int(number) for part in PARTS for number in part.subjects]
    assert Counter([*private, *PUBLIC]) == Counter(range(1797))
    assert len(PUBLIC) == 360
    assert [len(data.train) for data in DATA.values()] == [240] * 4
    assert [len(data.test) for data in DATA.values()] == [120, 119, 119, 119]


SPLIT = {  # SHA-256 of the numbers in order, as "1,2,3": train, test
    "north": (
        "d84ccf6d312b8914b8747ac6c8da1e764405e54dccdc641aa10675caa0f0910f",
        "5d07822cf5f933ebef4d771a2630773f6e3253210613feb1d637ab78b1db707e",
    ),
    "east": (
        "a86b764a452611bbfde1b4608ac0c8d01a5baa6b248b226ae1ee5d59c8e60ff7",
        "c41585cea0392eb32ea896168a96f92c9010f5d8682ccd3ea8b57a346bb8513f",
    ),
    "south": (
        "2a67b38130fe34bdee034a9fea7663ba3166008e3b5e5654a583449b5ff505b5",
        "6cca1ac814558259a86f48d9d8cbb2b53cd90318db6fe0afa5795bf9018afd7e",
    ),
    "west": (
        "4491e7dac5266031d2860108ec3df8c5ccad10c486024a8b338689a0b545cd47",
        "c5b3dec46050d96cd74299b41abbcf806d89c80a66f8042e395e6f1c2d258819",
    ),
}


def numbers_hash(part: Records) -> str:
    return hashlib.sha256(",".join(map(str, part.subjects)).encode()).hexdigest()


@pytest.mark.parametrize("site", SITES)
def test_the_split_is_fixed(site: str) -> None:
    assert (numbers_hash(DATA[site].train), numbers_hash(DATA[site].test)) == SPLIT[site]


def test_labels_are_those_of_the_source() -> None:
    for part in PARTS:
        assert (part.labels == SOURCE.target[part.subjects]).all()


def test_an_unknown_office_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(TaskError, match=r'site "zurich" is not one of north, east, south, west\.'):
        TASK.site("zurich")


def test_other_images_than_the_declared_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "SHA256", "0" * 64)
    digits._images.cache_clear()
    with pytest.raises(TaskError, match=r"load_digits has SHA-256 87ff0c9e40dc\.\.\., not 000000"):
        TASK.site("north")
    digits._images.cache_clear()


# --- scanners -----------------------------------------------------------------------------------


def test_an_image_of_scanner_a_is_the_source_scaled_to_minus_one_and_one() -> None:
    for part in PARTS:
        clean = part.groups["scanner"] == 0
        expected = SOURCE.images[part.subjects[clean]][:, None] / 8 - 1
        assert (part.inputs[clean] == expected.astype(np.float32)).all()
        assert clean.any() and not clean.all()


def test_an_image_of_scanner_b_has_less_contrast_and_noise_of_the_declared_size() -> None:
    off = []
    for part in PARTS:
        dim = part.groups["scanner"] == 1
        grey = scanners.CONTRAST * (SOURCE.images[part.subjects[dim]][:, None] / 8 - 1)
        off.append((part.inputs[dim] - grey).ravel())
    noise = np.concatenate(off)
    assert np.abs(noise).max() <= scanners.NOISE + 1e-6
    # Uniform within 0.3: variance 0.03. About 60,000 pixels: 12 standard errors of the variance
    # (0.3^2 x sqrt(4 / 45 / n)) are 0.0013, and three times that is what noise of 0.29 or 0.31 is.
    assert abs(noise.var() - 0.03) < 0.0013
    assert all(abs((bound / 0.3) ** 2 * 0.03 - 0.03) > 0.0013 for bound in (0.29, 0.31))


def test_offices_differ_in_how_much_went_through_scanner_b() -> None:
    found = [float(data.train.groups["scanner"].mean()) for data in DATA.values()]
    assert found == sorted(found)
    # 240 images: five standard errors of a share are at most 0.16.
    assert all(
        abs(share - declared) < 0.16
        for share, declared in zip(found, digits.OFFICES.values(), strict=True)
    )


@given(st.lists(st.integers(0, 1796), min_size=1, max_size=6, unique=True))
@settings(max_examples=30)
def test_an_image_is_the_same_whoever_else_is_there(numbers: list[int]) -> None:
    together = digits._records("east", tuple(numbers))
    for row, number in enumerate(numbers):
        alone = digits._records("east", (number,))
        assert (together.inputs[row] == alone.inputs[0]).all()
        assert together.groups["scanner"][row] == alone.groups["scanner"][0]


@given(st.integers(0, 2**32), st.lists(st.floats(-1, 1), min_size=4, max_size=4))
@settings(max_examples=50)
def test_whatever_is_scanned_stays_within_minus_one_and_one(seed: int, pixels: list[float]) -> None:
    images = np.tile(np.array(pixels, np.float32), (2, 1))
    noise = np.random.default_rng(seed).integers(0, 256, (2, 4)).astype(np.uint8)
    out = scanners.scan(images, np.array([0, 1]), noise)
    assert out.dtype == np.float32 and np.abs(out).max() <= 1
    assert (out[0] == images[0]).all()


# --- what is public -----------------------------------------------------------------------------


def clean(images: np.ndarray) -> set[bytes]:
    return {image.tobytes() for image in images}


def test_the_proxy_set_shows_public_images_alone() -> None:
    source = (SOURCE.images[:, None] / 8 - 1).astype(np.float32)
    public, private = source[sorted(PUBLIC)], np.delete(source, sorted(PUBLIC), axis=0)
    assert clean(public).isdisjoint(clean(private))
    drawn = TASK.public(400, 0)
    shown = clean(drawn) & clean(source)  # those that went through scanner a: about half
    assert 120 < sum(image.tobytes() in shown for image in drawn) < 280
    assert shown <= clean(public)


def test_the_proxy_set_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    assert (TASK.public(64, 3) == TASK.public(64, 3)).all()
    assert (TASK.public(64, 3) != TASK.public(64, 4)).any()
    assert (TASK.public(64, 3) == TASK.public(128, 3)[:64]).all()


@pytest.mark.parametrize("rows", [0, 1, 500])
def test_the_proxy_set_has_the_form_of_the_inputs(rows: int) -> None:
    proxy = TASK.public(rows, 0)
    assert (proxy.shape, proxy.dtype) == ((rows, 1, 8, 8), np.float32)
    assert rows == 0 or np.abs(proxy).max() <= 1


def test_the_labelled_images_are_the_public_ones_through_either_scanner() -> None:
    assert isinstance(TASK, Labelled)
    inputs, labels = TASK.labelled()
    numbers = digits.public_numbers()
    assert inputs.shape == (720, 1, 8, 8) and inputs.dtype == np.float32
    assert (labels == np.tile(SOURCE.target[list(numbers)], 2)).all()
    source = (SOURCE.images[list(numbers)][:, None] / 8 - 1).astype(np.float32)
    assert (inputs[:360] == source).all()
    assert (inputs[360:] != source).any(axis=(1, 2, 3)).all()


# --- the accord ---------------------------------------------------------------------------------


def test_what_is_simulated_is_called_so() -> None:
    assert "simulated" in TASK.spec.source and "CC BY 4.0" in TASK.spec.source


def test_the_accord_names_offices_that_are_there_and_as_many_images_as_they_have() -> None:
    agreed = accords.load("digits")
    check_fits(agreed, TASK)
    assert agreed.roster == {name: len(data.train) for name, data in sorted(DATA.items())}


def test_a_short_run_trains_and_audits_the_scanners(tmp_path: Path) -> None:
    text = accords.bundled()["digits"].read_text(encoding="utf-8")
    for old, new in (
        ("\nrounds = 16\nspare_rounds = 2", "\nrounds = 1"),
        ('[[sites]]\nname = "east"\nsubjects = 240\n', ""),
        ('[[sites]]\nname = "south"\nsubjects = 240\n', ""),
        ("\nmin_sites = 3", "\nmin_sites = 2"),
        ("\nsteps = 5", "\nsteps = 1"),
        ("channels = 8, blocks = 2", "channels = 4, blocks = 1"),
        ('\nmodel = "mlp"\noptions = { hidden = 32 }\n', "\nenabled = false\n"),
        ("target_epsilon = 8.0", "noise_multiplier = 2.0"),
        ("sampling_prob = 0.5", "sampling_prob = 1.0"),
    ):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "short.toml").write_text(text, encoding="utf-8")
    engine.simulate(tmp_path / "short.toml", tmp_path / "run", tmp_path / "sites", 2)
    lines = (tmp_path / "run" / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert records[-1]["stop"] == "finished" and records[-1]["rounds"] == 1
    (found,) = [record for record in records if record["kind"] == "round"]
    assert set(found["audit"]["model"]["figures"]["attributes"]) == {"scanner"}
