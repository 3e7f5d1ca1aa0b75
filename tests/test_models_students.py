"""Students that read text: the mean of a bag of words, and a small BERT that leaves as ONNX."""

from __future__ import annotations

import onnxruntime
import torch

from fedaccord.models.build import build
from fedaccord.server.distillation import to_onnx
from fedaccord.tasks import TaskSpec

SPEC = TaskSpec("notes", ("text",), ("a", "b", "c"), {}, "made up", shape=(6,), vocabulary=14)
TOKENS = torch.tensor([[3, 5, 7, 9, 11, 13], [2, 4, 6, 0, 0, 0], [0, 0, 0, 0, 0, 0]])


def test_a_small_bert_is_exported_and_answers_alike() -> None:
    model = build("text", SPEC, {"width": 8, "layers": 1}, 0).eval()
    session = onnxruntime.InferenceSession(to_onnx(model, torch.from_numpy(SPEC.blank(2))))
    found = session.run(None, {"inputs": TOKENS.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(TOKENS), rtol=1e-4, atol=1e-5)


def test_a_bag_of_words_is_the_mean_of_its_words_in_any_order() -> None:
    model = build("bag-of-words", SPEC, {"width": 8}, 0)
    words = model.words.weight
    expected = model.head(torch.stack([words[[2, 4, 6]].mean(dim=0), torch.zeros(8)]))
    torch.testing.assert_close(model(TOKENS[1:]), expected)
    torch.testing.assert_close(model(torch.tensor([[6, 2, 4, 0, 0, 0]])), expected[:1])
