"""bn_relu and bn_add_relu in Triton: launch plans and registration. bn_relu_kernels.py has the formulas.

Names without an underscore are for bn_add_bn_relu.py, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from ..layout import layout_of
from ..ops.bn_relu_checks import check_apply, check_backward, check_forward, check_update, check_x
from ..reference.bn_relu import accumulate_dtype, values_per_channel
from . import bn_relu_kernels as kernels
from . import launch as launching
from . import tune

# values per tile of the statistics: 32 per thread, four 128-bit loads in flight at 16 bit. Half of that if planes rule
# out wide loads, since every value then needs an address in registers
STATS_TILE = 4096
# per tile of the backward's sums: 8 per thread, one 128-bit load of x and one of dy; many warps hide the latency
BACKWARD_TILE = 2048
# groups of 8 values per program of an elementwise pass: one group per thread
APPLY_GROUPS = 128
APPLY_LOOPS = 4
WARPS = 4
CHANNEL_BLOCK = 128


@dataclass(frozen=True)
class Reduction:
    """Values in a tile of a reduction, and the warps of a program."""

    tile: int
    warps: int


@dataclass(frozen=True)
class Shape:
    """x as (rows, channels, pixels) or, NHWC, (rows, channels): as kernels receive it."""

    rows: int
    channels: int
    inner: int
    nhwc: bool
    numel: int
    dtype: torch.dtype

    @staticmethod
    def of(x: Tensor, layout: torch.memory_format) -> Shape:
        channels = x.shape[1]
        nhwc = layout != torch.contiguous_format
        rows = x.numel() // channels if nhwc else x.shape[0]
        inner = channels if nhwc else x.numel() // (rows * channels)
        return Shape(rows, channels, inner, nhwc, x.numel(), x.dtype)

    @property
    def vec(self) -> int:
        return launching.multiple_of(self.inner)

    @property
    def wide(self) -> bool:
        return self.numel >= launching.WIDE_FROM

    def family(self) -> str:
        """Autotuning cache key for this class of shapes."""
        sizes = tune.bucket(self.rows, self.channels, self.inner)
        return f"{self.dtype} {'NHWC' if self.nhwc else 'NCHW'} {self.vec} {sizes}"

    def elementwise(self, programs: int) -> tuple[tuple[int], dict[str, Any], dict[str, Any]]:
        """Grid, arguments and constants of a flat pass."""
        vec = 8 if self.vec == 8 else 1
        tiles = cdiv(self.numel, 8 * APPLY_GROUPS)
        units = self.inner // vec
        # NHWC: tiles `period` apart share channels, so their parameters are loaded once
        loops = (
            APPLY_LOOPS
            if self.nhwc and vec == 8 and self.dtype.itemsize == 2 and tiles >= APPLY_LOOPS * programs
            else 1
        )
        period = units // math.gcd(units, APPLY_GROUPS) if loops > 1 else 1
        arguments = {"numel": self.numel, "units": units, "channels": self.channels, "period": period}
        constants = {"NHWC": self.nhwc, "VEC": vec, "FULL": self.numel % 8 == 0, "WIDE": self.wide}
        grid = (cdiv(tiles, period * loops) * period,)
        return grid, arguments, {**constants, "GROUPS": APPLY_GROUPS, "LOOPS": loops}

    def reduction(self, programs: int, tile: int) -> tuple[tuple[int, int], dict[str, Any], dict[str, Any]]:
        """Grid (blocks of channels, splits), arguments and constants of a reduction over all but the channels."""
        cols = min(next_power_of_2(self.inner), 64 if self.nhwc else 1024)
        rows = max(1, min(tile // cols, next_power_of_2(self.rows)))
        blocks = cdiv(self.channels, cols) if self.nhwc else self.channels
        tiles = cdiv(self.rows, rows) * (1 if self.nhwc else cdiv(self.inner, cols))
        splits = max(1, min(tiles, programs // blocks))
        per_split = cdiv(tiles, splits)
        splits = cdiv(tiles, per_split)  # none is empty
        arguments = {"rows": self.rows, "units": self.inner // self.vec, "channels": self.channels}
        arguments |= {"tiles": tiles, "per_split": per_split}
        constants = {"NHWC": self.nhwc, "VEC": self.vec, "ROWS": rows, "COLS": cols, "WIDE": self.wide}
        return (blocks, splits), arguments, constants


def dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def in_sums_dtype(t: Tensor, x: Tensor) -> Tensor:
    """Numbers per channel of x, in the dtype of its sums."""
    return t.to(accumulate_dtype(x.dtype)).contiguous()


def like_x(t: Tensor, layout: torch.memory_format) -> Tensor:
    return t.contiguous(memory_format=layout)


def empty_like_x(x: Tensor, layout: torch.memory_format) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)


def per_channel(x: Tensor) -> Tensor:
    return torch.empty(x.shape[1], dtype=accumulate_dtype(x.dtype), device=x.device)


def blocks_of(channels: int) -> tuple[int]:
    return (cdiv(channels, CHANNEL_BLOCK),)


def laid_out(x: Tensor) -> tuple[Tensor, torch.memory_format]:
    """x, dense in the layout that its results have, and that layout."""
    layout = layout_of(x)
    return like_x(x, layout), layout


def bn_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel; zeros of an empty x."""
    check_x("bn_stats", x)
    return statistics(*laid_out(x))


