"""Bytes moved and launches of the CUDA and Triton kernels, without a GPU, against the formulas: make bench-traffic.

The CUDA kernels run in the emulator, the Triton kernels in Triton's interpreter (in a process of its own); both count
every load and store (tests/emulator, tests/triton_meter.py). Writes results/traffic.json. The formulas, where N is the
bytes of an activation, E its elements, and reads is how often x (backward: x and dz; two BatchNorms: the residual, too)
is read: 2, less the share of it that the plan keeps in shared memory (one cooperative launch, CUDA only):

    bn_relu      forward (reads + 1) N,  backward (2 reads + 1) N, with a second gradient (3 reads + 1) N;
                 evaluation 2 N
    bn_add_relu  forward (reads + 2) N + E/8,  backward (2 reads + 2) N + reads E/8;  all gammas zero: forward 3 N + E/8
                 backward with a second gradient (2 reads + 3) N + E/8; if that is of 2x2 means, at least 3/4 N less:
                 both rows of pixels of a window read it
    bn_add_relu with pool=True  forward 4.25 N + E/8,  evaluation 3.25 N + E/8;  all gammas zero: forward 3.25 N + E/8.
                 Triton in NCHW: if 8 divides the width, else at least that, since another launch reads y
    bn_add_bn_relu  forward (2 reads + 1) N + E/8,  backward (3 reads + 2) N + reads E/8, with a second gradient
                 (4 reads + 2) N + E/8;  all gammas of x zero: forward (reads + 2) N + E/8
    sgd          step 22 per value (gradient 2, fp16 parameter 2 + 2, master 4 + 4, momentum 4 + 4), check 2; fp32: 20
    avgpool      each tensor once, a lower bound for any kernel. Tiles are read again, mostly from the L2 cache: see
                 tests/test_cuda_avgpool_conv1x1.py and test_triton_avgpool_conv1x1.py for formulas with tiles

For CUDA the bytes of DRAM are counted, too: stores, and the first load of each 32 bytes in a launch. What is loaded
again comes from the L2 cache.

The formulas exclude numbers per channel and per tensor (parameters, statistics, partial sums, addresses). For CUDA the
bytes moved include them. For Triton, whose many small programs read them again from the caches, they are in a column
of their own. Their share is larger than in training, since batches are smaller.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

EPS = 1e-5
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
# shapes of ResNet-50 with fewer samples (for the interpreter, also fewer channels); some of them exceed the shared
# memory of the emulated GPU (4 multiprocessors), which keeps a part; float32 takes three launches
BN_SHAPES = {
    "cuda": ((4, 64, 56, 56), (8, 256, 28, 28), (16, 256, 14, 14), (32, 512, 7, 7), (64, 32, 7, 7)),
    "triton": ((1, 64, 28, 28), (1, 64, 14, 14), (2, 64, 7, 7)),
}
# (channels, height = width) of two images
AVGPOOL_CONV1X1_SHAPES = {"cuda": ((256, 56), (512, 28)), "triton": ((128, 28), (256, 14))}
# the parameters of a bottleneck in ResNet-50's second stage
SGD_SHAPES = ((128, 512, 1, 1), (128,), (128,), (128, 128, 3, 3), (128,), (128,), (512, 128, 1, 1), (512,), (512,))


@dataclass(frozen=True)
class Moved:
    """bytes: of the tensors in the formula; rest: of others, if counted separately; cooperative: in one such launch."""

    bytes: int
    rest: int
    launches: int
    cooperative: bool
    dram: int | None = None


@dataclass(frozen=True)
class Row:
    backend: str
    op: str
    case: str
    moved: int
    formula: int
    rest: int
    launches: int
    dram: int | None = None  # of `moved`, what DRAM serves: stores, and the first load of each 32 bytes in a launch
    bounded: bool = True  # False: the formula is a lower bound

    @property
    def ratio(self) -> float:
        return self.moved / self.formula


class Cuda:
    """Runs the CUDA kernels in the emulator."""

    name = "cuda"

    def __init__(self) -> None:
        import emulated

        self.library, self.kept_bytes = emulated.load(), emulated.kept_bytes
        self.ops = torch.ops.fasttricks_emulated

    def nothing_on_chip(self) -> AbstractContextManager[None]:
        return self.library.shared_per_sm(0)

    def reads(self, x: torch.Tensor, arrays: int, pair: bool = False) -> float:
        return 2 - self.kept_bytes(x, arrays, pair=pair) / (arrays * x.nbytes)

    def measured(self, run: Callable[[], Any], *tensors: torch.Tensor) -> tuple[Any, Moved]:
        """The result of `run`, and the bytes that it moved."""
        with self.library.metered() as meter:
            result = run()
        launches = meter.launches + meter.cooperative_launches
        return result, Moved(meter.moved, 0, launches, meter.cooperative_launches > 0, meter.dram)


class Triton:
    """Runs the Triton kernels in Triton's interpreter."""

    name = "triton"

    def __init__(self) -> None:
        import triton_interpreter

        from fasttricks.backends import not_loaded

        if "triton" in not_loaded:
            raise RuntimeError(f"Triton: {not_loaded['triton']}")
        triton_interpreter.correct()
        self.ops = torch.ops.fasttricks_triton

    def nothing_on_chip(self) -> AbstractContextManager[None]:
        return nullcontext()

    def reads(self, x: torch.Tensor, arrays: int, pair: bool = False) -> float:
        return 2

    def measured(self, run: Callable[[], Any], *tensors: torch.Tensor) -> tuple[Any, Moved]:
        """The result of `run`, and the bytes that it moved.

        Those of `tensors`, of results with >= numel/8 of the first one, and of temporaries that have its shape.
        """
        from triton_meter import metered

        with metered() as meter:
            result = run()
            made = [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, torch.Tensor)]
            large = [t for t in made if t.numel() * 8 >= tensors[0].numel()]
            like_first = [t for t in meter.arguments() if t.shape == tensors[0].shape]
            counted = {t.data_ptr(): t for t in (*like_first, *large, *tensors)}
            moved, rest, launches = meter.take(*counted.values())
        return result, Moved(moved, rest, launches, False)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bn_case(machine: Cuda | Triton, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Iterator[Row]:
    ops = machine.ops
    x, z, dy = (torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[layout]) for _ in range(3))
    weight, bias, zero = torch.rand(shape[1]) + 0.5, torch.rand(shape[1]), torch.zeros(shape[1])
    unit, bits = x.numel() * x.element_size(), x.numel() // 8

    def row(op: str, moved: Moved, formula: Callable[[float], float]) -> Row:
        case = f"{'x'.join(map(str, shape))} {layout} {dtype_name(dtype)}"
        of_formula = int(formula(machine.reads(x, 1 + ("backward" in op)) if moved.cooperative else 2))
        return Row(machine.name, op, case, moved.bytes, of_formula, moved.rest, moved.launches, moved.dram)

    (_, mean, var), moved = machine.measured(lambda: ops.bn_relu_forward(x, weight, bias, EPS), x)
    yield row("bn_relu forward", moved, lambda reads: (reads + 1) * unit)
    given = (weight, bias, mean, var, EPS)
    _, moved = machine.measured(lambda: ops.bn_relu_backward(dy, x, None, *given, True, False), x, dy)
    yield row("bn_relu backward", moved, lambda reads: (2 * reads + 1) * unit)
    _, moved = machine.measured(lambda: ops.bn_relu_apply(x, *given), x)
    yield row("bn_relu evaluation", moved, lambda reads: 2 * unit)
    (*_, mask), moved = machine.measured(lambda: ops.bn_add_relu_forward(x, z, weight, bias, EPS), x, z)
    yield row("bn_add_relu forward", moved, lambda reads: (reads + 2) * unit + bits)
    _, moved = machine.measured(lambda: ops.bn_relu_backward(dy, x, mask, *given, True, True), x, dy, mask)
    yield row("bn_add_relu backward", moved, lambda reads: (2 * reads + 2) * unit + reads * bits)
    _, moved = machine.measured(lambda: ops.bn_add_relu_forward(x, z, zero, None, EPS), x, z)
    yield row("bn_add_relu gamma 0", moved, lambda reads: 3 * unit + bits)


