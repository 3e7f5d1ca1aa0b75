"""The run folder: the evidence that one execution of an accord leaves, and how it is kept whole.

runs/<id>/  accord.toml  rounds.jsonl  ledgers/<site>.jsonl  checkpoints/  model.safetensors
            student.safetensors  student.onnx  manifest.json  report.html  report.json

`rounds.jsonl` holds one record a line. Each carries the hash of itself and the record before it;
`manifest.json` closes the run with the hash of every file. An edit shows; that nobody rewrote the
whole folder is for signatures outside it to show.
"""

from __future__ import annotations

import json
import os
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedaccord.errors import EvidenceError
from fedaccord.evidence import append_line, canonical_json, sha256, write_atomic

Record = dict[str, Any]

ROUNDS = "rounds.jsonl"
MANIFEST = "manifest.json"
_DERIVED = ("report.html", "report.json", MANIFEST)  # made from the evidence, not part of it
_GENESIS = "0" * 64


def home() -> Path:
    """Where runs go when nothing says otherwise: $FEDACCORD_HOME, else ~/.fedaccord."""
    return Path(os.environ.get("FEDACCORD_HOME") or Path.home() / ".fedaccord")


def new_id(name: str) -> str:
    """Make a run's id from the accord's name, the time and 32 random bits."""
    return f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"


def _mark(previous: str, record: Record) -> str:
    """Hash a record, without its own hash, together with the hash before it."""
    body = {key: value for key, value in record.items() if key != "hash"}
    return sha256(f"{previous}\n{canonical_json(body)}")


class RunFolder:
    """One run's folder, written by the coordinator and read by everyone else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.id = path.name
        self._head = _GENESIS

    @classmethod
    def create(cls, path: Path, accord_text: str) -> RunFolder:
        """Start a run's folder with the accord as it was agreed.

        Raises:
            EvidenceError: the folder already holds a run, or cannot be written.
        """
        if (path / ROUNDS).exists():
            raise EvidenceError(f"run {path}: already holds a run. Name another folder.")
        try:
            write_atomic(path / "accord.toml", accord_text)
        except OSError as fault:
            raise EvidenceError(
                f"run {path}: cannot be written: {fault.strerror}. Name another folder."
            ) from None
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open a run that was written before.

        Raises:
            EvidenceError: a folder that is not there, holds no run, or cannot be read.
        """
        if not (path / ROUNDS).is_file() or not (path / "accord.toml").is_file():
            raise EvidenceError(
                f"run {path}: not a run folder (no accord.toml and {ROUNDS} in it). "
                "Give a folder that `fedaccord simulate` wrote."
            )
        folder = cls(path)
        records = folder.records()
        folder._head = str(records[-1].get("hash")) if records else _GENESIS
        return folder

    @classmethod
    def reopen(cls, path: Path) -> tuple[RunFolder, int]:
        """Open a run that was cut short, to go on with it.

        A last line that was being written when the run was cut is removed: nobody has relied on it.

        Returns:
            The folder, and how many bytes of an unfinished line were removed.

        Raises:
            EvidenceError: as `open`; a run that has come to its end, or was altered.
        """
        if (path / MANIFEST).exists():
            raise EvidenceError(
                f"run {path}: has come to its end, there is nothing to resume. Start a new run."
            )
        cut = 0
        if (path / ROUNDS).is_file():
            data = (path / ROUNDS).read_bytes()
            whole = data.rfind(b"\n") + 1
            cut = len(data) - whole
            if cut:
                write_atomic(path / ROUNDS, data[:whole])
        folder = cls.open(path)
        previous = _GENESIS
        for record in folder.records():
            if record.get("hash") != _mark(previous, record):
                raise EvidenceError(
                    f'run {path}: record "{record.get("id")}" was edited after it was written. '
                    "Restore the folder, or start a new run."
                )
            previous = str(record.get("hash"))
        if not folder.records():
            raise EvidenceError(f"run {path}: holds no record yet. Start a new run.")
        return folder, cut

    def append(self, record: Record) -> None:
        """Add one record, durably; `id` and `kind` name it."""
        self._head = _mark(self._head, record)
        append_line(self.path / ROUNDS, canonical_json(record | {"hash": self._head}))

    def records(self) -> list[Record]:
        """Read all records, without checking them (see `faults`).

        Raises:
            EvidenceError: a line that is not a record.
        """
        out: list[Record] = []
        # Lines end in "\n" alone; str.splitlines would also cut at a U+2028 in a site's own words.
        lines = (self.path / ROUNDS).read_bytes().split(b"\n")
        lines = lines[:-1] if lines[-1] == b"" else lines
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                canonical_json(record)  # refuses NaN, which json.loads lets through
                out.append({**record})
            except (ValueError, TypeError, RecursionError):
                raise EvidenceError(
                    f"run {self.path}: line {number} of {ROUNDS} is not a record. Restore the file."
                ) from None
        return out

    def write(self, name: str, data: bytes | str) -> None:
        """Write one file of the run, whole or not at all."""
        write_atomic(self.path / name, data)

    def _files(self) -> dict[str, str]:
        out = {}
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            if path.is_file() and name not in _DERIVED and not name.startswith("sites/"):
                out[name] = sha256(path.read_bytes())
        return out

    def seal(self) -> None:
        """Close the run: write the hash of every file of evidence into the manifest."""
        self.write(MANIFEST, json.dumps({"run": self.id, "files": self._files()}, indent=1) + "\n")

    def faults(self) -> list[str]:
        """Name every record and file that is not as it was written; empty if the run is whole."""
        found: list[str] = []
        previous = _GENESIS
        for record in self.records():
            if record.get("hash") != _mark(previous, record):
                found.append(
                    f'{ROUNDS}: record "{record.get("id")}" was edited after it was written, or '
                    "the one before it was removed"
                )
            previous = str(record.get("hash"))
        if not (self.path / MANIFEST).is_file():
            return [*found, f"{MANIFEST} is missing: the run did not come to its end"]
        try:
            sealed = dict(json.loads((self.path / MANIFEST).read_bytes())["files"])
        except (ValueError, KeyError, TypeError):
            return [*found, f"{MANIFEST} is not a list of files with their hashes"]
        now = self._files()
        for name in sorted({*sealed, *now}):
            if sealed.get(name) != now.get(name):
                what = "was added" if name not in sealed else "was removed"
                found.append(
                    f"{name} {what if name not in sealed or name not in now else 'differs'}"
                )
        return found
