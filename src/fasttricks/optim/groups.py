"""Parameter groups without decay of biases and norms, and the linear scaling of the learning rate."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..checks import check_number

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []),
)


def param_groups(
    model: nn.Module, weight_decay: float, no_bias_decay: bool = True, *, named: bool = False
) -> list[dict[str, Any]]:
    """All parameters of `model` in groups for an optimizer: decayed weights, then those that are not decayed.

    With no_bias_decay, only the weights of convolutions, linear layers and the like are decayed; biases, the weight and
    bias of normalisation layers, and every other parameter of at most one dimension are not (He et al. 2019, "Bag of
    Tricks for Image Classification with Convolutional Neural Networks", section 3.1). The class of its module
    decides, not its name: a shortcut's BatchNorm named "downsample.1" is not decayed. Every parameter, including shared
    ones, is in exactly one group; empty groups are omitted.

    Args:
        named: adds torch's `param_names` to the groups, so that checkpoints with other groups load by name.

    Raises:
        TypeError: weight_decay is not a number.
        ValueError: weight_decay is negative or not finite, or the model has no parameters.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> groups = fasttricks.optim.param_groups(model, weight_decay=1e-4)
        >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
        [(1, 0.0001), (3, 0.0)]
    """
    check_number("param_groups", "weight_decay", weight_decay, 0.0)
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    seen: set[int] = set()
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            if id(param) in seen:
                continue
            seen.add(id(param))
            plain = param.ndim <= 1 or name.endswith("bias") or isinstance(module, _NORMS)
            (others if no_bias_decay and plain else decayed).append(param)
    if not seen:
        raise ValueError(f"model ({type(model).__name__}) has no parameters")
    # as the model names them: a module may give its child's parameters names of its own
    names = {id(param): name for name, param in model.named_parameters()}
    # the second group says 0 itself: it must not inherit the optimizer's default
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    for group in groups if named else ():
        group["param_names"] = [names[id(param)] for param in group["params"]]
    return [group for group in groups if group["params"]]


def linear_scaled_lr(base_lr: float, batch: int, base_batch: int = 256) -> float:
    """base_lr * batch / base_batch (Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 2.1).

    `batch` is the number of images in one step, over all processes.

    Raises:
        TypeError: base_lr is not a number.
        ValueError: base_lr is negative or not finite, or a batch is below 1.

    Examples:
        >>> fasttricks.optim.linear_scaled_lr(0.1, batch=1024)
        0.4
    """
    check_number("linear_scaled_lr", "base_lr", base_lr, 0.0)
    if batch < 1 or base_batch < 1:
        raise ValueError(f"batch is {batch} and base_batch {base_batch}; accepted: at least 1")
    return base_lr * batch / base_batch