def block_case(machine: Cuda | Triton, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Iterator[Row]:
    """The end of a residual block: backward with two gradients of y, and two BatchNorms."""
    ops = machine.ops
    x, z, dy, dy2 = (torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[layout]) for _ in range(4))
    pooled = F.avg_pool2d(dy2, 2)
    weight, bias, zero = torch.rand(shape[1]) + 0.5, torch.rand(shape[1]), torch.zeros(shape[1])
    unit, bits = x.numel() * x.element_size(), x.numel() // 8
    case = f"{'x'.join(map(str, shape))} {layout} {dtype_name(dtype)}"

    def row(op: str, moved: Moved, formula: Callable[[float], float], bounded: bool = True) -> Row:
        pair = op.startswith("bn_add_bn")
        arrays = 3 if pair and "backward" in op else 2
        of_formula = int(formula(machine.reads(x, arrays, pair) if moved.cooperative else 2))
        return Row(
            machine.name, op, case, moved.bytes, of_formula, moved.rest, moved.launches, moved.dram, bounded=bounded
        )

    wide = machine.name == "cuda" or layout == "NHWC" or shape[3] % 8 == 0
    moving = None, None, None, None, False
    (_, _, mean, var, mask), moved = machine.measured(
        lambda: ops.bn_add_relu_pool_forward(x, z, weight, bias, EPS, *moving), x, z
    )
    yield row("bn_add_relu pool forward", moved, lambda reads: (reads + 2.25) * unit + bits, wide)
    _, moved = machine.measured(lambda: ops.bn_add_relu_pool_apply(x, z, weight, bias, mean, var, EPS, False), x, z)
    yield row("bn_add_relu pool evaluation", moved, lambda reads: 3.25 * unit + bits, wide)
    _, moved = machine.measured(lambda: ops.bn_add_relu_pool_forward(x, z, zero, None, EPS, *moving), x, z)
    yield row("bn_add_relu pool gamma 0", moved, lambda reads: 3.25 * unit + bits, wide)

    given = (None, weight, bias, mean, var, EPS, True, False)
    _, moved = machine.measured(lambda: ops.bn_relu_backward(dy, x, *given, dy2), x, dy, dy2)
    yield row("bn_relu backward, dy2", moved, lambda reads: (3 * reads + 1) * unit)
    given = (mask, weight, bias, mean, var, EPS, True, True)
    _, moved = machine.measured(lambda: ops.bn_relu_backward(dy, x, *given, dy2), x, dy, dy2, mask)
    yield row("bn_add_relu backward, dy2", moved, lambda reads: (2 * reads + 3) * unit + bits)
    _, moved = machine.measured(lambda: ops.bn_relu_backward(dy, x, *given, pooled), x, dy, pooled, mask)
    least = unit - pooled.numel() * pooled.element_size()
    yield row("bn_add_relu backward, pooled dy2", moved, lambda reads: (2 * reads + 3) * unit + bits - least, False)

    affine = weight, bias, weight, bias, EPS, EPS
    (_, *four, mask), moved = machine.measured(lambda: ops.bn_add_bn_relu_forward(x, z, *affine), x, z)
    yield row("bn_add_bn_relu forward", moved, lambda reads: (2 * reads + 1) * unit + bits)
    given = (mask, weight, weight, *four, EPS, EPS, True)
    _, moved = machine.measured(lambda: ops.bn_add_bn_relu_backward(dy, x, z, *given), x, z, dy, mask)
    yield row("bn_add_bn_relu backward", moved, lambda reads: (3 * reads + 2) * unit + reads * bits)
    _, moved = machine.measured(lambda: ops.bn_add_bn_relu_backward(dy, x, z, *given, dy2), x, z, dy, dy2, mask)
    yield row("bn_add_bn_relu backward, dy2", moved, lambda reads: (4 * reads + 2) * unit + bits)
    affine = zero, bias, weight, bias, EPS, EPS
    _, moved = machine.measured(lambda: ops.bn_add_bn_relu_forward(x, z, *affine), x, z)
    yield row("bn_add_bn_relu gamma 0", moved, lambda reads: (reads + 2) * unit + bits)


