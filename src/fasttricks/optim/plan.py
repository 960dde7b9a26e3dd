"""The tensors of a step, collected once and kept until something that they depend on changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.sgd_call import StepCall, is_half
from .check import Batch
from .distributed import PLAIN, local
from .state import master_of, momentum_of


class Options(NamedTuple):
    """The options of a part of a parameter group: of its parameters with the same trust coefficient."""

    group: int
    # of the group's parameters, those of its other parts included
    size: int
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    trust_coefficient: float


# parameters, each with its place among all of the optimizer's
Part = tuple[Options, list[tuple[int, Tensor]]]


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


@dataclass
class _Lists:
    """A Batch that is being collected."""

    places: list[int] = field(default_factory=list)
    owners: list[Tensor] = field(default_factory=list)
    masters: list[Tensor] = field(default_factory=list)
    momentum_buffers: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    options: list[Options] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def batch(self) -> Batch:
        call = StepCall(
            params=[local(p) for p in self.owners],
            momentum_buffers=[local(t) for t in self.momentum_buffers],
            steps=self.steps,
            masters=[local(t) for t in self.masters],
            group_sizes=self.sizes,
            momentum=[o.momentum for o in self.options],
            dampening=[o.dampening for o in self.options],
            weight_decay=[o.weight_decay for o in self.options],
            nesterov=[o.nesterov for o in self.options],
            maximize=[o.maximize for o in self.options],
            trust_coefficient=[o.trust_coefficient for o in self.options],
        )
        return Batch(call, self.owners, self.places, [o.group for o in self.options])


class Plan:
    """The batches of a step, and what they were made from.

    A plan is valid while the parameters, their dtypes and devices, the set of parameters with gradients, the options
    and the state tensors stay the same. Gradients and values may change: every step reads them.
    """

    def __init__(
        self, params: list[Tensor], grads: list[Tensor | None], parts: list[Part], state: dict[Tensor, dict[str, Any]]
    ) -> None:
        self._params = params
        self._dtypes, self._devices = [p.dtype for p in params], [p.device for p in params]
        self._without_grad = [g is None for g in grads]
        self._options = [options for options, _ in parts]
        lists: dict[torch.device, _Lists] = {}
        for options, members in parts:
            for place, p in members:
                if grads[place] is None:
                    continue
                mine = lists.setdefault(p.device, _Lists())
                if not mine.options or mine.options[-1] is not options:
                    mine.options.append(options)
                    mine.sizes.append(0)
                mine.sizes[-1] += 1
                mine.places.append(place)
                mine.owners.append(p)
                if is_half(p):
                    mine.masters.append(master_of(p, state[p]))
                if options.momentum != 0:
                    mine.momentum_buffers.append(momentum_of(p, state[p]))
                    mine.steps.append(state[p]["step"])
        self.batches = [mine.batch() for mine in lists.values()]
        # local parts of DTensors are made for one step
        self._reusable = all(type(p) in PLAIN for p in params)
        self._states = list(state.values())
        tensors = {id(t) for m in lists.values() for t in (*m.masters, *m.momentum_buffers, *m.steps)}
        self._used = [
            (name, states, [s[name] for s in states])
            for name in ("master", "momentum_buffer", "step")
            if (states := [s for s in self._states if isinstance(s, dict) and id(s.get(name)) in tensors])
        ]

    def holds(
        self,
        params: list[Tensor],
        grads: list[Tensor | None],
        options: list[Options],
        state: dict[Tensor, dict[str, Any]],
    ) -> bool:
        """Whether the batches are still valid; checks hundreds of tensors per step in as few calls as possible."""
        return (
            self._reusable
            and _same(params, self._params)
            and [g is None for g in grads] == self._without_grad
            and options == self._options
            and [p.dtype for p in params] == self._dtypes
            and [p.device for p in params] == self._devices
            and _same(list(state.values()), self._states)
            and all(map(self._still_used, self._used))
        )

    @staticmethod
    def _still_used(used: tuple[str, list[dict[str, Any]], list[Tensor]]) -> bool:
        name, states, tensors = used
        try:
            return _same(list(map(itemgetter(name), states)), tensors)
        except KeyError:  # the user removed it
            return False
