"""Checkpoints and model files: what was saved comes back, and what is damaged is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedaccord.errors import EvidenceError
from fedaccord.server import checkpoint
from fedaccord.server.checkpoint import Checkpoint

WEIGHTS = {
    "b": np.float32([[1.5, -0.0], [2, 3]]),
    "a": np.array(2, np.int64),
    "e": np.zeros((0, 3)),
}


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    head = {"site": "va", "key": "k", "seq": 3, "hash": "h", "signature": "s"}
    for student in ({}, {"w": np.float64([np.pi])}):
        saved = Checkpoint(
            7,
            model=WEIGHTS,
            averaged={"a": np.array(1.5)},
            student=student,
            strategy={"m_t/a.b": np.float64([1e-300])},
            heads=[head],
            record={"id": "round-7", "reason": "caf\u00e9"},
        )
        checkpoint.save(tmp_path, saved)
        again = checkpoint.load(tmp_path)
        assert (again.number, again.heads, again.record) == (7, [head], saved.record)
        for part in checkpoint.PARTS:
            there, here = getattr(again, part), getattr(saved, part)
            assert there.keys() == here.keys()
            for name in here:
                assert there[name].tobytes() == here[name].tobytes()
                assert (there[name].dtype, there[name].shape) == (
                    here[name].dtype,
                    here[name].shape,
                )


def test_equal_weights_have_one_digest_whatever_their_order_and_layout() -> None:
    turned = {k: WEIGHTS[k].copy(order="F") for k in reversed(WEIGHTS)}
    assert checkpoint.weights_digest(turned) == checkpoint.weights_digest(WEIGHTS)
    other = WEIGHTS | {"b": np.float32([[1.5, 0.0], [2, 3]])}
    assert checkpoint.weights_digest(other) != checkpoint.weights_digest(WEIGHTS)


@pytest.mark.parametrize("spoil", ["absent", "empty", "garbage", "cut off", "no round"])
def test_a_checkpoint_that_cannot_be_read_is_refused_in_words(spoil: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, Checkpoint(1, WEIGHTS))
    path = tmp_path / checkpoint.LATEST
    data = path.read_bytes()
    bare = checkpoint.weights_bytes(WEIGHTS)
    spoilt = {"empty": b"", "garbage": b"\xff" * 64, "cut off": data[:-3], "no round": bare}
    path.unlink() if spoil == "absent" else path.write_bytes(spoilt[spoil])
    with pytest.raises(EvidenceError, match="No round had finished, or restore the file"):
        checkpoint.load(tmp_path)
