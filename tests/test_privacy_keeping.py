"""Keys, second place, full disks, backups: a ledger stops rather than say less than was spent."""

import contextlib
import math
import os
import re
import resource
import shutil
import sqlite3
import stat
import subprocess
import threading
from contextlib import closing, contextmanager

import pytest

from fedaccord import keys
from fedaccord.errors import BudgetError, LedgerError
from fedaccord.privacy import keeping
from fedaccord.privacy.budget import Cap
from fedaccord.privacy.ledger import Ledger, Terms, spent
from fedaccord.privacy.plan import PrivacyPlan
from fedaccord.privacy.second import SecondPlace

PLAN = PrivacyPlan("ward", 100, 5, 1, 1.0, 40.0, 1.0, 1e-5)
ROOM = Cap(100.0, 1e-5)
TERMS = Terms(ROOM, "f" * 64)


class Place:
    """A site's folder, its second place, and copies of them."""

    def __init__(self, base):
        self.base, self.folder = base, base / "ward"
        self.path, self.key = self.folder / "ledger.sqlite", self.folder / "ledger.key"
        self.head = base / "heads" / "ward.json"

    def open(self):
        return closing(Ledger(self.path, "ward", self.head))

    def write(self, *rounds):
        """Let the site go through some rounds."""
        with self.open() as ledger:
            ledger.reserve("a", PLAN, 1, TERMS)
            for number in rounds:
                ledger.intend("a", number, PLAN, TERMS.accord)
                ledger.release("a", number)

    def export(self, name="export.jsonl"):
        with self.open() as ledger:
            (self.base / name).write_text(ledger.export())
        return self.base / name

    def kinds(self):
        with self.open() as ledger:
            return [entry["kind"] for entry in ledger.entries()]

    def stopped(self, says):
        with pytest.raises(LedgerError, match=says) as fault:
            self.open()
        assert "\n" not in str(fault.value)
        return str(fault.value)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


ONE_ROUND = ["KEY", "RESERVE", "INTENT", "RELEASE"]


def test_the_key_is_made_once_and_only_its_owner_may_read_it(place):
    place.write(1)
    made = place.key.read_bytes()
    assert stat.S_IMODE(place.key.stat().st_mode) == 0o600
    place.write(2)
    assert place.key.read_bytes() == made
    with pytest.raises(FileExistsError):
        keys.create(place.key)
    assert place.key.read_bytes() == made
    names = sorted(path.name for path in place.folder.iterdir())
    assert names == ["ledger.key", "ledger.sqlite"]


FOREIGN = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda key: key.unlink(), "no such file, and the ledger beside it is signed with it"),
        (lambda key: key.chmod(0o640), "others may read it. Say: chmod 600"),
        (lambda key: key.write_text(""), "cannot be used"),
        (lambda key: key.write_text(FOREIGN), "cannot be used"),
        (lambda key: (key.unlink(), keys.create(key)), "is not the key of the ledger beside it"),
        (lambda key: (key.unlink(), key.mkdir()), "cannot be used"),
    ],
    ids=["missing", "mode", "empty", "no key", "another", "a folder"],
)
def test_a_key_that_cannot_sign_is_one_clear_line(place, spoil, says):
    place.write(1)
    spoil(place.key)
    place.stopped(re.escape(says))


def test_a_key_of_another_kind_is_refused(place):
    from cryptography.hazmat.primitives import serialization as formats
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    place.write(1)
    words = (formats.Encoding.PEM, formats.PrivateFormat.PKCS8, formats.NoEncryption())
    place.key.write_bytes(X25519PrivateKey.generate().private_bytes(*words))
    place.stopped("is no ed25519 key")


def test_rotation_hands_over_and_other_processes_go_on_with_the_new_key(place):
    place.write(1)
    with place.open() as one, place.open() as other:
        old = keys.load(place.key).public
        entry = one.rotate()
        new = keys.load(place.key).public
        assert old != new == entry["public_key"]
        other.intend("a", 2, PLAN, TERMS.accord)
        other.rotate()
        one.intend("a", 3, PLAN, TERMS.accord)
        assert one.head() == other.head()
    path = place.export()
    chain = keeping.read_export(path)
    assert [e["kind"] for e in chain.entries] == [*ONE_ROUND, "KEY", "INTENT", "KEY", "INTENT"]
    assert chain.signers == [old] * 5 + [new] * 2 + [chain.key]


def test_a_new_key_that_was_handed_over_to_and_not_yet_put_in_place_is_found(place):
    place.write(1)
    old = place.key.read_bytes()
    with place.open() as ledger:
        ledger.rotate()
    # As if killed before the new key took the old one's place.
    os.replace(place.key, place.folder / "ledger.key.next")
    place.key.write_bytes(old)
    place.key.chmod(0o600)
    place.write(2)
    assert not (place.folder / "ledger.key.next").exists()


