"""bn_relu's emulated kernels on small inputs, in a process of its own: exits with what is wrong.

run_bn_relu.py KIND CSRC OP...     # as emulated.run() starts it
"""

from __future__ import annotations

import itertools

import emulated
import torch
from cases import LAYOUTS, bn_add_gradients, bn_second_shape, poisoned_memory, relative_error

import fasttricks
from fasttricks.ops.bn_relu import unpack_mask
from fasttricks.reference.bn_relu import backward as exact_backward

EPS = 1e-5
# one block and several, of columns and of rows; 16-byte and single accesses; channels of one pixel
SHAPES = ((4, 24, 8, 8), (3, 7, 9, 5), (37, 33, 1, 1), (40, 16, 4, 4))
# of which a part stays on the chip: unequal shares, several tiles per block (NCHW), threads without columns (NHWC)
LARGER = ((17, 72, 8, 8),)


def wrong(
    library: emulated.Library, schedule: dict, dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...] = SHAPES
) -> str:
    ops = torch.ops.fasttricks_emulated
    for shape, layout, residual in itertools.product(shapes, LAYOUTS, (False, True)):
        x, z, dy = (torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(3))
        weight, bias = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
        with fasttricks.backend("cuda"), poisoned_memory(), library.schedule(**schedule):
            if residual:
                y, mean, var, mask = ops.bn_add_relu_forward(x, z, weight, bias, EPS)
            else:
                y, mean, var = ops.bn_relu_forward(x, weight, bias, EPS)
                mask = None
            backward = ops.bn_relu_backward(dy, x, mask, weight, bias, mean, var, EPS, True, residual)
            # dz is dresidual; dz is workspace
            dy2, pooled = (
                torch.randn(bn_second_shape(shape, of)).to(dtype).contiguous(memory_format=layout)
                for of in ("full", "ceil")
            )
            two = ops.bn_relu_backward(dy, x, mask, weight, bias, mean, var, EPS, True, residual, dy2)
            of_pooled = ops.bn_relu_backward(dy, x, mask, weight, bias, mean, var, EPS, True, False, pooled)
            sums = ops.bn_relu_backward_reduce(dy, x, mask, weight, bias, mean, var, EPS)
            applied = ops.bn_relu_apply(x, weight, bias, mean, var, EPS)
        if mask is not None and not torch.equal(unpack_mask(mask, x), ~(y <= 0)):
            return f"wrong mask ({shape}, {layout}, {schedule})"
        wide = [t.double() for t in (x, weight, bias)]
        true_mean = wide[0].mean((0, 2, 3))
        true_var = wide[0].var((0, 2, 3), unbiased=False)
        at = (None, slice(None), None, None)
        normal = (wide[0] - true_mean[at]) / (true_var[at] + EPS).sqrt() * wide[1][at] + wide[2][at]
        exact = (normal + z.double() if residual else normal).relu()
        passing = ~(y <= 0)

        def exact_gradients(
            g: torch.Tensor,
            given: tuple = (wide[0], None, wide[1], wide[2], true_mean, true_var, EPS, True, passing),
        ) -> tuple[torch.Tensor, ...]:
            return exact_backward(g.double(), *given)

        dx, dresidual, dweight, dbias = exact_gradients(dy)
        pairs = {"y": (y, exact), "mean": (mean, true_mean), "var": (var, true_var), "dx": (backward[0], dx)}
        pairs |= {"dweight": (backward[2], dweight), "dbias": (backward[3], dbias), "sums": (sums[0], dweight)}
        pairs |= {"dresidual": (backward[1], dresidual)} if residual else {"apply": (applied, normal.relu())}
        for name, results, g in (("two", two, dy2), ("pooled", of_pooled, pooled)):
            expected = exact_gradients(bn_add_gradients(dy, g))
            pairs |= {f"{name}: result {i}": (results[i], expected[i]) for i in (0, 2, 3)}
            if results[1].numel():
                pairs[f"{name}: dresidual"] = (results[1], expected[1])
        for name, (got, want) in pairs.items():
            error, limit = relative_error(got, want), 4e-3 if got.dtype == torch.float16 else 2e-5
            if not error <= limit:
                return f"wrong {name}: error {error} ({shape}, {layout}, {schedule})"
    return ""


def judged(library: emulated.Library, kind: str, schedule: dict) -> str:
    for dtype, shared in itertools.product(emulated.dtypes_of(kind), (228 << 10, 0)):
        with library.shared_per_sm(shared):  # one launch; several
            if said := wrong(library, schedule, dtype):
                return f"{said}, {shared} bytes of shared memory"
    for dtype in emulated.dtypes_of(kind):
        # room for a row of x and dz in each of two blocks, or for two rows of x
        shared = 2 * ((17 << 10) + 2 * 256 * 8 * dtype.itemsize)
        with library.shared_per_sm(shared):
            if said := wrong(library, schedule, dtype, LARGER):
                return f"{said}, a part on the chip"
    return ""


if __name__ == "__main__":
    torch.manual_seed(0)
    emulated.judge(judged)
