"""Tolerant rounds, under a fake clock: silence, lateness, return, late joiners, and chaos."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from carriers import Asked, Fate, Rough, run_over
from wards import faults, small_accord, toml

from fedaccord.privacy.ledger import Ledger
from fedaccord.runs import RunFolder
from fedaccord.simulations import engine

SITES = ["cleveland", "hungary", "switzerland", "va"]
Record = dict[str, Any]


def site_of(asked: Asked) -> str:
    return SITES[asked.node - engine.FIRST_NODE]


class Ran:
    """A run over a rough carrier: what it left, and how long it took by the carrier's clock."""

    def __init__(self, folder: Path, fate: Fate, **changes: Any) -> None:
        data = small_accord() | {
            "sites": [{"name": name, "subjects": 100} for name in SITES],
            "model": {"name": "mlp", "options": {"hidden": 2}},
            "rounds": {"rounds": 6, "spare_rounds": 3, "min_sites": 2, "timeout": 100.0},
            "distillation": {"enabled": False},
        }
        for path, value in changes.items():
            table, _, key = path.partition("__")
            data[table] = data[table] | {key: value}
        folder.mkdir(parents=True, exist_ok=True)
        accord = folder / "accord.toml"
        accord.write_text("".join(f"{k} = {toml(v)}\n" for k, v in data.items()))
        self.folder, self.sites = folder / "run", folder / "sites"
        config: engine.Config = {
            "accord": str(accord),
            "run": str(self.folder),
            "sites": str(self.sites),
        }
        self.carrier = Rough(4, config, fate)
        run_over(self.carrier, config)
        self.records = RunFolder.open(self.folder).records()

    @property
    def rounds(self) -> list[Record]:
        return self.of_kind("round")

    def of_kind(self, kind: str) -> list[Record]:
        return [record for record in self.records if record["kind"] == kind]

    def released(self, site: str) -> list[int]:
        book = Ledger(self.sites / site / "ledger.sqlite", site)
        try:
            return [e["round"] for e in book.entries() if e["kind"] == "RELEASE"]
        finally:
            book.close()


def test_a_round_waits_for_a_silent_site_until_its_deadline_and_no_longer(tmp_path: Path) -> None:
    def fate(asked: Asked) -> list[float] | None:
        return None if site_of(asked) == "va" and asked.number == 2 else [1.0]

    ran = Ran(tmp_path, fate)
    waited = [record["seconds"] for record in ran.rounds]
    assert waited[0] < 5 and waited[2] < 5
    assert 100 <= waited[1] < 110  # one deadline: its counts are not waited for once more
    assert ran.rounds[1]["replies"]["va"]["reason"] == "no answer"
    assert ran.rounds[1]["audit"]["not_counted"] == {"va": "no answer"}
    assert ran.rounds[2]["replies"]["va"]["accepted"]
    assert faults(ran.folder) == []


def test_a_late_reply_is_on_record_changes_nothing_and_is_spent_at_its_site(
    tmp_path: Path,
) -> None:
    def late(asked: Asked) -> list[float]:
        return [150.0] if (site_of(asked), asked.number) == ("va", 1) else [0.0]

    def lost(asked: Asked) -> list[float]:
        return [] if (site_of(asked), asked.number) == ("va", 1) else [0.0]

    changes = {"privacy__enabled": False, "rounds__rounds": 3}
    after, without = (
        Ran(tmp_path / name, fate, **changes) for name, fate in (("late", late), ("lost", lost))
    )
    said = [late for record in after.rounds for late in record["late"]]
    assert said == []  # it came after the run: the two rounds that were left took no time
    assert [r["model"] for r in after.rounds] == [r["model"] for r in without.rounds]
    assert after.released("va") == [1, 2, 3]

    def slow(asked: Asked) -> list[float]:
        return [150.0] if (site_of(asked), asked.number) == ("va", 1) else [60.0]

    slower = Ran(tmp_path / "slow", slow, **changes)
    assert [r["late"] for r in slower.rounds] == [[], [{"site": "va", "answers": "round 1"}], []]
    assert [r["model"] for r in slower.rounds] == [r["model"] for r in without.rounds]
    assert faults(slower.folder) == []


