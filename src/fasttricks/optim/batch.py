"""The arguments of one call of sgd_step, as the optimizers collect them."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Batch:
    """The arguments of one call of sgd_step: all parameters on one device, in the order of their groups."""

    owners: list[Tensor] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    momentum_buffers: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    masters: list[Tensor] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    lr: list[Tensor] = field(default_factory=list)
    momentum: list[float] = field(default_factory=list)
    dampening: list[float] = field(default_factory=list)
    weight_decay: list[float] = field(default_factory=list)
    nesterov: list[bool] = field(default_factory=list)
    maximize: list[bool] = field(default_factory=list)
    trust_coefficient: list[float] = field(default_factory=list)
    found_inf: Tensor | None = None
    grad_sq: Tensor | None = None
    weight_sq: Tensor | None = None
