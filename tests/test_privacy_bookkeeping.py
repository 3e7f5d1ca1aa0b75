"""Book-keeping: for every layer, what plain autograd finds in batches of one record."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fedaccord.privacy import bookkeeping, engines, products

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")
CLASSES = 3
WAYS = ["by rule", "gram", "gram, double", "gram, looped", "direct", "held", "held, looped"]


class Around(nn.Module):
    """A trained factor before a layer, so that its inputs have gradients, and a head after it."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(shape)) if shape else None
        self.layer, self.shape = layer, shape
        with torch.no_grad():
            probe = torch.zeros(1, *shape) if shape else torch.zeros(1, 3, dtype=torch.int64)
            width = layer(probe).numel()
        self.head = nn.Linear(width, CLASSES, bias=False).requires_grad_(False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        seen = inputs if self.factor is None else inputs * self.factor
        return self.head(torch.tanh(self.layer(seen)).flatten(1))


class Shaped(nn.Module):
    """A layer between axes that it does not know."""

    def __init__(self, layer: nn.Module, *tail: int) -> None:
        super().__init__()
        self.layer, self.tail = layer, tail

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.layer(rows.reshape(-1, *self.tail)).reshape(len(rows), -1)


small = st.integers(1, 4)
yes_or_no = st.booleans()


@st.composite
def linear(draw):
    shape = (*draw(st.lists(st.integers(1, 4), max_size=3)), draw(small))
    return nn.Linear(shape[-1], draw(small), bias=draw(yes_or_no)), shape


@st.composite
def convolution(draw):
    axes = draw(st.integers(1, 2))
    several = st.tuples(*[st.integers(1, 3)] * axes)
    groups, stride = draw(st.integers(1, 3)), draw(several)
    into, out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel, dilation = draw(several), draw(st.tuples(*[st.integers(1, 2)] * axes))
    padding = draw(
        st.one_of(
            st.integers(0, 2),
            st.tuples(*[st.integers(0, 2)] * axes),
            st.sampled_from(["same", "valid"]),
        )
    )
    if padding == "same":
        stride = (1,) * axes
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    shape = (into, *(r + draw(st.integers(0, 4)) for r in reach))
    kind = nn.Conv1d if axes == 1 else nn.Conv2d
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return kind(into, out, kernel, bias=draw(yes_or_no), **how), shape


@st.composite
def embedding(draw):
    table = draw(st.integers(2, 6))
    padding = draw(st.one_of(st.none(), st.integers(-table, table - 1)))
    return nn.Embedding(table, draw(small), padding_idx=padding), ()


@st.composite
def layer_norm(draw):
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    own = shape[draw(st.integers(0, len(shape) - 1)) :]
    affine = draw(yes_or_no)
    return nn.LayerNorm(own, elementwise_affine=affine, bias=draw(yes_or_no)), shape


@st.composite
def group_norm(draw):
    groups = draw(small)
    shape = (groups * draw(small), *draw(st.lists(small, max_size=2)))
    # torch refuses one value a group
    shape = shape if math.prod(shape) > groups else (*shape, 2)
    return nn.GroupNorm(groups, shape[0], affine=draw(yes_or_no)), shape


@st.composite
def rms_norm(draw):
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    own = shape[draw(st.integers(0, len(shape) - 1)) :]
    return nn.RMSNorm(own, elementwise_affine=draw(yes_or_no)), shape


@st.composite
def prelu(draw):
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    return nn.PReLU(shape[0] if draw(yes_or_no) else 1), shape


FOLDED = {
    "linear": (lambda size: nn.Linear(size, 2), 0),
    "layer norm": (nn.LayerNorm, 0),
    "convolution": (lambda size: nn.Conv1d(1, 2, 2), 1),
    "group norm": (lambda size: nn.GroupNorm(1, 1), 1),
}


@st.composite
def folded(draw):
    make, channels = draw(st.sampled_from(list(FOLDED.values())))
    size = draw(st.integers(2, 4))
    return Shaped(make(size), *[1] * channels, size), (draw(small), size)


class Bare(nn.Module):
    """Parameters of no layer: a row for all positions, one for each, and a token of their own."""

    def __init__(self, positions: int, width: int, way: int) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.randn(width))
        self.each = nn.Parameter(torch.randn(1, positions, width))
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.shift, self.way = nn.Parameter(torch.randn(())), way

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        n, way = len(rows), self.way
        rows = (rows * self.row, self.row * rows, rows / (self.row), self.row - rows)[way]
        rows = (rows + self.each, self.each + rows, rows - self.each, torch.add(rows, self.each))[
            way
        ]
        rows = torch.cat([self.token.expand(n, -1, -1), rows], dim=1)
        return torch.mul(rows, self.shift)


