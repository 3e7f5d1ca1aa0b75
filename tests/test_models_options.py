"""Options that a model cannot take, and pretrained weights that are not the agreed ones."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedaccord import accord as accords
from fedaccord import registry
from fedaccord.errors import AccordError
from fedaccord.models.build import agreed, build, parameter_count
from fedaccord.models.pretrained import Pretrained
from fedaccord.server.app import initial
from fedaccord.tasks import TaskSpec, load_task

Options = dict[str, int | float | bool | str]
HEART = load_task("heart")


def spec_of(shape: tuple[int, ...], vocabulary: int = 0) -> TaskSpec:
    return TaskSpec("made", ("c",), ("a", "b"), {}, "made up", shape, vocabulary=vocabulary)


IMAGE, ROW, TEXT = spec_of((3, 8, 8)), spec_of((6,)), spec_of((6,), 12)


@pytest.mark.parametrize(
    ("name", "spec", "options", "said"),
    [
        ("cnn1d", ROW, {"chanels": 4}, "unexpected keyword argument 'chanels'"),
        ("cnn1d", ROW, {"channels": 5}, "channels = 5 must be a multiple of groups = 2. Change"),
        ("cnn1d", ROW, {"channels": -4}, "channels = -4 must be a whole number from 1 to"),
        ("cnn1d", ROW, {"groups": 0}, "groups = 0 must be a whole number from 1 to"),
        ("cnn1d", ROW, {"kernel": 4}, "kernel = 4 must be odd."),
        ("cnn1d", ROW, {"blocks": 9}, "blocks = 9 must be a whole number from 1 to 8."),
        ("cnn1d", ROW, {"hidden": True}, "hidden = true must be a whole number from 0 to"),
        ("cnn1d", IMAGE, {}, "gives inputs of shape [3, 8, 8], and cnn1d reads rows"),
        ("mlp", ROW, {"hidden": "many"}, 'hidden = "many" must be a whole number from 1 to'),
        ("mlp", ROW, {"hidden": 2.5}, "hidden = 2.5 must be a whole number from 1 to"),
        ("mlp", ROW, {"spec": 1}, "multiple values for"),
        ("mlp", TEXT, {}, "gives tokens of text, and mlp reads numbers."),
        ("cnn2d", ROW, {}, "gives inputs of shape [6], and cnn2d reads images"),
        ("cnn2d", IMAGE, {"pool": "max"}, 'pool = "max" must be one of "flatten", "mean".'),
        ("cnn2d", IMAGE, {"activation": "tahn"}, 'Did you mean "tanh"?'),
        ("cnn2d", IMAGE, {"channels": 6}, "channels = 6 must be a multiple of groups = 4"),
        ("resnet18", IMAGE, {"groups": 48}, "groups = 48 must divide 64."),
        ("resnet18", IMAGE, {"stem": "tiny"}, 'stem = "tiny" must be one of "auto", "small"'),
        ("transformer", ROW, {"tokens": "steps"}, "needs a task with steps in time"),
        ("transformer", ROW, {"width": 30}, "width = 30 must be a multiple of heads = 4."),
        ("transformer", ROW, {"ratio": 0}, "ratio = 0 must be above 0"),
        ("transformer", ROW, {"dropout": 1.0}, "dropout = 1.0 must be from 0 to below 1."),
        ("transformer", ROW, {"layers": 0}, "layers = 0 must be a whole number from 1 to 48."),
        ("text", ROW, {}, "gives numbers of shape [6], and text reads tokens"),
        ("text", TEXT, {"tuning": "adapters"}, 'tuning = "adapters" must be one of "full"'),
        ("text", TEXT, {"tuning": "lora", "lora_rank": 0}, "lora_rank = 0 must be a whole number"),
        ("text", TEXT, {"tuning": "lora", "lora_targets": "queries"}, "{'queries'} not found in"),
        ("text", TEXT, {"width": 30}, "width = 30 must be a multiple of heads = 4."),
        ("text", TEXT, {"pretrained": "/etc"}, "pretrained is not an option. Give model.pretr"),
        ("bag-of-words", TEXT, {"width": 0}, "width = 0 must be a whole number from 1 to 8192."),
        ("bag-of-words", IMAGE, {}, "gives numbers of shape [3, 8, 8], and bag-of-words reads"),
    ],
)
def test_what_a_model_cannot_take_is_refused_in_one_line(
    name: str, spec: TaskSpec, options: Options, said: str
) -> None:
    with pytest.raises(AccordError) as caught:
        build(name, spec, options, 0)
    text = str(caught.value)
    assert text.startswith(f'model "{name}": ')
    assert "\n" not in text
    assert said in text
    assert text.endswith(".")


def test_an_option_that_a_model_cannot_take_is_refused_before_the_run() -> None:
    data = accords.load("heart").model_dump(mode="json")
    data["model"] = {"name": "cnn1d", "options": {"channels": 5}}
    with pytest.raises(AccordError, match="channels = 5 must be a multiple of groups = 2"):
        initial(accords.parse(data), HEART)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A student's weights, of another seed than that of the tests."""
    model = build("mlp", HEART.spec, {}, 99)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("by", ["file", "folder"])
