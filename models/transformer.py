"""A Transformer for table rows: features, or steps in time, are its tokens.

Every layer is one that an engine takes apart into records (Linear, LayerNorm, Embedding): attention
is written out, since the hooks of Opacus refuse `nn.MultiheadAttention`, and what all records share
(positions, directions of features) is looked up with ids that carry the batch axis.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from fedaccord.models import options
from fedaccord.models.tabular import split
from fedaccord.tasks import TaskSpec


class Attention(nn.Module):
    """Attention of every token to every token (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mix tokens (batch, tokens, width); a record sees its own alone."""
        query, key, value = (
            layer(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )  # (batch, heads, tokens, width / heads)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A layer: attention, then a perceptron, each after a LayerNorm and added to what it read."""

    def __init__(self, width: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.first, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.second, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, inner),
            nn.Linear(inner, width),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read and write (batch, tokens, width)."""
        tokens = tokens + self.dropout(self.attention(self.first(tokens)))
        inner = functional.gelu(self.up(self.second(tokens)))
        return tokens + self.dropout(self.down(inner))


def looked_up(table: nn.Embedding, rows: torch.Tensor) -> torch.Tensor:
    """Look the whole of a table up for each record of a batch, (batch, entries, width)."""
    ids = torch.arange(table.num_embeddings, device=rows.device)
    return table(ids.expand(rows.shape[0], -1).contiguous())


class Features(nn.Module):
    """A token for each column: its value times a learned direction, plus a learned bias.

    The tokenizer of the FT-Transformer (Gorishniy et al. 2021, section 3.3).
    """

    def __init__(self, columns: int, width: int) -> None:
        super().__init__()
        self.direction, self.bias = nn.Embedding(columns, width), nn.Embedding(columns, width)
        for table in (self.direction, self.bias):
            nn.init.uniform_(table.weight, -(width**-0.5), width**-0.5)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Turn (batch, columns) into (batch, columns, width)."""
        return rows[:, :, None] * looked_up(self.direction, rows) + looked_up(self.bias, rows)


class Steps(nn.Module):
    """A token for each step in time, with its position, and one for the other columns."""

    def __init__(self, columns: int, steps: int, channels: int, width: int) -> None:
        super().__init__()
        self._shape, rest = (steps, channels), columns - steps * channels
        self.step, self.position = nn.Linear(channels, width), nn.Embedding(steps, width)
        nn.init.normal_(self.position.weight, std=width**-0.5)
        self.rest = nn.Linear(rest, width) if rest else None

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Turn (batch, columns) into (batch, steps, or one more, width)."""
        series, rest = split(rows, *self._shape)
        tokens = self.step(series) + looked_up(self.position, rows)
        if self.rest is None:
            return tokens
        return torch.cat([self.rest(rest)[:, None], tokens], dim=1)


class Transformer(nn.Module):
    """Tokens, layers, and a linear head on their mean or on a token of its own."""

    def __init__(self, tokens: nn.Module, blocks: list[Block], width: int, classes: int) -> None:
        super().__init__()
        self.tokens, self.blocks = tokens, nn.Sequential(*blocks)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        self.summary: nn.Embedding | None = None

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Turn (batch, columns) into logits (batch, classes)."""
        tokens = self.tokens(rows)
        if self.summary is None:
            return self.head(self.norm(self.blocks(tokens)).mean(dim=1))
        tokens = torch.cat([looked_up(self.summary, rows), tokens], dim=1)
        return self.head(self.norm(self.blocks(tokens)[:, 0]))


def transformer(
    spec: TaskSpec,
    tokens: str = "features",
    width: int = 32,
    layers: int = 2,
    heads: int = 4,
    ratio: float = 2.0,
    pool: str = "mean",
    dropout: float = 0.0,
) -> nn.Module:
    """Build a Transformer for rows: float (batch, features) to logits (batch, classes).

    Its LayerNorms stand before attention and perceptron. A record's answer does not depend on its
    neighbours.

    Args:
        spec: the task, for its columns, its steps in time and its classes.
        tokens: "features", a token for each column, or "steps", a token for each step of
            `spec.sequence` and one for all other columns.
        width: numbers that make a token, a multiple of `heads`.
        layers: 1 to 48.
        heads: of attention.
        ratio: units of a layer's perceptron / `width`.
        pool: what the head reads: "mean" of the tokens, or "cls", a token added for it.
        dropout: share of a layer's output that training drops.

    Raises:
        OptionFault: an option outside its bounds, a task without rows, or "steps" of a task that
            declares none.
    """
    columns = options.row(spec, "transformer")
    options.choice("tokens", tokens, ("features", "steps"))
    options.whole("width", width, 1, 8192)
    options.multiple("width", width, "heads", options.whole("heads", heads, 1, 256))
    options.whole("layers", layers, 1, 48)
    options.positive("ratio", ratio)
    options.choice("pool", pool, ("mean", "cls"))
    inner = options.whole("width x ratio", math.ceil(width * ratio))
    rate = options.share("dropout", dropout)
    if tokens == "features":
        first: nn.Module = Features(columns, width)
    elif spec.sequence:
        first = Steps(columns, *spec.sequence, width)
    else:
        raise options.OptionFault(
            f'tokens = "steps" needs a task with steps in time, and task {spec.name} declares '
            'none. Set tokens = "features".'
        )
    blocks = [Block(width, heads, inner, rate) for _ in range(layers)]
    model = Transformer(first, blocks, width, len(spec.classes))
    if pool == "cls":
        model.summary = nn.Embedding(1, width)
        nn.init.normal_(model.summary.weight, std=width**-0.5)
    return model
