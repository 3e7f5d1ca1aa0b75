"""`fedaccord deploy-demo`: a coordinator and its sites as real processes on this machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from fedaccord.errors import AccordError, RunError

app = typer.Typer()
LONGEST = 900.0  # seconds that a demo's run may take
ROUNDS = 3  # of the comparison


@app.command(name="deploy-demo")
def deploy_demo(
    accord: Annotated[
        str, typer.Argument(help="A TOML file, or the name of a bundled accord.")
    ] = "heart",
    out: Annotated[Path, typer.Option(help="Folder that gets the kits and runs.")] = Path("demo"),
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Also run it without privacy, over the link and in one process."
        ),
    ] = False,
) -> None:
    """Carry an accord over the link on 127.0.0.1, all keys made here: for trying out only."""
    from rich.console import Console

    from fedaccord import accord as accords
    from fedaccord import runs
    from fedaccord.simulations import display
    from fedaccord.simulations.deployment import deployed

    display.quiet()
    console, file = Console(), accords.find(accord).resolve()
    agreed = accords.load(file)
    if out.exists() and not out.is_dir():
        raise AccordError(f"--out {out}: is a file. Name a folder.")
    folder = out / runs.new_id(agreed.name)

    def tell(words: str) -> None:
        console.print(words, soft_wrap=True, markup=False, highlight=False)

    tell(f"one coordinator and {len(agreed.roster)} sites, each a process; kits in {folder}")
    began = time.monotonic()
    with deployed(file, folder) as deployment:
        deployment.wait(LONGEST, tell)
        codes = deployment.stop()
    wrong = {name: code for name, code in codes.items() if code}
    if wrong:
        raise RunError(f"processes ended with another exit code than 0: {wrong}. See {folder}.")
    tell(f"done in {time.monotonic() - began:.0f} s, starting and stopping included")
    if compare:
        tell(_compared(file, folder / "compared"))


def _compared(file: Path, folder: Path) -> str:
    """Run an accord without privacy over the link and in one process, and compare the models."""
    import tomlkit

    from fedaccord import accord as accords
    from fedaccord.runs import RunFolder
    from fedaccord.simulations import engine
    from fedaccord.simulations.deployment import deployed

    text = tomlkit.parse(file.read_text(encoding="utf-8-sig"))
    privacy, rounds = text["privacy"], text["rounds"]
    privacy["enabled"] = False
    rounds["rounds"] = ROUNDS
    folder.mkdir(parents=True)
    plain = folder / "plain.toml"
    plain.write_text(tomlkit.dumps(text), encoding="utf-8")
    with deployed(plain, folder / "kits") as deployment:
        deployment.wait(LONGEST, lambda _: None)
        carried = deployment.run_folder()
    agreed = folder / "kits" / "coordinator" / "accord.toml"
    there = accords.load(agreed)
    engine.simulate(agreed, folder / "run", folder / "sites", len(there.roster))
    ends = [RunFolder.open(run).records()[-1]["model"] for run in (carried, folder / "run")]
    if ends[0] != ends[1]:
        raise RunError(
            f"without privacy, {ROUNDS} rounds: the model over the link ({ends[0][:12]}) is not "
            f"the one of the in-process engine ({ends[1][:12]}). Both runs are in {folder}."
        )
    return f"without privacy, {ROUNDS} rounds: the same model, bit for bit ({ends[0][:12]})"
