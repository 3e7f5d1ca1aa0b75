"""A small CNN for images of any size and number of channels, with GroupNorm."""

from __future__ import annotations

from torch import nn

from fedaccord.models import options
from fedaccord.tasks import TaskSpec

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


def cnn2d(
    spec: TaskSpec,
    channels: int = 16,
    blocks: int = 2,
    kernel: int = 3,
    groups: int = 4,
    hidden: int = 32,
    pool: str = "flatten",
    activation: str = "relu",
) -> nn.Module:
    """Build a small CNN: float (batch, channels, height, width) to logits (batch, classes).

    A block is a convolution, GroupNorm, the activation and a maximum over 2 x 2 pixels; every block
    has twice the feature maps of the one before. An odd size is halved upwards, and an image that
    is one pixel high or wide stays so.

    Args:
        spec: the task, for the shape of its images and its classes.
        channels: feature maps of the first block, a multiple of `groups`.
        blocks: 1 to 6.
        kernel: pixels that a filter spans each way, odd.
        groups: groups of GroupNorm.
        hidden: units of a layer before the last; 0 for none.
        pool: what the last layers read: "flatten", the map as it is, or "mean", the mean of each
            feature map, so that the number of weights does not depend on the image's size.
        activation: "relu", "tanh" (bounded, which clipping likes; Papernot et al. 2021) or "gelu".

    Raises:
        OptionFault: an option outside its bounds, or a task without images.
    """
    depth, height, width = options.image(spec, "cnn2d")
    options.whole("blocks", blocks, 1, 6)
    options.odd("kernel", kernel, 31)
    options.groups("channels", channels, groups)
    options.whole("hidden", hidden, 0)
    act = ACTIVATIONS[options.choice("activation", activation, list(ACTIVATIONS))]
    options.choice("pool", pool, ("flatten", "mean"))
    layers: list[nn.Module] = []
    for block in range(blocks):
        maps = channels * 2**block
        layers += [nn.Conv2d(depth, maps, kernel, padding=kernel // 2), nn.GroupNorm(groups, maps)]
        layers += [act(), nn.MaxPool2d(2, ceil_mode=True)]
        depth, height, width = maps, (height + 1) // 2, (width + 1) // 2
    if pool == "mean":
        layers += [nn.AdaptiveAvgPool2d(1)]
        height = width = 1
    layers += [nn.Flatten()]  # (batch, maps * height * width)
    read = depth * height * width
    if hidden:
        layers += [nn.Linear(read, hidden), act()]
        read = hidden
    return nn.Sequential(*layers, nn.Linear(read, len(spec.classes)))
