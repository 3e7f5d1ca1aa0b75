"""Verify: a whole run has no fault, and one edited digit anywhere is found and named."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedaccord.errors import EvidenceError
from fedaccord.evidence import canonical_json
from fedaccord.keys import SigningKey
from fedaccord.privacy.chain import GENESIS, seal
from fedaccord.reports.report import write_report
from fedaccord.reports.verify import Check, verify
from fedaccord.runs import RunFolder

SITES = ("cleveland", "hungary", "switzerland", "va")
LEDGER = "ledgers/va.jsonl"
Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def whole(heart_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its report, verified once so that its epsilons are known."""
    run = tmp_path_factory.mktemp("verify") / heart_run.name
    shutil.copytree(heart_run, run, ignore=shutil.ignore_patterns("sites", "report.*"))
    write_report(run)
    verify(run)
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / whole.name)


def faults(run: Path) -> list[str]:
    return [fault for check in verify(run) for fault in check.faults]


def without_report(run: Path) -> Path:
    """Take the report away, for edits beneath it: checking it takes most of the time."""
    for name in ("report.json", "report.html"):
        (run / name).unlink()
    return run


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def rewrite(run: Path, change: Callable[[Records], Records | None]) -> None:
    """Change a run's records and mend chain and seal, as somebody who holds the folder can."""
    records = RunFolder.open(run).records()
    records = change(records) or records
    (run / "rounds.jsonl").unlink()
    folder = RunFolder(run)
    for record in records:
        folder.append({key: value for key, value in record.items() if key != "hash"})
    folder.seal()


def rewrite_ledger(run: Path, site: str, change: Callable[[Records], Records | None]) -> None:
    """Change a ledger and mend its chain, its reservation's copy in the records, and the seal."""
    path = run / "ledgers" / f"{site}.jsonl"
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    entries = change(entries) or entries
    previous, key = GENESIS, SigningKey(Ed25519PrivateKey.generate())
    entries[0]["public_key"] = key.public  # who holds the folder has no other
    for seq, entry in enumerate(entries, start=1):
        body = {k: v for k, v in entry.items() if k not in ("hash", "signature")} | {"seq": seq}
        entry |= seal(previous, body, key).entry
        previous = entry["hash"]
    path.write_text("".join(canonical_json(entry) + "\n" for entry in entries), encoding="utf-8")

    def reserve(records: Records) -> None:
        for record in records:
            if record["id"] == f"plan/{site}":
                record["entry"] = next(e for e in entries if e["kind"] == "RESERVE")

    rewrite(run, reserve)


def at(record: Any, path: str) -> Any:
    for step in path.split("."):
        record = record[int(step)] if isinstance(record, list) else record[step]
    return record


def put(record: Any, path: str, value: Any) -> None:
    *inner, last = path.split(".")
    holder = at(record, ".".join(inner)) if inner else record
    holder[int(last) if isinstance(holder, list) else last] = value


def other_digit(text: str, place: int, rng: random.Random) -> str:
    return text[:place] + rng.choice("0123456789".replace(text[place], "")) + text[place + 1 :]


def digit_places(text: str) -> list[int]:
    return [match.start() for match in re.finditer(r"\d", text)]


def test_a_whole_run_has_no_fault_and_every_check_did_something(whole: Path) -> None:
    assert faults(whole) == []
    checks = by_name(verify(whole))
    assert list(checks)[:4] == ["files", "accord", "records", "plans"]
    assert {f"ledger of {site}" for site in SITES} < set(checks)
    assert {"figures", "models", "report.json", "report.html"} < set(checks)
    assert min(check.checked for check in checks.values()) >= 2
    assert checks["figures"].checked > 2000


def test_a_run_without_a_report_has_no_fault(run: Path) -> None:
    checks = by_name(verify(without_report(run)))
    assert "report.json" not in checks
    assert not any(check.faults for check in checks.values())


@pytest.mark.parametrize("seed", range(8))
def test_one_digit_changed_in_the_records_is_found_and_its_record_named(
    run: Path, seed: int
) -> None:
    rng, path = random.Random(f"records {seed}"), without_report(run) / "rounds.jsonl"
    text = path.read_text(encoding="utf-8")
    for place in rng.sample(digit_places(text), 25):
        line = text.count("\n", 0, place)
        changed = other_digit(text, place, rng)
        path.write_text(changed, encoding="utf-8")
        found = faults(run)
        before = json.loads(text.splitlines()[line])["id"]
        try:
            names = (f'"{before}"', f'"{json.loads(changed.splitlines()[line])["id"]}"')
        except ValueError:
            names = (f"line {line + 1} ",)
        assert any(name in fault for name in names for fault in found), (before, place, found)


