"""`fedaccord ledger`: exit codes 0, 1 and 2, one line each, and no torch to read a ledger."""

import json
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedaccord.cli import main
from fedaccord.cli_ledger import app
from fedaccord.client import policy_file
from fedaccord.errors import FedAccordError
from fedaccord.privacy.accounting import show
from fedaccord.privacy.budget import Cap
from fedaccord.privacy.ledger import Ledger, Terms, spent
from fedaccord.privacy.plan import PrivacyPlan

PLAN = PrivacyPlan("ward", 100, 5, 1, 1.0, 40.0, 1.0, 1e-5)
ROOT = Path(__file__).resolve().parents[1]


def write(folder, *rounds):
    """Let a site go through some rounds; its second place is the policy's default."""
    place = folder / "ledger.sqlite", "ward", folder.parent / "heads" / "ward.json"
    with closing(Ledger(*place)) as ledger:
        ledger.reserve("a", PLAN, 1, Terms(Cap(1.0, 1e-5), "f" * 64))
        for number in rounds:
            ledger.intend("a", number, PLAN, "f" * 64)
            ledger.release("a", number, what="weights", covers="the reserved plan")


@pytest.fixture
def ward(tmp_path):
    """A site's folder, as `fedaccord site` and one round leave it."""
    folder = tmp_path / "ward"
    folder.mkdir()
    policy_file.write_strict(folder / "policy.toml")
    write(folder, 1)
    return folder


def say(*words, **how):
    """Run a command; its exit code and what it printed. Exit code 2 is an error of FedAccord's."""
    result = CliRunner().invoke(app, [str(word) for word in words], **how)
    if isinstance(result.exception, FedAccordError):
        assert "\n" not in str(result.exception)
        return 2, str(result.exception)
    return result.exit_code, result.output


def export(ward, name="export.jsonl"):
    path = ward.parent / name
    assert say("export", ward, "--out", path)[0] == 0
    return path


def test_verify_of_a_folder_and_of_its_export_says_ok_in_one_line(ward):
    code, words = say("verify", ward)
    assert code == 0
    assert words.startswith("ok     4 entries, head ")
    assert words.endswith(f"it extends the head in {ward / '../heads/ward.json'}\n")
    code, words = say("verify", export(ward))
    assert (code, words.count("\n")) == (0, 1)
    assert "nothing was cut off its end cannot be seen here" in words


def test_verify_without_a_policy_says_that_no_second_place_was_looked_at(ward):
    (ward / "policy.toml").unlink()
    assert say("verify", ward)[1].endswith("no second place keeps a head\n")


def test_verify_of_an_altered_export_is_one_line_and_exit_code_1(ward):
    path = export(ward)
    whole = path.read_text()
    for altered in (
        whole.replace('"steps":1', '"steps":2'),
        whole.replace("1e-05", "1E-05"),
        "".join(whole.splitlines(keepends=True)[1:]),
        whole[:-1],
        "",
        "nonsense\n",
    ):
        assert altered != whole
        path.write_text(altered)
        code, words = say("verify", path)
        assert (code, words.count("\n")) == (1, 1)
        assert words.startswith(f"FAULT  ledger {path}: ")


def test_verify_of_an_older_copy_is_exit_code_1(ward):
    older = (ward / "ledger.sqlite").read_bytes()
    write(ward, 2)
    (ward / "ledger.sqlite").write_bytes(older)
    code, words = say("verify", ward)
    assert code == 1
    assert "does not hold entry 6" in words


def test_show_adds_up_what_was_reserved_and_what_was_used(ward):
    code, words = say("show", ward)
    assert code == 0
    assert "ledger of ward" in words
    assert "1 rounds, 1 releases, 0 counts" in words
    assert "All reserved plans together: (epsilon=" in words
    assert "add-or-remove-one, PLD." in " ".join(words.split())
    assert say("show", export(ward))[1] == words


def test_show_counts_a_plan_that_was_reserved_after_results_as_the_sites_cap_does(ward):
    with closing(Ledger(ward / "ledger.sqlite", "ward", ward / "../heads/ward.json")) as ledger:
        cap = Cap(3.0, 1e-5)
        ledger.reserve("b", PLAN, 1, Terms(cap, "e" * 64))
        held = spent(ledger.entries(), cap)
    code, words = say("show", ward)
    words = " ".join(words.split())
    assert code == 0
    assert f"All reserved plans together: (epsilon={show(held)}, delta=1e-05)" in words
    assert "by a Renyi filter" in words
    assert words.endswith("cap at the last of them: 3.")


def test_show_entries_prints_a_line_each(ward):
    code, words = say("show", ward, "--entries")
    assert code == 0
    lines = words.splitlines()
    assert [line.split()[2] for line in lines] == ["KEY", "RESERVE", "INTENT", "RELEASE"]
    assert lines[2].endswith("slot 1 of 5")
    assert lines[3].endswith("weights: the reserved plan")


