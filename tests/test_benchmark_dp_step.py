"""The benchmark of a private step: its ways give the right sum, and it says what cannot run."""

import pytest
import torch

from benchmarks import dp_step
from benchmarks.dp_step_cases import Case
from benchmarks.dp_step_methods import PLAIN, WAYS
from fedaccord.tasks import TaskSpec

SPEC = TaskSpec("random", ("f0",), ("a", "b"), {}, "drawn at random", (1, 6, 6))
TINY = Case("tiny", "cnn2d", SPEC, {"channels": 4, "blocks": 1, "hidden": 4}, 5, 1.4)


def test_every_way_but_plain_gives_the_clipped_sum_of_single_records() -> None:
    ways, errors, refused = dp_step.prepare(TINY, list(WAYS))
    assert refused == {}
    assert list(ways) == list(WAYS)
    for name, error in errors.items():
        assert (error > 0.01) if name == PLAIN else (error < 1e-5), name


def test_a_way_that_cannot_run_a_model_says_why_instead_of_a_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.last = torch.nn.Parameter(torch.ones(36)), torch.nn.Linear(36, 2)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.last(images.flatten(1) * self.scale)

    monkeypatch.setattr(Case, "build", lambda _: Bare())
    ways, _, refused = dp_step.prepare(TINY, [PLAIN, "ghost (float64)", "bookkeeping"])
    assert list(ways) == [PLAIN, "bookkeeping"]
    assert refused["ghost (float64)"].startswith("refused: AccordError: privacy.engine")


def test_the_tables_show_ratio_floor_error_noise_and_pages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dp_step, "CASES", (TINY,))
    monkeypatch.setattr(dp_step.devices, "settle", lambda: None)  # it changes the whole process
    dp_step.main(["--repeats", "1"])
    shown = capsys.readouterr().out
    for text in (*WAYS, "x plain", "relative error", "1.40", "noise, ms", "pages x rows", "1 x 48"):
        assert text in shown, text
