"""Equal parameters under FusedSGD and torch.optim.SGD(foreach=False, fused=False)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fasttricks.optim import FusedSGD

HAS_FMA = torch.backends.cpu.get_cpu_capability() != "DEFAULT"


def make_params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Matrices, channels-last filters, a slice, an empty tensor, a scalar, a transposed matrix."""
    last = torch.channels_last
    made = [torch.randn(5, 3), torch.randn(7), torch.randn(4, 3, 3, 3).contiguous(memory_format=last)]
    made += [torch.randn(8, 9)[::2, 1:8], torch.randn(0, 3), torch.randn(()), torch.randn(6, 4).t()]
    return [nn.Parameter(t.to(dtype)) for t in made]


def twins(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def give_grads(*lists: list[nn.Parameter], skip: tuple[int, ...] = ()) -> None:
    for i, same in enumerate(zip(*lists, strict=True)):
        grad = torch.randn(same[0].shape)
        for p in same:
            p.grad = None if i in skip else grad.to(p.dtype)


def same(mine: list[nn.Parameter], theirs: list[nn.Parameter], backend: str = "cpu") -> None:
    for a, b in zip(mine, theirs, strict=True):
        if backend == "cpu" and HAS_FMA:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a.detach(), b.detach(), rtol=3e-7, atol=3e-7)


class Pair:
    """Equal parameters under both optimizers, which receive equal gradients."""

    def __init__(self, make: Callable[[type, list[nn.Parameter]], Any] | None = None, **options: Any) -> None:
        self.mine = make_params()
        self.theirs = twins(self.mine)
        if make is None:
            self.ours = FusedSGD(self.mine, **options)
            self.torch = torch.optim.SGD(self.theirs, foreach=False, **options)
        else:
            self.ours, self.torch = make(FusedSGD, self.mine), make(torch.optim.SGD, self.theirs)

    def step(self, skip: tuple[int, ...] = ()) -> None:
        give_grads(self.mine, self.theirs, skip=skip)
        self.ours.step()
        self.torch.step()

    def check(self, backend: str = "cpu") -> None:
        same(self.mine, self.theirs, backend)