@pytest.mark.parametrize("site", SITES)
def test_one_digit_changed_in_a_ledger_is_found_and_its_entry_named(run: Path, site: str) -> None:
    rng, path = random.Random(f"ledger {site}"), without_report(run) / "ledgers" / f"{site}.jsonl"
    text = path.read_text(encoding="utf-8")
    for place in rng.sample(digit_places(text), 25):
        line = text.count("\n", 0, place) + 1
        path.write_text(other_digit(text, place, rng), encoding="utf-8")
        found = [f for f in faults(run) if f.startswith(f"ledgers/{site}.jsonl")]
        named = (f"entry {line} ", f"(line {line})", f"line {line} ")
        assert any(name in fault for name in named for fault in found), (line, place, found)


@pytest.mark.parametrize("seed", range(4))
def test_one_digit_changed_in_the_report_is_found_and_its_path_named(run: Path, seed: int) -> None:
    rng, path = random.Random(f"report {seed}"), run / "report.json"
    text = path.read_text(encoding="utf-8")
    for place in rng.sample(digit_places(text), 15):
        path.write_text(other_digit(text, place, rng), encoding="utf-8")
        check = by_name(verify(run))["report.json"]
        assert 1 <= len(check.faults) <= 2, (place, check.faults)  # two where a key's own digit
        key = re.findall(r'"(\w+)":', text[: text.index("\n", place)])[-1]
        assert f".{key}" in check.faults[0] or "cannot be checked" in check.faults[0]


def test_one_digit_changed_in_the_accord_is_found(run: Path) -> None:
    rng, path = random.Random("accord"), run / "accord.toml"
    text = path.read_text(encoding="utf-8")
    for place in rng.sample(digit_places(text), 25):
        path.write_text(other_digit(text, place, rng), encoding="utf-8")
        assert any("accord.toml" in fault for fault in faults(run)), text[place - 20 : place + 5]


def test_one_digit_changed_on_the_page_is_found_and_its_pointer_named(run: Path) -> None:
    rng, path = random.Random("page"), run / "report.html"
    text = path.read_text(encoding="utf-8")
    shown = list(re.finditer(r'<data [^>]*data-ref="([^"]+)"[^>]*>([^<]*\d[^<]*)<', text))
    for match in rng.sample(shown, 20):
        place = match.start(2) + rng.choice(digit_places(match.group(2)))
        path.write_text(other_digit(text, place, rng), encoding="utf-8")
        assert any(match.group(1) in fault for fault in by_name(verify(run))["report.html"].faults)


DISPARITY = "audit.{}.figures.attributes.sex.all.{}"


RECOMPUTED = [
    ("round-7", DISPARITY.format("model", "demographic_parity_difference.value"), 0.512, "counts"),
    ("round-9", DISPARITY.format("student", "equalized_odds_difference.high"), 0.5, "counts"),
    ("round-20", DISPARITY.format("model", "by_group.male.selection_rate.low"), 0.1, "counts"),
    ("round-20", DISPARITY.format("model", "by_group.female.n"), 68, "the counts give 67"),
    ("round-1", "audit.model.figures.accuracy.mean", 0.99, "the counts give 0."),
    ("round-2", "audit.student.figures.accuracy.sites.va", 0.99, "the counts give 0."),
    ("round-5", "epsilon.va.odometer", 0.5, "its event gives 1."),
    ("plan/va", "membership.tpr_at_1_in_100", 0.05, "its event gives 0.06"),
    ("plan/va", "membership.advantage", 0.2, "its event gives 0.29"),
    ("round-5", "heads.va.hash", "0" * 64, "the site's ledger has"),
    ("round-5", "epsilon.va.rounds_used", 4, "the invitations give 5"),
    ("round-5", "epsilon.va.reserved", 2.5, "its plan says 2.99"),
    ("round-5", "weights.va", 131, "the accord gives 130"),
    ("plan/va", "epsilon.PLD", 2.5, "its event gives 2.99"),
    ("plan/va", "epsilon.RDP", 2.5, "its event gives 3."),
    ("plan/va", "epsilon.replace-one", 2.5, "its event gives 6."),
    ("plan/va", "noise_stddev", 2.5, "the accord gives 2.0"),
    ("plan/va", "entry.plan.noise_multiplier", 2.5, "the accord gives 2.0"),
    ("plan/va", "entry.event.count", 200, "the accord gives 220"),
    ("plan/va", "entry.cap.epsilon", 9.9, "the ledger has 3.6"),
    ("decision-19", "stop", True, "no reason to stop"),
    ("decision-20", "stop", False, "the rules of the accord give true"),
    ("end", "rounds", 19, "the rounds give 20"),
    ("start", "private", False, "the accord gives true"),
    ("start", "model.parameters", 999, "model.safetensors holds 3"),
]


