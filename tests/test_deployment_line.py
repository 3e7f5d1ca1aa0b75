"""A deployment over a bad line: it finishes, and each update is counted once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from deployment import SITES, Deployment, accord_file, straight, weights, wrong
from link_proxy import Proxy

from fedaccord.simulations.deployment import free_ports


def replies(deployment: Deployment) -> Counter[str]:
    """How often each message was answered, by the coordinator's audit log."""
    return Counter(e["message"] for e in deployment.audit() if e["kind"] == "reply")


@pytest.mark.slow
def test_fifty_rounds_over_a_line_that_drops_connections_count_each_update_once(
    tmp_path: Path,
) -> None:
    rounds = {"rounds": 50, "spare_rounds": 0, "min_sites": 3, "timeout": 60.0}
    accord = accord_file(tmp_path, rounds=rounds, training={"steps": 1})
    # A round of a site passes about 15 kB, so one in ten meets the end of its connection.
    with (
        Proxy(free_ports(1)[0], seed=7, life=150_000, delay=0.003, stalls=0.003) as line,
        Deployment(
            accord,
            tmp_path / "kits",
            {"impatient": 0.5, "twice": 10},
            port=line.target,
            dialled=line.port,
        ) as deployment,
    ):
        deployment.start_all()
        deployment.finish(100)
    print(dict(line.seen))
    assert line.seen["dropped"] >= 10 and line.seen["stalled"] >= 3
    assert wrong(deployment) == []
    found = deployment.rounds()
    assert [row["aggregated"] for row in found] == [SITES] * 50
    for site in SITES:
        released = [e["round"] for e in deployment.entries(site) if e["kind"] == "RELEASE"]
        assert sorted(released) == list(range(1, 51))
        assert "sent twice" in deployment.log(site).read_text()
    assert set(replies(deployment).values()) == {1}
    assert weights(deployment.run) == weights(straight(accord, tmp_path / "straight"))