@st.composite
def bare(draw):
    shape = draw(small), draw(small)
    return Bare(*shape, draw(st.integers(0, 3))), shape


class Shared(nn.Module):
    """One weight in two places: the same layer twice, or the same weight in two layers."""

    def __init__(self, width: int, tied: bool) -> None:
        super().__init__()
        self.one = nn.Linear(width, width)
        self.two = nn.Linear(width, width) if tied else self.one
        self.two.weight = self.one.weight

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(rows)))


@st.composite
def shared(draw):
    width = draw(small)
    return Shared(width, draw(yes_or_no)), (*draw(st.lists(small, max_size=1)), width)


class Decoder(nn.Module):
    """The table of an embedding is the weight of a later layer, as in language models."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(words, width), nn.Linear(width, words)
        self.last.weight = self.table.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.table(words)))


@st.composite
def decoder(draw):
    return Decoder(draw(st.integers(2, 6)), draw(small)), ()


class Adapter(nn.Module):
    """A frozen layer with a trained detour of low rank (LoRA: Hu et al. 2021)."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.frozen(rows) + 0.5 * self.up(self.down(rows))


@st.composite
def adapter(draw):
    width = draw(small)
    return Adapter(width, draw(small)), (*draw(st.lists(small, max_size=2)), width)


KINDS = {
    "linear": linear(),
    "convolution": convolution(),
    "embedding": embedding(),
    "layer norm": layer_norm(),
    "group norm": group_norm(),
    "rms norm": rms_norm(),
    "prelu": prelu(),
    "folded": folded(),
    "bare": bare(),
    "shared": shared(),
    "decoder": decoder(),
    "adapter": adapter(),
}
TRIES = {"linear": 40, "convolution": 60}


def drawn(data, kind, dtype, low=0):
    """A model around a layer of a kind, its weights and records drawn from a seed."""
    seed, rows = data.draw(st.integers(0, 2**31)), data.draw(st.integers(low, 17))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Around(*data.draw(KINDS[kind])).to(dtype)
        for parameter in model.parameters():  # else norms start as the identity
            nn.init.normal_(parameter)
        with torch.no_grad():
            if isinstance(model.layer, Bare):
                model.layer.row.abs_().add_(0.5)  # a divisor
        if model.shape:
            inputs = torch.randn(rows, *model.shape, dtype=dtype)
        else:
            table = next(m for m in model.modules() if isinstance(m, nn.Embedding))
            inputs = torch.randint(0, table.num_embeddings, (rows, 3))
        return model, inputs, torch.randint(0, CLASSES, (rows,))


def one_by_one(model, inputs, labels):
    """Each record's gradient (n, d), float64, by plain autograd in batches of one."""
    trained = [p for p in model.parameters() if p.requires_grad]
    rows = torch.zeros(len(inputs), sum(p.numel() for p in trained), dtype=torch.float64)
    for i in range(len(inputs)):
        loss = functional.cross_entropy(model(inputs[i : i + 1]).double(), labels[i : i + 1])
        found = torch.autograd.grad(loss, trained, allow_unused=True)
        parts = [
            torch.zeros_like(p) if g is None else g for g, p in zip(found, trained, strict=True)
        ]
        rows[i] = torch.cat([part.flatten() for part in parts])
    return rows


def apart(got, wanted):
    """L2 distance, relative where the wanted is above 1e-3."""
    return (
        torch.linalg.vector_norm(got - wanted) / torch.linalg.vector_norm(wanted).clamp(min=1e-3)
    ).item()


def check(model, inputs, labels, measured=False, bound=1e-9):
    """Hold norms and clipped sums, some records clipped and some not, to batches of one."""
    rows = one_by_one(model, inputs, labels)
    norms = torch.linalg.vector_norm(rows, dim=1)
    clip = max(norms.median().item(), 1e-6) if len(norms) else 1.0
    wanted = (rows * (clip / norms.clamp(min=clip))[:, None]).sum(0)
    engine = engines.make("bookkeeping", model, measured=measured)
    if len(inputs):
        assert apart(engine.norms(inputs, labels), norms) <= bound
    got = engine.clipped_sum(inputs, labels, clip)
    assert got.shape == wanted.shape
    assert apart(got, wanted) <= bound


