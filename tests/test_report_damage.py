"""Reports of damaged evidence: a line in words, and never a traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fedaccord.errors import EvidenceError
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