def statistics(x: Tensor, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    mean, var = per_channel(x), per_channel(x)
    if x.numel() == 0:
        return mean.zero_(), var.zero_()
    shape = Shape.of(x, layout)

    def run(choice: Reduction) -> Tensor:
        grid, arguments, constants = shape.reduction(launching.programs(x.device), choice.tile)
        partial = torch.empty(3, grid[1], x.shape[1], dtype=mean.dtype, device=x.device)
        outputs = {"mean": partial[0], "m2": partial[1], "counts": partial[2]}
        launching.launch(kernels.bn_stats_kernel, grid, {"x": x, **outputs, **arguments}, constants, choice.warps)
        return partial

    tile = STATS_TILE if shape.vec > 1 else STATS_TILE // 2
    choices = Reduction(tile, WARPS), Reduction(tile // 2, WARPS)
    partial = run(tune.fastest("bn_stats", shape.family, x.device, choices, run))
    merged = {"means": partial[0], "m2s": partial[1], "counts": partial[2], "mean": mean, "var": var}
    sizes = {"channels": x.shape[1], "splits": partial.shape[1]}
    constants = {"BLOCK": CHANNEL_BLOCK}
    launching.launch(kernels.bn_merge_kernel, blocks_of(x.shape[1]), {**merged, **sizes}, constants, WARPS)
    return mean, var


def apply_tensors(
    x: Tensor, layout: torch.memory_format, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    mean: Tensor, var: Tensor,
) -> dict[str, Tensor | None]:  # fmt: skip
    """What a kernel that writes y reads, by the names of its arguments."""
    return {
        "x": x,
        "residual": None if residual is None else like_x(residual, layout),
        "weight": dense(weight),
        "bias": dense(bias),
        "mean": in_sums_dtype(mean, x),
        "var": in_sums_dtype(var, x),
    }


def apply(
    x: Tensor, layout: torch.memory_format, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    mean: Tensor, var: Tensor, eps: float, skip: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    y = empty_like_x(x, layout)
    mask = None if residual is None else torch.empty(cdiv(x.numel(), 8), dtype=torch.uint8, device=x.device)
    if x.numel() == 0:
        return y, mask
    grid, arguments, constants = Shape.of(x, layout).elementwise(launching.programs(x.device))
    tensors = {**apply_tensors(x, layout, residual, weight, bias, mean, var), "y": y, "mask": mask}
    constants = {**constants, "EPS": eps, "SKIP": skip and weight is not None}
    launching.launch(kernels.bn_apply_kernel, grid, {**tensors, **arguments}, constants, WARPS)
    return y, mask


def bn_relu_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, running_mean: Tensor | None = None,
    running_var: Tensor | None = None, num_batches_tracked: Tensor | None = None, momentum: float | None = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y and the batch statistics; updates the running statistics."""
    moved = running_mean, running_var, num_batches_tracked, momentum
    check_forward("bn_relu_forward", x, None, weight, bias, eps, *moved)
    x, layout = laid_out(x)
    mean, var = statistics(x, layout)
    y, _ = apply(x, layout, None, weight, bias, mean, var, eps, skip=True)
    update_running(running_mean, running_var, mean, var, values_per_channel(x), num_batches_tracked, momentum)
    return y, mean, var


def bn_add_relu_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    running_mean: Tensor | None = None, running_var: Tensor | None = None, num_batches_tracked: Tensor | None = None,
    momentum: float | None = 0.1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the batch statistics and the bit mask of the ReLU; updates the running statistics."""
    moved = running_mean, running_var, num_batches_tracked, momentum
    check_forward("bn_add_relu_forward", x, residual, weight, bias, eps, *moved)
    x, layout = laid_out(x)
    mean, var = statistics(x, layout)
    y, mask = apply(x, layout, residual, weight, bias, mean, var, eps, skip=True)
    assert mask is not None
    update_running(running_mean, running_var, mean, var, values_per_channel(x), num_batches_tracked, momentum)
    return y, mean, var, mask


def bn_relu_apply(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """y from given statistics; x is always read, since it may hold Inf or NaN that the statistics do not show."""
    check_apply("bn_relu_apply", x, None, weight, bias, mean, var, eps)
    return apply(*laid_out(x), None, weight, bias, mean, var, eps, skip=False)[0]


def bn_add_relu_apply(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """y and the bit mask from given statistics."""
    check_apply("bn_add_relu_apply", x, residual, weight, bias, mean, var, eps)
    y, mask = apply(*laid_out(x), residual, weight, bias, mean, var, eps, skip=False)
    assert mask is not None
    return y, mask


def _inputs(
    dy: Tensor, x: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor
) -> dict[str, Any]:
    layout = layout_of(x)
    return {
        "dy": like_x(dy, layout),
        "x": like_x(x, layout),
        "mask": None if mask is None else mask.contiguous(),
        "weight": dense(weight),
        "bias": dense(bias),
        "mean": in_sums_dtype(mean, x),
        "var": in_sums_dtype(var, x),
    }


def second_gradient(
    dy2: Tensor | None, x: Tensor, layout: torch.memory_format
) -> tuple[dict[str, Any], dict[str, int]]:
    """Arguments and constants of a reduction that adds dy2 to dy, and then writes dz."""
    sizes = dict.fromkeys(("height", "width_units", "pooled_height", "pooled_width"), 0)
    if dy2 is None or dy2.numel() == 0:  # there may be no means of a single row or column
        return {"dy2": None, "dz": None, **sizes}, {"SPREAD": 0}
    spread = 0
    if dy2.shape != x.shape:
        height, width = x.shape[2:]
        spread = launching.multiple_of(width) if layout == torch.contiguous_format else 1
        sizes = {"height": height, "width_units": width // spread}
        sizes |= {"pooled_height": dy2.shape[2], "pooled_width": dy2.shape[3]}
    return {"dy2": like_x(dy2, layout), "dz": empty_like_x(x, layout), **sizes}, {"SPREAD": spread}


def bn_relu_backward_reduce(
    dy: Tensor, x: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor,
    var: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dweight and dbias, in the type of the statistics."""
    check_backward("bn_relu_backward_reduce", dy, x, mask, weight, bias, mean, var, eps)
    dweight, dbias, _ = _reduce(_inputs(dy, x, mask, weight, bias, mean, var), None, layout_of(x), eps)
    return dweight, dbias


def _reduce(
    inputs: dict[str, Any], dy2: Tensor | None, layout: torch.memory_format, eps: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dweight and dbias; dz, if there is a second gradient."""
    x = inputs["x"]
    second, constants = second_gradient(dy2, x, layout)
    sums = {"dweight": per_channel(x), "dbias": per_channel(x)}
    reduce_backward(kernels.bn_backward_reduce_kernel, {**inputs, **second}, {**constants, "EPS": eps}, layout, sums)
    return sums["dweight"], sums["dbias"], second["dz"]


def reduce_backward(
    kernel: Any, inputs: dict[str, Any], constants: dict[str, Any], layout: torch.memory_format,
    sums: dict[str, Tensor],
) -> None:  # fmt: skip
    """Runs a reduction of the backward pass over x; sums: its results per channel, in the order of bn_sum_kernel."""
    x = inputs["x"]
    if x.numel() == 0:
        for result in sums.values():
            result.zero_()
        return
    shape = Shape.of(x, layout)

    def run(choice: Reduction) -> Tensor:
        grid, arguments, tiles = shape.reduction(launching.programs(x.device), choice.tile)
        parts = torch.empty(len(sums), grid[1], x.shape[1], dtype=inputs["mean"].dtype, device=x.device)
        arguments = {**inputs, **dict(zip(sums, parts, strict=True)), **arguments}
        launching.launch(kernel, grid, arguments, {**tiles, **constants}, choice.warps)
        return parts

    choices = [Reduction(BACKWARD_TILE, 2 * WARPS)]
    # every value needs an address in registers if planes rule out wide loads; with dy2 ptxas spills for sm_100
    if shape.vec > 1 and inputs["dy2"] is None:
        choices.append(Reduction(BACKWARD_TILE // 2, WARPS))
    parts = run(tune.fastest(kernel.__name__, shape.family, x.device, choices, run))
    arguments = {"parts": parts, **dict.fromkeys(("dweight", "dbias", "dresidual_weight")), **sums}
    arguments |= {"channels": x.shape[1], "splits": parts.shape[1]}
    launching.launch(kernels.bn_sum_kernel, blocks_of(x.shape[1]), arguments, {"BLOCK": CHANNEL_BLOCK}, WARPS)


def _backward_apply(
    inputs: dict[str, Any], layout: torch.memory_format, eps: float, dweight: Tensor, dbias: Tensor, count: int,
    batch: bool, need_dresidual: bool, dz: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx and dresidual; dz: what a reduction wrote, which is dresidual."""
    x = inputs["x"]
    dx = empty_like_x(x, layout)
    dresidual = x.new_empty(0)
    if need_dresidual:
        dresidual = empty_like_x(x, layout) if dz is None else dz
    if x.numel() == 0:
        return dx, dresidual
    grid, arguments, constants = Shape.of(x, layout).elementwise(launching.programs(x.device))
    sums = {"dweight": in_sums_dtype(dweight, x), "dbias": in_sums_dtype(dbias, x)}
    outputs = {"dx": dx, "dresidual": dresidual if need_dresidual and dz is None else None}
    if dz is not None:
        inputs = {**inputs, "dy": dz, "mask": None}
    constants = {**constants, "EPS": eps, "BATCH": batch, "DZ": dz is not None}
    arguments["count"] = count
    launching.launch(
        kernels.bn_backward_apply_kernel, grid, {**inputs, **sums, **outputs, **arguments}, constants, WARPS
    )
    return dx, dresidual


def bn_relu_backward(
    dy: Tensor, x: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor,
    var: Tensor, eps: float, training: bool, need_dresidual: bool, dy2: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dresidual (empty unless asked for), dweight and dbias; dy2: a second gradient of y, or of its 2x2 means."""
    check_backward("bn_relu_backward", dy, x, mask, weight, bias, mean, var, eps, need_dresidual, dy2)
    layout = layout_of(x)
    inputs = _inputs(dy, x, mask, weight, bias, mean, var)
    dweight, dbias, dz = _reduce(inputs, dy2, layout, eps)
    count = x.numel() // max(x.shape[1], 1)
    dx, dresidual = _backward_apply(inputs, layout, eps, dweight, dbias, count, training, need_dresidual, dz)
    return dx, dresidual, dweight, dbias


def bn_relu_backward_apply(
    dy: Tensor, x: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor,
    var: Tensor, eps: float, mean_dweight: Tensor, mean_dbias: Tensor, need_dresidual: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx and dresidual from sums divided by the number of values per channel, over all replicas."""
    sums = {"mean_dweight": mean_dweight, "mean_dbias": mean_dbias}
    check_backward("bn_relu_backward_apply", dy, x, mask, weight, bias, mean, var, eps, need_dresidual, **sums)
    inputs = _inputs(dy, x, mask, weight, bias, mean, var)
    return _backward_apply(inputs, layout_of(x), eps, mean_dweight, mean_dbias, 1, True, need_dresidual)


def bn_update_stats_(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: Tensor,
    num_batches_tracked: Tensor | None = None, momentum: float | None = 0.1,
) -> None:  # fmt: skip
    """Updates the running statistics by those of `count` values per channel; count is a number on the device."""
    check_update(running_mean, running_var, mean, var, count, num_batches_tracked, momentum)
    mean, var = (t.to(accumulate_dtype(t.dtype)).contiguous() for t in (mean, var))
    update_running(running_mean, running_var, mean, var, count, num_batches_tracked, momentum)


def update_running(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, var: Tensor, count: int | Tensor,
    batches: Tensor | None, momentum: float | None,
) -> None:  # fmt: skip
    """running = (1 - momentum) * running + momentum * batch (unbiased variance); an empty batch changes nothing."""
    on_device = isinstance(count, Tensor)
    channels = mean.numel() if running_mean is not None and (on_device or count > 0) else 0
    if channels == 0 and batches is None:
        return

    def double(name: str, value: float) -> dict[str, float]:
        whole = float(torch.tensor(value, dtype=torch.float32, device="cpu"))
        return {name: whole, f"{name}_rest": value - whole}

    tensors = {
        "running_mean": running_mean if channels else None,
        "running_var": running_var if channels else None,
        "mean": mean,
        "var": var,
        "count": count if on_device else None,
        "batches": batches,
    }
    strides = {
        "mean_stride": 1 if running_mean is None else running_mean.stride(0),
        "var_stride": 1 if running_var is None else running_var.stride(0),
    }
    bessel = 1.0 if isinstance(count, Tensor) else count / max(count - 1, 1)
    numbers = {**double("move", 0.0 if momentum is None else momentum), **double("bessel", bessel)}
    constants = {"CUMULATIVE": momentum is None, "BLOCK": CHANNEL_BLOCK}
    launching.launch(
        kernels.bn_update_stats_kernel, (1,), {**tensors, "channels": channels, **strides, **numbers}, constants, WARPS
    )


_MOVED = ("running_mean", "running_var", "num_batches_tracked")
_OPS: tuple[tuple[Callable[..., Any], tuple[str, ...]], ...] = (
    (bn_stats, ()),
    (bn_relu_forward, _MOVED),
    (bn_add_relu_forward, _MOVED),
    (bn_relu_apply, ()),
    (bn_add_relu_apply, ()),
    (bn_relu_backward, ()),
    (bn_relu_backward_reduce, ()),
    (bn_relu_backward_apply, ()),
    (bn_update_stats_, _MOVED),
)
for implementation, mutates in _OPS:
    launching.define(implementation, mutates)
