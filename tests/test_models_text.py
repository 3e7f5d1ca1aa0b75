"""Hugging Face classifiers of four families: the same function, taken apart record by record."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from opacus import GradSampleModule
from opacus.validators import ModuleValidator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    RobertaConfig,
)

from fedaccord.client.train import refuse_unsafe
from fedaccord.errors import AccordError
from fedaccord.models.build import build, trained
from fedaccord.models.pretrained import Pretrained, folder
from fedaccord.privacy import engines
from fedaccord.tasks import TaskSpec

Options = dict[str, int | float | bool | str]
WORDS, PLACES = 14, 6
SPEC = TaskSpec(
    "notes", ("text",), ("a", "b", "c"), {}, "made up", shape=(PLACES,), vocabulary=WORDS
)
CONFIGS: dict[str, Any] = {
    "bert": lambda: BertConfig(
        vocab_size=WORDS,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=10,
        max_position_embeddings=PLACES + 1,
    ),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=WORDS,
        dim=8,
        n_layers=2,
        n_heads=2,
        hidden_dim=10,
        max_position_embeddings=PLACES + 1,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=WORDS,
        n_embd=8,
        n_layer=2,
        n_head=2,
        n_positions=PLACES + 1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    ),
    "roberta": lambda: RobertaConfig(
        vocab_size=WORDS,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=10,
        max_position_embeddings=PLACES + 2,  # two of them are the padding's
        type_vocab_size=1,
        pad_token_id=1,
        bos_token_id=0,
    ),
}
TUNINGS: dict[str, Options] = {
    "full": {},
    "full, mean": {"pooling": "mean"},
    "frozen": {"tuning": "frozen-embeddings"},
    "lora": {"tuning": "lora", "lora_rank": 2},
    "head": {"tuning": "head", "layers": 1},
}
every_family = pytest.mark.parametrize("family", CONFIGS)
every_tuning = pytest.mark.parametrize("tuning", TUNINGS)
# Of two texts, full and cut short, and one without any token.
TOKENS = torch.tensor([[3, 5, 7, 9, 11, 13], [2, 4, 6, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
LABELS = torch.tensor([0, 1, 2])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are faster on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny pretrained model of each family; one weight in a table stands for its training."""
    made = {}
    for family, config in CONFIGS.items():
        made[family] = tmp_path_factory.mktemp(family)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = AutoModelForSequenceClassification.from_config(config())
            for parameter in model.parameters():  # else biases are 0 and norms the identity
                nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(made[family])
    return made


def named(where: Path) -> Pretrained:
    content = (where / "model.safetensors").read_bytes()
    return Pretrained(str(where), hashlib.sha256(content).hexdigest())


def make(where: Path, options: Options, seed: int = 0) -> nn.Module:
    return build("text", SPEC, options, seed, named(where))


