"""One's own table with one site column runs through simulate, audit and report without Python."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict
from wards import OWN_TABLE as ACCORD

from fedaccord import accord as accords
from fedaccord import cli
from fedaccord.client.site import data_of, open_site
from fedaccord.errors import PolicyError
from fedaccord.privacy.ledger import Ledger
from fedaccord.reports.verify import verify
from fedaccord.runs import RunFolder

SECRET = "zebra77"  # stands in a record at fault


def write(folder: Path) -> Path:
    chance = random.Random(5)
    rows = [
        f"p{i},{'North' if i < 60 else 'South'},{chance.randint(18, 110)},"
        f"{chance.choice(['no', 'yes', ''])},{chance.choice(['female', 'male'])},"
        f"{chance.choice(['no', 'yes'])}"
        for i in range(105)
    ]
    rows.insert(10, f"p900,North,40,{SECRET},male,no")
    (folder / "wards.csv").write_text("\n".join(["patient,ward,age,smoker,sex,again", *rows]))
    (folder / "ours.toml").write_text(ACCORD)
    return folder / "ours.toml"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the accord above, from the command line, in another folder than its own."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "accord").mkdir()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["fedaccord", "simulate", str(write(folder / "accord"))])
        cli.main()
    assert not ended.value.code
    (made,) = (folder / "runs").iterdir()
    return made


def test_an_accord_of_twenty_lines_trains_audits_and_reports(run: Path) -> None:
    assert len([line for line in ACCORD.splitlines() if line]) <= 20
    records = RunFolder(run).records()
    rounds = [record for record in records if record["kind"] == "round"]
    assert [record["aggregated"] for record in rounds] == [["north", "south"]] * 2
    groups = rounds[-1]["audit"]["model"]["figures"]["attributes"]["sex"]["all"]
    assert groups["demographic_parity_difference"]["value"] is not None
    report = json.loads((run / "report.json").read_text())
    assert "per training subject" in report["headline"]
    shown = (run / "report.html").read_text()
    assert "task.inputs.smoker.values" in shown and "its declared values, an input each" in shown
    assert [found.name for found in verify(run) if found.faults] == []


def test_a_record_at_fault_shows_in_its_sites_diary_and_nowhere_else(run: Path) -> None:
    holding = [p for p in run.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]
    assert [path.relative_to(run).as_posix() for path in holding] == ["sites/north/private.log"]
    text = holding[0].read_text()
    assert "1 records at fault are left out of north's data" in text
    assert f'wards.csv: row 12, column "smoker": "{SECRET}" is not one of the declared' in text
    assert "Traceback" not in text


def test_the_ledger_names_the_data_set_so_that_budgets_add_up(run: Path) -> None:
    book = Ledger(run / "sites" / "north" / "ledger.sqlite", "north")
    try:
        (held,) = book.find(RunFolder.open(run).id, "RESERVE")
    finally:
        book.close()
    assert held["dataset"] == "wards"


def context(sites: Path, run_config: dict[str, str], **node: str | int) -> Context:
    return Context(1, 1, dict(node), RecordDict(), {"sites": str(sites), **run_config})


def test_only_the_site_itself_says_where_its_data_lies(tmp_path: Path) -> None:
    ask = {"data": "/named/by/the/coordinator"}  # a key that no run may set, and that is not read
    assert data_of(tmp_path, context(tmp_path, ask)) is None
    told = context(tmp_path, ask, site="north")
    assert data_of(tmp_path / "north", told) == tmp_path / "north" / "data"
    elsewhere = context(tmp_path, ask, site="north", data="/mnt/records")
    assert data_of(tmp_path / "north", elsewhere) == Path("/mnt/records")
    (tmp_path / "south" / "data").mkdir(parents=True)
    assert data_of(tmp_path / "south", context(tmp_path, ask)) == tmp_path / "south" / "data"


def test_a_deployed_site_trains_on_its_own_folder_and_not_on_files_beside_the_accord(
    tmp_path: Path,
) -> None:
    path = write(tmp_path)
    accord, ask = accords.load(path), {"accord": str(path)}
    (tmp_path / "sites" / "north").mkdir(parents=True)
    node = {"site": "north", "folder": str(tmp_path / "sites"), "accord": str(path)}
    with pytest.raises(PolicyError, match=r"policy\.toml is missing"):
        open_site(accord, "north", context(tmp_path / "sites", ask, **node))
    made = open_site(accord, "north", context(tmp_path / "sites", ask))  # writes a policy
    made.ledger.close()
    assert len(made.task.site("north").train) > 30
    own = tmp_path / "sites" / "north" / "data" / "wards"
    own.mkdir(parents=True)
    lines = (tmp_path / "wards.csv").read_text().splitlines()
    (own / "wards.csv").write_text("\n".join(lines[:11]))
    told = open_site(accord, "north", context(tmp_path / "sites", ask, **node))
    told.ledger.close()
    data = told.task.site("north")
    assert len(data.train) + len(data.test) == 10


def test_a_site_without_its_file_stops_a_simulation_before_a_round_is_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    accord = write(tmp_path)
    (tmp_path / "wards.csv").unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fedaccord", "simulate", str(accord)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert 'task.file = "wards.csv": site north has no such file' in said
    assert not list(tmp_path.rglob("ledger.sqlite"))
