"""Verifying a run: every record whole, every figure recomputed, without the training code."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fedaccord import accord as accords
from fedaccord.accord import Accord
from fedaccord.errors import FedAccordError
from fedaccord.reports import link, pagecheck, recompute, sequence
from fedaccord.reports.checks import Check, read_lines
from fedaccord.reports.facts import HTML, JSON
from fedaccord.reports.reading import ACCORD
from fedaccord.runs import MANIFEST, ROUNDS, Record, RunFolder

__all__ = ["Check", "verify"]


def verify(run: Path) -> list[Check]:
    """Recompute a run's figures from its records and name everything that differs.

    Guarantee: one changed digit anywhere in rounds.jsonl, a ledger, accord.toml or report.json is
    a fault that names its record. What it cannot show: that a site ran what it declared, or that
    nobody rewrote the whole folder.

    | checked | against |
    |---|---|
    | files | the chain of hashes in rounds.jsonl, and the manifest |
    | accord | the digest in the start record |
    | records | their order, and what each says of those before it |
    | plans | the plan that the accord alone gives each site, and its epsilons |
    | ledger of each site | its chain, signatures, events' epsilons, cap, and the run's records |
    | heads shown to peers | the ledgers that the sites handed over |
    | signed replies, where the link carried the run | the keys that the accord pins |
    | figures | counts |
    | models | the digests in the last round and the end record |
    | report.json, report.html | the evidence, where a report was written |

    Args:
        run: the run's folder.

    Returns:
        A `Check` each; damaged content is a fault and never an exception.

    Raises:
        EvidenceError: a folder that holds nothing of a run.
    """
    if not any((run / name).is_file() for name in (ACCORD, ROUNDS, MANIFEST)):
        RunFolder.open(run)
    whole = Check("files")
    lines = read_lines(run / ROUNDS, whole, ROUNDS)
    records = [record for _, record in lines]
    _guarded(whole, lambda: _check_files(whole, run, len(records)))
    agreed, order, plans, figures, models = (
        Check(name) for name in ("accord", "records", "plans", "figures", "models")
    )
    accord = _check_accord(agreed, run, records)
    roster, closed = list(accord.roster) if accord else [], (run / MANIFEST).is_file()
    _guarded(order, lambda: sequence.check_order(order, records, roster, closed))
    books, seen, ledgers = _check_books(run, records)
    if accord is None:
        figures.holds(False, "not recomputed: the accord is not the one that the run started with")
        return [whole, agreed, order, *books, seen, figures]
    _guarded(order, lambda: sequence.check_rounds(order, records, accord))
    for record in records:
        if record.get("kind") == "plan":
            _guarded(plans, partial(recompute.check_plan, plans, record, accord), record)
        if record.get("kind") == "round":
            work = partial(recompute.check_figures, figures, record, records[0], accord)
            _guarded(figures, work, record)
    _guarded(models, lambda: _check_models(models, run, records))
    replies = Check("signed replies")
    if link.concerned(records):
        about = (records, accord, ledgers)
        _guarded(replies, lambda: link.check_link(replies, _name(run, records), *about))
        books.append(replies)
    checks = [whole, agreed, order, plans, *books, seen, figures, models]
    return checks + _reports(run, checks)


def _guarded(check: Check, work: Callable[[], None], record: Record | None = None) -> None:
    """Do a check; content that it cannot make sense of becomes a fault."""
    try:
        work()
    except FedAccordError as fault:
        check.holds(False, str(fault))
    except Exception as fault:  # damaged content can be wrong in any way
        where = f"{ROUNDS}: {record.get('id')}: " if record else ""
        words = f"{type(fault).__name__}: {fault}"
        check.holds(False, f"{where}{check.name} cannot be checked: {words}")


def _check_files(check: Check, run: Path, records: int) -> None:
    """Check the chain of hashes and the manifest."""
    check.checked += records
    check.faults += RunFolder.open(run).faults()


def _check_accord(check: Check, run: Path, records: list[Record]) -> Accord | None:
    """Check that the accord is the one that the run started with; return it only then."""
    try:
        accord = accords.load(run / ACCORD)
    except FedAccordError as fault:
        check.holds(False, str(fault))
        return None
    start = next((record for record in records if record.get("kind") == "start"), None)
    if start is None:
        check.holds(False, f"{ROUNDS}: there is no start record, which holds the accord's digest")
        return None
    check.equal(f"{ACCORD}: digest", accord.digest, start.get("accord"), "the start record has")
    if check.faults:
        return None
    _guarded(check, lambda: sequence.check_start(check, start, accord), start)
    return accord


def _books(run: Path, records: list[Record]) -> list[str]:
    """List the sites whose ledgers are there or should be."""
    said = next((r.get("ledgers") for r in records if r.get("kind") == "end"), None)
    named = {str(site) for site in said} if isinstance(said, list) else set()
    return sorted(named | {path.stem for path in run.glob("ledgers/*.jsonl")})


def _check_books(
    run: Path, records: list[Record]
) -> tuple[list[Check], Check, dict[str, list[Record]]]:
    """Check each site's ledger, by itself and against the run's records, and against its peers'.

    Returns:
        A check of each ledger, one of all against their peers', and the ledgers' entries by site.
    """
    checks, books = [], {}
    for site in _books(run, records):
        check = Check(f"ledger of {site}")
        lines = read_lines(run / "ledgers" / f"{site}.jsonl", check, f"ledgers/{site}.jsonl")
        books[site] = [entry for _, entry in lines]
        plans = [r for r in records if r.get("kind") == "plan" and r.get("site") == site]
        _guarded(check, partial(recompute.check_ledger, check, site, lines))
        _guarded(check, partial(_against_records, check, run, plans, site, books[site], records))
        checks.append(check)
    seen = Check("heads shown to peers")
    _guarded(seen, lambda: recompute.check_seen(seen, books))
    return checks, seen, books


def _name(run: Path, records: list[Record]) -> str:
    """Find the id that the run had at its sites; a moved folder has another name."""
    plans = [r for r in records if r.get("kind") == "plan"]
    return str(plans[0]["entry"]["run"]) if plans else run.resolve().name


def _against_records(
    check: Check,
    run: Path,
    plans: list[Record],
    site: str,
    book: list[Record],
    records: list[Record],
) -> None:
    """Check a ledger against the run's records, under the id that the run had at its site."""
    name = plans[0]["entry"]["run"] if plans else run.resolve().name
    recompute.check_site(check, site, name, book, records)


