"""Every op on a GPU, on each backend, against its peers: python benchmarks/card.py [--device cuda] [--out DIR].

A row is one case on one side: median milliseconds, the speedup over eager torch and, for sides with a formula of
bytes, the fraction of the measured copy bandwidth. Beside what was measured stands what was predicted: of the CUDA
kernels by their launch plans and the card's published limits (predict.py). All sides of a case run in turn in every
round, so that ratios compare equal conditions. Writes DIR/<card>.json and DIR/<card>.png.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import bench_sgd
import torch
import torch.nn.functional as F
from bench_train_step import Side
from torch.utils.benchmark import Timer

import fasttricks
from fasttricks.backends import why_not

ROUNDS = 3
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
Sides = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Sizes:
    """Sizes to measure: (C, H = W) of ResNet-50's BatchNorms, (C, Cout, H = W) of ResNet-50-D's shortcuts."""

    batch: int
    bn: tuple[tuple[int, int], ...] = ((64, 112), (256, 56), (512, 28), (512, 7), (2048, 7))
    pool: tuple[tuple[int, int, int], ...] = ((256, 512, 56), (512, 1024, 28), (1024, 2048, 14))
    step_batch: int = 128
    image: int = 224
    copy_bytes: int = 1 << 30
    compiled: bool = True
    seconds: float = 0.1  # per measurement


LAUNCH = 2.5e-6  # seconds that a launch takes at least
SMOKE = Sizes(2, ((16, 7),), ((16, 32, 6),), step_batch=2, image=64, copy_bytes=1 << 22, compiled=False, seconds=1e-3)


@dataclass(frozen=True)
class Row:
    op: str
    case: str
    side: str
    ms: float
    against_eager: float
    copy_ms: float | None = None  # the formula's bytes at the bandwidth of a copy, and the latency of launches
    of_copy: float | None = None
    predicted_ms: float | None = None  # at the card's published limits


@dataclass(frozen=True)
class Formula:
    """Bytes, launches and, at the card's published limits, seconds of a call of ours."""

    moved: float
    launches: int
    seconds: float | None = None


Formulas = dict[str, Formula]  # by side
Case = tuple[str, str, Sides, Formulas]  # op, case


class Predictor:
    """What the launch plans of the CUDA kernels give on this card; why_not: why that is not known."""

    def __init__(self, device: torch.device) -> None:
        self.why_not = ""
        if device.type != "cuda":
            self.why_not = "no card"
            return
        try:
            import predict

            card = torch.cuda.get_device_properties(device)
            limits = predict.limits_of(card.name)
            self.machines = {layout: predict.Machine(limits, layout == "NHWC") for layout in LAYOUTS}
        except (ImportError, OSError, ValueError, SystemExit) as error:  # the card is there to be measured
            self.why_not = f"{type(error).__name__}: {error}"

    def formula(self, launches: Iterable[Any]) -> Formula:
        made = tuple(launches)
        return Formula(sum(one.dram for one in made), len(made), sum(one.seconds for one in made))

    def bn(self, x: torch.Tensor, layout: str, add: bool) -> Formulas:
        if self.why_not:
            return {}
        forward, backward = self.machines[layout].bn_launches(tuple(x.shape), add, x.element_size())
        return {"cuda": self.formula(forward + backward)}

    def avgpool_conv1x1(self, x: torch.Tensor, layout: str, out: int) -> Formulas:
        if self.why_not:
            return {}
        launches = self.machines[layout].avgpool_launches(tuple(x.shape), out)
        return {"cuda": self.formula(one for each in launches.values() for one in each)}

    def sgd(self, half: bool) -> Formulas:
        if self.why_not:
            return {}
        sizes = [math.prod(shape) for shape in bench_sgd.SHAPES]
        return {"cuda": self.formula(self.machines["NHWC"].sgd_launches(sizes, half, check=half))}


