"""What the launch plans of the CUDA kernels give on a card, by its published limits: no card has run this.

    python benchmarks/predict.py --card h100|a100|b200|l40s --batch 256 --layout NHWC [--json FILE]

For every layer of ResNet-50-D that one of our ops serves, in float16 (a shortcut's pool is part of the block before):
launches, grids and waves as the ops' own host code plans them (tests/emulator), bytes of DRAM by formulas, bytes that a
multiprocessor has in flight, and the time:

    of a launch   max(bytes of DRAM / bandwidth, bytes through L2 / bandwidth, operations / rate) + launch latency

How many blocks of a kernel a multiprocessor holds, and how many 16-byte loads a thread has under way, is what
tests/static/cuda_budgets.py guarantees. Eager's time follows from its own kernels' bytes in the same way: see
resnet50d.py. Not counted: numbers per channel, and what one launch finds in L2 of the one before.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / part) for part in (".", "tests", "tests/static", "tests/emulator")]

import emulated  # noqa: E402
from cuda_budgets import budget_of, resident_blocks  # noqa: E402
from cuda_cards import CARDS, Card  # noqa: E402
from resnet50d import ELEMENT, Layer, eager, eager_optimizer, layers, parameter_sizes  # noqa: E402
from sass import short_name  # noqa: E402

from fasttricks.backends import LEFT_TO_TORCH  # noqa: E402

PREDICTED = "predicted: no card has run this"


@dataclass(frozen=True)
class Limits:
    """Published figures. dram, l2: bytes a second; tensor: dense fp16 operations a second, and the share of them that
    mma.sync reaches; launch: seconds from a small kernel to the next one of its stream."""

    name: str
    geometry: Card
    dram: float
    l2: float
    tensor: float
    mma_sync: float
    launch: float


# dram and tensor: NVIDIA's data sheets "A100 80GB" (SXM), "H100" (SXM), "DGX B200" (of eight) and "L40S".
# l2: github.com/te42kyfo/gpu-benches, gpu-l2-cache/a100_80.txt, h200.txt and l40.txt, of data sets of 10 to 25 MB (H200
# and H100, L40 and L40S have the same chip). launch: the same, gpu-small-kernels, time of a kernel of 64 kB.
# mma_sync: Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking",
# arXiv:2402.13499. None is published for B200's L2, launches and mma.sync: those of the H200, per multiprocessor.
LIMITS = {
    "a100": Limits("A100", CARDS["A100"], 2.039e12, 5.4e12, 312e12, 1.0, 2.7e-6),
    "h100": Limits("H100", CARDS["H100"], 3.35e12, 9.8e12, 989e12, 0.63, 2.5e-6),
    "b200": Limits("B200", CARDS["B200"], 8.0e12, 9.8e12 * 148 / 132, 2250e12, 0.63 * 989 / 2250 * 148 / 132, 2.5e-6),
    "l40s": Limits("L40S", CARDS["L40S"], 0.864e12, 5.2e12, 362e12, 1.0, 1.6e-6),
}


def limits_of(card: str) -> Limits:
    """By a name such as h100 or that which a driver gives, such as NVIDIA H100 80GB HBM3.

    Raises:
        ValueError: another card.
    """
    for key, limits in LIMITS.items():
        if key in card.lower():
            return limits
    raise ValueError(f"card is {card!r}; accepted: {', '.join(LIMITS)}")


@dataclass(frozen=True)
class Work:
    """Of one launch. through_l2: bytes that its blocks load and store; dram: each tensor once."""

    dram: float
    through_l2: float = 0.0
    operations: float = 0.0

    def seconds(self, limits: Limits, share: float = 1.0) -> dict[str, float]:
        of_l2 = max(self.dram, self.through_l2) / limits.l2
        return {
            "DRAM": self.dram / limits.dram,
            "L2": of_l2,
            "tensor cores": self.operations / (share * limits.tensor),
        }


@dataclass(frozen=True)
class Kept:
    """What one launch keeps on the chip: at most so many bytes, each of which saves so many of DRAM."""

    most: float
    saved: float = 1.0


@dataclass(frozen=True)
class Launch:
    kernel: str
    blocks: int
    resident: int  # on a multiprocessor
    waves: float
    in_flight: int  # bytes of a multiprocessor
    dynamic: int  # bytes of shared memory that all blocks ask for
    dram: float
    through_l2: float
    seconds: float
    limit: str


@dataclass(frozen=True)
class Row:
    layer: str
    op: str
    shape: tuple[int, ...]
    launches: tuple[Launch, ...]
    eager_bytes: float
    eager_launches: int
    eager_seconds: float

    @property
    def bytes(self) -> float:
        return sum(launch.dram for launch in self.launches)

    @property
    def seconds(self) -> float:
        return sum(launch.seconds for launch in self.launches)


@functools.cache
def resident_of(arch: int, kernel: str, dynamic_bytes: int) -> int:
    """Blocks of a kernel, by its demangled name, that a multiprocessor holds, by the budget for its registers."""
    budget = budget_of(short_name(kernel))
    return resident_blocks(arch, budget.threads, budget.registers, budget.shared + dynamic_bytes)


class Machine:
    """One card, and the launch planners."""

    def __init__(self, limits: Limits, nhwc: bool) -> None:
        self.limits, self.nhwc, self.plans = limits, nhwc, emulated.plans()
        card = limits.geometry
        self.device = self.plans.Device(card.sm_count, card.shared_per_sm, card.shared_per_block)

    def resident(self, kernel: str, threads: int, dynamic_bytes: int) -> int:
        return resident_of(self.limits.geometry.arch, kernel, dynamic_bytes)

    def launch(self, planned: Any, work: Work) -> Launch:
        kernel, blocks, sm_count = short_name(planned.kernel), math.prod(planned.grid), self.limits.geometry.sm_count
        resident = self.resident(planned.kernel, planned.threads, planned.dynamic_bytes)
        loads = budget_of(kernel).in_flight * 16 * planned.threads
        seconds = work.seconds(self.limits, self.limits.mma_sync)
        limit = max(seconds, key=lambda of: seconds[of])
        if seconds[limit] < self.limits.launch:
            limit = "launch"
        return Launch(
            kernel,
            blocks,
            resident,
            blocks / (resident * sm_count),
            loads * min(resident, math.ceil(blocks / sm_count)),
            blocks * planned.dynamic_bytes,
            work.dram,
            max(work.dram, work.through_l2),
            max(seconds.values()) + self.limits.launch,
            limit,
        )

    def launches(self, planned: Iterable[Any], work: Callable[[str], Work]) -> tuple[Launch, ...]:
        """work: of a kernel, by its name without template arguments."""
        return tuple(self.launch(one, work(short_name(one.kernel).split("<")[0])) for one in planned)

    def bn_passes(
        self, planned: tuple[Iterable[Any], Iterable[Any]], moved: dict[str, float], kept: dict[str, Kept]
    ) -> tuple[tuple[Launch, ...], tuple[Launch, ...]]:
        """Forward and backward. moved: bytes by kernel, if nothing stays on the chip."""

        def launched(one: Any) -> Launch:
            kernel = short_name(one.kernel).split("<")[0]
            of = kept.get(kernel, Kept(0.0))
            taken = min(of.most, math.prod(one.grid) * one.dynamic_bytes)
            return self.launch(one, Work(moved[kernel] - of.saved * taken))

        forward, backward = (tuple(map(launched, launches)) for launches in planned)
        return forward, backward

    def eager_seconds(self, bytes_moved: float, launches: int) -> float:
        return bytes_moved / self.limits.dram + launches * self.limits.launch

    # ---- bn_relu and bn_add_relu ----

    def bn_launches(
        self, shape: tuple[int, ...], residual: bool, element_bytes: int = ELEMENT, second: str = ""
    ) -> tuple[tuple[Launch, ...], tuple[Launch, ...]]:
        """Forward and backward; second: the backward pass has one more gradient, "full" or "pooled" (of 2x2 means)."""
        n, c, h, w = shape
        elements = n * c * h * w
        x, mask = element_bytes * elements, elements / 8 if residual else 0.0
        other = {"": 0, "full": x, "pooled": element_bytes * n * c * (h // 2) * (w // 2)}[second]
        add = x if residual else 0
        moved = {
            "bn_stats": x,
            "bn_apply": 2 * x + add + mask,
            "bn_forward_slab": 3 * x + add + mask,
            "bn_backward_reduce": 2 * x + mask,
            "bn_backward_reduce_two": 3 * x + other + mask,
            "bn_backward_apply": 3 * x + (0 if second else add + mask),
            "bn_backward_slab": 5 * x + add + 2 * mask,
            "bn_backward_slab_two": 6 * x + other + mask,
            # numbers per channel
            **dict.fromkeys(("bn_finalize_stats", "bn_finalize_backward", "bn_update_stats"), 0.0),
        }
        # of the backward pass x and dz, in place of which it reads dy and the mask; and without a residual dz is
        # workspace, of which only the rest is written
        kept = {
            "bn_forward_slab": Kept(x),
            "bn_backward_slab": Kept(2 * x, 1 + mask / (2 * x)),
            "bn_backward_slab_two": Kept(2 * x, 1 if residual else 1.5),
        }
        of = (self.plans.bn_shape(n, c, h * w, self.nhwc), self.device, self.resident, element_bytes, residual)
        planned = self.plans.bn_forward_launches(*of), self.plans.bn_backward_launches(*of, bool(second))
        return self.bn_passes(planned, moved, kept)

    def kept(self, launches: Iterable[Launch], shape: tuple[int, ...], arrays: int) -> float:
        """Bytes of `arrays` float16 tensors that a pass keeps on the chip."""
        taken = sum(launch.dynamic for launch in launches if "slab" in launch.kernel)
        return min(arrays * ELEMENT * math.prod(shape), taken)

    def bn_pool_launches(
        self, shape: tuple[int, ...], element_bytes: int = ELEMENT, ceil_mode: bool = False
    ) -> tuple[Launch, ...]:
        """The forward pass of bn_add_relu with the 2x2 means of its output; the backward pass is bn_relu's."""
        n, c, h, w = shape
        out_h, out_w = (math.ceil(h / 2), math.ceil(w / 2)) if ceil_mode else (h // 2, w // 2)
        x, means = element_bytes * n * c * h * w, element_bytes * n * c * out_h * out_w
        applied = 3 * x + n * c * h * w / 8
        moved = {
            "bn_stats": x,
            "bn_apply_pool_pixels": applied + means,
            "bn_apply_pool_lines": applied + means,
            "bn_apply": applied,
            "bn_pool_means": x + means,
            **dict.fromkeys(("bn_finalize_stats", "bn_update_stats"), 0.0),
        }
        of = (self.plans.bn_shape(n, c, h * w, self.nhwc), h, w, ceil_mode, self.device, self.resident, element_bytes)
        return self.launches(self.plans.bn_add_relu_pool_launches(*of), lambda kernel: Work(moved[kernel]))

    def bn_add_bn_launches(
        self, shape: tuple[int, ...], second: str = "", element_bytes: int = ELEMENT
    ) -> tuple[tuple[Launch, ...], tuple[Launch, ...]]:
        """Forward and backward; second: "full" or "pooled", if there is a second gradient of y."""
        n, c, h, w = shape
        x, mask = element_bytes * n * c * h * w, n * c * h * w / 8
        more = {"": 0.0, "full": 2.0 * x, "pooled": x + element_bytes * n * c * (h // 2) * (w // 2)}[second]
        moved = {
            "bn_stats": x,
            "bn_add_bn_apply": 3 * x + mask,
            "bn_add_bn_reduce": 3 * x + mask + more,
            "bn_add_bn_gradients": 5 * x + (0.0 if second else mask),
            "bn_add_bn_forward_slab": 5 * x + mask,
            "bn_add_bn_backward_slab": 8 * x + more + (mask if second else 2 * mask),
            **dict.fromkeys(("bn_finalize_stats", "bn_add_bn_finalize", "bn_update_stats"), 0.0),
        }
        # of the backward pass x, the residual and dz, in place of which it reads dy and the mask; of two gradients dz
        # is written for the rest only
        kept = {
            "bn_add_bn_forward_slab": Kept(2 * x),
            "bn_add_bn_backward_slab": Kept(3 * x, 4 / 3 if second else 1 + mask / (3 * x)),
        }
        of = (self.plans.bn_shape(n, c, h * w, self.nhwc), self.device, self.resident, element_bytes)
        planned = (
            self.plans.bn_add_bn_relu_forward_launches(*of),
            self.plans.bn_add_bn_relu_backward_launches(*of, bool(second)),
        )
        return self.bn_passes(planned, moved, kept)

    def bn_rows(self, layer: Layer) -> list[Row]:
        """With what eager does in its pool and its addition of gradients where a pass of ours does it."""
        (forward, backward), (cost, cost_back) = (
            self.bn_launches(layer.shape, layer.kind == "bn_add_relu"),
            eager(layer),
        )
        name, name_back = f"{layer.kind} forward", f"{layer.kind} backward"
        if layer.pooled:
            pool, pool_back = eager(replace(layer, kind="pool"))
            forward, name = self.bn_pool_launches(layer.shape), f"{layer.kind} pool forward"
            cost, cost_back = cost + pool, cost_back + pool_back
        if layer.forked:
            cost_back += eager(replace(layer, kind="fork"))[1]
        if layer.projection:
            of_residual = eager(replace(layer, kind="bn"))
            cost, cost_back = cost + of_residual[0], cost_back + of_residual[1]
            forward, backward = self.bn_add_bn_launches(layer.shape, "full" if layer.forked else "")
            name, name_back = "bn_add_bn_relu forward", f"bn_add_bn_relu backward{', dy2' if layer.forked else ''}"
        elif layer.forked:
            backward = self.bn_launches(layer.shape, True, second="pooled" if layer.pooled else "full")[1]
            name_back = f"{layer.kind} backward, {'pooled ' if layer.pooled else ''}dy2"
        passes = ((name, forward, cost), (name_back, backward, cost_back))
        return [
            Row(
                layer.name,
                op,
                layer.shape,
                launches,
                cost.bytes,
                cost.launches,
                self.eager_seconds(cost.bytes, cost.launches),
            )
            for op, launches, cost in passes
        ]

    # ---- avgpool_conv1x1 ----

    def left_to_torch(self, layer: Layer) -> bool:
        """As backends.left_to_torch."""
        capability = divmod(self.limits.geometry.arch, 10)
        table = LEFT_TO_TORCH.get("avgpool_conv1x1", ())
        return any(capability >= c and e <= ELEMENT and layer.shape[1] >= channels for c, e, channels in table)

    def avgpool_launches(self, shape: tuple[int, ...], out: int) -> dict[str, tuple[Launch, ...]]:
        n, c, h, w = shape
        card, plans = self.limits.geometry, self.plans
        s = plans.AvgPoolShape(n, c, h, w, out, 2, True)
        pixels = n * s.ho * s.wo
        x, weight, y = ELEMENT * n * c * h * w, ELEMENT * out * c, ELEMENT * pixels * out
        operations = 2.0 * pixels * c * out
        slab = plans.avgpool_slab_plan(s, card.sm_count, card.shared_per_sm, card.shared_per_block)
        forward, into, of_weight = (
            plans.avgpool_plan(s, getattr(plans.AvgPoolProduct, product), ELEMENT, card.sm_count)
            for product in ("forward", "input", "weight")
        )
        partial = 4 * out * c * of_weight.splits
        # each operand passes through L2 once per tile of the other one
        of = {
            "avgpool_conv1x1_forward_slab": Work(
                x + weight + y, slab.groups * x + slab.tiles_m * weight + y, operations
            ),
            "avgpool_conv1x1_forward": Work(
                x + weight + y, forward.tiles_n * x + forward.tiles_m * weight + y, operations
            ),
            "avgpool_conv1x1_input": Work(x + weight + y, into.tiles_n * y + into.tiles_m * weight + x, operations),
            "avgpool_conv1x1_weight": Work(
                x + y + partial, of_weight.tiles_n * y + of_weight.tiles_m * x + partial, operations
            ),
            "avgpool_sum_splits": Work(partial + weight),
        }
        return {
            name: self.launches(plans.avgpool_launches(s, self.nhwc, self.device, product), of.__getitem__)
            for name, product in (
                ("forward", plans.AvgPoolProduct.forward),
                ("dx", plans.AvgPoolProduct.input),
                ("dweight", plans.AvgPoolProduct.weight),
            )
        }

    # ---- sgd ----

    def sgd_launches(self, sizes: list[int], half: bool, check: bool) -> tuple[Launch, ...]:
        """The step of parameters of these sizes, float16 with float32 masters or float32; and the check before it."""
        values, (of_check, of_step) = sum(sizes), (2, 22) if half else (4, 20)  # as in traffic.py
        checks = self.launches(self.plans.sgd_check_launches(sizes, half), lambda _: Work(of_check * values))
        steps = self.launches(self.plans.sgd_step_launches(sizes, half), lambda _: Work(of_step * values))
        return checks + steps if check else steps

    def sgd_rows(self, sizes: list[int]) -> list[Row]:
        """float16 parameters with float32 masters; eager's optimizer is compared with check and step together."""
        cost = eager_optimizer(sizes)
        seconds = self.eager_seconds(cost.bytes, cost.launches)
        launches = self.sgd_launches(sizes, half=True, check=True)
        return [Row("optimizer", "sgd", (sum(sizes),), launches, cost.bytes, cost.launches, seconds)]


def predict(limits: Limits, batch: int, nhwc: bool) -> list[Row]:
    machine, rows = Machine(limits, nhwc), []
    for layer in layers(batch):
        if layer.kind in ("bn_relu", "bn_add_relu"):
            rows += machine.bn_rows(layer)
    return rows + machine.sgd_rows(parameter_sizes())


def as_json(rows: list[Row]) -> list[dict]:
    return [{**asdict(row), "bytes": row.bytes, "seconds": row.seconds, "predicted": PREDICTED} for row in rows]


def show(rows: list[Row], title: str) -> None:
    """Layers with the same op and shape share a line."""
    from rich.console import Console
    from rich.table import Table

    alike: dict[tuple, list[Row]] = {}
    for row in rows:
        alike.setdefault((row.op, row.shape), []).append(row)
    table = Table(
        *("layers", "op", "kernels", "blocks", "waves", "MB", "KB in flight", "limit", "us", "us, eager"),
        title=f"{title}; {PREDICTED}",
    )
    for (op, shape), those in alike.items():
        row = those[0]
        name = row.layer if len(those) == 1 else f"{len(those)} as {row.layer}"
        columns = [f"{name}\n{'x'.join(map(str, shape))}", op]
        for text in (
            lambda launch: launch.kernel.split("<")[0],
            lambda launch: str(launch.blocks),
            lambda launch: f"{launch.waves:.2f}",
            lambda launch: f"{launch.dram / 1e6:.1f}",
            lambda launch: f"{launch.in_flight / 1024:.0f}" if launch.in_flight else "",
            lambda launch: launch.limit,
            lambda launch: f"{launch.seconds * 1e6:.1f}",
        ):
            columns.append("\n".join(map(text, row.launches)))
        table.add_row(*columns, f"{row.eager_seconds * 1e6:.1f}", end_section=True)
    console = Console(width=150)
    console.print(table)
    ours, eagers = sum(row.seconds for row in rows), sum(row.eager_seconds for row in rows)
    launches = sum(len(row.launches) for row in rows), sum(row.eager_launches for row in rows)
    moved = sum(row.bytes for row in rows), sum(row.eager_bytes for row in rows)
    console.print(
        f"these layers of one step: {ours * 1e3:.2f} ms, eager {eagers * 1e3:.2f} ms; "
        f"{moved[0] / 1e9:.1f} GB, eager {moved[1] / 1e9:.1f} GB; {launches[0]} launches, eager {launches[1]}"
    )
    console.print(PREDICTED)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--card", default="h100", help=", ".join(LIMITS))
    options.add_argument("--batch", type=int, default=256)
    options.add_argument("--layout", choices=("NHWC", "NCHW"), default="NHWC")
    options.add_argument("--json", type=Path, help="a file for the rows")
    given = options.parse_args()
    try:
        limits = limits_of(given.card)
    except ValueError as error:
        options.error(str(error))
    if given.batch < 1:
        options.error(f"batch is {given.batch}; accepted: at least 1")
    rows = predict(limits, given.batch, given.layout == "NHWC")
    show(rows, f"ResNet-50-D on {limits.name}, batch {given.batch}, {given.layout}, float16")
    if given.json:
        given.json.write_text(json.dumps(as_json(rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
