"""The initialisation of the weights in He et al. 2018."""

from __future__ import annotations

from torch import nn


def xavier_(model: nn.Module) -> None:
    """Xavier-uniform weights and zero biases of convolutions and linear layers (section 2.1 of the paper).

    Uniform in [-a, a] with a = sqrt(6 / (fan_in + fan_out)), as `torch.nn.init.xavier_uniform_`. BatchNorm keeps its
    gamma and beta.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> fasttricks.models.xavier_(model)
        >>> model[0].bias.any()
        tensor(False)
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