def of_sides(formula: Formula, predicted: Formulas) -> Formulas:
    """The formula of every side with kernels of ours, but what is predicted for those where it is."""
    return {side: predicted.get(side, formula) for side in ("cuda", "triton", "cpu")}


def bn_formula(x: torch.Tensor, add: bool) -> Formula:
    """Forward and backward in several launches."""
    n, bits = x.numel() * x.element_size(), x.numel() / 8 if add else 0.0
    return Formula((8 + 2 * add) * n + 3 * bits, 7)


def backends(device: torch.device) -> list[str]:
    """The backends with kernels for this device."""
    return [name for name in ("cuda", "triton", "cpu") if why_not(name, device) is None]


def on(backend: str, run: Callable[[], object]) -> Callable[[], object]:
    def inside() -> object:
        with fasttricks.backend(backend):
            return run()

    return inside


def median_seconds(sides: Sides, sizes: Sizes) -> dict[str, float]:
    """Median seconds of every side, over rounds in which the sides run in turn."""
    seen: dict[str, list[float]] = {name: [] for name in sides}
    timers = {
        name: Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads()) for name, run in sides.items()
    }
    for timer in timers.values():
        timer.timeit(2)  # compiles and fills caches
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            seen[name].append(timer.blocked_autorange(min_run_time=sizes.seconds).median)
    return {name: statistics.median(times) for name, times in seen.items()}


def copy_bandwidth(sizes: Sizes) -> float:
    """Bytes per second, read and written, of a copy larger than any cache."""
    source, target = torch.empty(2, sizes.copy_bytes, dtype=torch.uint8).unbind()
    return 2 * sizes.copy_bytes / median_seconds({"copy": lambda: target.copy_(source)}, sizes)["copy"]


def gradients(run: Callable[..., torch.Tensor], leaves: list[torch.Tensor]) -> Callable[[], object]:
    """A function that runs forward and backward of `run`."""
    torch.manual_seed(0)  # the same for all sides
    dy = torch.randn_like(run(*leaves))
    return lambda: torch.autograd.grad(run(*leaves), leaves, dy)