@pytest.mark.parametrize("kind", KINDS)
def test_every_layers_norms_and_clipped_sums_are_those_of_batches_of_one(kind, monkeypatch):
    @given(st.data())
    @settings(deadline=None, max_examples=TRIES.get(kind, 20))
    def law(data):
        way, block = data.draw(st.sampled_from(WAYS)), data.draw(st.sampled_from([4, 32, 2**18]))
        model, inputs, labels = drawn(data, kind, torch.float64)
        with monkeypatch.context() as patch:
            patch.setattr(products, "BLOCK", block)  # so that small layers are split too
            patch.setattr(bookkeeping, "KERNELS", {})
            patch.setattr(bookkeeping, "_fastest", lambda ways, _: way if way in ways else "gram")
            check(model, inputs, labels, way != "by rule")

    law()


def test_the_same_check_catches_a_norm_that_forgets_a_weight(monkeypatch):
    torch.manual_seed(0)
    model = Around(nn.Linear(4, 2), (4,)).double()
    records = torch.randn(5, 4).double(), torch.arange(5) % CLASSES
    check(model, *records)
    whole = bookkeeping._norms
    monkeypatch.setattr(bookkeeping, "_norms", lambda found, *rest: whole(found[1:], *rest))
    with pytest.raises(AssertionError):
        check(model, *records)


def test_a_normalisation_without_its_own_part_is_refused_where_it_folds_an_axis_into_the_batch():
    model = Around(Shaped(nn.RMSNorm(3), 3), (2, 3))
    engine = engines.make("bookkeeping", model)
    with pytest.raises(NotImplementedError, match="a value without the batch axis"):
        engine.norms(torch.randn(4, 2, 3), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("kind", KINDS)
def test_in_float32_a_records_part_keeps_every_bit_whoever_its_neighbours_are(kind, monkeypatch):
    @given(st.data())
    @settings(deadline=None, max_examples=6)
    def law(data):
        model, inputs, labels = drawn(data, kind, torch.float32, low=2)
        page, said = inputs.repeat(9, *[1] * (inputs.dim() - 1)), labels.repeat(9)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= data.draw(st.sampled_from([1.0, 30.0]))
        way = data.draw(st.sampled_from(WAYS))
        engine = engines.make("bookkeeping", model, measured=way != "by rule")
        place = data.draw(st.integers(0, len(page) - 1))
        keep = torch.arange(len(page)) == place
        other, answer = page.flip(0), said.flip(0)
        other[place], answer[place] = page[place], said[place]
        with monkeypatch.context() as patch:
            patch.setattr(bookkeeping, "KERNELS", {})
            patch.setattr(bookkeeping, "_fastest", lambda ways, _: way if way in ways else "gram")
            # Below `clipped_sum`, which would empty the rows of the neighbours first.
            one, two = (
                engine._page_sum(rows, 0.1, keep) for rows in ((page, said), (other, answer))
            )
        assert torch.equal(one, two)

    law()


BAD = [math.inf, -math.inf, math.nan, 1e30]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("embedding", "decoder")])
def test_a_record_without_a_finite_gradient_contributes_zero_and_changes_no_other_bit(kind):
    @given(st.data())
    @settings(deadline=None, max_examples=8)
    def law(data):
        model, inputs, labels = drawn(data, kind, torch.float32, low=1)
        place = data.draw(st.integers(0, len(inputs) - 1))
        inputs[place] = data.draw(st.sampled_from(BAD))
        engine = engines.make("bookkeeping", model, measured=False)
        finite = torch.isfinite(engine.norms(inputs, labels))
        others = engine.clipped_sum(inputs, labels, 0.1, torch.arange(len(inputs)) != place)
        got = engine.clipped_sum(inputs, labels, 0.1)
        assert torch.isfinite(got).all()
        if finite[place]:  # 1e30 in a layer that normalises: its clipped self
            assert torch.linalg.vector_norm(got - others) <= 0.1 * (1 + 1e-3)
        else:
            assert torch.equal(got, others)

    law()