def test_a_dead_site_is_skipped_after_its_misses_and_welcomed_back(tmp_path: Path) -> None:
    def fate(asked: Asked) -> list[float] | None:
        number = rounds_seen(asked)
        return None if site_of(asked) == "hungary" and 2 <= number <= 5 else [1.0]

    seen = [0]

    def rounds_seen(asked: Asked) -> int:
        seen[0] = max(seen[0], asked.number)
        return seen[0]

    ran = Ran(tmp_path, fate, rounds__max_misses=2, rounds__rounds=8)
    invited = [record["round"] for record in ran.rounds if "hungary" in record["invited"]]
    assert invited[:3] == [1, 2, 3]  # two misses, and it is not asked in vain again
    assert [r["away"] for r in ran.rounds[2:5]] == [["hungary"]] * 3
    (back,) = ran.of_kind("back")
    assert back["site"] == "hungary" and invited[3] == back["round"] > 5
    assert ran.rounds[-1]["replies"]["hungary"]["accepted"]
    long = [record["round"] for record in ran.rounds if record["seconds"] >= 100]
    assert long == [2, 3]  # nobody waits for it while it is away
    assert faults(ran.folder) == []


def test_a_late_joiner_reserves_and_takes_part(tmp_path: Path) -> None:
    joins = Counter[str]()

    def fate(asked: Asked) -> list[float] | None:
        joins[site_of(asked)] += asked.kind == "query.join"
        away = site_of(asked) == "va" and joins["va"] == 1
        return None if away else [0.5]

    ran = Ran(tmp_path, fate)
    kinds = [record["id"] for record in ran.records]
    assert kinds.index("out/va") < kinds.index("round-1") < kinds.index("plan/va")
    first = next(record["round"] for record in ran.rounds if "va" in record["invited"])
    assert first > 1 and ran.released("va")[0] == first
    assert all("va" in record["invited"] for record in ran.rounds[first - 1 :])
    assert faults(ran.folder) == []


def test_a_site_that_refused_is_not_asked_in_every_round(tmp_path: Path, set_policy: Any) -> None:
    def fate(asked: Asked) -> list[float]:
        return [0.0]

    (tmp_path / "sites" / "va").mkdir(parents=True)
    (tmp_path / "sites" / "va" / "policy.toml").write_text("no policy")
    ran = Ran(tmp_path, fate)
    asked = [post for post in ran.carrier.log if site_of(post) == "va"]
    assert [post.kind for post in asked] == ["query.join"]


def test_with_too_few_sites_nobody_is_asked_and_the_run_ends_in_words(tmp_path: Path) -> None:
    def fate(asked: Asked) -> list[float] | None:
        gone = asked.number >= 2 or seen[0] >= 2
        seen[0] = max(seen[0], asked.number)
        return None if gone and site_of(asked) != "va" else [1.0]

    seen = [0]
    ran = Ran(tmp_path, fate, rounds__max_misses=1)
    assert ran.records[-1]["reason"] == (
        "sites: fewer than 2 have answered in 1 rounds in a row, after 1 of 6 rounds"
    )
    assert ran.rounds[-1]["invited"] == []
    assert ran.released("va") == [1, 2]  # no slot is spent on a round that cannot count
    assert faults(ran.folder) == []


@pytest.mark.slow
def test_thirty_percent_chaos_over_fifty_rounds_counts_every_accepted_update_once(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(5)

    def fate(asked: Asked) -> list[float]:
        if asked.kind in ("query.join", "query.reserve") and asked.count < 8:
            return [0.0]
        match int(rng.integers(14)):  # 4 of 14: lost, twice, late, or out of order
            case 0:
                return []
            case 1:
                return [0.1, 0.1]
            case 2:
                return [float(rng.uniform(100, 400))]
            case 3:
                return [float(rng.uniform(0, 99))]
            case _:
                return [0.1]

    changes = {"rounds__rounds": 50, "rounds__spare_rounds": 40, "training__steps": 1}
    ran = Ran(tmp_path, fate, **changes)
    assert ran.records[-1]["reason"] == "rounds done: 50 of 50"
    assert sum(bool(record["aggregated"]) for record in ran.rounds) == 50
    for record in ran.rounds:
        said = record["replies"]
        accepted = sorted(site for site in said if said[site]["accepted"])
        assert record["aggregated"] in ([], accepted)
        assert len(set(record["aggregated"])) == len(record["aggregated"])
    further = [
        r for x in ran.rounds for said in x["replies"].values() for r in said.get("further", [])
    ]
    lost = [
        s for x in ran.rounds for s, said in x["replies"].items() if said["reason"] == "no answer"
    ]
    late = [entry for record in ran.rounds for entry in record["late"]]
    assert further and lost and late  # each of it did happen
    assert all(reason.startswith("duplicate") for reason in further)
    for site in SITES:
        assert len(set(ran.released(site))) == len(ran.released(site))
    assert faults(ran.folder) == []
