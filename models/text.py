"""Models for text: Hugging Face classifiers tuned whole or in part, and a bag of words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedaccord.models import options
from fedaccord.models.options import OptionFault
from fedaccord.tasks import TaskSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TUNINGS = ("full", "frozen-embeddings", "lora", "head")
# Layers that LoRA adapts where an accord names none: queries and values (Hu et al. 2022, 7.1).
TARGETS = {
    "bert": "query,value",
    "camembert": "query,value",
    "distilbert": "q_lin,v_lin",
    "gpt2": "c_attn",
    "roberta": "query,value",
    "xlm-roberta": "query,value",
}


def text(
    spec: TaskSpec,
    tuning: str = "full",
    layers: int = 0,
    pooling: str = "own",
    dropout: float = 0.0,
    width: int = 0,
    heads: int = 0,
    ratio: float = 2.0,
    lora_rank: int = 8,
    lora_alpha: int = 16,
    lora_targets: str = "",
    pretrained: Path | None = None,
) -> nn.Module:
    """Build a Hugging Face sequence classifier: int64 tokens (batch, places) to (batch, classes).

    With pretrained weights it is whatever the folder's config.json says; BERT, RoBERTa, DistilBERT
    and GPT-2 are tested. Without, it is a small BERT with random weights, which is the student.

    | tuning | trains | the rest |
    |---|---|---|
    | "full" | everything | |
    | "frozen-embeddings" | all but the tables of tokens, positions and types, and their LayerNorm | frozen |
    | "lora" | low-rank adapters (Hu et al. 2022) and the head | frozen |
    | "head" | the head: what the classifier has above its base model | frozen |

    Args:
        spec: the task, for its tokens and classes.
        tuning: which weights train.
        layers: the first layers to keep of a pretrained model (default all), or those of a random
            one (default 2).
        pooling: what the head reads: "own", what the classifier's author chose, or "mean", the mean
            of all tokens' states, which suits models of sentences.
        dropout: share that training drops; in place of every rate in config.json.
        width: of a random model, a multiple of `heads` (default 32).
        heads: of attention of a random model (default 4).
        ratio: units of a random model's perceptrons / `width`.
        lora_rank: of an adapter.
        lora_alpha: an adapter's output is multiplied by lora_alpha / lora_rank.
        lora_targets: names of the layers that are adapted, with commas between, or "all-linear"
            (default: queries and values, for the families that are tested).
        pretrained: folder of the pretrained model, checked by `build`.

    Raises:
        OptionFault: an option outside its bounds, a task without tokens, or one whose tokens or
            places the pretrained model does not have.
        AccordError: a folder that cannot be loaded.
    """  # noqa: E501  (a table row cannot be broken)
    vocabulary, places = options.text(spec, "text")
    options.choice("tuning", tuning, TUNINGS)
    options.choice("pooling", pooling, ("own", "mean"))
    options.whole("layers", layers, 0, 200)
    options.share("dropout", dropout)
    options.whole("lora_rank", lora_rank, 1, 1024)
    options.whole("lora_alpha", lora_alpha)
    from fedaccord.models import huggingface

    if pretrained is None:
        config = _small(spec, layers or 2, width or 32, heads or 4, ratio)
        encoder = huggingface.draw(config, dropout)
    else:
        if width or heads:
            name = "width" if width else "heads"
            raise OptionFault(f"{name} is of a model without pretrained weights. Leave it out.")
        encoder = huggingface.load(pretrained, len(spec.classes), layers, dropout)
        _refuse_unfit(encoder, vocabulary, places)
    family = encoder.config.model_type
    model = huggingface.TextClassifier(encoder, len(spec.classes), pooling)
    if tuning == "lora":
        names = lora_targets or TARGETS.get(family, "")
        if not names:
            raise OptionFault(
                f'lora_targets = "" needs names of layers for a model of type {family}. Name them, '
                'or set "all-linear".'
            )
        _adapt(model.base, names, lora_rank, lora_alpha)
    else:
        freeze(model.base, tuning)
    return model


def _small(spec: TaskSpec, layers: int, width: int, heads: int, ratio: float) -> PretrainedConfig:
    """Describe a small BERT that reads a task's tokens."""
    from transformers import BertConfig

    options.whole("width", width, 1, 8192)
    options.multiple("width", width, "heads", options.whole("heads", heads, 1, 256))
    inner = math.ceil(width * options.positive("ratio", ratio))
    config = BertConfig(
        vocab_size=spec.vocabulary,
        max_position_embeddings=spec.shape[0],
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=options.whole("width x ratio", inner),
        type_vocab_size=1,
    )
    config.num_labels = len(spec.classes)
    return config


def _refuse_unfit(encoder: PreTrainedModel, vocabulary: int, places: int) -> None:
    """Refuse a model that has no row in a table for some token or place of the task."""
    config = encoder.config
    table: Any = encoder.get_input_embeddings()
    known = int(table.num_embeddings)
    if vocabulary > known:
        raise OptionFault(
            f"the task has {vocabulary} tokens and the pretrained model {known}. Cut the task's "
            "texts with the tokenizer that comes with the model."
        )
    most = getattr(config, "max_position_embeddings", None)
    if most is None:
        return
    most -= (config.pad_token_id or 0) + 1 if "roberta" in config.model_type else 0
    if places > most:
        raise OptionFault(
            f"the task's texts have {places} places and the pretrained model {most}. Shorten them."
        )


def freeze(base: nn.Module, tuning: str) -> None:
    """Leave to training what `tuning` says of the model below the head."""
    if tuning == "head":
        base.requires_grad_(False)
    elif tuning == "frozen-embeddings":
        for name, module in base.named_modules():
            if isinstance(module, nn.Embedding) or name == "embeddings":
                module.requires_grad_(False)


def _adapt(base: nn.Module, names: str, rank: int, alpha: int) -> None:
    """Put LoRA's adapters into a model, and freeze the rest of it."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = names if names == "all-linear" else [name.strip() for name in names.split(",")]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0)
    inject_adapter_in_model(config, base)


def bag_of_words(spec: TaskSpec, width: int = 16) -> nn.Module:
    """Build the mean of a text's token vectors, and a linear layer: the smallest student.

    Args:
        spec: the task, for its tokens and classes.
        width: numbers that make a token's vector.

    Raises:
        OptionFault: an option outside its bounds, or a task without tokens.
    """
    vocabulary, _ = options.text(spec, "bag-of-words")
    return _Bag(vocabulary, options.whole("width", width, 1, 8192), len(spec.classes))


class _Bag(nn.Module):
    """The mean over places that hold a token (not 0); a text without tokens has the mean 0."""

    def __init__(self, vocabulary: int, width: int, classes: int) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        vectors = self.words(tokens)  # (batch, places, width)
        held = (tokens != 0)[:, :, None].to(vectors.dtype)
        return self.head((vectors * held).sum(dim=1) / held.sum(dim=1).clamp(min=1))
