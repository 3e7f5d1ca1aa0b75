"""Hugging Face sequence classifiers, changed so that every layer sees the batch axis first.

| what Hugging Face does | what is done here |
|---|---|
| looks positions and token types up once for the whole batch | passes ids (batch, places) |
| leaves the mask out where no text of the batch is padded: another kernel, chosen by the neighbours | passes a whole mask, always |
| GPT-2: a linear layer of its own class (Conv1D), unknown to Opacus | nn.Linear, the same function |
| an embedding without gradient in its padding row, which Opacus does not know of | any row may have one; a masked place has none anyway |
| persistent buffers | not persistent: they hold no weights |
"""  # noqa: E501  (a table row cannot be broken)

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from fedaccord.errors import AccordError
from fedaccord.models import options

# Families whose forward pass takes a mask (batch, 1, places, places) as it is.
WHOLE_MASKS = ("bert", "camembert", "distilbert", "gpt2", "roberta", "xlm-roberta")
# Names of dropout rates in their configurations.
DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "dropout",
    "attention_dropout",
    "seq_classif_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
)
POOLER = "pooler."  # of a base model; weights for language alone come without


class TextClassifier(nn.Module):
    """Logits (batch, classes) of tokens (batch, places).

    A place holds no token from the last token that is not 0 onwards (`TaskSpec.vocabulary`), and
    where the model's own padding token stands. The first place always holds one, so that a text
    without tokens has an answer too.

    Args:
        encoder: a Hugging Face sequence classifier; changed in place.
        classes: of the label.
        pooling: "own", the classifier's own, or "mean", a linear layer on the mean of the states
            of all tokens.
    """

    def __init__(self, encoder: PreTrainedModel, classes: int, pooling: str) -> None:
        super().__init__()
        config = encoder.config
        offset = take_apart(encoder)
        takes = inspect.signature(encoder.forward).parameters
        self._pad = int(config.pad_token_id or 0)
        self._offset = offset if "position_ids" in takes else None
        self._types = "token_type_ids" in takes and bool(getattr(config, "type_vocab_size", 0))
        self._whole = config.model_type in WHOLE_MASKS
        self._causal = config.model_type == "gpt2"
        self.head: nn.Linear | None = None
        self.encoder: nn.Module = encoder
        if pooling == "mean":
            self.encoder = encoder.base_model
            if getattr(self.encoder, "pooler", None) is not None:
                self.encoder.register_module("pooler", None)
            self.head = nn.Linear(config.hidden_size, classes)
            nn.init.normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @property
    def base(self) -> nn.Module:
        """The model below the head."""
        base: Any = self.encoder if self.head is not None else self.encoder.base_model
        return cast(nn.Module, base)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read int64 tokens (batch, places)."""
        held = _held(tokens, self._pad)
        given: dict[str, torch.Tensor] = {"input_ids": torch.where(held, tokens, self._pad)}
        given["attention_mask"] = self._mask(held)
        if self._offset is not None:
            places = torch.arange(tokens.shape[1], device=tokens.device) + self._offset
            given["position_ids"] = places.expand(tokens.shape[0], -1).contiguous()
        if self._types:
            given["token_type_ids"] = torch.zeros_like(tokens)
        if self.head is None:
            logits: torch.Tensor = self.encoder(**given).logits
            return logits
        states = self.encoder(**given).last_hidden_state  # (batch, places, width)
        counted = held[:, :, None].to(states.dtype)
        return self.head((states * counted).sum(dim=1) / counted.sum(dim=1))

    def _mask(self, held: torch.Tensor) -> torch.Tensor:
        """Say which places each place may look at; in whole where the model takes that."""
        if not self._whole:
            return held
        places = held.shape[1]
        mask = held[:, None, None, :].expand(-1, 1, places, places)
        if self._causal:
            mask = mask & torch.ones(places, places, dtype=torch.bool, device=held.device).tril()
        return mask


def _held(tokens: torch.Tensor, pad: int) -> torch.Tensor:
    """Find the places that hold a token, bool (batch, places)."""
    later = (tokens != 0).flip(1).cumsum(1).flip(1)  # tokens that are not 0 from here on
    first = torch.arange(tokens.shape[1], device=tokens.device) == 0
    return ((later > 0) & (tokens != pad)) | first


def take_apart(encoder: PreTrainedModel) -> int:
    """Change a model in place so that engines take it apart; its function stays.

    Returns:
        The position of the first place: 0, or above the padding's own (RoBERTa).
    """
    offset = 0
    for name, module in list(encoder.named_modules()):
        module._non_persistent_buffers_set.update(module._buffers)
        if isinstance(module, nn.Embedding):
            if module.padding_idx is not None and "position" in name:
                offset = module.padding_idx + 1
            module.padding_idx = None
        for key, child in list(module.named_children()):
            if isinstance(child, Conv1D):
                setattr(module, key, _linear(child))
    return offset


def _linear(layer: Conv1D) -> nn.Linear:
    """Make the linear layer that computes what GPT-2's Conv1D does."""
    made = nn.Linear(layer.weight.shape[0], layer.weight.shape[1], device="meta")
    made.weight = nn.Parameter(layer.weight.detach().t().contiguous())
    made.bias = nn.Parameter(layer.bias.detach().clone())
    return made


