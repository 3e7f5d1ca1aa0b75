"""Faults of a deployment that nobody kills: each ends in a clear state that both logs tell."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from deployment import SITES, Deployment, accord_file, wrong
from link_proxy import Proxy

from fedaccord import authority, keyfiles
from fedaccord.kit import CoordinatorKit, SiteKit
from fedaccord.simulations.deployment import free_ports

FAST = {"impatient": 0.5, "beat": 0.3, "keepalive": 1.0}


def at(deployment: Deployment, number: int) -> None:
    deployment.wait_for(f"round {number}", lambda: len(deployment.rounds()) >= number)


def left(deployment: Deployment) -> set[str]:
    """Sites whose session ended before the coordinator stopped, by its audit log."""
    found = [entry for entry in deployment.audit() if entry["kind"] == "left"]
    return {entry["site"] for entry in found if entry["why"] != "the coordinator stopped"}


def cut_off(folder: Path, seconds: float, change: dict[str, Any], how: str) -> Deployment:
    """Run an accord of five rounds, and cut the line after the first for a while."""
    rounds = {"rounds": 5, "spare_rounds": 0, "min_sites": 3, "timeout": 30.0 + 2 * seconds}
    accord, slow = accord_file(folder, rounds=rounds), {"slow": [2, 0.5]}
    with (
        Proxy(free_ports(1)[0]) as line,
        Deployment(
            accord, folder / "kits", change, port=line.target, dialled=line.port
        ) as deployment,
    ):
        deployment.start("coordinator")
        deployment.start(*SITES, **slow)
        at(deployment, 1)
        getattr(line, how)(True)
        time.sleep(seconds)
        getattr(line, how)(False)
        deployment.finish(60 + 2 * seconds)
        assert line.seen["silent"] + line.seen["refused"] > 0
    assert [row["aggregated"] for row in deployment.rounds()] == [SITES] * 5
    assert wrong(deployment) == []
    return deployment


def test_connections_that_break_for_three_seconds_are_noticed_by_both_ends_and_overcome(
    tmp_path: Path,
) -> None:
    deployment = cut_off(tmp_path, 3.0, FAST, "cut")
    assert left(deployment) == set(SITES)
    broken = {e["site"] for e in deployment.incidents() if "session broke off" in e["what"]}
    assert broken == set(SITES)
    for site in SITES:
        assert "dialling again" in deployment.log(site).read_text()


@pytest.mark.soak
def test_a_partition_of_sixty_seconds_is_overcome_as_a_hospital_is_set_up(tmp_path: Path) -> None:
    deployment = cut_off(tmp_path, 60.0, {}, "silence")
    assert left(deployment) == set(SITES)


def test_a_slow_site_misses_its_round_is_late_on_record_and_comes_back(tmp_path: Path) -> None:
    rounds = {"rounds": 4, "spare_rounds": 3, "timeout": 2.0}
    accord = accord_file(tmp_path, private=True, rounds=rounds)
    with Deployment(accord, tmp_path / "kits", FAST) as deployment:
        deployment.start("coordinator", "cleveland", "hungary")
        deployment.start("va", slow=[2, 3.0])
        deployment.finish()
    found = deployment.rounds()
    assert found[1]["replies"]["va"]["reason"] == "no answer"
    assert found[1]["aggregated"] == ["cleveland", "hungary"]
    assert {"site": "va", "answers": "round 2"} in [late for row in found for late in row["late"]]
    assert "va" in found[-1]["aggregated"]
    assert wrong(deployment) == []


def test_a_clock_ten_minutes_off_keeps_a_site_out_in_plain_words(tmp_path: Path) -> None:
    accord = accord_file(tmp_path, rounds={"rounds": 2})
    with Deployment(accord, tmp_path / "kits", FAST, join_wait=3) as deployment:
        deployment.start("coordinator", "cleveland", "hungary")
        deployment.start("va", clock=600.0)
        deployment.finish()
    words = "The clock of site va is 600 s off the coordinator's"
    assert words in deployment.log("va").read_text()
    assert [e["reason"] for e in deployment.audit() if e["kind"] == "refused"][:1] == ["clock"]
    assert any(e["site"] == "va" and words in e["what"] for e in deployment.incidents())
    assert [row["aggregated"] for row in deployment.rounds()] == [["cleveland", "hungary"]] * 2
    assert wrong(deployment) == []


def test_a_full_disk_at_a_site_refuses_its_rounds_and_the_others_go_on(tmp_path: Path) -> None:
    accord = accord_file(tmp_path, private=True, rounds={"rounds": 14})
    with Deployment(accord, tmp_path / "kits", FAST) as deployment:
        deployment.start("coordinator", "cleveland", "hungary")
        deployment.start("va", **{"file size": 33_000})
        deployment.finish()
    reasons = [row["replies"]["va"]["reason"] for row in deployment.rounds()]
    assert reasons[0] == "" and "refused: " in reasons[-1] and "disk" in reasons[-1], reasons
    assert all("hungary" in row["aggregated"] for row in deployment.rounds())
    assert wrong(deployment) == []


def test_a_full_disk_at_the_coordinator_ends_it_and_the_run_goes_on_once_there_is_room(
    tmp_path: Path,
) -> None:
    accord = accord_file(tmp_path, rounds={"rounds": 8})
    with Deployment(accord, tmp_path / "kits", FAST) as deployment:
        deployment.start(*SITES)
        deployment.start("coordinator", **{"file size": 30_000})
        code = deployment.running["coordinator"].wait()
        assert code == 2, deployment.logs()
        assert "File too large" in deployment.log("coordinator").read_text()
        deployment.start("coordinator")
        deployment.finish()
    assert len(deployment.rounds()) == 8
    assert wrong(deployment) == []


def expire(deployment: Deployment, site: str, seconds: float) -> None:
    """Give a site a certificate that ends soon."""
    kits, kit = deployment.kits, SiteKit.read(deployment.kits / site)
    own = CoordinatorKit.read(kits / "coordinator")
    ca = kits / "authority" / "ca.pem"
    issuer = (
        authority.read_certificate(ca.read_bytes(), str(ca)),
        keyfiles.load(kits / "authority" / "ca.key"),
    )
    begin = datetime.now(UTC) - timedelta(days=1) + timedelta(seconds=seconds)
    key = keyfiles.load(kit.tls_key).public_key()
    issued = authority.issue(issuer, key, site, [], "client", 1, begin)
    kit.tls_cert.write_bytes(authority.certificate_pem(issued))
    members = own.members()
    changed = {"certificate": authority.fingerprint(issued)}
    own.write_members(members | {site: members[site].model_copy(update=changed)})


def test_a_certificate_that_runs_out_shows_at_the_next_dial(tmp_path: Path) -> None:
    accord = accord_file(tmp_path, rounds={"rounds": 6, "timeout": 2.0})
    with Deployment(accord, tmp_path / "kits", FAST) as deployment:
        end = time.monotonic() + 5.0
        expire(deployment, "va", 5.0)
        deployment.start("coordinator", "cleveland", "hungary")
        deployment.start("va", dies=["before INTENT", 2])
        deployment.running["va"].wait()
        time.sleep(max(0.0, end - time.monotonic()))
        deployment.start("va")
        deployment.finish()
    assert "site.pem: is good from" in deployment.log("va").read_text()
    assert left(deployment) == {"va"}
    found = deployment.rounds()
    assert [row["aggregated"] for row in found] == [SITES] + [["cleveland", "hungary"]] * 5
    assert [row["away"] for row in found] == [[], [], [], ["va"], ["va"], ["va"]]
    assert wrong(deployment) == []