@every_family
@every_tuning
def test_gradients_of_a_batch_are_those_of_its_records_one_by_one(
    family: str, tuning: str, folders: dict[str, Path]
) -> None:
    model = make(folders[family], TUNINGS[tuning]).double().train()
    assert ModuleValidator.validate(model, strict=False) == []
    refuse_unsafe(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = []
    for record, label in zip(TOKENS, LABELS, strict=True):
        loss = functional.cross_entropy(model(record[None]), label[None])
        found = torch.autograd.grad(loss, parameters)  # raises for a weight that has no part in it
        expected.append(torch.linalg.vector_norm(torch.cat([part.flatten() for part in found])))
    for name in ("hooks", "bookkeeping"):
        norms = engines.make(name, copy.deepcopy(model)).norms(TOKENS, LABELS)
        torch.testing.assert_close(norms, torch.stack(expected), rtol=1e-9, atol=0)


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2"])
def test_hugging_faces_own_position_ids_are_taken_by_no_hook(
    family: str, folders: dict[str, Path]
) -> None:
    # The other direction: without our ids the test above would have something to find.
    theirs = AutoModelForSequenceClassification.from_pretrained(folders[family]).double()
    if family == "gpt2":
        for parameter in theirs.transformer.h.parameters():
            parameter.requires_grad_(False)  # its Conv1D is refused before that
    hooked = GradSampleModule(theirs, loss_reduction="sum")
    outcome = "no fault"
    try:
        hooked(input_ids=TOKENS).logits.sum().backward()
        shapes = {len(p.grad_sample) for p in hooked.parameters() if p.requires_grad}
        if shapes != {len(TOKENS)}:
            outcome = "gradients for another number of records"
    except Exception as fault:
        outcome = type(fault).__name__
    assert outcome != "no fault"


@every_family
def test_the_logits_are_those_of_hugging_faces_own_model(
    family: str, folders: dict[str, Path]
) -> None:
    theirs = AutoModelForSequenceClassification.from_pretrained(folders[family], num_labels=2)
    spec = TaskSpec("notes", ("t",), ("a", "b"), {}, "", shape=(PLACES,), vocabulary=WORDS)
    ours = build("text", spec, {}, 0, named(folders[family])).double().eval()
    pad = theirs.config.pad_token_id
    for tokens in (TOKENS[:1], TOKENS[1:2]):
        held = tokens != 0
        given = {"input_ids": torch.where(held, tokens, pad), "attention_mask": held.long()}
        expected = theirs.double().eval()(**given).logits
        torch.testing.assert_close(ours(tokens), expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(ours(TOKENS[:1]), ours(TOKENS[1:2]))


@every_family
@every_tuning
def test_a_records_answer_does_not_change_with_its_neighbours_or_the_empty_places(
    family: str, tuning: str, folders: dict[str, Path]
) -> None:
    model = make(folders[family], TUNINGS[tuning]).double().eval()
    together = model(TOKENS)
    assert torch.isfinite(together).all()
    for place in range(3):
        alone = model(TOKENS[[place]])
        torch.testing.assert_close(alone[0], together[place], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(TOKENS[1:2, :4])[0], together[1], rtol=1e-9, atol=1e-12)


@every_family
def test_attention_runs_the_same_kernel_whether_or_not_some_text_is_padded(
    family: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Kernels with a mask and without one may round differently; which runs must not depend on who
    # else is in the batch.
    seen, real = [], functional.scaled_dot_product_attention

    def watch(*args: Any, **given: Any) -> torch.Tensor:
        mask = given["attn_mask"]
        seen.append((None if mask is None else (mask.dtype, mask.shape), given["is_causal"]))
        return real(*args, **given)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watch)
    model = make(folders[family], {}).eval()
    model(TOKENS[[0, 0, 0]])
    model(TOKENS)
    assert seen == [((torch.bool, (3, 1, PLACES, PLACES)), False)] * 4  # two layers, two batches


@every_family
def test_padding_by_the_models_own_token_is_padding_too(
    family: str, folders: dict[str, Path]
) -> None:
    model = make(folders[family], {}).eval()
    pad = CONFIGS[family]().pad_token_id
    own = torch.where(TOKENS[1:2] == 0, pad, TOKENS[1:2])
    torch.testing.assert_close(model(own), model(TOKENS[1:2]))


def test_a_token_0_amid_a_text_is_a_token(folders: dict[str, Path]) -> None:
    # RoBERTa's texts begin with it.
    model = make(folders["roberta"], {}).eval()
    begins, other = torch.tensor([[0, 5, 2, 0, 0, 0]]), torch.tensor([[4, 5, 2, 0, 0, 0]])
    assert not torch.allclose(model(begins), model(other))
    own = torch.tensor([[0, 5, 2, 1, 1, 1]])
    torch.testing.assert_close(model(begins), model(own))


@every_family
def test_lora_trains_adapters_and_head_alone_and_starts_as_the_pretrained_model(
    family: str, folders: dict[str, Path]
) -> None:
    plain = make(folders[family], {})
    model = make(folders[family], TUNINGS["lora"])
    base = {
        f"encoder.{model.encoder.base_model_prefix}.{name}"
        for name, _ in model.base.named_parameters()
    }
    below = set(trained(model)) & base
    assert below
    assert all("lora_A" in name or "lora_B" in name for name in below)
    above = {name for name, _ in model.named_parameters()} - base
    assert above
    assert above < set(trained(model))
    for (_, one), (_, other) in zip(
        above_weights(plain, above), above_weights(model, above), strict=True
    ):
        assert torch.equal(one, other)
    torch.testing.assert_close(model.eval()(TOKENS), plain.eval()(TOKENS))


def above_weights(model: nn.Module, names: set[str]) -> list[tuple[str, torch.Tensor]]:
    return [(name, value) for name, value in model.named_parameters() if name in names]


@every_family
def test_frozen_embeddings_are_every_table_and_nothing_in_the_layers(
    family: str, folders: dict[str, Path]
) -> None:
    model = make(folders[family], TUNINGS["frozen"])
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            assert not module.weight.requires_grad, name
        if isinstance(module, nn.Linear):
            assert module.weight.requires_grad, name


@every_family
def test_the_head_is_what_the_classifier_has_above_its_base(
    family: str, folders: dict[str, Path]
) -> None:
    names = trained(make(folders[family], TUNINGS["head"]))
    heads = {"classifier", "pre_classifier", "score"}
    assert names
    assert all(name.split(".")[1] in heads for name in names)
    mean = make(folders[family], {"tuning": "head", "pooling": "mean"})
    assert set(trained(mean)) == {"head.weight", "head.bias"}


@every_family
def test_the_first_layers_of_a_model_are_those_of_the_whole(
    family: str, folders: dict[str, Path]
) -> None:
    whole, cut = make(folders[family], {}), make(folders[family], {"layers": 1})
    kept, all_weights = cut.state_dict(), whole.state_dict()
    assert len(kept) < len(all_weights)
    for name, value in kept.items():
        if value.shape[0] != len(SPEC.classes):  # of the head, which was drawn for three classes
            assert torch.equal(value, all_weights[name]), name


@every_family
def test_what_is_not_pretrained_comes_from_the_seed_alone(
    family: str, folders: dict[str, Path]
) -> None:
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        return make(folders[family], {}, seed).state_dict()

    before = torch.get_rng_state()
    one = drawn(7)
    torch.rand(5)
    again, other = drawn(7), drawn(8)
    assert all(torch.equal(one[name], again[name]) for name in one)
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed
    assert all(one[name].shape[0] == len(SPEC.classes) for name in changed)
    torch.set_rng_state(before)
    drawn(7)
    assert torch.equal(torch.get_rng_state(), before)


@every_family
def test_dropout_is_the_options_and_not_the_configurations(
    family: str, folders: dict[str, Path]
) -> None:
    model = make(folders[family], {}).train()
    assert torch.equal(model(TOKENS), model(TOKENS))
    dropping = make(folders[family], {"dropout": 0.5}).train()
    assert not torch.equal(dropping(TOKENS), dropping(TOKENS))


def refused(where: Path, options: Options, spec: TaskSpec = SPEC) -> str:
    with pytest.raises(AccordError) as caught:
        build("text", spec, options, 0, named(where))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_the_pretrained_model_does_not_have_is_refused(folders: dict[str, Path]) -> None:
    bert, roberta = folders["bert"], folders["roberta"]
    wide = TaskSpec("notes", ("t",), ("a", "b"), {}, "", shape=(PLACES,), vocabulary=WORDS + 1)
    long = TaskSpec("notes", ("t",), ("a", "b"), {}, "", shape=(PLACES + 2,), vocabulary=WORDS)
    longer = TaskSpec("notes", ("t",), ("a", "b"), {}, "", shape=(PLACES + 1,), vocabulary=WORDS)
    assert "task has 15 tokens and the pretrained model 14" in refused(bert, {}, wide)
    assert "have 8 places and the pretrained model 7" in refused(bert, {}, long)
    assert "have 7 places and the pretrained model 6" in refused(roberta, {}, longer)
    assert "layers = 3 is above 2" in refused(bert, {"layers": 3})
    assert "width is of a model without pretrained weights" in refused(bert, {"width": 8})


def test_weights_that_lack_a_part_of_the_model_are_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    weights = load_file(folders["bert"] / "model.safetensors")
    config = json.loads((folders["bert"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    lost = "bert.encoder.layer.1.output.dense.weight"
    save_file(
        {k: v for k, v in weights.items() if k != lost},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    assert f"the weights lack {lost}" in refused(tmp_path, {})
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read" in refused(tmp_path, {})
    (tmp_path / "config.json").unlink()
    assert "there is no" in refused(tmp_path, {})


def test_another_hash_is_refused_before_anything_is_loaded(folders: dict[str, Path]) -> None:
    right = named(folders["bert"])
    assert folder(right.name, right.sha256) == folders["bert"]
    with pytest.raises(
        AccordError, match=rf"has SHA-256 {right.sha256}, not model.sha256 = 0{{64}}"
    ):
        build("text", SPEC, {}, 0, Pretrained(right.name, "0" * 64))


MINILM = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TABLE = (Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8")


@pytest.mark.soak
@pytest.mark.parametrize("tuning", ["full", "frozen-embeddings", "lora", "head"])
def test_minilm_trains_as_many_weights_as_the_documentation_says(tuning: str) -> None:
    # Needs: fedaccord data fetch minilm
    spec = TaskSpec("notes", ("t",), ("a", "b"), {}, "", shape=(64,), vocabulary=30522)
    model = build("text", spec, {"tuning": tuning}, 0, Pretrained("minilm", MINILM))
    count = sum(value.numel() for value in trained(model).values())
    (row,) = [line for line in TABLE.splitlines() if line.startswith(f'| `"{tuning}"` |')]
    assert row.endswith(f"| {count:,} |")
