"""Reports of damaged evidence: a line in words, and never a traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fedaccord.errors import EvidenceError
from fedaccord.reports.pagecheck import rounds_to
from fedaccord.reports.report import write_report


def test_a_record_of_another_form_is_one_line_that_points_to_verify(
    heart_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(heart_run, tmp_path / "run"))
    lines = (run / "rounds.jsonl").read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if json.loads(line)["kind"] == "round")
    lines[place] = json.dumps(json.loads(lines[place]) | {"audit": "lost"})
    (run / "rounds.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(EvidenceError, match=r"not in the form .* `fedaccord verify .*` names it"):
        write_report(run)


def test_what_counts_as_a_rounding() -> None:
    for full, shown in (("0.41249", "0.412"), ("19294", "19,294"), ("1e-05", "1e-05")):
        assert rounds_to(full, shown, up=False)
    for full, shown in (("0.41249", "0.413"), ("1e-05", "2e-05"), ("0.5", "half"), ("0.5", "nan")):
        assert not rounds_to(full, shown, up=False)
    for full, shown in (("2.8437", "2.85"), ("3.0", "3.00"), ("infinite", "infinite")):
        assert rounds_to(full, shown, up=True)
    for full, shown in (("2.8437", "2.84"), ("2.8437", "2.86"), ("infinite", "3.00")):
        assert not rounds_to(full, shown, up=True)
