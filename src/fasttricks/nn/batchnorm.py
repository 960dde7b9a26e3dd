"""BatchNorm2d followed by ReLU, or by residual addition and ReLU, as one module."""

from __future__ import annotations

import functools
import sys
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import distributed, nn

from . import run
from .holder import Holder, delegated

Self = TypeVar("Self", bound="_FusedBatchNorm2d")


class _FusedBatchNorm2d(Holder):
    """Holds an nn.BatchNorm2d as `norm` (an nn.SyncBatchNorm, if given a process group) and fuses what follows it."""

    _held_name = "norm"
    _plain = (nn.BatchNorm2d, nn.SyncBatchNorm)
    norm: nn.Module

    num_features = delegated("num_features", "C")
    eps = delegated("eps", "added to the variance")
    momentum = delegated("momentum", "of the running statistics; None: the cumulative average")
    affine = delegated("affine", "whether there are weight and bias")
    track_running_stats = delegated("track_running_stats", "whether the running statistics move")

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
        _refuse_norm_layer(type(self))
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        kind = nn.BatchNorm2d
        if process_group is not None:
            kind = functools.partial(nn.SyncBatchNorm, process_group=process_group)  # type: ignore[assignment]
        super().__init__(kind(num_features, eps, momentum, affine, track_running_stats, **options))

    @classmethod
    def from_bn(cls: type[Self], bn: nn.Module) -> Self:
        """Wraps an existing BatchNorm: the module shares bn's parameters, buffers, options and mode.

        To edit a block by hand: `block.bn1 = BatchNormReLU2d.from_bn(block.bn1)`, then remove the ReLU after it.

        Raises:
            TypeError: bn is neither an nn.BatchNorm2d nor an nn.SyncBatchNorm.
        """
        if not isinstance(bn, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            raise TypeError(
                f"{cls.__name__}.from_bn: bn is a {type(bn).__name__}; accepted: nn.BatchNorm2d, nn.SyncBatchNorm"
            )
        new = cls.__new__(cls)
        Holder.__init__(new, bn)
        new.training = bn.training
        return new

    @property
    def process_group(self) -> distributed.ProcessGroup | None:
        """The group whose ranks share batch statistics in training; None: this process, or the default group."""
        return getattr(self.norm, "process_group", None)

    def reset_running_stats(self) -> None:
        """As of nn.BatchNorm2d."""
        self.held.reset_running_stats()

    def reset_parameters(self) -> None:
        """As of nn.BatchNorm2d."""
        self.held.reset_parameters()

    def _fuses(self, x: torch.Tensor) -> bool:
        return not run.wants_plain_modules(x) and run.is_plain_norm(self.held)


class BatchNormReLU2d(_FusedBatchNorm2d):
    """`nn.Sequential(nn.BatchNorm2d(C), nn.ReLU())` as one module, with BatchNorm2d's state_dict keys and modes.

    It holds an nn.BatchNorm2d as its child `norm`. Tools that convert, freeze or replace BatchNorms act on that child;
    the ReLU stays. If the child has hooks or is no longer a BatchNorm, the module calls it and then applies a ReLU.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as in torch.nn.BatchNorm2d.
        process_group: in training, batch statistics are computed over the ranks of this group, and the child is an
            nn.SyncBatchNorm. None: over this process alone. `nn.SyncBatchNorm.convert_sync_batchnorm` works too.

    Shapes: (N, C, H, W) -> (N, C, H, W). Errors: those of `fasttricks.bn_relu`, and a TypeError if a model of
    torchvision or timm is given this class as its `norm_layer`: such models apply a ReLU or an addition after it.

    Examples:
        >>> bn = fasttricks.nn.BatchNormReLU2d(8)
        >>> bn(torch.randn(2, 8, 5, 5)).min() >= 0
        tensor(True)
        >>> bn.load_state_dict(nn.BatchNorm2d(8).state_dict())
        <All keys matched successfully>
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is not torch.Tensor and (node := self._leaf(x)) is not None:
            return node  # type: ignore[return-value]
        return self._compute(x) if len(self._modules) == 1 else self._lent(self._compute, x)

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        return run.norm_relu(self.held, x) if self._fuses(x) else F.relu(self.held(x))


class BatchNormAddReLU2d(_FusedBatchNorm2d):
    """The end of a residual block as one module: relu(BatchNorm2d(x) + residual).

    Args:
        zero_init: start with weight = 0, so that the block starts as its shortcut (He et al. 2018, section 3.1).
        The others: as in BatchNormReLU2d.

    forward: x and residual (N, C, H, W) -> (N, C, H, W). With a third argument, an nn.BatchNorm2d that is the last
    module of the shortcut, residual is its input: relu(BatchNorm2d(x) + shortcut_norm(residual)) is one op then, too.
    Errors: those of `fasttricks.bn_add_relu` and `fasttricks.bn_add_bn_relu`.

    Attributes:
        ceil_mode_of_reader: that of an `AvgPoolConv1x1` in the block that reads the output. The output then carries its
            2x2 means for it, where that is faster (`fasttricks.backends.MEANS_HANDED_ON`). None, the default: no such
            block. No result depends on it but for rounding.

    Examples:
        >>> bn = fasttricks.nn.BatchNormAddReLU2d(8, zero_init=True)
        >>> x, shortcut = torch.randn(2, 2, 8, 5, 5)
        >>> torch.equal(bn(x, shortcut), shortcut.relu())
        True
    """

    zero_init = False
    ceil_mode_of_reader: bool | None = None

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
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, process_group=process_group
        )
        self.zero_init = zero_init
        if zero_init:
            nn.init.zeros_(self.held.weight)

    def reset_parameters(self) -> None:
        """As of nn.BatchNorm2d; weight = 0 with zero_init."""
        super().reset_parameters()
        if self.zero_init:
            nn.init.zeros_(self.held.weight)

    def forward(self, x: torch.Tensor, residual: torch.Tensor, shortcut_norm: nn.Module | None = None) -> torch.Tensor:
        if not (type(x) is type(residual) is torch.Tensor):
            if shortcut_norm is not None:
                residual, shortcut_norm = shortcut_norm(residual), None
            if (node := self._leaf(x, residual)) is not None:
                return node  # type: ignore[return-value]
        if len(self._modules) == 1:
            return self._compute(x, residual, shortcut_norm)
        return self._lent(self._compute, x, residual, shortcut_norm)

    def _compute(self, x: torch.Tensor, residual: torch.Tensor, shortcut_norm: nn.Module | None) -> torch.Tensor:
        fuses = self._fuses(x)
        if shortcut_norm is not None:
            if fuses and run.is_plain_norm(shortcut_norm):
                return run.norm_add_norm_relu(self.held, x, shortcut_norm, residual)
            residual = shortcut_norm(residual)
        if not fuses:
            return F.relu(self.held(x) + residual)
        return run.norm_add_relu(self.held, x, residual, ceil_mode_of_reader=self.ceil_mode_of_reader)


def _refuse_norm_layer(cls: type) -> None:
    """Raises if a model of torchvision or timm is being built with cls, or a function that makes it, as norm_layer."""
    frame = sys._getframe(2)
    functions = set()  # whose calls led here from a frame
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(("torchvision.models.", "timm.models.")):
            for name, layer in frame.f_locals.items():
                made_by = cls in (layer, getattr(layer, "func", None)) or getattr(layer, "__code__", None) in functions
                if name.startswith("norm") and made_by:
                    raise TypeError(
                        f"{name}={getattr(layer, '__name__', cls.__name__)}: {module} uses {name} also where no ReLU "
                        f"follows, so that {cls.__name__} would make it another network; accepted: its default "
                        f"{name}, then fasttricks.fuse(model)"
                    )
        functions.add(frame.f_code)
        frame = frame.f_back  # type: ignore[assignment]