def test_a_rotation_never_throws_away_the_key_in_force(place):
    place.write(1)
    old = place.key.read_bytes()
    with place.open() as ledger, place.open() as other:
        ledger.rotate()
        os.replace(place.key, place.folder / "ledger.key.next")
        place.key.write_bytes(old)
        place.key.chmod(0o600)
        other.rotate()  # opened before, it first finds the key that still waits
        other.intend("a", 2, PLAN, TERMS.accord)
    place.write(3)


def test_the_second_place_holds_the_end_after_every_transaction(place):
    with place.open() as ledger:
        for work in (
            lambda: ledger.reserve("a", PLAN, 1, TERMS),
            lambda: ledger.intend("a", 1, PLAN, TERMS.accord),
            lambda: ledger.release("a", 1),
            lambda: ledger.counts("a", 1),
            lambda: ledger.refuse("b", "f" * 64, "expires", "The policy ended."),
            ledger.rotate,
        ):
            work()
            assert SecondPlace(place.head).read() == ledger.head()


def test_the_second_place_never_goes_back(place):
    place.write()
    with place.open() as ledger:
        before = ledger.head()
        ledger.intend("a", 1, PLAN, TERMS.accord)
        SecondPlace(place.head).advance(before)
        assert SecondPlace(place.head).read() == ledger.head()


def test_a_head_that_was_not_kept_of_the_first_entry_is_kept_at_the_next_opening(place):
    place.open().__exit__()
    place.head.unlink()  # as if killed after the first entry
    place.open().__exit__()
    with place.open() as ledger:
        assert SecondPlace(place.head).read() == ledger.head()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda head: head.unlink(), "is not in the second place"),
        (lambda head: head.write_text("{}"), "holds no head"),
        (lambda head: head.write_bytes(b"\xff"), "holds no head"),
        (lambda head: head.write_text(head.read_text().replace('"seq":4', '"seq":3')), "not sign"),
    ],
    ids=["gone", "empty", "no text", "edited"],
)
def test_without_its_head_a_ledger_stops_until_an_operator_accepts(place, spoil, says):
    place.write(1)
    with place.open() as ledger:
        spoil(place.head)
        with pytest.raises(LedgerError, match=says):
            ledger.intend("a", 2, PLAN, TERMS.accord)  # also one that is open
    place.stopped(says)
    entry = keeping.accept(place.path, "ward", place.head, [])
    assert entry["kind"] == "ACCEPT"
    place.write(2)
    assert place.kinds() == [*ONE_ROUND, "ACCEPT", "INTENT", "RELEASE"]


def test_another_sites_head_in_the_second_place_stops_the_ledger(place):
    place.write(1)
    other = Place(place.base / "other")
    other.write(1)
    shutil.copy(other.head, place.head)
    place.stopped("keeps the head of another ledger")


def test_a_restored_backup_stops_until_the_latest_export_is_put_in_place(place):
    place.write(1)
    older = place.export("older.jsonl")
    backup = place.path.read_bytes()
    place.write(2)
    newer = place.export("newer.jsonl")
    place.path.write_bytes(backup)
    place.stopped(r"does not hold entry 6 .* \(4 entries here\)")
    with pytest.raises(LedgerError, match=r"has 4 entries and does not hold entry 6"):
        keeping.restore(place.path, place.head, older)
    assert keeping.restore(place.path, place.head, newer) == 6
    assert place.kinds() == [*ONE_ROUND, "INTENT", "RELEASE"]
    place.write(3)
    before = place.folder / "ledger.sqlite.before-restore"
    with closing(sqlite3.connect(before)) as raw:
        assert raw.execute("SELECT count(*) FROM entries").fetchone() == (4,)


@pytest.mark.parametrize("damage", [b"", b"no database at all" * 90, None])
def test_a_ledger_that_is_damaged_or_gone_is_restored_from_the_latest_export(place, damage):
    place.write(1)
    export = place.export()
    place.path.unlink()
    if damage is not None:
        place.path.write_bytes(damage)
    place.stopped(".")
    assert keeping.restore(place.path, place.head, export) == 4
    place.write(2)


def test_a_copy_that_lacks_what_is_still_there_is_not_restored_without_second_place(place):
    place.write(1)
    older = place.export("older.jsonl")
    place.write(2)
    with pytest.raises(LedgerError, match="does not hold entry 6"):
        keeping.restore(place.path, None, older)


def test_another_sites_or_keys_export_is_not_restored(place):
    place.write(1)
    other = Place(place.base / "other")
    other.write(1, 2)
    with pytest.raises(LedgerError, match="is signed by another key"):
        keeping.restore(place.path, place.head, other.export())
    place.write(2)


