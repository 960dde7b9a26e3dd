"""bn_add_bn_relu's emulated kernels on small inputs, in a process of its own: exits with what is wrong.

run_bn_add_bn_relu.py KIND CSRC OP...     # as emulated.run() starts it
"""

from __future__ import annotations

import itertools

import emulated
import torch
from cases import BN_SECONDS, LAYOUTS, bn_add_gradients, bn_second_shape, poisoned_memory, relative_error

import fasttricks
from fasttricks.ops.bn_relu import unpack_mask
from fasttricks.reference import bn_add_bn_relu as exact

EPS, RESIDUAL_EPS = 1e-5, 1e-2
# one block and several, of columns and of rows; 16-byte and single accesses; odd edges
SHAPES = ((4, 24, 8, 8), (3, 7, 9, 5), (40, 16, 4, 4))
# of which a part stays on the chip: unequal shares, several tiles per block (NCHW), threads without columns (NHWC)
LARGER = ((17, 72, 8, 8),)


def wrong(
    library: emulated.Library, schedule: dict, dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...] = SHAPES
) -> str:
    ops = torch.ops.fasttricks_emulated
    for shape, layout, second in itertools.product(shapes, LAYOUTS, (None, *BN_SECONDS)):
        x, z, dy = (torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(3))
        dy2 = None if second is None else torch.randn(bn_second_shape(shape, second)).to(dtype)
        weight, bias, residual_weight, residual_bias = (torch.rand(shape[1]) + 0.5 for _ in range(4))
        affine = weight, bias, residual_weight, residual_bias
        with fasttricks.backend("cuda"), poisoned_memory(), library.schedule(**schedule):
            y, *statistics, mask = ops.bn_add_bn_relu_forward(x, z, *affine, EPS, RESIDUAL_EPS)
            given = mask, weight, residual_weight, *statistics, EPS, RESIDUAL_EPS
            gradients = ops.bn_add_bn_relu_backward(dy, x, z, *given, True, dy2)
            applied, _ = ops.bn_add_bn_relu_apply(x, z, *affine, *statistics, EPS, RESIDUAL_EPS)
        if not torch.equal(unpack_mask(mask, x), ~(y <= 0)):
            return f"wrong mask ({shape}, {layout}, {schedule})"
        wide = [t.double() for t in (x, z, *affine)]
        truths = [
            f(t) for t in wide[:2] for f in (lambda t: t.mean((0, 2, 3)), lambda t: t.var((0, 2, 3), correction=0))
        ]
        want = exact.apply(*wide, *truths, EPS, RESIDUAL_EPS, torch.float64)
        both = (dy if dy2 is None else bn_add_gradients(dy, dy2)).double()
        wide_weights = wide[2], wide[4]
        wanted = exact.backward(both, *wide[:2], *wide_weights, *truths, EPS, RESIDUAL_EPS, True, ~(y <= 0))
        names = ("dx", "dresidual", "dweight", "dresidual_weight", "dbias")
        pairs = {"y": (y, want), "apply": (applied, want)}
        pairs |= {f"statistic {i}": pair for i, pair in enumerate(zip(statistics, truths, strict=True))}
        pairs |= dict(zip(names, zip(gradients, wanted, strict=True), strict=True))
        for name, (got, right) in pairs.items():
            error, limit = relative_error(got, right), 4e-3 if got.dtype == torch.float16 else 2e-5
            if not error <= limit:
                return f"wrong {name}: error {error} ({shape}, {layout}, second gradient {second}, {schedule})"
    return ""


def judged(library: emulated.Library, kind: str, schedule: dict) -> str:
    for dtype in emulated.dtypes_of(kind):
        for shared in (228 << 10, 0):  # one launch; several
            with library.shared_per_sm(shared):
                if said := wrong(library, schedule, dtype):
                    return f"{said}, {shared} bytes of shared memory"
        # room for a row of a thread in each of two blocks
        with library.shared_per_sm(2 * ((17 << 10) + 3 * 256 * 8 * dtype.itemsize)):
            if said := wrong(library, schedule, dtype, LARGER):
                return f"{said}, a part on the chip"
    return ""


if __name__ == "__main__":
    torch.manual_seed(0)
    emulated.judge(judged)
