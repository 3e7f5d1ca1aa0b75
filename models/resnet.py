"""ResNet-18 as torchvision builds it, with GroupNorm, for images of any size and channels."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torchvision.models import resnet

from fedaccord.models import options
from fedaccord.tasks import TaskSpec

SMALL = 64  # pixels; an image below it keeps its size in the first layer
STAGES = [2, 2, 2, 2]  # blocks of each width, 64 to 512


class _Block(resnet.BasicBlock):  # type: ignore[misc]  # torchvision ships no types
    """Torchvision's block without changes in place, which the hooks of Opacus forbid."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        first = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(first)) + shortcut)


def resnet18(spec: TaskSpec, groups: int = 32, stem: str = "auto") -> nn.Module:
    """Build ResNet-18 (He et al. 2016, table 1): float images to logits (batch, classes).

    GroupNorm stands where the paper has BatchNorm, which mixes records and keeps their statistics.
    No weights come from the net; `model.pretrained` may name a file of the state dict, whose names
    are torchvision's.

    Args:
        spec: the task, for the shape of its images and its classes.
        groups: groups of GroupNorm, a divisor of 64.
        stem: the first layer. "large" is the paper's, which shrinks an image to a quarter each way;
            "small", 3 x 3 pixels with stride 1 and no maximum after it, keeps the size; "auto" is
            "small" for images below 64 pixels in height or width.

    Raises:
        OptionFault: an option outside its bounds, or a task without images.
    """
    depth, height, width = options.image(spec, "resnet18")
    if 64 % options.whole("groups", groups, 1, 64):
        raise options.OptionFault(f"groups = {groups} must divide 64. Change it.")
    options.choice("stem", stem, ("auto", "small", "large"))
    small = stem == "small" or (stem == "auto" and min(height, width) < SMALL)
    norm = partial(nn.GroupNorm, groups)
    model: nn.Module = resnet.ResNet(_Block, STAGES, len(spec.classes), norm_layer=norm)
    if small or depth != 3:
        side, stride = (3, 1) if small else (7, 2)
        first = nn.Conv2d(depth, 64, side, stride, padding=side // 2, bias=False)
        nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")
        model.conv1 = first
    if small:
        model.maxpool = nn.Identity()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model
