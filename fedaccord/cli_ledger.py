"""Commands on a site's ledger: show, verify, export; rotate, restore, accept for its operator."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedaccord.errors import LedgerError

if TYPE_CHECKING:
    from fedaccord.privacy.chain import Chain
    from fedaccord.privacy.ledger import Ledger

app = typer.Typer(
    no_args_is_help=True, help="A site's privacy ledger: what it released and what that cost."
)
Folder = Annotated[Path, typer.Argument(help="The site's folder: ledger.sqlite, policy.toml.")]
Either = Annotated[
    Path, typer.Argument(help="A site's folder, or an exported ledger (RUN/ledgers/SITE.jsonl).")
]


def _place(folder: Path) -> tuple[Path, str, Path | None]:
    """Find a site's ledger, its name, and the second place that its policy names."""
    from fedaccord.client.policy import SitePolicy
    from fedaccord.privacy.keeping import site_of

    path, rules = folder / "ledger.sqlite", folder / "policy.toml"
    if not path.is_file():
        raise LedgerError(
            f"site {folder}: has no ledger.sqlite. Give a site's own folder, or put its ledger "
            "back with `fedaccord ledger restore`."
        )
    site = site_of(path)
    if not site:  # to read a ledger may not begin one
        raise LedgerError(
            f"ledger {path}: holds no entry that can be read. Put an exported one back with "
            "`fedaccord ledger restore`, or let the site's first run begin it."
        )
    second = folder / SitePolicy.read(rules).second_head if rules.is_file() else None
    return path, site, second


def _open(folder: Path) -> Ledger:
    from fedaccord.privacy.ledger import Ledger

    return Ledger(*_place(folder))


def _checked(where: Path) -> tuple[Chain, str]:
    """Read a ledger with every signature checked; say what else was checked."""
    from fedaccord.privacy.keeping import read_export

    if where.is_file():
        if not where.stat().st_size:
            raise LedgerError(f"ledger {where}: is an empty file. Give a file that was exported.")
        return read_export(where), "an export: that nothing was cut off its end cannot be seen here"
    from fedaccord.privacy.chain import Chain
    from fedaccord.privacy.store import Store

    path, _, second = _place(where)
    ledger = _open(where)  # chain, key, SQLite's own count and the second place
    ledger.close()
    chain, store = Chain(f"ledger {path}"), Store(path)
    try:
        chain.extend(store.rows(), every=True)
    finally:
        store.close()
    return chain, f"it extends the head in {second}" if second else "no second place keeps a head"


