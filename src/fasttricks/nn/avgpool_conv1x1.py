"""The shortcut of a ResNet-D block that changes resolution, as a module."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..ops.avgpool_conv1x1 import avgpool_conv1x1


class AvgPoolConv1x1(nn.Module):
    """`nn.AvgPool2d(2, 2, ceil_mode=ceil_mode, count_include_pad=False)`, then `nn.Conv2d(C, Cout, 1)`, as one op.

    See `fasttricks.avgpool_conv1x1` for the formula, the layouts and the dtypes. Parameters and their names, their
    initialisation and its use of the random generator are those of `nn.Conv2d`: its state dict loads here.

    Args:
        in_channels, out_channels: C and Cout.
        stride: 2, or 1 for the convolution without a pool.
        bias: whether there is a bias (a BatchNorm usually follows, so there is none by default).
        ceil_mode: what happens with odd H or W; True as in timm and GluonCV, False as AvgPool2d does by default.
        device, dtype: of the parameters.

    Shapes: (N, C, H, W) -> (N, Cout, H', W').

    Raises:
        ValueError: channels below 1, or a stride other than 1 and 2.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 2,
        bias: bool = False,
        ceil_mode: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if value < 1:
                raise ValueError(f"AvgPoolConv1x1: {name} is {value}; accepted: 1 or more")
        if stride not in (1, 2):
            raise ValueError(f"AvgPoolConv1x1: stride is {stride!r}; accepted: 1, 2")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride
        self.ceil_mode = ceil_mode
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 1, 1, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `nn.Conv2d`: weight and bias uniform in +-1 / sqrt(C)."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_channels)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return avgpool_conv1x1(x, self.weight, self.bias, stride=self.stride, ceil_mode=self.ceil_mode)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, stride={self.stride}"
        if self.ceil_mode:
            text += ", ceil_mode=True"
        return text if self.bias is not None else text + ", bias=False"