def _check_models(check: Check, run: Path, records: list[Record]) -> None:
    """Check that the models in the folder are those of the last round."""
    rounds = [record for record in records if record["kind"] == "round"]
    ended = any(record["kind"] == "end" and record["stop"] != "refused" for record in records)
    for which in ("model", "student"):
        path = run / f"{which}.safetensors"
        right = rounds[-1][which] if rounds else None
        if not ended or right is None:
            check.holds(not path.exists(), f"{path.name} is there, but no record names it")
            continue
        data = path.read_bytes() if path.is_file() else b""
        said = hashlib.sha256(data).hexdigest() if data else "nothing"
        check.equal(f"{path.name}: SHA-256", said, right, f"{rounds[-1]['id']} has")
        # A weight that is shared counts once in the record and may be twice in the file.
        parameters, held = records[0][which]["parameters"], _count(data)
        stay = records[0][which].get("stay", 0)  # frozen, or at their sites: not in the file
        less = f", {stay} of them not sent" if stay else ""
        words = f"start: {which}.parameters says {parameters}{less}, {path.name} holds {held}"
        check.holds(0 < parameters - stay <= held and stay >= 0, f"{ROUNDS}: {words}")


def _count(data: bytes) -> int:
    """Count the weights in a safetensors file by its header (see its format's description)."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name[:2] != "__")


def _reports(run: Path, checks: list[Check]) -> list[Check]:
    """Check the written report, where there is one and the evidence under it is whole."""
    out = []
    damaged = any(check.faults for check in checks if check.name.startswith("ledger"))
    for name, work in ((JSON, pagecheck.check_json), (HTML, pagecheck.check_html)):
        if not (run / name).is_file():
            continue
        check = Check(name)
        if name == JSON and damaged:
            check.holds(False, f"{name} was not compared, because a ledger under it has faults")
        else:
            _guarded(check, partial(work, check, run))
        out.append(check)
    return out
