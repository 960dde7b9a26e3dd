"""The shortcut of a ResNet-D block that changes resolution, as a module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from . import run
from .holder import Holder, delegated


class AvgPoolConv1x1(Holder):
    """`nn.AvgPool2d(2, 2, ceil_mode=ceil_mode, count_include_pad=False)`, then `nn.Conv2d(C, Cout, 1)`, as one op.

    See `fasttricks.avgpool_conv1x1` for the formula, the layouts and the dtypes. Its child
    `conv` is an nn.Conv2d, so that loops over the convolutions of a model find it. The state_dict is that of the child.

    Args:
        in_channels, out_channels: C and Cout.
        stride: 2, or 1 for the convolution without a pool.
        bias: whether there is a bias (a BatchNorm usually follows, so there is none by default).
        ceil_mode: as in nn.AvgPool2d, for odd H or W: True in timm and GluonCV, False by default.
        device, dtype: of the parameters.

    Shapes: (N, C, H, W) -> (N, Cout, H', W').

    Raises:
        ValueError: channels below 1, or a stride other than 1 and 2.

    Examples:
        >>> shortcut = fasttricks.nn.AvgPoolConv1x1(8, 16, ceil_mode=True)
        >>> shortcut(torch.randn(2, 8, 15, 15)).shape
        torch.Size([2, 16, 8, 8])
        >>> shortcut.load_state_dict(nn.Conv2d(8, 16, 1, bias=False).state_dict())
        <All keys matched successfully>
    """

    _held_name = "conv"
    _plain = (nn.Conv2d,)
    conv: nn.Module

    in_channels = delegated("in_channels", "C")
    out_channels = delegated("out_channels", "Cout")

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
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if value < 1:
                raise ValueError(f"AvgPoolConv1x1: {name} is {value}; accepted: 1 or more")
        if stride not in (1, 2):
            raise ValueError(f"AvgPoolConv1x1: stride is {stride!r}; accepted: 1, 2")
        super().__init__(nn.Conv2d(in_channels, out_channels, 1, bias=bias, device=device, dtype=dtype))
        self.stride = int(stride)
        self.ceil_mode = ceil_mode

    @classmethod
    def from_pool_conv(cls, pool: nn.Module, conv: nn.Module) -> AvgPoolConv1x1:
        """Wraps an existing convolution, whose parameters are shared, and replaces the pool before it.

        Raises:
            TypeError: pool is not an nn.AvgPool2d, or conv is not an nn.Conv2d.
            ValueError: the pool is not 2x2 with stride 2 and no padding, or the convolution is not 1x1 with stride 1
                and one group.
        """
        if type(pool) is not nn.AvgPool2d or type(conv) is not nn.Conv2d:
            raise TypeError(
                f"AvgPoolConv1x1.from_pool_conv: pool is a {type(pool).__name__} and conv a {type(conv).__name__}; "
                "accepted: nn.AvgPool2d and nn.Conv2d"
            )
        if not run.is_2x2_pool(pool) or not run.is_1x1_conv(conv):
            raise ValueError(
                f"AvgPoolConv1x1.from_pool_conv: pool is {pool} and conv is {conv}; accepted: a 2x2 pool with stride 2 "
                "and no padding, and a 1x1 convolution with stride 1 and one group"
            )
        new = cls.__new__(cls)
        Holder.__init__(new, conv)
        new.stride, new.ceil_mode = 2, pool.ceil_mode
        new.training = conv.training
        return new

    def reset_parameters(self) -> None:
        """As nn.Conv2d.reset_parameters."""
        self.held.reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is not torch.Tensor and (node := self._leaf(x)) is not None:
            return node  # type: ignore[return-value]
        return self._compute(x) if len(self._modules) == 1 else self._lent(self._compute, x)

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        conv = self.held
        if not run.wants_plain_modules(x) and run.is_plain_conv1x1(conv):
            if self.stride == 2:
                return run.pool_and_conv1x1(conv, x, self.ceil_mode)
            return run.avgpool_conv1x1(x, conv.weight, conv.bias, stride=1)
        pooled = x if self.stride == 1 else F.avg_pool2d(x, 2, 2, 0, self.ceil_mode, count_include_pad=False)
        return conv(pooled)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, stride={self.stride}"
        if self.ceil_mode:
            text += ", ceil_mode=True"
        return text if self.held.bias is not None else text + ", bias=False"