def bn_rows(machine: Cuda | Triton) -> Iterator[Row]:
    shapes = BN_SHAPES[machine.name]
    for layout in LAYOUTS:
        for shape in shapes:
            yield from bn_case(machine, shape, layout, torch.float16)
            if shape in shapes[: 2 if machine.name == "cuda" else 1]:
                yield from block_case(machine, shape, layout, torch.float16)
        with machine.nothing_on_chip():
            yield from bn_case(machine, shapes[0], layout, torch.float32)


def sgd_rows(machine: Cuda | Triton) -> Iterator[Row]:
    ops, count = machine.ops, sum(torch.Size(s).numel() for s in SGD_SHAPES)
    for dtype, step_bytes, check_bytes in ((torch.float16, 22, 2), (torch.float32, 20, 4)):
        params = [torch.randn(s).to(dtype) for s in SGD_SHAPES]
        grads = [torch.randn_like(p) for p in params]
        masters = [p.float() for p in params] if dtype == torch.float16 else []
        buffers, steps = [torch.zeros_like(p, dtype=torch.float32) for p in params], [torch.ones(()) for _ in params]
        lr, found_inf = torch.tensor(0.1), torch.zeros(())
        tail = ([0.9], [0.0], [1e-4], [False], [False], [0.0], 0.0, False, 0.0, None, found_inf, None, None)

        def check(grads: list = grads, found_inf: torch.Tensor = found_inf) -> None:
            ops.sgd_check(grads, [], [], found_inf, None, None)

        def step(
            lists: tuple = (params, grads, buffers, steps, masters), lr: torch.Tensor = lr, tail: tuple = tail
        ) -> None:
            ops.sgd_step(*lists, [len(SGD_SHAPES)], [lr], *tail)

        for name, run, each in (("sgd_check", check, check_bytes), ("sgd_step", step, step_bytes)):
            run()  # the first call writes Triton's table of addresses
            _, moved = machine.measured(run, *params, *grads, *masters, *buffers)
            case = f"a bottleneck, {dtype_name(dtype)}"
            yield Row(machine.name, name, case, moved.bytes, each * count, moved.rest, moved.launches, moved.dram)


