"""zero_init_last: the zero-gamma start of residual networks."""

from __future__ import annotations

import torch
from torch import nn

from .batchnorm import BatchNormAddReLU2d

# the last BatchNorm of blocks that have no zero_init_last method, by the class of the block
_LAST = {
    "BasicBlock": "bn2",
    "Bottleneck": "bn3",
    "ResBottleneckBlock": "f.c.1",  # torchvision's RegNet
    "DlaBasic": "bn2",
    "DlaBottleneck": "bn3",
    "DlaBottle2neck": "bn3",
}


def zero_init_last(model: nn.Module) -> int:
    """Sets the weight (gamma) of the last normalisation of every residual block to zero, so that blocks are shortcuts.

    He et al. 2018, section 3.1. Blocks that have a method zero_init_last (most of timm's) do it themselves; timm's
    pre-activation blocks zero their last convolution. Other blocks are recognised by a BatchNormAddReLU2d,
    or by their class in torchvision and timm: BasicBlock (bn2), Bottleneck (bn3), ResBottleneckBlock, DlaBasic,
    DlaBottleneck. The model may be fused.

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
        if isinstance(module, BatchNormAddReLU2d):
            last, path = module, name
        elif type(module).__name__ in _LAST and _child(module, _LAST[type(module).__name__]) is not None:
            path = _LAST[type(module).__name__]
            last, path = module.get_submodule(path), f"{name}.{path}"
        else:
            continue
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


def _child(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _zeroed_by(block: nn.Module) -> dict[int, torch.Tensor]:
    """The parameters that block.zero_init_last() sets: those that it writes, even if they were zero."""
    before = {id(p): p._version for p in block.parameters()}
    block.zero_init_last()  # type: ignore[operator]
    return {id(p): p for p in block.parameters() if p._version != before[id(p)]}
