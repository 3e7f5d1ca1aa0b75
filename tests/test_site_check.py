"""`site check`: what it finds at the site itself, in both directions, and the command."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import tomlkit
from checked_site import NOW, PLANTED, TABLE, at, edit, enrolled, fails, issue, listening

from fedaccord import accord as accords
from fedaccord import authority, cli_site_check, keyfiles, keys, tasks
from fedaccord.accord import Accord
from fedaccord.client import check, dial, enrol
from fedaccord.client.check import Finding
from fedaccord.client.policy import SitePolicy
from fedaccord.kit import SiteKit
from fedaccord.privacy.budget import Cap
from fedaccord.privacy.ledger import Ledger, Terms
from fedaccord.privacy.plan import plan_for
from fedaccord.provision import Kits


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Kits:
    """Not to be changed."""
    return enrolled(tmp_path_factory.mktemp("kits"))


@pytest.fixture
def kit(kits: Kits, tmp_path: Path) -> SiteKit:
    """A copy of the kit of site north, which a test may break."""
    shutil.copytree(kits.site("north"), tmp_path / "north")
    return SiteKit.read(tmp_path / "north")


@pytest.fixture(scope="module")
def coordinator(kits: Kits, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a coordinator that listens."""
    with listening(kits, tmp_path_factory.mktemp("coordinator")) as port:
        yield port


def agreed(kit: SiteKit) -> Accord:
    return accords.load(kit.accord_file)


def task_of(kit: SiteKit) -> tasks.Task:
    return tasks.task_of(agreed(kit), kit.folder, check.data_of(kit))


def test_a_good_site_passes_every_check_and_nothing_in_its_kit_is_changed(
    kit: SiteKit, coordinator: int
) -> None:
    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in kit.folder.rglob("*") if path.is_file()}

    before = contents()
    found = list(cli_site_check.findings(at(kit, coordinator), dial.probe))
    assert [one for one in found if one.state != "ok"] == []
    by_name = {one.name: one.found for one in found}
    assert " ".join(by_name) == (
        "accord data policy ledger keys certificate disk GPU coordinator clock"
    )
    subjects, train, test = map(int, re.findall(r"\d+", by_name["data"]))
    assert subjects == train and train + test == 30  # as many as the file has of this ward
    assert "run ours-1" in by_name["coordinator"]
    assert contents() == before


# Data


def test_missing_records_fail_and_the_remedy_finds_where_they_are_looked_for(kit: SiteKit) -> None:
    shutil.rmtree(check.data_of(kit))
    found = check.check_data(agreed(kit), task_of(kit), kit)
    fails(found, "site north has no such file")
    assert f"--data {kit.site / 'data'}" in found.remedy


@pytest.mark.parametrize(
    ("old", "new", "state"),
    [
        ("patient,ward,", "patient,place,", "fail"),  # a column is missing: nothing can be read
        (",male,", f",{PLANTED},", "warn"),  # single records are at fault
        ("p1,", "q1,", "ok"),
    ],
)
def test_records_at_fault_are_counted_and_none_of_their_values_is_shown(
    kit: SiteKit, old: str, new: str, state: str
) -> None:
    file = check.data_of(kit) / "wards" / "wards.csv"
    file.write_text(TABLE.replace(old, new))
    found = check.check_data(agreed(kit), task_of(kit), kit)
    assert found.state == state and PLANTED not in found.found + found.remedy
    assert state == "ok" or "`fedaccord task check" in found.remedy


def test_fewer_training_subjects_than_declared_are_warned_of(kit: SiteKit) -> None:
    file = check.data_of(kit) / "wards" / "wards.csv"
    file.write_text("".join(TABLE.splitlines(keepends=True)[:20]))
    found = check.check_data(agreed(kit), task_of(kit), kit)
    assert (found.state, "1 thing is wrong" in found.found) == ("warn", True)