@pytest.mark.parametrize(("record", "path", "value", "source"), RECOMPUTED)
def test_an_edit_whose_hashes_were_mended_is_found_by_recomputing(
    run: Path, record: str, path: str, value: Any, source: str
) -> None:
    def change(records: Records) -> None:
        put(next(r for r in records if r["id"] == record), path, value)

    rewrite(run, change)
    checks = by_name(verify(run))
    assert checks["files"].faults == []
    where = f"rounds.jsonl: {record}: {path}"
    found = [fault for check in checks.values() for fault in check.faults]
    assert any(where in fault and source in fault for fault in found), found


def test_counts_that_were_edited_no_longer_give_the_figures(run: Path) -> None:
    def change(records: Records) -> None:
        table = at(next(r for r in records if r["id"] == "round-7"), "audit.model.counts.va.sex")
        table[1][0][0] += 1

    rewrite(run, change)
    found = by_name(verify(run))["figures"].faults
    path = DISPARITY.format("model", "by_group.male.n")
    assert any(fault.startswith(f"rounds.jsonl: round-7: {path} says") for fault in found)
    assert all("round-7" in fault for fault in found)


def sets(path: str, value: Any) -> Callable[[Records], None]:
    return lambda entries: put(entries, path, value)


def drops(kind: str) -> Callable[[Records], Records]:
    return lambda e: [entry for entry in e if (entry["kind"], entry.get("round")) != (kind, 4)]


LEDGER_EDITS: dict[str, tuple[Callable[[Records], Records | None], str]] = {
    "a smaller epsilon": (sets("1.epsilon", 1.5), "entry 2 (RESERVE): epsilon says 1.5"),
    "an event of fewer steps": (sets("1.event.count", 20), "entry 2 (RESERVE): event"),
    "another digest of the plan": (sets("1.plan_digest", "0" * 64), "plan_digest"),
    "a cap below what was reserved": (sets("1.cap.epsilon", 2.0), "cap.epsilon says 2"),
    "a plan with less noise": (sets("1.plan.noise_multiplier", 1.0), "entry 2 (RESERVE): event"),
    "an INTENT removed": (drops("INTENT"), "round 4 has no INTENT before it"),
    "a RELEASE removed": (drops("RELEASE"), "round 4: an update was accepted, but no RELEASE"),
    "a COUNTS removed": (drops("COUNTS"), "round 4: counts were audited, but no COUNTS"),
    "fewer cells than were sent": (sets("4.cells", 8), "round 1: cells says 8"),
    "a release covered by nothing": (sets("3.covers", "not covered"), "entry 4 (RELEASE): covers"),
    "the reservation twice": (lambda e: [*e[:2], dict(e[1]), *e[2:]], "reserves a second time"),
    "a slot used twice": (lambda e: [*e[:3], dict(e[2]), *e[3:]], "round 1 has two INTENTs"),
    "another site's entry": (sets("5.site", "hungary"), "entry 6"),
    "a hidden earlier run": (
        lambda e: [e[0], {**e[1], "run": "earlier"}, *e[1:]],
        "up to here adds up to",
    ),
}


@pytest.mark.parametrize("edit", LEDGER_EDITS)
def test_a_ledger_whose_hashes_were_mended_is_found_by_recomputing(run: Path, edit: str) -> None:
    change, words = LEDGER_EDITS[edit]
    rewrite_ledger(run, "va", change)
    checks = by_name(verify(run))
    found = checks["ledger of va"].faults
    assert any(words in fault for fault in found), found
    assert all(not checks[f"ledger of {site}"].faults for site in SITES if site != "va")


Lines = list[str]
RECORD_EDITS: dict[str, tuple[Callable[[Lines], Lines], str]] = {
    "a round removed": (lambda lines: lines[:9] + lines[10:], "round-3 is missing"),
    "a decision removed": (lambda lines: lines[:10] + lines[11:], "decision-3 is missing"),
    "the last removed": (
        lambda lines: lines[:-1],
        "decision-20 stops the run, but there is no end",
    ),
    "the last two removed": (lambda lines: lines[:-2], "the run was closed, but has no end"),
    "two swapped": (
        lambda lines: [*lines[:9], lines[10], lines[9], *lines[11:]],
        "decision-3 stands where round-3 should",
    ),
    "one doubled": (lambda lines: [*lines[:10], *lines[9:]], "round-3 stands there more than once"),
    "a plan removed": (lambda lines: lines[:4] + lines[5:], "site va has neither a plan"),
}