def load(folder: Path, classes: int, layers: int, dropout: float) -> PreTrainedModel:
    """Load a sequence classifier from a folder; the network is not used, and no code is run.

    Args:
        folder: config.json and model.safetensors, the latter checked by the caller.
        classes: of the label; a head for another number of them is drawn anew.
        layers: the first ones to keep; 0 for all.
        dropout: in place of every rate of the configuration.

    Raises:
        AccordError: files that cannot be read, or weights that lack a part of the model.
        OptionFault: more layers than the model has.
    """
    only_here: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(folder, **only_here)
            if layers > config.num_hidden_layers:
                raise options.OptionFault(
                    f"layers = {layers} is above {config.num_hidden_layers}, the layers of the "
                    "pretrained model. Lower it."
                )
            config.num_labels = classes
            config.num_hidden_layers = layers or config.num_hidden_layers
            _settle(config, dropout)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=config,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                dtype=torch.float32,
                attn_implementation="sdpa",
                **only_here,
            )
    except (OSError, SafetensorError) as fault:
        first = str(fault).splitlines()[0]
        raise AccordError(
            f"model.pretrained: {folder} cannot be read: {first}. Save the model again."
        ) from None
    _refuse_lacking(model, info)
    loaded: PreTrainedModel = model
    return loaded


def _refuse_lacking(model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Refuse weights that lack a part below the head: it would start from random ones, unsaid."""
    wrong = [*info["missing_keys"], *(found[0] for found in info["mismatched_keys"])]
    below = f"{model.base_model_prefix}."
    for name in sorted(wrong):
        if name.startswith(below) and not name.removeprefix(below).startswith(POOLER):
            raise AccordError(
                f"model.pretrained: the weights lack {name}, or have it in another shape. "
                "Choose weights that belong to their config.json."
            )


def draw(config: PretrainedConfig, dropout: float) -> PreTrainedModel:
    """Build a sequence classifier with random weights from torch's generator."""
    _settle(config, dropout)
    with _quiet():
        make: Any = AutoModelForSequenceClassification.from_config
        return cast(PreTrainedModel, make(config, attn_implementation="sdpa"))


def _settle(config: PretrainedConfig, dropout: float) -> None:
    """Set what training in steps of one batch needs, whatever the configuration says."""
    for name in DROPOUTS:
        if isinstance(getattr(config, name, None), float):
            setattr(config, name, dropout)
    if getattr(config, "use_cache", False):
        config.use_cache = False
    if config.pad_token_id is None:
        config.pad_token_id = 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Hugging Face's report of a head drawn anew, and its progress bar, off the screen."""
    said: Any = logging  # its functions have no types
    before, bar = said.get_verbosity(), said.is_progress_bar_enabled()
    said.set_verbosity_error()
    said.disable_progress_bar()
    try:
        yield
    finally:
        said.set_verbosity(before)
        if bar:
            said.enable_progress_bar()