def test_a_reader_that_raises_with_a_value_shows_its_type_alone(kit: SiteKit) -> None:
    class Broken:
        spec, sites = task_of(kit).spec, ("north",)

        def site(self, name: str) -> None:
            raise RuntimeError(PLANTED)

    found = check.check_data(agreed(kit), Broken(), kit)  # type: ignore[arg-type]
    fails(found, "RuntimeError")
    assert PLANTED not in found.found


# Policy and ledger


def judged(kit: SiteKit) -> Finding:
    return check.check_policy(agreed(kit), kit, 100, NOW)


def test_a_policy_that_would_refuse_fails_with_the_rule(kit: SiteKit) -> None:
    assert judged(kit).state == "ok"
    edit(kit.site / "policy.toml", approved=[])
    fails(judged(kit), "approved: ")
    assert "`fedaccord site approve" in judged(kit).remedy
    edit(kit.site / "policy.toml", approved=[agreed(kit).digest], min_cell=500)
    fails(judged(kit), "min_cell: ")
    (kit.site / "policy.toml").write_text("max_epsilon = 'much'")
    fails(judged(kit), "max_epsilon")
    (kit.site / "policy.toml").unlink()
    fails(judged(kit), "policy.toml is missing")


def test_hours_outside_which_it_does_not_train_are_warned_of(kit: SiteKit) -> None:
    soon = [f"{(NOW + timedelta(hours=h)):%H}:00" for h in (2, 3)]
    edit(kit.site / "policy.toml", hours="-".join(soon))
    found = judged(kit)
    assert (found.state, "when it trains" in found.found) == ("warn", True)


def test_a_plan_over_the_cap_fails_and_a_run_that_holds_a_reservation_is_warned_of(
    kit: SiteKit,
) -> None:
    accord = agreed(kit)
    assert check.check_ledger(accord, kit).state == "ok"
    edit(kit.site / "policy.toml", max_epsilon=0.01)
    fails(check.check_ledger(accord, kit), "of 0.01")
    cap = SitePolicy.read(kit.site / "policy.toml")
    edit(kit.site / "policy.toml", max_epsilon=1e6)
    ledger = Ledger(kit.site / "ledger.sqlite", "north", kit.site / cap.second_head)
    plan = plan_for(accord, "north")
    ledger.reserve("r", plan, 2, Terms(Cap(1e6, 1e-4), accord.digest, accord.task.name))
    ledger.close()
    assert check.check_ledger(accord, kit).state == "ok"
    edit(kit.site / "policy.toml", max_epsilon=0.01)
    found = check.check_ledger(accord, kit)
    assert (found.state, "goes on with its reservation" in found.found) == ("warn", True)


def test_a_ledger_whose_head_was_taken_away_fails(kit: SiteKit) -> None:
    own = SitePolicy.read(kit.site / "policy.toml")
    ledger = Ledger(kit.site / "ledger.sqlite", "north", kit.site / own.second_head)
    for _ in range(2):
        ledger.refuse("r", "a", "rule", str(_))
    ledger.close()
    assert check.check_ledger(agreed(kit), kit).state == "ok"
    (kit.site / own.second_head).unlink()
    fails(check.check_ledger(agreed(kit), kit), "second place")


# Keys and certificate


def test_keys_that_others_may_read_are_missing_or_not_pinned_fail(kit: SiteKit) -> None:
    accord = agreed(kit)
    assert check.check_keys(accord, kit).state == "ok"
    for path in (kit.identity_key, kit.tls_key):
        path.chmod(0o640)
        fails(check.check_keys(accord, kit), "others may read it")
        assert f"`chmod 600 {kit.identity_key}" in check.check_keys(accord, kit).remedy
        path.chmod(0o600)
    kit.identity_key.unlink()
    fails(check.check_keys(accord, kit), "No key was made")
    keys.create(kit.identity_key)
    fails(check.check_keys(accord, kit), "did not hand over")


def test_a_key_that_the_pinned_one_handed_over_to_passes(kit: SiteKit) -> None:
    enrol.rotate(kit, int(NOW.timestamp()) + 60, identity=True)
    found = check.check_keys(agreed(kit), kit)
    assert (found.state, "successor" in found.found) == ("ok", True)


