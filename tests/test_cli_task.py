"""`fedaccord task check`: every fault of one's own data is one line, at the site's own console."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from wards import OWN_TABLE as ACCORD
from wards import Call

HEADER = "patient,ward,age,smoker,sex,again"


def rows(seed: int = 3) -> list[str]:
    """50 patients of north and 40 of south, each with one row."""
    chance = random.Random(seed)
    return [
        f"p{i},{'north' if i < 60 else 'south'},{chance.randint(18, 110)},"
        f"{chance.choice(['no', 'yes', ''])},{chance.choice(['female', 'male'])},"
        f"{chance.choice(['no', 'yes'])}"
        for i in range(105)
    ]


def written(folder: Path, lines: list[str], text: str = ACCORD) -> Path:
    (folder / "wards.csv").write_text("\n".join([HEADER, *lines]) + "\n")
    (folder / "ours.toml").write_text(text)
    return folder / "ours.toml"


def test_counts_by_site_split_class_and_group_are_those_of_the_file(
    called: Call, tmp_path: Path
) -> None:
    code, out, err = called("task", "check", written(tmp_path, rows()))
    assert (code, err) == (0, "")
    assert "no fault found in the records of task wards" in out
    cells = [[c.strip() for c in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    table = {(site, split): list(map(int, counts)) for site, split, *counts in cells}
    held = [row.split(",") for row in rows()]
    for site in ("north", "south"):
        train, test = table[site, "train"], table[site, "test"]
        own = [row for row in held if row[1] == site]
        assert train[0] + test[0] == train[1] + test[1] == len(own)
        for column, (at, value) in enumerate([(5, "no"), (5, "yes"), (4, "female"), (4, "male")]):
            count = sum(row[at] == value for row in own)
            assert train[2 + column] + test[2 + column] == count
        assert train[2] + train[3] == train[1] and test[4] + test[5] == test[1]


ONE = [  # what is wrong with one row, and the line that names it
    ("p0,north,300,no,male,no", 'wards.csv: row 107, column "age": 300 is outside 18 to 110'),
    ("p900,north,old,no,male,no", 'wards.csv: row 107, column "age": "old" is no number'),
    ("p900,north,40,maybe,male,no", 'column "smoker": "maybe" is not one of the declared ["no", '),
    ("p900,north,40,no,other,no", 'column "sex": "other" is not one of the declared ["female", '),
    ("p900,north,40,no,male,NaN", 'wards.csv: row 107, column "again": is missing'),
    ("p900,north,40,no,male,2", 'column "again": "2" is not one of the declared ["no", "yes"]'),
    (",north,40,no,male,no", 'wards.csv: row 107, column "patient": is missing'),
    ("p900,,40,no,male,no", 'wards.csv: row 107, column "ward": is missing'),
    ("p900,west,40,no,male,no", 'column "ward": "west" is no site of the accord'),
    ("p900,north,40,no,male", "wards.csv: row 107: has 5 cells, and the header 6"),
    ('p900,north,40,"no,male,no', "wards.csv: row 107: has a quote that does not close"),
]


@pytest.mark.parametrize(("row", "said"), ONE)
def test_a_row_at_fault_is_one_line_and_exit_code_2(
    row: str, said: str, called: Call, tmp_path: Path
) -> None:
    code, out, err = called("task", "check", written(tmp_path, [*rows(), row]))
    lines = [line for line in out.splitlines() if line.startswith("FAULT")]
    assert (code, len(lines)) == (2, 1)
    assert said in lines[0]
    assert err.startswith("fedaccord: ") and "1 fault in the records of task wards" in err
    assert err.count("\n") == 1


def renamed(lines: list[str]) -> list[str]:
    cells = [row.split(",") for row in lines]
    return [",".join([*row[:3], {"no": "yes", "yes": "no"}[row[5]], *row[4:]]) for row in cells]


WHOLE = [  # what is wrong with the file as a whole, and the line that names it
    (lambda r: [set_cell(row, 3, "no") for row in r],
     'column "smoker": has one value in all records. Remove it.'),
    (lambda r: [set_cell(row, 3, row.split(",")[5]) for row in r],
     'column "smoker": is the label "again" by another name, record by record.'),
    (renamed, 'column "smoker": is the label "again" by another name, record by record.'),
    (lambda r: [*r, "p3,south,40,no,male,no"],
     "sites north and south: have 1 subjects in common (p3), each protected at each site alone."),
    (lambda r: r[30:], "sites[north].subjects = 40, and the site has "),
]  # fmt: skip


def set_cell(row: str, at: int, value: str) -> str:
    cells = row.split(",")
    cells[at] = value
    return ",".join(cells)


@pytest.mark.parametrize(("spoil", "said"), WHOLE)
def test_a_fault_of_the_whole_is_one_line_and_exit_code_2(
    spoil: Callable[[list[str]], list[str]], said: str, called: Call, tmp_path: Path
) -> None:
    code, out, _ = called("task", "check", written(tmp_path, spoil(rows())))
    lines = [line for line in out.splitlines() if line.startswith("FAULT")]
    assert (code, len(lines)) == (2, 1)
    assert said in lines[0]


def test_a_column_that_goes_with_the_label_in_all_but_one_record_is_no_leak(
    called: Call, tmp_path: Path
) -> None:
    lines = renamed(rows())
    lines[7] = set_cell(lines[7], 3, {"no": "yes", "yes": "no"}[lines[7].split(",")[3]])
    code, out, _ = called("task", "check", written(tmp_path, lines))
    assert (code, "FAULT" in out) == (0, False)


def test_a_subject_in_both_splits_is_a_line(called: Call, tmp_path: Path) -> None:
    lines = [f"{row},{'test' if i % 3 == 0 else 'train'}" for i, row in enumerate(rows())]
    path = written(tmp_path, lines, ACCORD.replace('"patient"\n', '"patient"\nsplit = "split"\n'))
    (tmp_path / "wards.csv").write_text("\n".join([f"{HEADER},split", *lines]) + "\n")
    assert called("task", "check", path)[0] == 0
    (tmp_path / "wards.csv").write_text(
        "\n".join([f"{HEADER},split", *lines, f"{rows()[1]},test"]) + "\n"
    )
    code, out, _ = called("task", "check", path)
    assert code == 2
    assert 'row 107, column "split": is of a subject that is also trained on' in out


@pytest.mark.parametrize("spoil", ["gone", "column"])
def test_a_file_that_is_missing_or_lacks_a_column_is_a_line_for_each_site(
    spoil: str, called: Call, tmp_path: Path
) -> None:
    path = written(tmp_path, rows())
    if spoil == "gone":
        (tmp_path / "wards.csv").unlink()
    else:
        (tmp_path / "wards.csv").write_text("a,b\n1,2\n")
    code, out, _ = called("task", "check", path)
    lines = [line for line in out.splitlines() if line.startswith("FAULT")]
    assert code == 2 and len(lines) == 2
    said = "No such file or directory" if spoil == "gone" else 'has no column "age"'
    assert all(said in line for line in lines)


def test_many_faults_are_cut_short_unless_all_are_asked_for(called: Call, tmp_path: Path) -> None:
    lines = [*rows(), *(f"q{i},north,{200 + i},no,male,no" for i in range(70))]
    path = written(tmp_path, lines)
    code, out, err = called("task", "check", path, "--site", "north")
    assert (code, out.count("FAULT")) == (2, 51)
    assert "FAULT  20 more; --all prints them" in out and "70 faults" in err
    assert called("task", "check", path, "--site", "north", "--all")[1].count("FAULT") == 70


def test_a_site_checks_its_own_folder_of_data_sets(called: Call, tmp_path: Path) -> None:
    path = written(tmp_path, [])
    own = tmp_path / "data" / "wards"
    own.mkdir(parents=True)
    (own / "wards.csv").write_text("\n".join([HEADER, *rows()]) + "\n")
    code, out, _ = called("task", "check", path, "--site", "north", "--data", tmp_path / "data")
    assert (code, "north" in out, "south" in out) == (0, True, False)
    code, _, err = called("task", "check", path, "--site", "nord")
    assert code == 2 and 'no such site. Did you mean "north"?' in err


def test_a_task_by_name_is_counted_too(called: Call) -> None:
    code, out, _ = called("task", "check", "heart", "--site", "va")
    assert code == 0
    assert [line.split("│")[3:5] for line in out.splitlines() if "train" in line] == [
        ["      134 ", "     134 "]
    ]
