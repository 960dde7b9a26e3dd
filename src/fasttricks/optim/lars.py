"""FusedLARS: layer-wise adaptive rate scaling for large batches, on the kernels of FusedSGD."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..checks import check_number
from .base import FusedOptimizer
from .plan import Options


class FusedLARS(FusedOptimizer):
    """LARS (You, Gitman, Ginsburg 2017, "Large Batch Training of Convolutional Networks", Algorithm 1).

        trust = trust_coefficient * |w| / (|g| + weight_decay * |w| + eps)      per tensor; 1 where a norm is 0
        v = momentum * v + lr * trust * (g + weight_decay * w);  w -= v

    Parameters of at most one dimension (biases, weights and biases of BatchNorm) are not adapted (trust = 1), as in the
    ResNet-50 runs at batch 8K to 32K, unless their group has adapt_1d=True. Everything else (masters,
    scaling, checkpoints, clipping) is as in FusedSGD. Every step measures the gradients and is skipped if one is not
    finite, even without a loss scaler.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a tensor of one element (read on the device at every step).
        momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        trust_coefficient: eta of the paper, above 0.
        eps: added to the denominator of trust.
        lr_in_momentum: True: the paper's momentum, as above. False: that of torch.optim.SGD, v = momentum * v + trust *
            (g + weight_decay * w), w -= lr * v; the two differ while lr changes.
        adapt_1d: whether parameters of at most one dimension are adapted.
        max_grad_norm, shard_group, unscale_in_step, foreach, differentiable, fused: as in FusedSGD.

    Raises:
        TypeError, ValueError: as FusedSGD; trust_coefficient is not above 0.

    Examples:
        >>> model = nn.Linear(4, 2)
        >>> optimizer = fasttricks.optim.FusedLARS(model.parameters(), lr=3.2, weight_decay=1e-4)
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        trust_coefficient: float = 1e-3,
        eps: float = 0.0,
        lr_in_momentum: bool = True,
        adapt_1d: bool = False,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        shard_group: Any | None = None,
        unscale_in_step: bool = True,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        self._eps = check_number("FusedLARS", "eps", eps, 0.0)
        self._lr_in_momentum = lr_in_momentum
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "trust_coefficient": trust_coefficient,
            "adapt_1d": adapt_1d,
        }
        super().__init__(
            params,
            defaults,
            max_grad_norm=max_grad_norm,
            shard_group=shard_group,
            unscale_in_step=unscale_in_step,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["trust_coefficient"] == 0:
            raise ValueError("trust_coefficient is 0; accepted: a finite number above 0")

    def _group_options(self, index: int, group: dict[str, Any]) -> list[Options]:
        trust = check_number("FusedLARS", "trust_coefficient", group["trust_coefficient"], 0.0)
        return [self._options(index, group, trust), self._options(index, group)]

    def _part_of(self, p: Tensor, group: dict[str, Any]) -> int:
        return 0 if p.ndim > 1 or group["adapt_1d"] else 1

    def _measures(self) -> bool:
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_eps": self._eps, "_lr_in_momentum": self._lr_in_momentum}