def bn_cases(sizes: Sizes, device: torch.device, dtype: torch.dtype, predictor: Predictor) -> Iterator[Case]:
    for add in (False, True):
        for c, size in sizes.bn:
            for layout, memory_format in LAYOUTS.items():
                shape = (sizes.batch, c, size, size)
                x, *residual = (
                    torch.randn(shape, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
                    for _ in range(1 + add)
                )
                weight, bias = torch.rand(c, requires_grad=True), torch.rand(c, requires_grad=True)
                mean, var = torch.zeros(c), torch.ones(c)

                def eager(x, weight, bias, *residual, mean=mean, var=var):  # type: ignore[no-untyped-def]
                    y = F.batch_norm(x, mean, var, weight, bias, training=True)
                    return F.relu(y + residual[0] if residual else y)

                def ours(x, weight, bias, *residual, mean=mean, var=var):  # type: ignore[no-untyped-def]
                    if residual:
                        return fasttricks.bn_add_relu(x, *residual, weight, bias, mean, var)
                    return fasttricks.bn_relu(x, weight, bias, mean, var)

                leaves = [x, weight, bias, *residual]
                sides: Sides = {"eager": gradients(eager, leaves)}
                if sizes.compiled and size == sizes.bn[-1][1]:  # compiling takes 15 seconds
                    sides["compiled"] = gradients(torch.compile(eager, dynamic=False), leaves)
                for name in backends(device):
                    with fasttricks.backend(name):
                        sides[name] = on(name, gradients(ours, leaves))
                yield (
                    ("bn_add_relu" if add else "bn_relu"),
                    f"{c}x{size}x{size} {layout} {dtype}",
                    sides,
                    of_sides(bn_formula(x, add), predictor.bn(x, layout, add)),
                )


def avgpool_conv1x1_cases(
    sizes: Sizes, device: torch.device, dtype: torch.dtype, predictor: Predictor
) -> Iterator[Case]:
    for c, out, size in sizes.pool:
        for layout, memory_format in LAYOUTS.items():
            x = torch.randn(sizes.batch, c, size, size, dtype=dtype).contiguous(memory_format=memory_format)
            leaves = [x.requires_grad_(), torch.randn(out, c, 1, 1, dtype=dtype, requires_grad=True)]
            sides: Sides = {"eager": gradients(lambda x, w: F.conv2d(F.avg_pool2d(x, 2), w), leaves)}
            for name in backends(device):
                with fasttricks.backend(name):
                    sides[name] = on(name, gradients(fasttricks.avgpool_conv1x1, leaves))
            y = sizes.batch * out * (size // 2) ** 2
            moved = (3 * x.numel() + 3 * y) * x.element_size()  # forward: x, y; backward: dy twice, x, dx
            formulas = of_sides(Formula(moved, 4), predictor.avgpool_conv1x1(x, layout, out))
            yield "avgpool_conv1x1", f"{c}->{out} {size}x{size} {layout} {dtype}", sides, formulas


def sgd_cases(device: torch.device, predictor: Predictor) -> Iterator[Case]:
    """ResNet-50's parameters: check and step in fp16 with masters, step in fp32."""
    sides: Sides = {"eager": bench_sgd.eager_fp16(), "in place": bench_sgd.in_place_fp16()}
    for name in backends(device):
        sides[name] = on(name, bench_sgd.fused_fp16())
    formulas = of_sides(Formula(bench_sgd.COUNT * bench_sgd.BYTES, 2), predictor.sgd(half=True))
    yield "sgd", "ResNet-50, float16, masters, check", sides, formulas
    sides = {"eager": torch_sgd(foreach=True), "torch fused": torch_sgd(fused=True)}
    for name in backends(device):
        sides[name] = on(name, bench_sgd.fused_fp32())
    yield "sgd", "ResNet-50, float32", sides, of_sides(Formula(bench_sgd.COUNT * 20, 1), predictor.sgd(half=False))


def torch_sgd(**kind: bool) -> Callable[[], object]:
    parameters = bench_sgd.parameters(torch.float32)
    options = {"lr": bench_sgd.LR, "momentum": bench_sgd.MOMENTUM, "weight_decay": bench_sgd.DECAY}
    return torch.optim.SGD(parameters, **options, **kind).step


def step_cases(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """One training step of ResNet-50-D under autocast, channels_last."""
    images = torch.randn(sizes.step_batch, 3, sizes.image, sizes.image).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (sizes.step_batch,))

    def side(fused: bool) -> Callable[[], object]:
        made = Side(fused, torch.channels_last, None)

        def run() -> None:
            with torch.autocast(device.type, dtype):
                made.step(images, labels)

        return run

    sides: Sides = {"eager": side(False)} | {name: on(name, side(True)) for name in backends(device)}
    yield "training step", f"ResNet-50-D, batch {sizes.step_batch}, NHWC, {dtype}", sides, {}


def check_results(case: str, sides: Sides) -> None:
    """Raises if the gradients of one side are far from eager's: what is wrong need not be timed."""
    results = {name: run() for name, run in sides.items()}
    expected = results["eager"]
    if not isinstance(expected, tuple):  # the optimizers, which work in place, and the whole step
        return
    for name, got in results.items():
        for k, (a, b) in enumerate(zip(got, expected, strict=True)):  # type: ignore[call-overload]
            error = float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-12))
            if not error < 0.2:  # in half precision some masks differ, where the output rounds to zero
                raise RuntimeError(f"{case}: gradient {k} of {name} differs from eager's by {error:.2g}")


