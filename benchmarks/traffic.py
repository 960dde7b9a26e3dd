"""Bytes that the CUDA kernels move and their launches, from the emulator, beside the formulas: make bench-traffic.

No card is needed: the kernels run on the CPU, and every load and store of theirs is counted (tests/emulator). Written
to results/traffic.json. The formulas, with N the bytes of an activation, E its elements, and reads = 1 where the
planner keeps the tensor on the chip (one cooperative launch), else 2:

    bn_relu      forward (reads + 1) N,  backward (2 reads + 1) N;  evaluation 2 N
    bn_add_relu  forward (reads + 2) N + E/8,  backward (2 reads + 2) N + reads E/8;  all gammas zero: forward 3 N + E/8
    sgd          step 22 a parameter (gradient 2, fp16 parameter 2 + 2, master 4 + 4, momentum 4 + 4), check 2; fp32: 20
    avgpool      each tensor once: the least that any kernel could move. What blocks read again is meant for the L2
                 cache; tests/test_cuda_avgpool_conv1x1.py has the formula with tiles, to 5%

What is one number a channel or a tensor (parameters, statistics, partial sums) is counted and not in the formulas; the
batches are reduced, and with them the tensors that it is measured by.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "emulator"))

import emulated

EPS = 1e-5
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
# of ResNet-50, batch reduced: too large for the chip of the emulated card (4 multiprocessors), and not
BN_SHAPES = ((4, 64, 56, 56), (8, 256, 28, 28), (16, 256, 14, 14), (32, 512, 7, 7), (64, 32, 7, 7))
# the tensors of one bottleneck of ResNet-50's third stage
SGD_SHAPES = ((256, 1024, 1, 1), (256,), (256,), (256, 256, 3, 3), (256,), (256,), (1024, 256, 1, 1), (1024,), (1024,))


@dataclass(frozen=True)
class Row:
    op: str
    case: str
    moved: int
    formula: int
    launches: int
    bounded: bool = True  # whether the formula is what a call should move, or only the least that any could

    @property
    def ratio(self) -> float:
        return self.moved / self.formula


def measured(library: emulated.Library, run: Callable[[], object]) -> tuple[object, emulated.Meter]:
    with library.metered() as meter:
        result = run()
    return result, meter


def bn_case(library: emulated.Library, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Iterator[Row]:
    ops = torch.ops.fasttricks_emulated
    x, z, dy = (torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[layout]) for _ in range(3))
    weight, bias, zero = torch.rand(shape[1]) + 0.5, torch.rand(shape[1]), torch.zeros(shape[1])
    unit, bits = x.numel() * x.element_size(), x.numel() // 8

    def row(op: str, meter: emulated.Meter, formula: Callable[[int], int]) -> Row:
        case = f"{'x'.join(map(str, shape))} {layout} {str(dtype).removeprefix('torch.')}"
        reads = 1 if meter.cooperative_launches else 2
        return Row(op, case, meter.moved, formula(reads), meter.launches + meter.cooperative_launches)

    (_, mean, var), meter = measured(library, lambda: ops.bn_relu_forward(x, weight, bias, EPS))
    yield row("bn_relu forward", meter, lambda reads: (reads + 1) * unit)
    given = (weight, bias, mean, var, EPS)
    _, meter = measured(library, lambda: ops.bn_relu_backward(dy, x, None, *given, True, False))
    yield row("bn_relu backward", meter, lambda reads: (2 * reads + 1) * unit)
    _, meter = measured(library, lambda: ops.bn_relu_apply(x, *given))
    yield row("bn_relu evaluation", meter, lambda reads: 2 * unit)
    (*_, mask), meter = measured(library, lambda: ops.bn_add_relu_forward(x, z, weight, bias, EPS))
    yield row("bn_add_relu forward", meter, lambda reads: (reads + 2) * unit + bits)
    _, meter = measured(library, lambda: ops.bn_relu_backward(dy, x, mask, *given, True, True))
    yield row("bn_add_relu backward", meter, lambda reads: (2 * reads + 2) * unit + reads * bits)
    _, meter = measured(library, lambda: ops.bn_add_relu_forward(x, z, zero, None, EPS))
    yield row("bn_add_relu gamma 0", meter, lambda reads: 3 * unit + bits)


def bn_rows(library: emulated.Library) -> Iterator[Row]:
    for layout in LAYOUTS:
        for shape in BN_SHAPES:
            yield from bn_case(library, shape, layout, torch.float16)
        yield from bn_case(library, BN_SHAPES[0], layout, torch.float32)


def sgd_rows(library: emulated.Library) -> Iterator[Row]:
    ops, count = torch.ops.fasttricks_emulated, sum(torch.Size(s).numel() for s in SGD_SHAPES)
    for dtype, step_bytes, check_bytes in ((torch.float16, 22, 2), (torch.float32, 20, 4)):
        params = [torch.randn(s).to(dtype) for s in SGD_SHAPES]
        grads = [torch.randn_like(p) for p in params]
        masters = [p.float() for p in params] if dtype == torch.float16 else []
        buffers, steps = [torch.zeros_like(p, dtype=torch.float32) for p in params], [torch.ones(()) for _ in params]
        lr, found_inf, case = torch.tensor(0.1), torch.zeros(()), f"a bottleneck, {str(dtype).removeprefix('torch.')}"
        tail = ([0.9], [0.0], [1e-4], [False], [False], [0.0], 0.0, False, 0.0, None, found_inf, None, None)

        def check(grads: list = grads, found_inf: torch.Tensor = found_inf) -> None:
            ops.sgd_check(grads, [], [], found_inf, None, None)

        def step(
            lists: tuple = (params, grads, buffers, steps, masters), lr: torch.Tensor = lr, tail: tuple = tail
        ) -> None:
            ops.sgd_step(*lists, [len(SGD_SHAPES)], [lr], *tail)

        for name, run, each in (("sgd_check", check, check_bytes), ("sgd_step", step, step_bytes)):
            _, meter = measured(library, run)
            yield Row(name, case, meter.moved, each * count, meter.launches)


def pool_case(library: emulated.Library, c: int, size: int, layout: str) -> Iterator[Row]:
    ops = torch.ops.fasttricks_emulated
    x = torch.randn(2, c, size, size).half().contiguous(memory_format=LAYOUTS[layout])
    weight = torch.randn(2 * c, c, 1, 1).half()
    dy = torch.randn(2, 2 * c, size // 2, size // 2).half().contiguous(memory_format=LAYOUTS[layout])
    least, case = 2 * (x.numel() + weight.numel() + dy.numel()), f"2x{c}x{size}x{size} {layout} float16"
    _, meter = measured(library, lambda: ops.avgpool_conv1x1_forward(x, weight, None, 2, False))
    yield Row("avgpool_conv1x1 forward", case, meter.moved, least, meter.launches, bounded=False)
    for name, need in (("dx", (True, False, False)), ("dweight", (False, True, False))):
        _, meter = measured(library, functools.partial(ops.avgpool_conv1x1_backward, dy, x, weight, 2, False, *need))
        yield Row(f"avgpool_conv1x1 {name}", case, meter.moved, least, meter.launches, bounded=False)


def pool_rows(library: emulated.Library) -> Iterator[Row]:
    for c, size in ((256, 56), (512, 28)):
        for layout in LAYOUTS:
            yield from pool_case(library, c, size, layout)


def rows() -> list[Row]:
    library = emulated.load()
    return [*bn_rows(library), *sgd_rows(library), *pool_rows(library)]


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    made = rows()
    table = Table("op", "case", "MB moved", "MB by the formula", "ratio", "launches")
    for row in made:
        ratio = f"{row.ratio:.3f}" if row.bounded else f"{row.ratio:.2f} of the least"
        sizes = (f"{row.moved / 1e6:.2f}", f"{row.formula / 1e6:.2f}")
        table.add_row(row.op, row.case, *sizes, ratio, str(row.launches))
    Console(width=120).print(table)
    target = Path(__file__).parent / "results" / "traffic.json"
    target.write_text(json.dumps([{**asdict(row), "ratio": round(row.ratio, 4)} for row in made], indent=1) + "\n")


if __name__ == "__main__":
    main()