@pytest.mark.parametrize("mended", [False, True], ids=["as it is", "hashes mended"])
@pytest.mark.parametrize("edit", RECORD_EDITS)
def test_records_removed_swapped_or_doubled_are_named(run: Path, edit: str, mended: bool) -> None:
    change, words = RECORD_EDITS[edit]
    path = run / "rounds.jsonl"
    changed = change(path.read_text(encoding="utf-8").splitlines(keepends=True))
    if mended:
        rewrite(run, lambda _: [json.loads(line) for line in changed])
    else:
        path.write_text("".join(changed), encoding="utf-8")
    checks = by_name(verify(run))
    assert any(words in fault for fault in checks["records"].faults), checks["records"].faults
    assert mended or checks["files"].faults


def test_records_without_a_start_or_a_whole_end_are_a_fault(run: Path) -> None:
    text = (run / "rounds.jsonl").read_text(encoding="utf-8")
    first = text.index("\n") + 1
    for left, words in ((text[first:], "first record is not start"), ("", "no start record"),
                        (text[:-50], "line 46 is no JSON object")):  # fmt: skip
        (run / "rounds.jsonl").write_text(left, encoding="utf-8")
        assert any(words in fault for fault in faults(run))


@pytest.mark.parametrize("name", ["model.safetensors", "student.safetensors"])
def test_a_changed_model_is_found(run: Path, name: str) -> None:
    data = bytearray((run / name).read_bytes())
    data[-1] ^= 1
    (run / name).write_bytes(bytes(data))
    RunFolder(run).seal()
    assert any(f.startswith(f"{name}: SHA-256") for f in by_name(verify(run))["models"].faults)


@pytest.mark.parametrize("name", ["accord.toml", "rounds.jsonl", "manifest.json", LEDGER])
def test_a_file_removed_or_added_is_a_fault_that_names_it(run: Path, name: str) -> None:
    (run / name).unlink()
    (run / "ledgers" / "another.jsonl").write_text("{}\n")  # and one that was added
    for file in (name, "another.jsonl"):
        assert any(file in fault for fault in faults(run))


def test_a_limit_taken_off_the_page_and_a_number_put_on_it_are_found(run: Path) -> None:
    path = run / "report.html"
    text = re.sub(r'<span data-ref="/not_protected/0">.*?</span>', "", path.read_text())
    path.write_text(text.replace("</main>", "<p>Accuracy 0.999</p></main>"))
    for words in ("/not_protected/0 is missing", "Accuracy 0.999"):
        assert any(words in fault for fault in faults(run))


FILES = ["rounds.jsonl", LEDGER, "accord.toml", "manifest.json", "report.json"]
FILES += ["report.html", "model.safetensors"]


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(FILES), st.floats(0, 1), st.integers(0, 200), st.binary(max_size=20))
def test_damage_of_any_kind_is_never_an_exception(
    whole: Path, tmp_path: Path, name: str, where: float, length: int, junk: bytes
) -> None:
    run = tmp_path / whole.name
    if not run.exists():
        shutil.copytree(whole, run)
    data = (whole / name).read_bytes()
    place = int(where * len(data))
    damaged = data[:place] + junk + data[place + length :]
    (run / name).write_bytes(damaged)
    found = faults(run)
    if damaged != data and name not in ("report.html", "manifest.json", "report.json"):
        assert found
    (run / name).write_bytes(data)


@pytest.mark.parametrize("line", ["null", "[]", "3", '"end"', "{}", '{"id":"x"}', "[" * 10_000])
@pytest.mark.parametrize("name", ["rounds.jsonl", LEDGER])
def test_a_line_that_is_no_record_is_a_fault_that_names_the_line(
    run: Path, name: str, line: str
) -> None:
    lines = (run / name).read_text(encoding="utf-8").splitlines()
    lines[6] = line
    (run / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = [fault for fault in faults(run) if fault.startswith(name)]
    assert any("7" in fault or '"x"' in fault or "None" in fault for fault in found), found


def test_a_folder_that_holds_nothing_of_a_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(EvidenceError, match="not a run folder"):
            verify(folder)
