"""bn_add_relu_pool's emulated kernels on small inputs, in a process of its own: exits with what is wrong.

run_bn_add_relu_pool.py KIND CSRC OP...     # as emulated.run() starts it
"""

from __future__ import annotations

import itertools

import emulated
import torch
import torch.nn.functional as F
from cases import LAYOUTS, poisoned_memory, relative_error

import fasttricks
from fasttricks.ops.bn_outputs import unpack_mask
from fasttricks.reference import bn_relu as exact

EPS = 1e-5
# odd edges, with a window of one pixel; 8 neighbours of two channels; several turns of a block; single accesses
SHAPES = ((4, 24, 8, 8), (3, 8, 7, 7), (2, 5, 9, 5), (13, 40, 14, 14))


def wrong(library: emulated.Library, schedule: dict, dtype: torch.dtype) -> str:
    ops = torch.ops.fasttricks_emulated
    for shape, layout, ceil_mode in itertools.product(SHAPES, LAYOUTS, (False, True)):
        x, z = (torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(2))
        weight, bias = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
        weight[1::2] = 0
        with fasttricks.backend("cuda"), poisoned_memory(), library.schedule(**schedule):
            y, pooled, mean, var, mask = ops.bn_add_relu_pool_forward(
                x, z, weight, bias, EPS, None, None, None, None, ceil_mode
            )
            applied = ops.bn_add_relu_pool_apply(x, z, weight, bias, mean, var, EPS, ceil_mode)
        wide = x.double()
        statistics = wide.mean((0, 2, 3)), wide.var((0, 2, 3), correction=0)
        want = exact.apply(wide, z.double(), weight.double(), bias.double(), *statistics, EPS, torch.float64)
        pairs = {"mean": (mean, statistics[0]), "var": (var, statistics[1])}
        for of, values in {"forward": (y, pooled, mask), "apply": applied}.items():
            if not torch.equal(unpack_mask(values[2], x), ~(values[0] <= 0)):
                return f"wrong mask of {of} ({shape}, {layout}, {schedule})"
            pairs[f"y of {of}"] = values[0], want
            means = F.avg_pool2d(values[0].double(), 2, ceil_mode=ceil_mode, count_include_pad=False)
            pairs[f"means of {of}"] = values[1], means
        for name, (got, right) in pairs.items():
            error, limit = relative_error(got, right), 1e-3 if got.dtype == torch.float16 else 2e-6
            if not error <= limit:
                return f"wrong {name}: error {error} ({shape}, {layout}, ceil_mode {ceil_mode}, {schedule})"
    return ""


if __name__ == "__main__":
    torch.manual_seed(0)
    emulated.judge_dtypes(wrong)
