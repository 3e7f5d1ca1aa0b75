"""The report: its numbers are report.json's, each names its record, the page stands alone."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from fedaccord import accord as accords
from fedaccord.errors import BudgetError, EvidenceError
from fedaccord.reports import agreed, figures
from fedaccord.reports.page import Node, fixed
from fedaccord.reports.reading import read
from fedaccord.reports.report import facts, write_report
from fedaccord.reports.verify import verify
from fedaccord.runs import RunFolder

ROOT = Path(__file__).resolve().parent.parent
Element = tuple[str, dict[str, Any]]


class Texts(HTMLParser):
    """Every text of a page with the open elements around it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.stack: list[Element] = []
        self.elements: list[Element] = []
        self.found: list[tuple[list[Element], str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.stack.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self.stack and self.stack.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.found.append((list(self.stack), data))

    def inside(self, tag: str) -> list[tuple[dict[str, Any], str]]:
        return [(s[-1][1], text) for s, text in self.found if s and s[-1][0] == tag]


def copy(run: Path, to: Path) -> Path:
    return shutil.copytree(run, to, ignore=shutil.ignore_patterns("sites", "report.*"))


def pointed(content: Any, pointer: str) -> Any:
    for step in pointer.split("/")[1:]:
        content = content[int(step)] if isinstance(content, list) else content[step]
    return content


def numbers(value: Any, record: str = "", path: str = "") -> Iterator[tuple[str, str]]:
    """(path, record of the nearest object) of every number."""
    if isinstance(value, dict):
        record = value.get("record", record)
        for key, inner in value.items():
            yield from numbers(inner, record, f"{path}/{key}")
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from numbers(inner, record, f"{path}/{place}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, record


@pytest.fixture(scope="module")
def private(heart_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(copy(heart_run, tmp_path_factory.mktemp("report") / "heart-run")).parent


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fedaccord.simulations import engine

    folder = tmp_path_factory.mktemp("plain")
    text = accords.bundled()["heart"].read_text(encoding="utf-8")
    text = re.sub(r"(?m)^enabled = true( +# false)", r"enabled = false\1", text)
    text = re.sub(r"(?m)^rounds = 20", "rounds = 2", text)
    (folder / "plain.toml").write_text(text, encoding="utf-8")
    engine.simulate(str(folder / "plain.toml"), folder / "run", folder / "sites", 4)
    return write_report(folder / "run").parent


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory, set_policy: Callable[..., None]) -> Path:
    from fedaccord.simulations import engine

    folder = tmp_path_factory.mktemp("refused")
    for site in ("cleveland", "hungary", "switzerland", "va"):
        set_policy(folder / "sites" / site, "heart", max_epsilon=1.0)
    with pytest.raises(BudgetError):
        engine.simulate("heart", folder / "run", folder / "sites", 4)
    return write_report(folder / "run").parent


@pytest.fixture(scope="module")
def unfinished(heart_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = copy(heart_run, tmp_path_factory.mktemp("unfinished") / heart_run.name)
    for name in ("manifest.json", "model.safetensors", "student.safetensors", "student.onnx"):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / "ledgers")
    lines = (run / "rounds.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["kind"] in ("start", "plan")]
    kept += [line for line in lines if json.loads(line)["id"] in ("round-1", "decision-1")]
    (run / "rounds.jsonl").write_text("".join(kept), encoding="utf-8")
    return write_report(run).parent


@pytest.fixture(params=["private", "plain", "refused", "unfinished"])
def run(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def content_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())


def page_of(run: Path) -> str:
    return (run / "report.html").read_text()


def test_every_number_in_the_json_names_a_record_that_exists(run: Path) -> None:
    known = read(run).ids
    found = list(numbers(content_of(run)))
    assert len(found) > 30
    assert [path for path, record in found if record not in known] == []


def test_every_number_on_the_page_is_the_one_in_the_json(run: Path) -> None:
    content, page = content_of(run), Texts(page_of(run))
    records = dict(numbers(content))
    assert len(page.inside("data")) >= 30
    for attributes, text in page.inside("data"):
        pointer = attributes["data-ref"]
        value = pointed(content, pointer)
        if value == "infinite":
            assert attributes["value"] == text == "infinite"
            continue
        assert json.loads(attributes["value"]) == value
        assert attributes["data-record"] == records[pointer]
        number = Decimal(text.replace(",", ""))
        step = Decimal(1).scaleb(number.as_tuple().exponent)
        assert abs(number - Decimal(value)) <= step if "data-rounded" in attributes else step / 2


def test_every_quoted_text_on_the_page_is_the_one_in_the_json(run: Path) -> None:
    content, page = content_of(run), Texts(page_of(run))
    spans = [(a, t) for a, t in page.inside("span") if "data-ref" in a]
    codes = [(a, t) for a, t in page.inside("code") if "data-ref" in a]
    assert len(spans) > 20
    assert [text for a, text in spans if pointed(content, a["data-ref"]) != text] == []
    assert all(pointed(content, a["data-ref"]).startswith(text) for a, text in codes)


def test_no_digit_stands_on_the_page_without_its_place_in_the_json(run: Path) -> None:
    silent = ("style", "svg")
    loose = [
        text
        for stack, text in Texts(page_of(run)).found
        if re.search(r"\d", text)
        and not any(tag in silent or "data-ref" in attributes for tag, attributes in stack)
    ]
    assert loose == []


def test_an_epsilon_is_never_shown_below_the_true_one(run: Path) -> None:
    for attributes, text in Texts(page_of(run)).inside("data"):
        if "epsilon" in attributes["data-ref"] and text != "infinite":
            accord_row = attributes["data-ref"].startswith("/agreed")
            assert accord_row or Decimal(text) >= Decimal(attributes["value"]), attributes


def test_the_page_asks_for_nothing_from_outside_and_its_links_lead_somewhere(run: Path) -> None:
    text = page_of(run)
    assert re.findall(r"https?:|//[a-z]|@import|url\((?!#)", text) == []
    for tag, attributes in Texts(text).elements:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base", "form")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")
    assert "default-src 'none'" in text
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= set(ids)


def test_the_headline_says_the_whole_guarantee_and_figures_what_they_show(private: Path) -> None:
    pictures = [a for tag, a in Texts(page_of(private)).elements if tag == "svg"]
    assert [a["role"] for a in pictures if len(a["aria-label"] or "") > 30] == ["img"] * 4
    headline = content_of(private)["headline"]
    for words in ("epsilon=3.00", "delta=0.0001", "per training subject", "add-or-remove-one",
                  "PLD", "20+2 rounds x 10 steps", "Poisson q=0.1", "cleveland"):  # fmt: skip
        assert words in headline


def test_the_claimed_epsilon_is_that_of_an_independent_computation(private: Path) -> None:
    for site in content_of(private)["privacy"]["sites"]:
        book = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
        step = dp_accounting.PoissonSampledDpEvent(
            site["sampling_prob"], dp_accounting.GaussianDpEvent(site["noise_multiplier"])
        )
        book.compose(step, site["rounds_reserved"] * site["steps"])
        right = book.get_epsilon(site["delta"])
        assert site["epsilon"] == pytest.approx(right, abs=1e-6)
        assert right - 1e-9 <= site["ledger"]["epsilon"] <= site["ledger"]["cap"]
    h = content_of(private)["privacy"]["headline"]
    said, alarm = h["membership"]["found_at_most"], h["membership"]["false_alarm"]
    assert alarm < said < 0.5 * (math.exp(h["epsilon"]) * alarm + h["delta"])
    found = site["membership"]
    assert said == found["tpr_at_1_in_100"] > found["tpr_at_1_in_1000"] > 0.001
    assert found["advantage"] == pytest.approx(book.get_delta(0.0), abs=1e-9)


def test_a_run_without_privacy_is_stamped_and_claims_nothing(plain: Path) -> None:
    content, text = content_of(plain), page_of(plain)
    assert content["stamps"] == ["NOT PRIVATE: epsilon infinite"]
    assert content["headline"].startswith("NOT PRIVATE: epsilon infinite")
    assert content["not_protected"][0].startswith("Training subjects: privacy was switched off")
    assert content["privacy"]["headline"] is None
    assert {site["epsilon"] for site in content["privacy"]["sites"]} == {"infinite"}
    assert "-differential privacy" not in text
    assert re.search(r'<p class="stamp"><span [^>]*>NOT PRIVATE: epsilon infinite', text)


def test_a_refused_run_says_so_and_gives_the_sites_words(refused: Path) -> None:
    content, text = content_of(refused), page_of(refused)
    assert content["run"]["state"] == "refused"
    assert [stamp.split(":")[0] for stamp in content["stamps"]] == ["REFUSED"]
    assert len(content["incidents"]["out"]) == 4
    assert "This plan needs epsilon 3.00" in text
    assert content["releases"] == []
    assert "-differential privacy" not in text


def test_an_unfinished_run_says_so_and_keeps_its_claim(unfinished: Path) -> None:
    content = content_of(unfinished)
    assert [stamp.split(":")[0] for stamp in content["stamps"]] == ["UNFINISHED"]
    assert "epsilon=3.00" in content["headline"]
    assert {site["used"]["rounds"] for site in content["privacy"]["sites"]} == {1}
    assert all("not handed over" in site["ledger"]["missing"]
               for site in content["privacy"]["sites"])  # fmt: skip


def test_a_run_interrupted_before_its_first_round_has_a_report(
    unfinished: Path, tmp_path: Path
) -> None:
    run = copy(unfinished, tmp_path / "early")
    lines = (run / "rounds.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for kept in (lines[:-2], lines[:1]):
        (run / "rounds.jsonl").write_text("".join(kept), encoding="utf-8")
        assert "No round was audited" in write_report(run).read_text(encoding="utf-8")


def test_equal_evidence_gives_equal_bytes_and_altered_a_stamp(
    private: Path, tmp_path: Path
) -> None:
    run = copy(private, tmp_path / private.name)
    write_report(run)
    for name in ("report.json", "report.html"):
        assert (run / name).read_bytes() == (private / name).read_bytes()
    path = run / "rounds.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"round":7,', '"round":8,', 1))
    assert facts(run)["stamps"][0].startswith("ALTERED")


def test_a_dropped_reply_a_failed_round_and_a_silent_site_are_on_the_report(
    private: Path, tmp_path: Path
) -> None:
    run = copy(private, tmp_path / private.name)
    hostile = '<script>alert("7")</script>'

    records = {record["id"]: record for record in RunFolder.open(run).records()}
    records["round-3"]["replies"]["va"] = {"accepted": False, "reason": hostile}
    records["round-3"] |= {"aggregated": [], "weights": {}, "audit": None, "failed": "too few"}
    records["round-4"]["audit"]["not_counted"] = {"va": "no answer"}
    (run / "rounds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records.values()))
    text = write_report(run).read_text(encoding="utf-8")
    found = content_of(run)["incidents"]
    row = {"round": 3, "site": "va", "reason": hostile, "record": "round-3"}
    assert found["dropped"] == [row]
    assert found["failed"] == [{"round": 3, "reason": "too few", "record": "round-3"}]
    assert found["not_counted"][0]["site"] == "va"
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_a_site_cannot_keep_a_report_from_being_written_by_a_bad_ledger(
    private: Path, tmp_path: Path
) -> None:
    for text in ("not json\n", '{"kind":"RESERVE"}\n', "[]\n", "", '{"kind":["a"]}\n', "\xff"):
        run = tmp_path / "bad" / private.name
        copy(private, run)
        (run / "ledgers" / "va.jsonl").write_text(text, encoding="latin-1")
        sites = {row["site"]: row for row in facts(run)["privacy"]["sites"]}
        assert sites["va"]["ledger"]["missing"]
        assert not sites["cleveland"]["ledger"]["missing"]
        shutil.rmtree(run)


def test_verify_finds_no_fault_in_a_run_however_it_ended(run: Path) -> None:
    found = [fault for check in verify(run) for fault in check.faults]
    unfinished = content_of(run)["run"]["state"] == "unfinished"
    assert found == (["manifest.json is missing: the run did not come to its end"] * unfinished)


def test_the_page_pronounces_no_verdict(run: Path) -> None:
    words = " ".join(text for _, text in Texts(page_of(run)).found)
    verdicts = r"\b(un)?(fair|biased|compliant|anonym\w*|safe|secure|harmless|trustworthy)\b"
    found = {match.group(0) for match in re.finditer(verdicts, words, re.IGNORECASE)}
    assert found <= {"secure"}  # "there is no secure aggregation"


def test_every_key_of_an_accord_has_its_meaning_on_the_report() -> None:
    rows = agreed.rows(accords.load("heart"))
    assert [row["key"] for row in rows if not row["meaning"]] == []
    known = {re.sub(r"^sites\.[^.]+", "sites", row["key"]) for row in rows}
    known |= {key.rsplit(".", 1)[0] for key in known}
    assert {key.split(".")[0] for key in set(agreed.MEANINGS) - known} == {"task"}  # of own data


def test_exact_counts_are_not_covered_and_weights_are(private: Path) -> None:
    covered = {row["what"]: row["covered"] for row in content_of(private)["releases"]}
    assert covered["group counts"] == "not covered"
    assert covered["weights"] == "the reserved plan"
    sent = {row["what"]: row["sites"] for row in content_of(private)["releases"]}
    assert {site["count"] for site in sent["weights"]} == {20}
    assert {site["size"] for site in sent["group counts"]} == {20 * 2 * 8}


def test_a_number_without_a_record_and_a_folder_without_a_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvidenceError, match=r"not a run folder .*\.$"):
        write_report(tmp_path)
    with pytest.raises(EvidenceError, match="names no record"):
        fixed(Node({"value": 0.5})["value"])
    with pytest.raises(EvidenceError, match="is no text"):
        str(Node({"value": 0.5, "record": "end"})["value"])
    assert Node({"value": 0.0})["value"], "a bound of zero is a bound"


def test_sites_with_different_costs_have_lines_of_their_own(private: Path) -> None:
    privacy = content_of(private)["privacy"]
    first = figures.epsilon(privacy)
    for row in privacy["rounds"]:
        row["sites"][0]["epsilon"] *= 0.9
    privacy["sites"][1]["ledger"] |= {"epsilon": 3.5, "cap": "infinite"}
    second = figures.epsilon(privacy)
    assert first.count("spent by") == 1 + 1  # the picture's own words, and a line each
    assert second.count("spent by") == 1 + 3
    assert "whole ledger" in second
    alone = [row | {"student": None} for row in content_of(private)["accuracy"]["rounds"]]
    assert "student" not in figures.accuracy(alone)


def test_writing_and_verifying_leave_torch_and_flower_alone(private: Path, tmp_path: Path) -> None:
    run = copy(private, tmp_path / private.name)
    code = (
        "import sys; from pathlib import Path\n"
        "from fedaccord.reports.report import write_report\n"
        "from fedaccord.reports.verify import verify\n"
        f"run = Path({str(run)!r}); write_report(run)\n"
        "assert not [c.faults for c in verify(run) if c.faults]\n"
        "bad = {'torch', 'flwr', 'opacus', 'transformers'} & set(sys.modules); print(bad)\n"
        "sys.exit(bool(bad))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not on the PATH")
def test_chromium_opens_the_report(private: Path, tmp_path: Path) -> None:
    picture = tmp_path / "report.png"
    switches = "headless no-sandbox disable-gpu disable-quic no-first-run disable-component-update"
    switches += " disable-background-networking disable-sync window-size=1200,4200"
    command = ["chromium", *(f"--{switch}" for switch in switches.split())]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--screenshot={picture}", (private / "report.html").resolve().as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    assert int.from_bytes(data[16:20], "big") == 1200
    assert len(data) > 150_000  # a blank page of this size has under 20,000 bytes
