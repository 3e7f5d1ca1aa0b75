"""`python -m benchmarks.slack`: how far rounding lets one subject move what the others contribute.

For each engine and precision: by how much the sum of the others changes when one record leaves,
relative to max_grad_norm. It bounds the excess over max_grad_norm of that record's influence. The
largest is shown over weights (as built; up to MAX_WEIGHT at random; up to MAX_WEIGHT and
cancelling), batches of 1 to 1,024 records, and the place of the record that leaves.

Under book-keeping what is left is the rounding of finished gradients that are added up: at most
2.5e-4 (`privacy.parts`), whatever the weights.

"pages" is what training does: the record's place stays empty. "packed" is the usual way, a batch
that is one shorter, in which every other record's gradient may change in its last digits.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fedaccord.client.train import MAX_WEIGHT
from fedaccord.models.build import build
from fedaccord.privacy import engines
from fedaccord.privacy.noise import OsSource
from fedaccord.privacy.plan import SLACK
from fedaccord.privacy.sampling import EMPTY, MICRO_BATCH, pages
from fedaccord.tasks import TaskSpec

WIDTH = 16
SPEC = TaskSpec("ward", tuple(f"f{i}" for i in range(WIDTH)), ("a", "b"), {}, "drawn at random")
CLIP = 0.01  # below nearly every gradient's norm, so that nearly every one is clipped


class Words(nn.Module):
    """Embedding and mean over positions, as a small text model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.last = nn.Embedding(50, 12), nn.Linear(12, 2)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """Read whole numbers (n, WIDTH) to logits (n, 2)."""
        return self.last(torch.tanh(self.embed(words)).mean(dim=1))


def deep() -> nn.Module:
    """Six hidden layers: what one layer rounds, the next ones magnify."""
    hidden = [part for _ in range(6) for part in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 2))


def image() -> nn.Module:
    """A 2-D CNN over WIDTH pixels."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, WIDTH // 4)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * WIDTH, 2),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, 2),
    "mlp": lambda: build("mlp", SPEC, {}, 0),
    "cnn1d": lambda: build("cnn1d", SPEC, {}, 0),
    "cnn2d": image,
    "layernorm": lambda: nn.Sequential(
        nn.Linear(WIDTH, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 2)
    ),
    "embedding": Words,
    "deep": deep,
}


def as_built(model: nn.Module, rng: np.random.Generator) -> None:
    """Leave the weights as they are."""


def at_random(model: nn.Module, rng: np.random.Generator) -> None:
    """Draw every weight from -MAX_WEIGHT to MAX_WEIGHT."""
    for parameter in model.parameters():
        values = rng.uniform(-MAX_WEIGHT, MAX_WEIGHT, parameter.shape)
        parameter.data.copy_(torch.from_numpy(values))


def cancelling(model: nn.Module, rng: np.random.Generator) -> None:
    """Pair every weight with its opposite, so that a layer's terms cancel for equal inputs."""
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.data.zero_()
            continue
        half = rng.uniform(0.3 * MAX_WEIGHT, MAX_WEIGHT, parameter[..., ::2].shape)
        values = np.zeros(parameter.shape)
        values[..., ::2] = half
        values[..., 1::2] = -half[..., : parameter[..., 1::2].shape[-1]]
        order = rng.permutation(parameter.shape[-1])
        parameter.data.copy_(torch.from_numpy(values[..., order]))


def batch(name: str, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw records: half at random, half all alike (ones), which weights can be chosen against."""
    labels = torch.from_numpy(rng.integers(0, 2, count))
    if name == "embedding":
        return torch.from_numpy(rng.integers(0, 50, (count, WIDTH))), labels
    inputs = rng.uniform(-1, 1, (count, WIDTH))
    inputs[: (count + 1) // 2] = 1.0
    return torch.from_numpy(inputs).to(torch.float32), labels


def summed(
    engine: engines.Engine, inputs: torch.Tensor, labels: torch.Tensor, laid: list[np.ndarray]
) -> torch.Tensor:
    """Sum over pages as `client.train` does."""
    total = torch.zeros(1, dtype=torch.float64)
    for page in laid:
        keep = torch.from_numpy(page != EMPTY)
        rows = torch.from_numpy(page.clip(0))
        total = total + engine.clipped_sum(inputs[rows], labels[rows], CLIP, keep)
    return total


def packed(rows: list[int]) -> list[np.ndarray]:
    """Lay records out without empty places."""
    return np.array_split(np.array(rows, np.int64), -(-len(rows) // MICRO_BATCH) or 1)


def others_move(
    engine: engines.Engine, inputs: torch.Tensor, labels: torch.Tensor, gone: int
) -> tuple[float, float]:
    """Measure how the others' sum changes when one record leaves: (on pages, packed)."""
    count = len(inputs)
    laid = pages(np.arange(count), count, MICRO_BATCH, OsSource())
    without = [np.where(page == gone, EMPTY, page) for page in laid]
    alone = [np.where(page == gone, page, EMPTY) for page in laid]
    left = [row for row in range(count) if row != gone]
    found = []
    for layouts in (
        (laid, without, alone),
        (packed([*range(count)]), packed(left), packed([gone])),
    ):
        whole, rest, own = (summed(engine, inputs, labels, layout) for layout in layouts)
        found.append(torch.linalg.vector_norm(whole - rest - own).item() / CLIP)
    return found[0], found[1]


def largest(name: str, engine: str, precision: str, tries: int, device: str) -> tuple[float, float]:
    """Find the largest change for one model, over weights, batch sizes and places."""
    worst = [0.0, 0.0]
    rng = np.random.default_rng(0)
    sizes = (1, 2, 3, 9, 64, 257, 1024)
    for weigh, count, _ in itertools.product(
        (as_built, at_random, cancelling), sizes, range(tries)
    ):
        torch.manual_seed(int(rng.integers(2**31)))
        model = MODELS[name]()
        weigh(model, rng)
        parts = engines.make(engine, model.to(device, engines.PRECISIONS[precision]))
        inputs, labels = batch(name, count, rng)
        found = others_move(parts, inputs, labels, int(rng.integers(count)))
        worst = [max(pair) for pair in zip(worst, found, strict=True)]
        parts.close()
    return worst[0], worst[1]


def main() -> None:
    """Measure every precision and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=3, help="of each case (default 3)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title="change of the others' sum / max_grad_norm")
    for column in ("engine", "precision", "model", "pages", "packed", "slack"):
        table.add_column(column, justify="left" if column < "p" else "right")
    several = [(engine, name) for engine in ("bookkeeping", "hooks") for name in SLACK]
    for engine, precision in [*several, ("ghost", "float64")]:
        for name in MODELS:
            paged, packed = largest(name, engine, precision, asked.tries, asked.device)
            slack = f"{SLACK[precision]:g}"
            table.add_row(engine, precision, name, f"{paged:.0e}", f"{packed:.0e}", slack)
    Console().print(table)


if __name__ == "__main__":
    main()
