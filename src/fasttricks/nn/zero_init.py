"""zero_init_last: the zero-gamma start of residual networks."""

from __future__ import annotations

from torch import nn

from .batchnorm import BatchNormAddReLU2d

# the last BatchNorm of a residual block by its class: torchvision and timm name it by its place in the block
_LAST = {"BasicBlock": ("bn2",), "Bottleneck": ("bn3",)}


def zero_init_last(model: nn.Module) -> int:
    """Sets the weight (gamma) of the last BatchNorm of every residual block to zero, so that blocks start as shortcuts.

    He et al. 2018, section 3.1. Own blocks are known by BatchNormAddReLU2d; those of torchvision and timm by their
    classes, BasicBlock (bn2) and Bottleneck (bn3).

    Returns:
        How many were set.

    Raises:
        ValueError: the model has no residual block that is known, or a block's last BatchNorm has no weight.
    """
    last: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, BatchNormAddReLU2d):
            last[id(module)] = (name, module)
        for attribute in _LAST.get(type(module).__name__, ()):
            norm = getattr(module, attribute, None)
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                last[id(norm)] = (f"{name}.{attribute}", norm)
    if not last:
        raise ValueError(
            f"zero_init_last: model is a {type(model).__name__} with no residual block that is known; accepted: models "
            "with BatchNormAddReLU2d, or torchvision's or timm's BasicBlock or Bottleneck"
        )
    for name, norm in last.values():
        if norm.weight is None:
            raise ValueError(f"zero_init_last: {name} has no weight (affine=False); accepted: an affine BatchNorm")
    for _, norm in last.values():
        nn.init.zeros_(norm.weight)  # type: ignore[arg-type]
    return len(last)
