"""A private round's passes: of public shape, the same under every engine, and not in vain."""

import pytest
import torch
from torch import nn
from wards import SPEC, STEP, WIDTH, Silent, flat, plan, some

from fedaccord.accord import TrainingSection
from fedaccord.client import train
from fedaccord.errors import AccordError
from fedaccord.models.build import build

torch.set_num_threads(1)


def step_sum(model, data, engine="bookkeeping", precision="float64"):
    """What a private step sums before there is any noise; the model is trained."""
    agreed = plan()
    train.train_private(model, data, agreed, STEP, Silent, train.How(engine, precision))
    return torch.from_numpy(agreed.total)


def rows_seen(model, data, agreed):
    """How many rows each forward pass of one round had."""
    seen = []
    handle = model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    train.train_private(model, data, agreed, STEP)
    handle.remove()
    return seen


def test_a_forward_pass_has_a_public_number_of_rows_and_never_more_than_a_micro_batch():
    agreed = plan(subjects=900, sampling_prob=0.5, steps=3, noise_multiplier=1.0)
    rows_seen(build("mlp", SPEC, {}, 0), some(1), agreed)  # a first round runs a blank page too
    shapes = [rows_seen(build("mlp", SPEC, {}, 0), some(n), agreed) for n in (700, 900, 901, 1_000)]
    assert all(shape == shapes[0] for shape in shapes)  # whoever and however many were drawn
    assert set(shapes[0]) == {204}
    huge = rows_seen(build("mlp", SPEC, {}, 0), some(5_000), plan(subjects=10))
    assert sum(huge) >= 5_000  # nobody is left out, though 500 times as many came as declared
    assert max(huge) <= train.How().page_rows


@pytest.mark.parametrize("name", ["cnn1d", "mlp"])
def test_a_step_is_the_same_under_every_engine_and_close_in_coarser_precisions(name):
    data = some(40)
    whole = step_sum(build(name, SPEC, {}, 0), data)
    size = torch.linalg.vector_norm(whole)
    for engine, precision, bound in (
        ("ghost", "float64", 1e-10),
        ("hooks", "float64", 1e-10),
        ("hooks", "float32", 1e-5),
        ("bookkeeping", "float32", 1e-5),
        ("bookkeeping", "bfloat16", 0.1),
        ("hooks", "bfloat16", 0.1),
    ):
        other = step_sum(build(name, SPEC, {}, 0), data, engine, precision)
        apart = torch.linalg.vector_norm(other - whole) / size
        assert (precision != "float64") == bool(apart > 1e-9)
        assert apart < bound


def test_in_coarse_precisions_weights_are_still_held_in_float64_between_steps():
    def trained(precision):
        model = build("mlp", SPEC, {}, 0)
        before = flat(model)
        small = TrainingSection(steps=50, learning_rate=1e-5)
        agreed = plan(steps=50)
        train.train_private(model, some(8), agreed, small, Silent, train.How("hooks", precision))
        return flat(model) - before

    fine = trained("float64")
    # One such step is far below bfloat16's last place; fifty must not vanish.
    assert torch.linalg.vector_norm(trained("bfloat16") - fine) < 0.1 * torch.linalg.vector_norm(
        fine
    )


def test_a_parameter_that_a_private_step_did_not_move_is_refused_by_name():
    model = build("mlp", SPEC, {}, 0)
    before = [p.detach().clone() for p in model.parameters()]
    released = torch.ones(sum(p.numel() for p in before), dtype=torch.float64)
    with pytest.raises(AccordError, match=r"0\.weight did not move"):
        train.refuse_still(before, model, released)
    train.refuse_still(before, model, 0 * released)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    train.refuse_still(before, model, released)
    with torch.no_grad():
        model[2].bias.copy_(before[3])
    with pytest.raises(AccordError, match=r"2\.bias did not move"):
        train.refuse_still(before, model, released)


class Late(nn.Module):
    """A model that puts a copy in its weight's place at each step, as a late move does."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(WIDTH, 2)
        self.stale = self.one.weight

    def named_parameters(self, *args, **how):
        yield "one.weight", nn.Parameter(self.fixed.clone())
        yield "one.bias", self.one.bias


def test_weights_that_were_replaced_behind_the_optimiser_end_the_round():
    model = Late()
    model.fixed = model.one.weight.detach().double().clone()
    with pytest.raises(AccordError, match=r"one\.weight did not move"):
        train.train_private(model, None, plan(noise_multiplier=1.0), STEP)