def row_of(
    op: str, case: str, side: str, seconds: float, eager: float, bandwidth: float, formula: Formula | None
) -> Row:
    row = Row(op, case, side, seconds * 1e3, eager / seconds)
    if formula is None:
        return row
    return replace(
        row,
        copy_ms=1e3 * (formula.moved / bandwidth + formula.launches * LAUNCH),
        of_copy=formula.moved / seconds / bandwidth,
        predicted_ms=None if formula.seconds is None else 1e3 * formula.seconds,
    )


def line(row: Row) -> str:
    said = f"{row.op:16} {row.case:45} {row.side:12} {row.ms:8.3f} ms {row.against_eager:5.2f}x"
    if row.of_copy is not None:
        said += f", {row.of_copy:4.0%} of copy"
    return said if row.predicted_ms is None else f"{said}, {row.predicted_ms:.3f} ms predicted"


def measure(sizes: Sizes, device: torch.device, predictor: Predictor) -> tuple[list[Row], float]:
    bandwidth = copy_bandwidth(sizes)
    print(f"copy: {bandwidth / 1e9:.0f} GB/s", flush=True)
    rows: list[Row] = []
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    groups = [bn_cases(sizes, device, half, predictor), avgpool_conv1x1_cases(sizes, device, half, predictor)]
    groups += [sgd_cases(device, predictor), bn_cases(sizes, device, torch.float32, predictor)]
    groups += [step_cases(sizes, device, half)]
    for group in groups:
        for op, case, sides, formulas in group:
            check_results(f"{op} {case}", sides)
            seconds = median_seconds(sides, sizes)
            for side, s in seconds.items():
                row = row_of(op, case, side, s, seconds["eager"], bandwidth, formulas.get(side))
                rows.append(row)
                print(line(row), flush=True)
    return rows, bandwidth


def draw(rows: list[Row], title: str, path: Path) -> None:
    """Draws a panel per op: the speedup of each side over eager torch, by case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ops = list(dict.fromkeys(row.op for row in rows))
    cases = {op: list(dict.fromkeys(row.case for row in rows if row.op == op)) for op in ops}
    heights = [len(c) for c in cases.values()]
    figure, panels = pyplot.subplots(
        len(ops), figsize=(10, 1.5 + 0.35 * sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for panel, op in zip(panels[:, 0], ops, strict=True):
        sides = [s for s in dict.fromkeys(row.side for row in rows if row.op == op) if s != "eager"]
        for k, side in enumerate(sides):
            of_side = {row.case: row.against_eager for row in rows if row.op == op and row.side == side}
            at = [cases[op].index(case) + (k + 0.5) / len(sides) - 0.5 for case in of_side]
            panel.barh(at, list(of_side.values()), height=0.8 / len(sides), label=side)
        panel.set_yticks(range(len(cases[op])), cases[op], fontsize=7)
        panel.invert_yaxis()
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_title(f"{op}: times as fast as eager torch", fontsize=9)
        panel.legend(fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda", help="cuda, or cpu to try this script")
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options.add_argument("--batch", type=int, default=256)
    options.add_argument("--smoke", action="store_true", help="tiny sizes: checks that everything runs, not how fast")
    given = options.parse_args()
    device = torch.device(given.device)
    sizes = SMOKE if given.smoke else Sizes(given.batch)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    with device:
        predictor = Predictor(device)
        print(f"predictions: {predictor.why_not or 'of the CUDA kernels'}", flush=True)
        rows, bandwidth = measure(sizes, device, predictor)
    info = {key: str(value) for key, value in fasttricks.info().items()}
    result = {
        "card": card,
        "copy_bytes_a_second": bandwidth,
        "not_predicted": predictor.why_not,
        "info": info,
        "rows": [asdict(row) for row in rows],
    }
    given.out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", card.lower()).strip("-")
    (given.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, f"{card}, torch {torch.__version__}", given.out / f"{name}.png")
    print(f"written: {given.out / name}.json and .png")


if __name__ == "__main__":
    main()
