"""The site's diary: what depends on private records is said there, and nowhere else."""

import subprocess
import sys
import threading

from fedaccord.client.diary import NAME, log, privacy_diary

CODE = """
import logging, sys
logging.basicConfig(level=1, stream=sys.stdout)
import numpy as np, torch
from pathlib import Path
from torch import nn
from fedaccord.accord import TrainingSection
from fedaccord.client import diary, train
from fedaccord.privacy.plan import PrivacyPlan
from fedaccord.tasks import Records
STEPS = TrainingSection(steps=2, learning_rate=1)
plan = PrivacyPlan("ward", 40, 1, 2, 1.0, 1.0, 1.0, 1e-5)
for name in sys.argv[2:]:
    labels = np.zeros(40, np.int64)
    if name == "bad":
        labels[3] = 7
    records = Records(np.zeros((40, 3), np.float32), labels, np.arange(40), {})
    if name == "odd":
        records = Records(None, labels, np.arange(40), {})
    folder = Path(sys.argv[1], name)
    folder.mkdir()
    with diary.privacy_diary(folder):
        train.train_private(nn.Linear(3, 2), records, plan, STEPS)
    train.log.warning("after the diary was closed")
    print("end of a round", flush=True)
"""


def test_what_a_process_prints_does_not_depend_on_its_records_and_its_diary_says_it(tmp_path):
    command = [sys.executable, "-c", CODE, str(tmp_path), "good", "bad", "odd"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *rounds, rest = done.stdout.split("end of a round\n")
    assert len(rounds) == 3
    assert rounds[1] == rounds[2] == rest == ""  # the first may tell of imports
    assert "raised" not in done.stdout + done.stderr
    assert not (tmp_path / "good" / NAME).exists()
    diary = tmp_path / "bad" / NAME
    assert "40 records raised ValueError" in diary.read_text()
    assert " 1 records raised ValueError" in diary.read_text()
    assert "after" not in diary.read_text()
    assert diary.stat().st_mode & 0o777 == 0o600
    assert "the training records cannot be indexed" in (tmp_path / "odd" / NAME).read_text()


def test_a_diary_that_cannot_be_written_is_silent_and_each_thread_has_its_own(tmp_path, capfd):
    with privacy_diary(tmp_path / "gone"):
        log.error("nowhere")
    inner, outer = tmp_path / "inner", tmp_path / "outer"
    inner.mkdir(), outer.mkdir()

    def other():
        log.error("dropped: a thread starts without a diary")
        with privacy_diary(inner):
            log.error("inner")

    with privacy_diary(outer):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        log.error("outer")
    assert (inner / NAME).read_text().endswith(" inner\n")
    assert (outer / NAME).read_text().endswith(" outer\n")
    assert len((inner / NAME).read_text().splitlines()) == 1
    assert len((outer / NAME).read_text().splitlines()) == 1
    assert capfd.readouterr() == ("", "")