def avgpool_conv1x1_case(machine: Cuda | Triton, c: int, size: int, layout: str) -> Iterator[Row]:
    ops = machine.ops
    x = torch.randn(2, c, size, size).half().contiguous(memory_format=LAYOUTS[layout])
    weight = torch.randn(2 * c, c, 1, 1).half()
    dy = torch.randn(2, 2 * c, size // 2, size // 2).half().contiguous(memory_format=LAYOUTS[layout])
    least, case = 2 * (x.numel() + weight.numel() + dy.numel()), f"2x{c}x{size}x{size} {layout} float16"
    runs: dict[str, Callable[[], Any]] = {
        "forward": lambda: ops.avgpool_conv1x1_forward(x, weight, None, 2, False),
        "dx": lambda: ops.avgpool_conv1x1_backward(dy, x, weight, 2, False, True, False, False),
        "dweight": lambda: ops.avgpool_conv1x1_backward(dy, x, weight, 2, False, False, True, False),
    }
    for name, run in runs.items():
        _, moved = machine.measured(run, weight, x, dy)
        yield Row(
            machine.name,
            f"avgpool_conv1x1 {name}",
            case,
            moved.bytes,
            least,
            moved.rest,
            moved.launches,
            moved.dram,
            bounded=False,
        )


def avgpool_rows(machine: Cuda | Triton) -> Iterator[Row]:
    for c, size in AVGPOOL_CONV1X1_SHAPES[machine.name]:
        for layout in LAYOUTS:
            yield from avgpool_conv1x1_case(machine, c, size, layout)


def rows() -> list[Row]:
    """The rows of CUDA; with TRITON_INTERPRET=1, those of Triton."""
    machine = Triton() if os.environ.get("TRITON_INTERPRET") == "1" else Cuda()
    return [*bn_rows(machine), *sgd_rows(machine), *avgpool_rows(machine)]


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    if sys.argv[1:] == ["--json"]:
        print(json.dumps([asdict(row) for row in rows()]))
        return
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__, "--json"], env=environment, stdout=subprocess.PIPE, check=True)
    made = [*rows(), *(Row(**row) for row in json.loads(done.stdout))]
    table = Table(
        "backend", "op", "case", "MB moved", "MB by the formula", "ratio", "MB of DRAM", "MB of the rest", "launches"
    )
    for row in sorted(made, key=lambda row: row.op.split()[0]):
        ratio = f"{row.ratio:.3f}" if row.bounded else f"{row.ratio:.2f} of the least"
        sizes = (f"{row.moved / 1e6:.2f}", f"{row.formula / 1e6:.2f}")
        rest = "" if row.backend == "cuda" else f"{row.rest / 1e6:.2f}"
        dram = "" if row.dram is None else f"{row.dram / 1e6:.2f}"
        table.add_row(row.backend, row.op, row.case, *sizes, ratio, dram, rest, str(row.launches))
    Console(width=140).print(table)
    target = Path(__file__).parent / "results" / "traffic.json"
    target.write_text(json.dumps([{**asdict(row), "ratio": round(row.ratio, 4)} for row in made], indent=1) + "\n")


if __name__ == "__main__":
    main()
