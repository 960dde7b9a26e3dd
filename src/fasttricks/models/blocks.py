"""Layers and checks shared by the models."""

from __future__ import annotations

from torch import Tensor, nn

from ..nn import BatchNormReLU2d

Pair = int | tuple[int, int]


class ConvBNReLU(nn.Module):
    """Convolution without bias, BatchNorm and ReLU: x (N, in_channels, H, W) -> (N, channels, H', W').

    Padding keeps the size at stride 1; ``padding`` overrides it. The keys of the state_dict are the same for
    ``fused=True`` and ``fused=False``.

    Examples:
        >>> block = fasttricks.models.ConvBNReLU(3, 8, 3, stride=2, fused=True)
        >>> block(torch.randn(2, 3, 6, 6)).shape
        torch.Size([2, 8, 3, 3])
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel: Pair,
        *,
        stride: int = 1,
        padding: Pair | None = None,
        groups: int = 1,
        eps: float = 1e-5,
        fused: bool = True,
    ):
        super().__init__()
        if padding is None:
            padding = kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=padding, groups=groups, bias=False)
        self.bn = BatchNormReLU2d(channels, eps=eps) if fused else nn.BatchNorm2d(channels, eps=eps)
        self.relu = nn.Identity() if fused else nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


def check_sizes(width: int, num_classes: int, in_channels: int) -> None:
    """Raises:
    ValueError: an argument below what the constructors accept.
    """
    if width < 2 or width % 2:
        raise ValueError(f"width must be an even number of channels, at least 2, got {width!r}")
    if num_classes < 1 or in_channels < 1:
        raise ValueError(f"num_classes and in_channels must be at least 1, got {num_classes!r} and {in_channels!r}")
