"""`fedaccord pretrain`: weights to start from, made of public records alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedaccord.errors import AccordError

app = typer.Typer(add_completion=False)


@app.command()
def pretrain(
    accord: Annotated[str, typer.Argument(help="A TOML file, or the name of a bundled accord.")],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")] = Path(
        "pretrained.safetensors"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Steps of Adam.")] = 300,
    learning_rate: Annotated[float, typer.Option(min=1e-9, help="Of Adam.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(min=1, help="Public records a step.")] = 128,
) -> None:
    """Train an accord's model on its task's public records, and print how to agree on the result.

    No private record is read and no epsilon is spent. The accord then names the file by its
    SHA-256, and every site checks it.
    """
    import torch
    from rich.console import Console
    from rich.progress import Progress
    from safetensors.torch import save_file

    from fedaccord import accord as accords
    from fedaccord import devices, evidence
    from fedaccord.models.build import agreed, parameter_count
    from fedaccord.server.pretraining import pretrain as train
    from fedaccord.tasks import Labelled, task_of

    if out.suffix != ".safetensors":
        raise AccordError(f"--out {out}: weights are one safetensors file. Name it so.")
    said = accords.load(accord)
    task = task_of(said, accords.find(accord).parent.resolve())
    if not isinstance(task, Labelled):
        raise AccordError(
            f"task {task.spec.name} has no public records with labels. Start from weights that "
            "were made elsewhere (model.pretrained), or from none."
        )
    model = agreed(said.model.model_copy(update={"frozen": []}), task.spec, said.seed)
    devices.settle(parameter_count(model))
    inputs, labels = (torch.from_numpy(column) for column in task.labelled())
    console = Console()
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("Pre-training on public records", total=steps)
        right = train(
            model,
            (inputs, labels),
            steps,
            learning_rate,
            batch_size,
            said.seed,
            lambda: progress.advance(bar),
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}, out)
    digest = evidence.sha256(out.read_bytes())
    console.print(
        f"{len(labels)} public records, {right:.3f} of them right after {steps} steps. In the "
        f'accord\'s [model]:\n\npretrained = "{out}"\nsha256 = "{digest}"',
        markup=False,
        soft_wrap=True,
    )