def test_a_restore_that_was_interrupted_can_be_repeated(place):
    place.write(1)
    export = place.export()
    os.replace(place.path, place.folder / "ledger.sqlite.before-restore")
    place.stopped("it is empty, but .* keeps its entry 4")
    assert keeping.restore(place.path, place.head, export) == 4
    place.write(2)


@pytest.mark.parametrize("how", ["backup", "new key", "heads of peers"])
def test_accepting_a_ledger_that_is_known_to_lack_entries_is_epsilon_infinite(place, how):
    place.write(1)
    backup = place.path.read_bytes()
    place.write(2)
    with place.open() as ledger:
        shown = ledger.head()
    place.path.write_bytes(backup)
    heads = []
    if how == "new key":
        place.path.unlink()
        place.key.unlink()
    elif how == "heads of peers":
        place.head.unlink()
        heads = [shown]
    entry = keeping.accept(place.path, "ward", place.head, heads)
    assert (entry["kind"], entry["epsilon"], entry["head"]["seq"]) == ("LOST", "infinite", 6)
    with place.open() as ledger:
        assert spent(ledger.entries(), ROOM) == math.inf
        with pytest.raises(BudgetError, match=r"has 0\.00 of 100\.00 left"):
            ledger.reserve("b", PLAN, 1, TERMS)
        groups = (("heart",), ("lung",))
        with pytest.raises(BudgetError):  # what was lost may concern any data set
            ledger.reserve("c", PLAN, 1, Terms(ROOM, "f" * 64, "lung", groups))
        ledger.reserve("d", PLAN, 1, Terms(Cap(math.inf, 1e-5), "f" * 64))


@contextmanager
def full_disk(room=0):
    """No file of this process may grow beyond `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_a_ledger_error_and_leaves_the_ledger_as_it_was(place):
    place.write()
    with place.open() as ledger:
        for work in (lambda: ledger.intend("a", 1, PLAN, TERMS.accord), ledger.rotate):
            with full_disk(), pytest.raises(LedgerError, match="Nothing was released"):
                work()
        assert place.kinds() == ["KEY", "RESERVE"]
        ledger.intend("a", 1, PLAN, TERMS.accord)  # the same connection goes on once there is room
    assert place.kinds() == ["KEY", "RESERVE", "INTENT"]


def test_a_full_second_place_fails_although_the_entry_counts(place):
    place.write()
    with place.open() as ledger:
        shutil.rmtree(place.head.parent)
        place.head.parent.write_text("a file in the folder's place")
        with pytest.raises(LedgerError, match="second place"):
            ledger.intend("a", 1, PLAN, TERMS.accord)
        place.head.parent.unlink()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_on_a_disk_that_fills_up_whatever_was_answered_is_in_the_ledger(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)])
    if mounted.returncode:
        pytest.skip("this machine lets nobody mount a disk")
    place, answered, refused = Place(disk), 0, 0
    try:
        place.write()
        with place.open() as ledger:
            for number in range(400):
                try:
                    ledger.counts("a", number, words="x" * 500)
                    answered += 1
                except LedgerError as fault:
                    assert "released" in str(fault)
                    refused += 1
        (disk / "more").write_bytes(b"")
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        found = place.kinds().count("COUNTS")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert min(answered, refused) > 10
    assert answered <= found <= answered + refused


def test_a_file_that_is_read_only_is_a_ledger_error_and_nothing_is_written(place, monkeypatch):
    place.write()
    right = sqlite3.connect
    monkeypatch.setattr(  # what SQLite does of itself with a file that it may not write
        sqlite3, "connect", lambda path, **how: right(f"file:{path}?mode=ro", uri=True, **how)
    )
    with pytest.raises(LedgerError, match="readonly"), place.open() as ledger:
        ledger.intend("a", 1, PLAN, TERMS.accord)
    monkeypatch.undo()
    assert place.kinds() == ["KEY", "RESERVE"]


@pytest.mark.parametrize("lock", ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
def test_opening_waits_for_another_process_that_creates_the_file(place, lock):
    place.folder.mkdir()
    with closing(sqlite3.connect(place.path, isolation_level=None, check_same_thread=False)) as raw:
        raw.execute(lock)
        done = threading.Timer(0.3, lambda: raw.execute("ROLLBACK"))
        done.start()
        with contextlib.ExitStack() as stack:
            stack.callback(done.join)
            place.write()
    assert place.kinds() == ["KEY", "RESERVE"]


@pytest.mark.parametrize("order", ["UPDATE entries SET body = '{}'", "DELETE FROM entries"])
def test_sql_cannot_change_or_remove_an_entry(place, order):
    place.write(1)
    with (
        closing(sqlite3.connect(place.path)) as raw,
        pytest.raises(sqlite3.IntegrityError, match="append-only"),
    ):
        raw.execute(order)
    assert place.kinds() == ONE_ROUND
