"""Revoked sites and rotated keys: what holds before, after, and wherever it is interrupted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from kitted import (
    ADDRESSES,
    HEART,
    NOW,
    SECONDS,
    granted,
    laid,
)

from fedaccord import authority, cli, enrolment, keyfiles, keys, membership, provision
from fedaccord.client import enrol
from fedaccord.envelope import handover, key_in_force
from fedaccord.errors import KitError, LedgerError
from fedaccord.kit import CoordinatorKit, SiteKit
from fedaccord.privacy.ledger import Ledger
from fedaccord.provision import Kits

LATER = SECONDS + 60
OTHERS = shutil.ignore_patterns("cleveland", "hungary", "switzerland")
NAMES = list(HEART.roster)


def test_a_revoked_site_stays_so_and_is_granted_nothing(kits: Kits) -> None:
    own = kits.own()
    assert membership.revoke(own, "va", "its laptop\nwas stolen", NOW) is True
    assert own.members()["va"].revoked == "2026-11-22: its laptop was stolen"
    assert membership.revoke(own, "va", "again", NOW) is False
    assert own.members()["hungary"].revoked == ""
    request = enrol.rotate(SiteKit.read(kits.site("va")), LATER)
    with pytest.raises(KitError, match="the site is revoked"):
        granted(kits, request)


def test_who_is_no_member_cannot_be_revoked(kits: Kits) -> None:
    with pytest.raises(KitError, match=r'no member "oslo". Members: cleveland'):
        membership.revoke(kits.own(), "oslo", "a reason", NOW)
    with pytest.raises(KitError, match="--reason must be 1 to 200 characters"):
        membership.revoke(kits.own(), "va", " \n", NOW)


@pytest.mark.parametrize("identity", [False, True])
def test_a_rotated_coordinator_has_a_certificate_that_fits_and_a_handover_if_asked(
    kits: Kits, identity: bool
) -> None:
    own = kits.own()
    pin = SiteKit.read(kits.site("va")).coordinator_key
    before = own.tls_cert.read_bytes(), own.tls_key.read_bytes()
    for turn in (1, 2):
        public = membership.rotate(kits, 397, NOW, identity)
        assert before[0] != own.tls_cert.read_bytes() and before[1] != own.tls_key.read_bytes()
        assert own.tls_key == own.new_tls_key
        assert key_in_force(pin, "coordinator", own.handovers()) == public
        assert len(own.handovers()) == (turn if identity else 0)
    assert (public == pin) is not identity
    assert not list(own.folder.glob("*.next"))


def test_a_kit_made_after_a_rotation_pins_the_key_in_force_and_follows_the_next(
    kits: Kits, tmp_path: Path
) -> None:
    first = membership.rotate(kits, 397, NOW, identity=True)
    shutil.rmtree(kits.site("va"))
    provision.lay(kits, HEART, [], 397, NOW, demo=False)
    assert SiteKit.read(kits.site("va")).coordinator_key == first
    second = membership.rotate(kits, 397, NOW, identity=True)
    assert key_in_force(first, "coordinator", kits.own().handovers()) == second


def test_without_the_authority_s_key_nothing_is_issued_and_all_else_works(kits: Kits) -> None:
    shutil.rmtree(kits.authority)
    assert provision.lay(kits, HEART, [], 397, NOW, demo=False) == []
    membership.revoke(kits.own(), "va", "a reason", NOW)
    with pytest.raises(KitError, match="Put them back for as long as this takes"):
        membership.rotate(kits, 397, NOW)
    with pytest.raises(LedgerError):
        keys.load(kits.root / "no.key")


class Cut(Exception):
    """The power goes."""


def interrupted(patch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> bool:
    """Do something, and stop before the given link, rename or removal; whether it was stopped."""
    count = 0

    def until(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **words: object) -> object:
            nonlocal count
            count += 1
            if count > number:
                raise Cut
            return real(*args, **words)

        return call

    with patch.context() as held:
        for name in ("link", "replace", "unlink"):
            held.setattr(os, name, until(getattr(os, name)))
        try:
            act()
        except Cut:
            return True
    return False


def test_provisioning_interrupted_anywhere_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, stopped = 0, True
    alone = HEART.model_copy(update={"sites": HEART.sites[:1]})
    while stopped:
        kits = Kits(tmp_path / str(number))

        def lay(kits: Kits = kits) -> object:
            return provision.lay(kits, alone, ADDRESSES, 397, NOW, demo=False)

        stopped = interrupted(monkeypatch, number, lay)
        lay()
        own = kits.own()
        assert own.tls_key.exists() and own.members() == {} and own.handovers() == []
        pin = SiteKit.read(kits.site(HEART.sites[0].name)).coordinator_key
        assert pin == keys.load(own.signing_key).public
        number += 1
    assert number > 15


def test_a_coordinator_s_rotation_interrupted_anywhere_leaves_keys_that_belong_together(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = SiteKit.read(whole / "va").coordinator_key
    number, stopped, seen = 0, True, set()
    while stopped:
        kits = Kits(shutil.copytree(whole, tmp_path / str(number), ignore=OTHERS))

        def rotate(kits: Kits = kits) -> object:
            return membership.rotate(kits, 397, NOW, identity=True)

        stopped = interrupted(monkeypatch, number, rotate)
        for after in (len(kits.own().handovers()), len(kits.own().handovers()) + 1):
            own = kits.own()
            held = authority.read_certificate(own.tls_cert.read_bytes(), "tls.pem")
            assert authority.fits(held, keyfiles.load(own.tls_key))
            in_force = key_in_force(pin, "coordinator", own.handovers())
            assert keys.load(own.signing_key).public == in_force
            assert len(own.handovers()) == after
            seen.add(after)
            rotate()
        number += 1
    assert seen == {0, 1, 2}


def test_a_site_s_rotation_interrupted_anywhere_is_finished_by_the_next_command(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = CoordinatorKit.read(whole).members()["va"].key
    number, stopped, seen = 0, True, set()
    while stopped:
        kits = Kits(shutil.copytree(whole, tmp_path / str(number), ignore=OTHERS))
        kit = SiteKit.read(kits.site("va"))

        def rotate(kit: SiteKit = kit) -> object:
            return enrol.rotate(kit, LATER, identity=True)

        stopped = interrupted(monkeypatch, number, rotate)
        assert kit.tls_key.exists()  # the certificate that is there has its key, throughout
        request = enrol.init(kit, LATER)
        assert request.key == keys.load(kit.identity_key).public
        assert key_in_force(pin, "va", request.handovers) == request.key
        seen.add(len(request.handovers))
        granted(kits, request)
        assert enrol.init(kit, LATER) == request
        assert not (kit.folder / "keys" / "ledger.key.before").exists()
        ledger = Ledger(kit.site / "ledger.sqlite", "va", kit.folder / "heads" / "va.json")
        assert ledger.entries()[-1]["public_key"] == request.key
        ledger.close()
        number += 1
    assert seen == {0, 1} and number > 8


def test_a_site_that_rotates_keeps_its_old_certificate_until_the_new_one_is_there(
    kits: Kits,
) -> None:
    kit = SiteKit.read(kits.site("va"))
    before = kit.tls_cert.read_bytes(), kit.tls_key
    request = enrol.rotate(kit, LATER)
    assert request.made == LATER and kit.tls_key == before[1]
    granted(kits, request)  # which puts site.pem into the kit
    assert kit.tls_cert.read_bytes() != before[0] and kit.tls_key != before[1]
    old = authority.read_certificate(before[0], "old")
    assert kits.own().members()["va"].certificate != authority.fingerprint(old)
    again = enrol.rotate(kit, LATER)
    assert again.made == LATER + 1  # a clock that stands still makes no request older
    assert kit.tls_key == kit.new_tls_key


def test_the_key_before_a_rotation_is_no_longer_the_one_in_force(kits: Kits) -> None:
    kit = SiteKit.read(kits.site("va"))
    old = keys.load(kit.identity_key)
    request = enrol.rotate(kit, LATER, identity=True)
    granted(kits, request)
    member = kits.own().members()["va"]
    assert membership.in_force(member, "va") == request.key != old.public == member.key
    third = keys.create(kits.root / "third.key")
    forked = [handover("va", third.public, old)]  # the old key tries to go on
    assert key_in_force(member.key, "va", [*member.handovers, *forked]) == request.key
    signature = third.sign(enrolment.words("va", request.csr, third.public, LATER + 1, forked))
    new = {"key": third.public, "made": LATER + 1, "handovers": forked, "signature": signature}
    with pytest.raises(KitError, match="is not the one in force"):
        granted(kits, request.model_copy(update=new))


def test_a_site_in_a_kit_does_not_rotate_its_key_behind_the_coordinator_s_back(
    kits: Kits, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = kits.site("va") / "va"
    monkeypatch.setattr("sys.argv", ["fedaccord", "ledger", "rotate", str(site)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = f"fedaccord site rotate {kits.site('va')} --key"
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_site_without_keys_has_none_to_rotate(tmp_path: Path) -> None:
    kit = SiteKit.read(laid(tmp_path).site("va"))
    with pytest.raises(KitError, match="has no keys to replace"):
        enrol.rotate(kit, LATER)


def test_a_ledger_that_lost_its_key_gets_no_other(kits: Kits) -> None:
    kit = SiteKit.read(kits.site("va"))
    Ledger(kit.site / "ledger.sqlite", "va").close()
    kit.identity_key.unlink()
    with pytest.raises(KitError, match="the ledger beside it is signed with it"):
        enrol.init(kit, LATER)