def test_a_certificate_for_another_tls_key_fails(kit: SiteKit) -> None:
    kit.new_tls_key.unlink()
    keyfiles.create(kit.new_tls_key)
    fails(check.check_keys(agreed(kit), kit), "is for another key")


def test_an_accord_that_pins_no_key_of_the_site_fails(kit: SiteKit) -> None:
    text = tomlkit.parse(kit.accord_file.read_text())
    for site in text["sites"]:
        del site["key"]
    fails(check.check_keys(accords.parse(text.unwrap()), kit), "pins no key")


def test_a_kit_whose_request_was_not_granted_yet_says_what_comes_next(kit: SiteKit) -> None:
    kit.tls_cert.unlink()
    fails(check.check_keys(None, kit), "There is no certificate")
    fails(check.check_certificate(kit, NOW), "site.pem")


def test_a_certificate_is_held_to_its_name_its_authority_and_its_dates(
    kits: Kits, kit: SiteKit
) -> None:
    assert check.check_certificate(kit, NOW).state == "ok"
    almost = NOW + timedelta(days=397 - 30)
    assert check.check_certificate(kit, almost - timedelta(hours=1)).state == "ok"
    assert check.check_certificate(kit, almost + timedelta(hours=1)).state == "warn"
    fails(check.check_certificate(kit, NOW + timedelta(days=398)), "ran out")
    early = check.check_certificate(kit, NOW - timedelta(hours=2))
    fails(early, "not valid before")
    assert "timedatectl" in early.remedy
    issue(kits, kit, name="south")
    fails(check.check_certificate(kit, NOW), 'is for "south"')
    other = authority.new_key()
    same = authority.name_of(kits.issuer()[0])
    issue(kits, kit, by=(authority.found(same, other, 99, NOW), other))
    fails(check.check_certificate(kit, NOW), "not issued by the authority")
    kit.tls_cert.write_text("-----BEGIN CERTIFICATE-----\nno\n-----END CERTIFICATE-----\n")
    fails(check.check_certificate(kit, NOW), "cannot be read")


# Disk and device


def test_a_folder_without_room_or_that_is_not_there_fails(kit: SiteKit, tmp_path: Path) -> None:
    assert check.check_disk(kit.site, 1).state == "ok"
    free_bytes = shutil.disk_usage(kit.site).free
    fails(check.check_disk(kit.site, free_bytes), "GB are needed")
    fails(check.check_disk(tmp_path / "gone", 1), "cannot be written")
    fails(check.check_disk(Path("/proc"), 1), "cannot be written")
    assert not list(kit.site.glob("tmp*"))


def test_a_device_that_is_named_and_not_there_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDACCORD_DEVICE", "cpu")
    assert "the CPU is used" in check.check_device("north", "float32").found
    monkeypatch.setenv("FEDACCORD_DEVICE", "cuda:99")
    fails(check.check_device("north", "float32"), "cuda:99")


# The command


def test_the_command_shows_a_table_and_fails_where_a_check_does(
    kit: SiteKit, coordinator: int, called: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    code, out, _ = called("site", "check", kit.folder)
    assert code == 1 and out.endswith(f"{kit.folder}: coordinator failed\n")
    assert "nothing listens there" in out and "fedaccord coordinator up" in out
    edit(kit.folder / "site.toml", coordinator=f"127.0.0.1:{coordinator}")
    code, out, _ = called("site", "check", kit.folder)
    assert code == 0 and out.endswith(f"{kit.folder}: nothing fails\n")
    assert PLANTED not in out


def test_a_kit_without_its_accord_is_checked_as_far_as_it_goes(
    kit: SiteKit, called: Callable, tmp_path: Path
) -> None:
    kit.accord_file.unlink()
    found = {one.name: one for one in cli_site_check.findings(kit, dial.probe)}
    fails(found["accord"], "no such file")
    assert (found["keys"].state, found["certificate"].state) == ("ok", "ok")
    code, _, err = called("site", "check", tmp_path / "nothing")
    assert code == 2 and err.count("\n") == 1 and "fedaccord provision" in err