def test_a_model_starts_from_the_weights_that_the_accord_names(weights: Path, by: str) -> None:
    data = accords.load("heart").model_dump(mode="json")
    where = str(weights if by == "file" else weights.parent)
    data["model"] = {"name": "mlp", "pretrained": where, "sha256": digest(weights)}
    accord = accords.parse(data)
    expected = build("mlp", HEART.spec, {}, 99).state_dict()
    for model in (initial(accord, HEART)[0], agreed(accord.model, HEART.spec, 0)):
        for name, value in model.state_dict().items():
            assert torch.equal(value, expected[name])


def refused(pretrained: Pretrained, name: str = "mlp", **options: int) -> str:
    with pytest.raises(AccordError) as caught:
        build(name, HEART.spec, options, 0, pretrained)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_weights_with_another_hash_are_refused_and_both_hashes_are_said(weights: Path) -> None:
    agreed_on = digest(weights)
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1  # one bit
    weights.write_bytes(changed)
    text = refused(Pretrained(str(weights), agreed_on))
    assert f"has SHA-256 {digest(weights)}, not model.sha256 = {agreed_on}" in text


def test_weights_of_another_model_are_refused(weights: Path) -> None:
    named = Pretrained(str(weights), digest(weights))
    assert "0.weight has shape" in refused(named, hidden=9)
    assert "the file has no 1.weight" in refused(named, "cnn1d")


def test_a_file_that_holds_no_tensors_is_refused(weights: Path) -> None:
    weights.write_bytes(b"no tensors at all")
    assert "is no safetensors file" in refused(Pretrained(str(weights), digest(weights)))


def test_a_pickle_is_refused_whatever_its_hash(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save({}, file)
    assert "from one safetensors file" in refused(Pretrained(str(file), digest(file)))


def test_weights_that_are_nowhere_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDACCORD_DATA", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    nothing = "0" * 64
    assert "is no path on this machine" in refused(Pretrained("nowhere at all", nothing))
    assert "fedaccord data fetch minilm" in refused(Pretrained("minilm", nothing))
    nobody = Pretrained("nobody-at-all/nothing", nothing)
    assert "not in the hub's cache and cannot be fetched" in refused(nobody)
    assert "there is no " in refused(Pretrained(str(tmp_path), nothing))


def any_spec(
    shape: tuple[int, ...], words: int = 0, steps: tuple[int, int] | None = None
) -> TaskSpec:
    columns = tuple(f"c{i}" for i in range(shape[0]))
    return TaskSpec("any", columns, ("a", "b"), {}, "", shape, vocabulary=words, sequence=steps)


GIVES = {
    "row of 20": any_spec((20,)),
    "6 months of 3, 5 others": any_spec((23,), steps=(6, 3)),
    "image of 1 x 28 x 28": any_spec((1, 28, 28)),
    "text of 64 tokens out of 30,522": any_spec((64,), words=30522),
}


def test_models_have_the_counts_of_weights_that_the_documentation_gives() -> None:
    text = (Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| (.+) \| `(.+)` \| `({.*})` \| ([\d,]+) \|$", text, re.MULTILINE)
    assert {name for _, name, *_ in found} == set(registry.MODELS)
    for gives, name, options, count in found:
        model = build(name, GIVES[gives], json.loads(options), 0)
        assert f"{parameter_count(model):,}" == count, (gives, name)