def test_export_prints_what_it_writes_to_a_file(ward):
    path = export(ward)
    assert say("export", ward) == (0, path.read_text())
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert kinds == ["KEY", "RESERVE", "INTENT", "RELEASE"]


def test_rotate_names_the_key_that_signs_from_here_on(ward):
    code, words = say("rotate", ward)
    assert code == 0
    last = json.loads(export(ward).read_text().splitlines()[-1])
    assert words == f"entry 5: key {last['public_key']} signs from here on\n"
    assert say("verify", ward)[0] == 0
    write(ward, 2)


def test_restore_takes_a_newer_export_and_refuses_an_older_one(ward):
    older, backup = export(ward, "older.jsonl"), (ward / "ledger.sqlite").read_bytes()
    write(ward, 2)
    newer = export(ward, "newer.jsonl")
    (ward / "ledger.sqlite").write_bytes(backup)
    code, words = say("restore", ward, "--from", older)
    assert code == 2
    assert "Look for a later copy" in words
    code, words = say("restore", ward, "--from", newer)
    assert (code, words) == (0, f"{ward}: restored, 6 entries; what was there is kept beside it\n")
    assert say("verify", ward)[0] == 0


def test_accept_writes_what_is_known_to_be_missing(ward):
    backup = (ward / "ledger.sqlite").read_bytes()
    write(ward, 2)
    (ward / "ledger.sqlite").write_bytes(backup)
    assert say("accept", ward, input="n\n")[0] == 1
    assert say("verify", ward)[0] == 1
    code, words = say("accept", ward, "--yes")
    assert (code, words) == (0, "entry 5: LOST entries up to 6 are missing: epsilon infinite\n")
    assert say("verify", ward)[0] == 0
    assert "epsilon=infinite" in say("show", ward)[1]


def test_accept_keeps_a_head_where_the_second_place_was_lost(ward):
    shutil.rmtree(ward.parent / "heads")
    assert say("verify", ward)[0] == 1
    code, words = say("accept", ward, "--yes")
    assert code == 0
    assert words.startswith("entry 5: ACCEPT ")
    assert say("verify", ward)[0] == 0


def test_accept_without_a_policy_is_refused(ward):
    (ward / "policy.toml").unlink()
    assert say("accept", ward, "--yes") == (
        2,
        f"site {ward}: no policy.toml names a second place. Add one.",
    )


@pytest.mark.parametrize("command", ["show", "verify", "export", "rotate", "accept"])
def test_a_folder_without_a_ledger_is_one_line_and_stays_empty(tmp_path, command):
    code, words = say(command, tmp_path, *(["--yes"] if command == "accept" else []))
    assert code == 2
    assert "has no ledger.sqlite. Give a site's own folder, " in words
    assert list(tmp_path.iterdir()) == []


def test_restore_into_a_folder_without_a_key_asks_for_the_key(ward, tmp_path):
    code, words = say("restore", tmp_path / "new", "--from", export(ward))
    assert (code, "has no ledger.key" in words) == (2, True)
    assert not (tmp_path / "new").exists()


def test_an_empty_export_and_a_folder_to_write_to_are_named(ward, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    code, words = say("show", tmp_path / "empty.jsonl")
    assert (code, "is an empty file" in words) == (2, True)
    assert say("export", ward, "--out", tmp_path) == (
        2,
        f"--out {tmp_path}: is a folder. Name a file in it.",
    )


@pytest.mark.parametrize("command", ["show", "export", "rotate"])
def test_a_damaged_ledger_is_exit_code_2_and_one_line(ward, command, capsys, monkeypatch):
    (ward / "ledger.sqlite").write_bytes(b"no database" * 100)
    monkeypatch.setattr(sys, "argv", ["fedaccord", "ledger", command, str(ward)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "file is not a database" in said.err


WITHOUT_TORCH = """
import sys
from typer.testing import CliRunner
from fedaccord.cli import app
for words in sys.argv[1].split(";"):
    result = CliRunner().invoke(app, ["ledger", *words.split()])
    assert result.exit_code == 0, (words, result.output, result.exception)
heavy = {"torch", "flwr", "opacus"} & set(sys.modules)
assert not heavy, heavy
"""


def test_no_command_on_a_ledger_imports_torch(ward):
    path = ward.parent / "export.jsonl"
    commands = [
        "--help",
        f"verify {ward}",
        f"rotate {ward}",
        f"accept {ward} --yes",
        f"export {ward} --out {path}",
        f"verify {path}",
        f"show {ward}",
        f"restore {ward} --from {path}",
    ]
    command = [sys.executable, "-c", WITHOUT_TORCH, ";".join(commands)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("verb", ["show", "verify", "export", "rotate"])
def test_to_look_at_an_empty_ledger_does_not_begin_one(tmp_path, verb):
    (tmp_path / "ledger.sqlite").touch()
    code, said = say(verb, tmp_path)
    assert (code, "holds no entry that can be read" in said) == (2, True)
    assert not (tmp_path / "ledger.key").exists()
