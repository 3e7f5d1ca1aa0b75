"""A ledger of 10,000 entries: no flipped bit, cut, older copy or torn file goes unseen."""

import contextlib
import random
import shutil
import sqlite3
from contextlib import closing

import pytest

from fedaccord.errors import LedgerError
from fedaccord.privacy.chain import GENESIS, Chain, faults
from fedaccord.privacy.keeping import read_export, read_lines
from fedaccord.privacy.ledger import Ledger
from fedaccord.privacy.log import SignedLog
from fedaccord.privacy.store import Store

ENTRIES = 10_000
ROTATED = 5_000  # from this entry on another key signs


def place(folder):
    return folder / "ward" / "ledger.sqlite", "ward", folder / "heads" / "ward.json"


def fill(log, count):
    """Append entries like a run's, some with small numbers, in one transaction."""
    with log.transaction():
        for number in range(count):
            kind = ("INTENT", "RELEASE", "COUNTS")[number % 3]
            what = {"round": number, "delta": 1e-05, "share": number / 7, "covers": "größe"}
            log.append(kind, f"run-{number // 300}", **what)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A site's folder with 10,000 entries and one change of keys, and its export in lines."""
    folder = tmp_path_factory.mktemp("large")
    with closing(SignedLog(*place(folder))) as log:
        fill(log, ROTATED - 2)
        log.rotate()
        fill(log, ENTRIES - ROTATED)
        assert len(log.read()) == ENTRIES
    with closing(Ledger(*place(folder))) as ledger:
        (folder / "export.jsonl").write_text(ledger.export(), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def lines(large):
    return (large / "export.jsonl").read_bytes().splitlines(keepends=True)


def seen(lines, first, last):
    """Tell whether `ledger verify` would see a fault, looking at some lines alone.

    The check goes entry by entry, and what it knows before a line is what it knows in the whole
    file; so a fault that shows here shows there.
    """
    try:
        rows = read_lines(b"".join(lines))
    except ValueError:
        return True
    return bool(list(faults(rows, True, first, *last)))


def state(lines, number, keys):
    """What the check knows after some lines: the last hash and the key in force."""
    if not number:
        return GENESIS, ""
    (row,) = read_lines(lines[number - 1])
    return row.hash, keys[number >= ROTATED]


@pytest.fixture(scope="module")
def keys(lines):
    first, second = (read_lines(lines[n])[0].entry["public_key"] for n in (0, ROTATED - 1))
    assert first != second
    return first, second


def test_the_check_of_some_lines_sees_no_fault_where_there_is_none(lines, keys):
    for number in (0, 1, 2, ROTATED - 2, ROTATED - 1, ROTATED, ENTRIES - 2):
        assert not seen(lines[number : number + 2], number, state(lines, number, keys))


def test_any_flipped_bit_of_the_export_is_detected(lines, keys):
    chance = random.Random(1)
    for flip in range(6_000):
        number = (0, ROTATED - 1, ENTRIES - 1)[flip] if flip < 3 else chance.randrange(ENTRIES)
        line = bytearray(lines[number])
        bit = chance.randrange(8 * len(line))
        line[bit // 8] ^= 1 << bit % 8
        changed = [bytes(line), *lines[number + 1 : number + 2]]
        assert seen(changed, number, state(lines, number, keys)), (number, bit)


@pytest.mark.parametrize("number", [0, 1, ROTATED - 1])
def test_every_flipped_bit_of_an_entry_is_detected(lines, keys, number):
    before = state(lines, number, keys)
    for bit in range(8 * len(lines[number])):
        line = bytearray(lines[number])
        line[bit // 8] ^= 1 << bit % 8
        assert seen([bytes(line), lines[number + 1]], number, before), bit


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"1e-05", b"1E-05"),
        (b"1e-05", b"1e-5"),
        (b'"delta":', b'"delta": '),
        ("größe".encode(), b"gr\\u00f6\\u00dfe"),
        (b'"site":"ward"', b'"site":"clinic","site":"ward"'),
        (b"\n", b"\r\n"),
        (b"\n", b"\n\n"),
        (b"\n", b" \n"),
        (b"{", b"\xef\xbb\xbf{"),
    ],
)
def test_an_edit_that_leaves_the_values_as_they_are_is_detected(lines, keys, old, new):
    number = 2_000
    assert old in lines[number]
    changed = [lines[number].replace(old, new, 1), lines[number + 1]]
    assert seen(changed, number, state(lines, number, keys))


@pytest.mark.parametrize("how", ["deletion", "swap", "duplication", "gap", "older key"])
def test_lines_removed_moved_or_repeated_are_detected(lines, keys, how):
    chance = random.Random(2)
    for _ in range(500):
        number = chance.randrange(1, ENTRIES - 12)
        one, two, three = lines[number : number + 3]
        changed = {
            "deletion": [two, three],
            "swap": [two, one, three],
            "duplication": [one, one, two],
            "gap": [one, lines[number + chance.randrange(2, 12)]],
            "older key": [one, two],
        }[how]
        before = state(lines, number, keys)
        if how == "older key":
            before = before[0], keys[number < ROTATED - 1]  # the other one
            if number == ROTATED - 1:
                continue
        assert seen(changed, number, before)


