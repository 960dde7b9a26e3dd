"""zero_init_last: the zero-gamma start of residual networks."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from .batchnorm import BatchNormAddReLU2d

# the last BatchNorm of blocks that have no zero_init_last method, by the class of the block
_LAST = {
    "BasicBlock": ("bn2", "conv2.bn", "conv2_kxk.bn"),
    "Bottleneck": ("bn3", "conv3.bn"),
    "ResBottleneckBlock": ("f.c.1",),  # torchvision's RegNet
    "DlaBasic": ("bn2",),
    "DlaBottleneck": ("bn3",),
    "DlaBottle2neck": ("bn3",),
    "SEResNetBlock": ("bn2",),
    "SEBottleneck": ("bn3",),
    "SEResNetBottleneck": ("bn3",),
    "SEResNeXtBottleneck": ("bn3",),
    "BottleneckBlock": ("conv3_1x1.bn",),  # this one and the next three: timm's ByobNet
    "SelfAttnBlock": ("conv3_1x1.bn",),
    "DarkBlock": ("conv2_kxk.bn",),
    "EdgeBlock": ("conv2_1x1.bn",),
}


def zero_init_last(model: nn.Module) -> int:
    """Sets the weight (gamma) of the last normalisation of every residual block to zero, so that blocks are shortcuts.

    He et al. 2018, section 3.1. Blocks that have a method zero_init_last (most of timm's) do it themselves; timm's
    pre-activation blocks zero their last convolution. Other blocks are recognised by a BatchNormAddReLU2d,
    or by their class in torchvision and timm: BasicBlock, Bottleneck, the blocks of RegNet, DLA, SENet and ByobNet. The
    model may be fused.

    Returns:
        The number of weights that were set.

    Raises:
        ValueError: the model has no residual block of a known class, or a block's last BatchNorm has no weight.

    Examples:
        >>> model = fasttricks.models.build("resnet18d", num_classes=10, width=8)
        >>> fasttricks.zero_init_last(model)
        8
        >>> model.layer1[0].bn2.weight.any()
        tensor(False)
    """
    weights: dict[int, torch.Tensor] = {}
    for name, module in model.named_modules():
        own = getattr(module, "zero_init_last", None)
        if callable(own):
            weights.update(_zeroed_by(module))
            continue
        last: nn.Module
        if isinstance(module, BatchNormAddReLU2d):
            last, path = module, name
        else:
            found = _last_of(module)
            if found is None:
                continue
            last, path = found[0], f"{name}.{found[1]}"
        if last.weight is None:
            raise ValueError(f"zero_init_last: {path} has no weight (affine=False); accepted: an affine BatchNorm")
        assert isinstance(last.weight, torch.Tensor)
        weights[id(last.weight)] = last.weight
    if not weights:
        raise ValueError(
            f"zero_init_last: model is a {type(model).__name__} with no residual block that is known; accepted: models "
            "with BatchNormAddReLU2d, or torchvision's or timm's residual blocks"
        )
    for weight in weights.values():
        nn.init.zeros_(weight)
    return len(weights)


def _last_of(block: nn.Module) -> tuple[nn.Module, str] | None:
    """The last normalisation of a residual block of a known class, and its path; None of any other module."""
    if getattr(block, "shortcut", block) is None:  # a block of timm's ByobNet without one
        return None
    for path in _LAST.get(type(block).__name__, ()):
        with contextlib.suppress(AttributeError):
            last = block.get_submodule(path)
            if isinstance(last, nn.modules.batchnorm._BatchNorm):
                return last, path
    return None


def _zeroed_by(block: nn.Module) -> dict[int, torch.Tensor]:
    """The parameters that block.zero_init_last() sets: those that it writes, even if they were zero."""
    before = {id(p): p._version for p in block.parameters()}
    block.zero_init_last()  # type: ignore[operator]
    return {id(p): p for p in block.parameters() if p._version != before[id(p)]}