@app.command()
def show(
    where: Either,
    entries: Annotated[bool, typer.Option("--entries", help="Every entry, a line each.")] = False,
) -> None:
    """Print what each run reserved and used, what was refused, and what it all adds up to."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    chain, _ = _checked(where)
    if entries:
        for entry in chain.entries:
            number = entry.get("round", "")
            print(entry["seq"], entry["time"], entry["kind"], entry["run"], number, _what(entry))
        return
    console = Console()
    site = chain.entries[0]["site"] if len(chain) else where.name
    table = Table("run", "reserved", "epsilon", "used", title=f"ledger of {site}")
    for run in dict.fromkeys(entry["run"] for entry in chain.entries if entry["run"]):
        mine = [entry for entry in chain.entries if entry["run"] == run]
        table.add_row(*(Text(words, overflow="fold") for words in (run, *_summary(mine))))
    console.print(table)
    for entry in chain.entries:
        if entry["kind"] not in ("RESERVE", "NONPRIVATE", "INTENT", "RELEASE", "COUNTS"):
            console.print(f"{entry['seq']} {entry['kind']} {_what(entry)}", markup=False)
    console.print(_total(chain.entries), markup=False)


def _total(entries: Sequence[dict[str, Any]]) -> str:
    """Say what all reservations come to, counted as the cap of the last one counts them."""
    from fedaccord.privacy import accounting
    from fedaccord.privacy.ledger import reserved
    from fedaccord.reports.costs import gate

    held = [entry for entry in entries if entry["kind"] in ("RESERVE", "NONPRIVATE")]
    if not held:
        lost = any(entry["kind"] == "LOST" for entry in entries)
        return "Entries are missing: epsilon infinite." if lost else "No plan was reserved."
    first, later, _ = reserved(entries)
    cap = held[-1]["cap"]
    try:
        total = gate(first, later, cap["epsilon"], cap["delta"])
    except ValueError as fault:
        raise LedgerError(f"the ledger cannot be added up: {fault}.") from None
    how = "PLD"
    if later:
        how = "by a Renyi filter, since a plan was reserved after results had left the site"
    if not isinstance(total, str):
        total = accounting.show(total)
    bound = cap["epsilon"] if isinstance(cap["epsilon"], str) else f"{cap['epsilon']:g}"
    return (
        f"All reserved plans together: (epsilon={total}, delta={cap['delta']:g}), "
        f"add-or-remove-one, {how}. The site's cap at the last of them: {bound}."
    )


def _summary(mine: list[dict[str, Any]]) -> tuple[str, str, str]:
    """Say what a run reserved, what that costs, and what it used."""
    count = {kind: sum(e["kind"] == kind for e in mine) for kind in ("INTENT", "RELEASE", "COUNTS")}
    used = f"{count['INTENT']} rounds, {count['RELEASE']} releases, {count['COUNTS']} counts"
    held = next((e for e in mine if e["kind"] in ("RESERVE", "NONPRIVATE")), None)
    if held is None:
        return "nothing: refused", "0", used
    return f"{held['rounds']} rounds", _epsilon(held), used


def _epsilon(entry: dict[str, Any]) -> str:
    """Write the epsilon of a reservation, rounded up."""
    from fedaccord.privacy import accounting

    epsilon = entry["epsilon"]
    return epsilon if isinstance(epsilon, str) else accounting.show(epsilon)


def _what(entry: dict[str, Any]) -> str:
    """Say in a few words what an entry is about."""
    kind = entry["kind"]
    if kind in ("RESERVE", "NONPRIVATE"):
        return f"{entry['rounds']} rounds, epsilon {_epsilon(entry)}, accord {entry['accord'][:12]}"
    if kind == "INTENT":
        return f"slot {entry['slot']} of {entry['slots']}"
    if kind in ("RELEASE", "COUNTS", "PERSONAL"):
        return f"{entry.get('what', '')}: {entry.get('covers', '')}"
    if kind == "KEY":
        return f"key {entry['public_key'][:12]}"
    if kind == "LOST":
        return f"entries up to {entry['head']['seq']} are missing: epsilon infinite"
    return str(entry.get("reason", entry.get("second", "")))


@app.command()
def verify(where: Either) -> None:
    """Check every hash and signature; exit code 1 if one does not hold."""
    if not where.is_file():
        _place(where)  # a folder that is no site's is a mistake of the command, not of a ledger
    try:
        chain, besides = _checked(where)
    except LedgerError as fault:
        print(f"FAULT  {fault}")
        raise typer.Exit(1) from None
    head = f", head {chain.last[:12]}" if len(chain) else ""
    count = "1 entry" if len(chain) == 1 else f"{len(chain)} entries"
    print(f"ok     {count}{head}: chain and signatures hold; {besides}")


@app.command()
def export(
    folder: Folder,
    out: Annotated[Path | None, typer.Option(help="File to write; else it is printed.")] = None,
) -> None:
    """Write the ledger as JSON lines, each entry with its hash and signature."""
    from fedaccord.evidence import write_atomic

    if out and out.is_dir():
        raise LedgerError(f"--out {out}: is a folder. Name a file in it.")
    ledger = _open(folder)
    try:
        text = ledger.export()
    finally:
        ledger.close()
    if out:
        write_atomic(out, text)
    else:
        sys.stdout.write(text)


@app.command()
def rotate(folder: Folder) -> None:
    """Hand over to a new signing key; the old key signs that."""
    if (folder.resolve().parent / "site.toml").is_file():  # the coordinator knows this key too
        raise LedgerError(
            f"site {folder}: is part of a kit, and its key is the one that the accord pins. Say: "
            f"fedaccord site rotate {folder.resolve().parent} --key"
        )
    ledger = _open(folder)
    try:
        entry = ledger.rotate()
    finally:
        ledger.close()
    print(f"entry {entry['seq']}: key {entry['public_key']} signs from here on")


@app.command()
def restore(
    folder: Folder,
    source: Annotated[Path, typer.Option("--from", help="An exported ledger of this site.")],
) -> None:
    """Put an exported ledger in the place of one that was lost or damaged."""
    from fedaccord.client.policy import SitePolicy
    from fedaccord.privacy import keeping

    if not (folder / "ledger.key").exists():
        raise LedgerError(
            f"site {folder}: has no ledger.key, with which the ledger was signed. Give a site's "
            "own folder; if its key was lost as well, put that back first."
        )
    rules = folder / "policy.toml"
    second = folder / SitePolicy.read(rules).second_head if rules.is_file() else None
    count = keeping.restore(folder / "ledger.sqlite", second, source)
    print(f"{folder}: restored, {count} entries; what was there is kept beside it")


@app.command()
def accept(
    folder: Folder,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Go on although the head in the second place is gone or proves that entries are missing.

    Missing entries count as epsilon infinite from then on. The decision is written into the ledger.
    """
    from fedaccord.privacy import keeping

    path, site, second = _place(folder)
    if second is None:
        raise LedgerError(f"site {folder}: no policy.toml names a second place. Add one.")
    if not yes:
        typer.confirm(f"Go on with the ledger in {folder}, whatever it may lack?", abort=True)
    entry = keeping.accept(path, site, second, [])
    print(f"entry {entry['seq']}: {entry['kind']} {_what(entry)}")
