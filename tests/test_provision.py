"""Provisioning: what is made, what stays as it is, and who is pinned."""

from __future__ import annotations

import stat
import tomllib
from pathlib import Path

import pytest
from kitted import (
    ADDRESSES,
    HEART,
    HEART_FILE,
    NOW,
    SECONDS,
    contents,
    granted,
    laid,
    made,
)

from fedaccord import accord as accords
from fedaccord import enrolment, keyfiles, provision
from fedaccord.client.policy import SitePolicy
from fedaccord.errors import KitError
from fedaccord.kit import CoordinatorKit
from fedaccord.provision import Kits

NAMES = list(HEART.roster)


def test_kits_as_they_are_sent_hold_no_private_key(tmp_path: Path) -> None:
    kits = laid(tmp_path / "kits")
    private = [name for name, data in contents(kits.root).items() if b"PRIVATE" in data]
    assert sorted(private) == ["authority/ca.key", "coordinator/signing.key", "coordinator/tls.key"]
    assert not list(kits.root.rglob("*.next")) and not list(kits.root.rglob(".*.part"))


def test_every_private_key_is_for_its_owner_alone(whole: Path) -> None:
    private = [p for p in whole.rglob("*") if p.is_file() and b"PRIVATE" in p.read_bytes()]
    assert len(private) == 3 + 2 * len(NAMES)
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}
    folders = {stat.S_IMODE(path.parent.stat().st_mode) for path in private if path.stem == "tls"}
    assert folders == {0o700}


def test_a_key_is_written_for_its_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    import os

    before = os.umask(0)
    try:
        keyfiles.create(tmp_path / "keys" / "tls.key")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "keys" / "tls.key").stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        keyfiles.create(tmp_path / "keys" / "tls.key")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_key_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    keyfiles.create(tmp_path / "tls.key")
    (tmp_path / "tls.key").chmod(mode)
    with pytest.raises(KitError, match=r"others may read it. Say: chmod 600"):
        keyfiles.load(tmp_path / "tls.key")


def test_a_site_s_policy_is_not_written_by_the_kit_but_starts_by_denying(tmp_path: Path) -> None:
    from fedaccord.client import policy_file

    kits = laid(tmp_path / "kits")
    path = kits.site("va") / "va" / "policy.toml"
    assert not path.exists()
    policy_file.write_strict(path)
    own = SitePolicy.read(path)
    assert (own.approved, own.releases, own.models) == ([], [], [])


def test_the_accord_in_every_kit_pins_every_site_and_keeps_the_comments(whole: Path) -> None:
    members = CoordinatorKit.read(whole).members()
    texts = {(whole / folder / "accord.toml").read_text() for folder in ["coordinator", *NAMES]}
    (text,) = texts
    final = accords.load(whole / "coordinator" / "accord.toml")
    assert final.pins == {name: members[name].key for name in NAMES}
    keys_only = [line for line in text.splitlines() if not line.startswith('key = "')]
    assert keys_only == HEART_FILE.read_text().splitlines()
    assert final.digest != HEART.digest


def test_pins_are_written_into_a_list_of_sites_as_well() -> None:
    text = 'sites = [{name = "a", subjects = 3},  # one\n {name = "b", subjects = 4}]\n'
    after = provision.pinned(text, {"a": "0" * 64, "b": "1" * 64})
    assert [site["key"] for site in tomllib.loads(after)["sites"]] == ["0" * 64, "1" * 64]
    assert "# one" in after


def test_provisioning_again_changes_no_byte(kits: Kits) -> None:
    before = contents(kits.root)
    assert provision.lay(kits, HEART, [], 397, NOW, demo=False) == []
    assert provision.lay(kits, HEART, ADDRESSES, 397, NOW, demo=False) == []
    for name in NAMES:
        request = enrolment.read(kits.site(name) / "request.json")
        assert "nothing was changed" in granted(kits, request)
        assert made(kits, name, SECONDS + 99) == request
    assert provision.finish(kits, HEART, HEART_FILE)[1] is False
    assert contents(kits.root) == before


def test_a_site_that_is_added_gets_a_kit_and_touches_no_other_certificate(
    kits: Kits, tmp_path: Path
) -> None:
    text = HEART_FILE.read_text().replace(
        "[model]", '[[sites]]\nname = "oslo"\nsubjects = 90\n\n[model]', 1
    )
    file = tmp_path / "ours.toml"
    file.write_text(text)
    ours, before = accords.load(file), contents(kits.root)
    assert provision.lay(kits, ours, [], 397, NOW, demo=False) == ["oslo"]
    assert provision.missing(kits, ours) == ["oslo"]
    granted(kits, made(kits, "oslo"), ours)
    final, new = provision.finish(kits, ours, file)
    assert new and final.pins.keys() == {*NAMES, "oslo"}
    after = contents(kits.root)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"coordinator/members.json"} | {
        f"{folder}/accord.toml" for folder in ["coordinator", *NAMES]
    }


@pytest.mark.parametrize(
    ("addresses", "demo", "said"),
    [
        (["other.example.org:1"], False, "coordinator.toml has fed.example.org:8443"),
        ([], True, "was made without --demo. Leave --demo out, or another --out"),
    ],
)
def test_what_the_kits_are_for_does_not_change_under_the_sites(
    kits: Kits, addresses: list[str], demo: bool, said: str
) -> None:
    before = contents(kits.root)
    with pytest.raises(KitError, match=said):
        provision.lay(kits, HEART, addresses, 397, NOW, demo)
    assert contents(kits.root) == before


def test_a_site_may_not_be_named_like_a_folder_beside_the_kits(tmp_path: Path) -> None:
    text = HEART_FILE.read_text().replace('name = "va"', 'name = "requests"')
    (tmp_path / "ours.toml").write_text(text)
    with pytest.raises(KitError, match='"requests" is the name of a folder beside the kits'):
        laid(tmp_path / "kits", accords.load(tmp_path / "ours.toml"))