@pytest.mark.slow
def test_the_whole_file_is_refused_wherever_it_was_changed(large, lines, tmp_path):
    chance = random.Random(3)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(b"".join(lines))
    assert len(read_export(copy)) == ENTRIES
    data = b"".join(lines)
    cases = [
        data[:-1],
        data[: len(data) // 2],
        b"".join(lines[: ENTRIES // 2] + lines[ENTRIES // 2 + 1 :]),
        b"".join(lines[1:]),
        data + lines[-1],
        b"",
    ]
    for _ in range(6):
        changed = bytearray(data)
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        cases.append(bytes(changed))
    for case in cases:
        copy.write_bytes(case)
        with pytest.raises(LedgerError, match=r"ledger .*copy\.jsonl: "):
            read_export(copy)


def test_a_cut_end_is_detected_by_the_second_place_and_by_a_peers_head(large, lines, tmp_path):
    with closing(Ledger(*place(large))) as ledger:
        shown = ledger.head()  # what a peer was shown
    folder = tmp_path / "site"
    shutil.copytree(large, folder)
    path, site, second = place(folder)
    with closing(sqlite3.connect(path, isolation_level=None)) as raw:
        raw.execute("DROP TRIGGER no_delete")
        raw.execute("DELETE FROM entries WHERE seq > ?", [ENTRIES - 3])
    with pytest.raises(LedgerError, match="entry 9998 of 10000 was removed from its end"):
        Ledger(path, site)  # SQLite itself counts
    with closing(sqlite3.connect(path, isolation_level=None)) as raw:
        raw.execute("UPDATE sqlite_sequence SET seq = ?", [ENTRIES - 3])
    with pytest.raises(LedgerError, match=r"does not hold entry 10000 .* \(9997 entries here\)"):
        Ledger(path, site, second)
    with (
        closing(Ledger(path, site)) as alone,  # nothing at the site tells; the peers do
        pytest.raises(LedgerError, match="another site was shown entry 10000"),
    ):
        alone.witness([shown])


def some(folder, count=60):
    """A small ledger, closed: all of it is in one file."""
    with closing(Ledger(*place(folder))) as ledger:
        fill(ledger._log, count)
        return ledger.export(), ledger.head()


def opened(folder):
    """What a site reads of its ledger, or None where it stops with an error of its own."""
    try:
        with closing(Ledger(*place(folder))) as ledger:
            return ledger.export()
    except LedgerError as fault:
        assert "\n" not in str(fault)
        return None


def verified(path):
    """Check a ledger with every signature, as `fedaccord ledger verify` does."""
    with closing(Store(path)) as store:
        found = Chain("ledger")
        found.extend(store.rows(), every=True)


@pytest.mark.parametrize("column", ["body", "hash", "signature"])
def test_a_flipped_bit_of_a_stored_entry_is_detected(tmp_path, column):
    text, _ = some(tmp_path)
    path, chance = place(tmp_path)[0], random.Random(4)
    order = f"UPDATE entries SET {column} = CAST(? AS TEXT) WHERE seq = ?"
    for _ in range(40):
        number = chance.randrange(1, 62)
        with closing(sqlite3.connect(path, isolation_level=None)) as raw:
            raw.execute("DROP TRIGGER IF EXISTS no_update")
            query = f"SELECT CAST({column} AS BLOB) FROM entries WHERE seq = ?"
            (value,) = raw.execute(query, [number]).fetchone()
            flipped = bytearray(value)
            flipped[chance.randrange(len(value))] ^= 1 << chance.randrange(8)
            raw.execute(order, [bytes(flipped), number])
        with pytest.raises(LedgerError):
            verified(path)
        # At opening, the signatures of hand-overs and of the end stand for those between.
        if column != "signature" or number in (1, 61):
            assert opened(tmp_path) is None
        with closing(sqlite3.connect(path, isolation_level=None)) as raw:
            raw.execute("DROP TRIGGER IF EXISTS no_update")
            raw.execute(order, [value, number])
    assert opened(tmp_path) == text


@pytest.mark.slow
def test_a_flipped_bit_of_the_file_is_detected_or_harmless(tmp_path):
    text, _ = some(tmp_path)
    path = place(tmp_path)[0]
    whole, chance, stopped = path.read_bytes(), random.Random(5), 0
    for _ in range(600):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        for extra in ("-wal", "-shm"):
            path.with_name(path.name + extra).unlink(missing_ok=True)
        found = opened(tmp_path)
        assert found in (None, _outside(text, found))
        stopped += found is None
    assert 200 < stopped < 600
    path.write_bytes(whole)
    assert opened(tmp_path) == text


def _outside(text, found):
    """The export as it was, where all that differs is a signature that opening does not check."""
    if found is None:
        return text
    rows, others = read_lines(text.encode()), _rows(found)
    same = [(r.body, r.hash) for r in rows] == [(r.body, r.hash) for r in others]
    return found if same else text


def _rows(text):
    with contextlib.suppress(ValueError):
        return read_lines(text.encode())
    return []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_a_torn_write_ahead_log_never_shortens_the_ledger_in_silence(tmp_path, how):
    (tmp_path / "site").mkdir()
    with closing(Ledger(*place(tmp_path / "site"))) as ledger:
        for number in range(12):
            ledger.counts("a", number)
        text = ledger.export()
        shutil.copytree(tmp_path / "site", tmp_path / "crashed")  # as a power cut leaves it
    copy = tmp_path / "crashed"
    assert opened_copy(copy, tmp_path / "try") == text
    path = place(copy)[0]
    wal = path.with_name(f"{path.name}-wal")
    whole, chance, stopped = wal.read_bytes(), random.Random(6), 0
    for _ in range(200):
        at = chance.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[at] ^= 1 << chance.randrange(8)
        wal.write_bytes(whole[:at] if how == "cut" else damaged)
        found = opened_copy(copy, tmp_path / "try")
        assert found in (None, text)
        stopped += found is None
    assert stopped > 0


def opened_copy(folder, to):
    """Open a copy of a folder, so that the folder stays as it is."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)
    with contextlib.suppress(FileNotFoundError):
        (place(to)[0].parent / "ledger.sqlite-shm").unlink()
    return opened(to)
