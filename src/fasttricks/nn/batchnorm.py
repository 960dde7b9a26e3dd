"""BatchNorm2d with the ReLU, or the residual addition and the ReLU, that follow it, as one module."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn

from ..ops.bn_relu import bn_add_relu, bn_relu


class _FusedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d's parameters, buffers and bookkeeping; the arithmetic is that of the fused op."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        process_group: distributed.ProcessGroup | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.process_group = process_group

    def _fused(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        self._check_input_dim(x)
        tracked = self.num_batches_tracked if self.training and self.track_running_stats else None
        running: tuple[torch.Tensor | None, torch.Tensor | None] = (self.running_mean, self.running_var)
        if self.training and not self.track_running_stats:
            running = (None, None)  # buffers that are not tracked do not move
        batch = self.training or running[0] is None
        given: dict[str, Any] = {
            "training": batch,
            "momentum": 0.0 if tracked is None and self.momentum is None else self.momentum,
            "eps": self.eps,
            "group": self.process_group if self.training else None,
            "num_batches_tracked": tracked,
        }
        if residual is None:
            return bn_relu(x, self.weight, self.bias, *running, **given)
        return bn_add_relu(x, residual, self.weight, self.bias, *running, **given)


class BatchNormReLU2d(_FusedBatchNorm2d):
    """`nn.Sequential(nn.BatchNorm2d(C), nn.ReLU())` as one module, with BatchNorm2d's state_dict keys and modes.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as in torch.nn.BatchNorm2d.
        process_group: takes the batch statistics over its ranks in training (as nn.SyncBatchNorm); None: this process.

    Shapes: (N, C, H, W) -> (N, C, H, W). Errors: those of `fasttricks.bn_relu`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._fused(x, None)


class BatchNormAddReLU2d(_FusedBatchNorm2d):
    """The end of a residual block as one module: relu(BatchNorm2d(x) + residual).

    Args:
        zero_init: start with weight = 0, so that the block starts as its shortcut (He et al. 2018, section 3.1).
        The others: as in BatchNormReLU2d.

    Shapes: x and residual (N, C, H, W) -> (N, C, H, W). Errors: those of `fasttricks.bn_add_relu`.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        zero_init: bool = False,
        process_group: distributed.ProcessGroup | None = None,
    ) -> None:
        if zero_init and not affine:
            raise ValueError("BatchNormAddReLU2d: zero_init is True and affine is False; accepted: affine=True with it")
        self.zero_init = zero_init
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, process_group=process_group
        )

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.zero_init:
            nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self._fused(x, residual)
