"""Pre-training on public records, and what is frozen: what travels, and what a site checks."""

import re

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fedaccord import accord as accords
from fedaccord.accord import ModelSection
from fedaccord.cli import app
from fedaccord.errors import AccordError
from fedaccord.models.build import agreed, build, freeze, put, trained
from fedaccord.server.pretraining import pretrain
from fedaccord.tasks import task_of

torch.set_num_threads(1)
DIGITS = accords.load("digits")
TASK = task_of(DIGITS, accords.find("digits").parent)


def fresh():
    return build("mlp", TASK.spec, {"hidden": 16}, 0)


def test_pretraining_reads_public_records_alone_and_learns_them():
    inputs, labels = (torch.from_numpy(column) for column in TASK.labelled())
    one, other = fresh(), fresh()
    shares = [pretrain(m, (inputs, labels), 150, 0.01, 64, seed=3) for m in (one, other)]
    assert shares[0] == shares[1] > 0.8
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_site_starts_from_the_file_that_the_command_wrote_and_from_no_other(tmp_path):
    out = tmp_path / "trunk.safetensors"
    said = CliRunner().invoke(app, ["pretrain", "digits", "--out", str(out), "--steps", "5"])
    assert said.exit_code == 0, said.output
    digest = re.search(r'sha256 = "([0-9a-f]{64})"', said.output)[1]
    named = DIGITS.model.model_copy(update={"pretrained": str(out), "sha256": digest})
    start = agreed(named, TASK.spec, DIGITS.seed)
    plain = agreed(DIGITS.model, TASK.spec, DIGITS.seed)
    assert any(
        not torch.equal(a, b) for a, b in zip(start.parameters(), plain.parameters(), strict=True)
    )
    out.write_bytes(out.read_bytes()[:-1] + b"\x01")
    with pytest.raises(AccordError, match="SHA-256"):
        agreed(named, TASK.spec, DIGITS.seed)


def test_a_task_without_public_labels_says_so(tmp_path):
    said = CliRunner().invoke(app, ["pretrain", "heart", "--out", str(tmp_path / "a.safetensors")])
    assert isinstance(said.exception, AccordError)
    assert "no public records with labels" in str(said.exception)


def test_frozen_layers_are_neither_trained_nor_sent():
    model = agreed(ModelSection(name="mlp", options={"hidden": 16}, frozen=["1."]), TASK.spec, 0)
    names = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert names == {"1.weight", "1.bias"}
    assert trained(model).keys() == {n for n, _ in model.named_parameters()} - names
    before = model[1].weight.clone()
    put(model, {name: value + 1 for name, value in trained(model).items()})
    assert torch.equal(model[1].weight, before)
    with pytest.raises(RuntimeError, match="other names"):
        put(model, dict(model.state_dict()))


def test_what_cannot_be_frozen_is_refused_by_name():
    with pytest.raises(AccordError, match='starts with "trunk"'):
        freeze(fresh(), ["trunk"])
    with pytest.raises(AccordError, match="no weight to train"):
        freeze(fresh(), [""])


def test_persistent_buffers_travel_and_frozen_twins_do_not():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model.register_buffer("seen", torch.zeros(1))
    model[0].weight.requires_grad_(False)
    assert trained(model).keys() == {"seen", "0.bias", "1.bias"}
