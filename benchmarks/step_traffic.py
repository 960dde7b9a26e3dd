"""Bytes, launches and saved bytes of one training step of ResNet-50-D: the last part of make bench-traffic.

Everything that is no convolution, at batch 256 and 224 pixels, NHWC, float16, on an H100: of eager torch, by its
kernels' formulas (resnet50d.py); of our ops, each by itself; and of these ops as they are, which hand gradients along
the residual from block to block.

Bytes are those of DRAM: what a launch stores, and the first load of each 32 bytes. The ops run in the emulator on
a few images of every layer's shape and on twice as many, and bytes are linear in the batch. Which of them stay on the
chip, and the number of launches, is what their host code plans for the card (predict.py). Where that is a part, the
emulated card also keeps one, the same at both batches, and what the real card keeps beyond it is subtracted: it is not
read again. Where no op of ours runs, torch's formula is taken. The operands of avgpool_conv1x1's products belong to a
convolution and are subtracted.

Saved bytes: the tensors that nodes of the autograd graph save which are no convolutions, parameters left out.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import emulated
import predict
import torch
from resnet50d import ELEMENT, Cost, Layer, eager, eager_optimizer, layers, parameter_sizes

from fasttricks.models import resnet50

BATCH, EPS = 256, 1e-5
NHWC = torch.channels_last
# the parameters of a bottleneck, as in traffic.py
SGD_SIZES = (128 * 512, 128, 128, 128 * 128 * 9, 128, 128, 512 * 128, 512, 512)
Passes = tuple[Cost, Cost]  # forward and backward
BLOCKS = 8  # of the emulated card, if they keep a part of a tensor


class Metered:
    """The ops in the emulator, scaled to BATCH images on a card."""

    def __init__(self, card: str = "h100") -> None:
        self.machine = predict.Machine(predict.limits_of(card), nhwc=True)
        self.library, self.ops = emulated.load(), torch.ops.fasttricks_emulated

    def few(self, shape: tuple[int, ...]) -> int:
        return max(1, 100_000 // math.prod(shape[1:]))

    def room(self, shape: tuple[int, ...], arrays: int) -> int:
        """Bytes that an emulated block keeps of a part of so many tensors: one of 24 rows of 256 threads with 8
        columns."""
        rows = 2 * self.few(shape) * math.prod(shape[1:]) / (BLOCKS * 256 * 8)
        return arrays * ELEMENT * 256 * 8 * math.ceil(rows / 24)

    def of_batch(self, shape: tuple[int, ...], bytes_of: Callable[[int], list[int]]) -> list[float]:
        """Of BATCH images, from those of a few and of twice as many, which are enough for all the emulated blocks."""
        few = self.few(shape)
        pairs = zip(bytes_of(few), bytes_of(2 * few), strict=True)
        return [once + (BATCH / few - 1) * (twice - once) for once, twice in pairs]

    def dram(self, run: Callable[[], Any], kept: float = 0.0, room: int = 0) -> tuple[Any, int]:
        """What `run` returns, and its bytes. kept: the share of the tensors that stays on the chip, in one launch; if
        a part, `room` bytes of each block."""
        partly = 2 * (self.machine.plans.BN_SLAB_STATIC + room)
        shared = 228 << 10 if kept == 1 else partly if kept else 0
        with self.library.shared_per_sm(shared), self.library.metered() as meter:
            result = run()
        assert (meter.cooperative_launches > 0) == (kept > 0)
        assert not 0 < kept < 1 or meter.blocks == BLOCKS
        return result, meter.dram

    def kept(self, shape: tuple[int, ...], residual: bool, two: bool = False) -> list[float]:
        """The shares of x that the forward pass keeps on the chip, and of x and dz that the backward pass keeps."""
        planned = self.machine.bn_launches(shape, residual, second="full" if two else "")
        return self.shares(planned, shape, (1, 2))

    def kept_of_pair(self, shape: tuple[int, ...], second: str) -> list[float]:
        """As kept, of two BatchNorms: x and the residual, and dz."""
        return self.shares(self.machine.bn_add_bn_launches(shape, second), shape, (2, 3))

    def shares(self, planned: Iterable[Any], shape: tuple[int, ...], arrays: tuple[int, ...]) -> list[float]:
        size = ELEMENT * math.prod(shape)
        return [
            self.machine.kept(launches, shape, count) / (count * size)
            for launches, count in zip(planned, arrays, strict=True)
        ]

    def on_the_card(self, moved: float, shape: tuple[int, ...], kept: float, arrays: int, saved: float = 1.0) -> float:
        """Bytes of a pass of BATCH images, from those of a card that keeps what the emulated one does. saved: bytes of
        DRAM for each that is kept."""
        if not 0 < kept < 1:
            return moved
        return moved - saved * (kept * arrays * ELEMENT * math.prod(shape) - BLOCKS * self.room(shape, arrays))

    @functools.cache  # noqa: B019
    def bn(self, shape: tuple[int, ...], residual: bool) -> Passes:
        planned, kept, c = self.machine.bn_launches(shape, residual), self.kept(shape, residual), shape[1]

        def bytes_of(batch: int) -> list[int]:
            x, z, dy = (torch.randn(batch, *shape[1:]).half().contiguous(memory_format=NHWC) for _ in range(3))
            weight, bias = torch.rand(c) + 0.5, torch.rand(c)
            room = self.room(shape, 1)
            if residual:
                (_, mean, var, mask), forward = self.dram(
                    lambda: self.ops.bn_add_relu_forward(x, z, weight, bias, EPS), kept[0], room
                )
            else:
                (_, mean, var), forward = self.dram(
                    lambda: self.ops.bn_relu_forward(x, weight, bias, EPS), kept[0], room
                )
                mask = None
            given = (weight, bias, mean, var, EPS, True, residual)
            run = functools.partial(self.ops.bn_relu_backward, dy, x, mask, *given)
            return [forward, self.dram(run, kept[1], self.room(shape, 2))[1]]

        forward, backward = (
            self.on_the_card(moved, shape, share, arrays)
            for moved, share, arrays in zip(self.of_batch(shape, bytes_of), kept, (1, 2), strict=True)
        )
        return Cost(forward, len(planned[0])), Cost(backward, len(planned[1]))

    @functools.cache  # noqa: B019
    def bn_pool(self, shape: tuple[int, ...]) -> Cost:
        """The forward pass of bn_add_relu with the 2x2 means of its output."""

        def bytes_of(batch: int) -> list[int]:
            x, z, *_ = inputs(batch, shape, False)
            moved = None, None, None, None, False
            return [self.dram(lambda: self.ops.bn_add_relu_pool_forward(x, z, None, None, EPS, *moved))[1]]

        return Cost(self.of_batch(shape, bytes_of)[0], len(self.machine.bn_pool_launches(shape)))

    @functools.cache  # noqa: B019
    def bn_with_second_gradient(self, shape: tuple[int, ...], pooled: bool) -> Cost:
        """The backward pass of bn_add_relu."""
        planned = self.machine.bn_launches(shape, True, second="pooled" if pooled else "full")[1]
        kept = self.kept(shape, True, two=True)[1]

        def bytes_of(batch: int) -> list[int]:
            x, z, dy, second = inputs(batch, shape, pooled)
            (_, mean, var, mask), _ = self.dram(lambda: self.ops.bn_add_relu_forward(x, z, None, None, EPS))
            given = (None, None, mean, var, EPS, True, True)
            run = functools.partial(self.ops.bn_relu_backward, dy, x, mask, *given, second)
            return [self.dram(run, kept, self.room(shape, 2))[1]]

        return Cost(self.on_the_card(self.of_batch(shape, bytes_of)[0], shape, kept, 2), len(planned))

    @functools.cache  # noqa: B019
    def bn_add_bn(self, shape: tuple[int, ...], second: str) -> Passes:
        """second: "full" or "pooled", if there is a second gradient of y."""
        planned, kept = self.machine.bn_add_bn_launches(shape, second), self.kept_of_pair(shape, second)

        def bytes_of(batch: int) -> list[int]:
            x, z, dy, other = inputs(batch, shape, second == "pooled")
            affine = [torch.rand(shape[1]) for _ in range(4)]
            (_, *statistics, mask), forward = self.dram(
                lambda: self.ops.bn_add_bn_relu_forward(x, z, *affine, EPS, EPS), kept[0], self.room(shape, 2)
            )
            given = (affine[0], affine[2], *statistics, EPS, EPS, True, other if second else None)
            run = functools.partial(self.ops.bn_add_bn_relu_backward, dy, x, z, mask, *given)
            return [forward, self.dram(run, kept[1], self.room(shape, 3))[1]]

        forward, backward = self.of_batch(shape, bytes_of)
        forward = self.on_the_card(forward, shape, kept[0], 2)
        # of dz that is kept, the sum with a second gradient is not written either
        backward = self.on_the_card(backward, shape, kept[1], 3, saved=4 / 3 if second else 1.0)
        return Cost(forward, len(planned[0])), Cost(backward, len(planned[1]))

    @functools.cache  # noqa: B019
    def avgpool_conv1x1(self, shape: tuple[int, ...]) -> Passes:
        """Without the operands of the three products, of which each has two and a result."""
        c, h, w = shape[1:]

        def bytes_of(batch: int) -> list[int]:
            x = torch.randn(batch, c, h, w).half().contiguous(memory_format=NHWC)
            weight = torch.randn(2 * c, c, 1, 1).half()
            y, forward = self.dram(lambda: self.ops.avgpool_conv1x1_forward(x, weight, None, 2, True))
            dx, dweight = (
                self.dram(lambda of=of: self.ops.avgpool_conv1x1_backward(y, x, weight, 2, True, *of, False))[1]
                for of in ((True, False), (False, True))
            )
            product = ELEMENT * (y.numel() // 2 + weight.numel() + y.numel())
            return [forward - product, dx + dweight - 2 * product]

        planned = self.machine.avgpool_launches(shape, 2 * c)
        forward, backward = self.of_batch(shape, bytes_of)
        products = {name: len(launches) - 1 for name, launches in planned.items()}  # a convolution has one launch each
        return Cost(forward, products["forward"]), Cost(backward, products["dx"] + products["dweight"])

    def optimizer(self, sizes: list[int]) -> Cost:
        params = [torch.randn(size).half() for size in SGD_SIZES]
        lists = [[torch.randn_like(p) for p in params], [torch.zeros(p.shape) for p in params]]
        steps, masters, found_inf = [torch.ones(()) for _ in params], [p.float() for p in params], torch.zeros(())
        groups = ([len(params)], [torch.tensor(0.1)], [0.9], [0.0], [1e-4], [False], [False], [0.0])

        def run() -> None:
            self.ops.sgd_check(lists[0], [], [], found_inf, None, None)
            self.ops.sgd_step(params, *lists, steps, masters, *groups, 0.0, False, 0.0, None, found_inf, None, None)

        (row,) = self.machine.sgd_rows(sizes)
        return Cost(self.dram(run)[1] / sum(SGD_SIZES) * sum(sizes), len(row.launches))


def metered(layer: Layer, ops: Metered) -> Passes:
    """What each op moves by itself."""
    if layer.kind in ("bn_relu", "bn_add_relu"):
        return ops.bn(layer.shape, layer.kind == "bn_add_relu")
    if layer.kind == "pool" and not ops.machine.left_to_torch(layer):
        return ops.avgpool_conv1x1(layer.shape)
    return eager(layer)


# ---- ops along the residual ----


def inputs(batch: int, shape: tuple[int, ...], pooled: bool) -> tuple[torch.Tensor, ...]:
    """x, residual, dy and a second gradient of y."""
    _, c, h, w = shape
    sizes = [(h, w)] * 3 + [((h + 1) // 2, (w + 1) // 2) if pooled else (h, w)]
    x, z, dy, second = (torch.randn(batch, c, *size).half().contiguous(memory_format=NHWC) for size in sizes)
    return x, z, dy, second


def adding(layer: Layer, ops: Metered) -> Passes:
    """bn_add_relu with the means of its output and a second gradient, and two BatchNorms in one op."""
    if layer.projection:
        return ops.bn_add_bn(layer.shape, ("pooled" if layer.pooled else "full") if layer.forked else "")
    forward, backward = metered(layer, ops)
    if layer.pooled:
        forward = ops.bn_pool(layer.shape)
    return forward, ops.bn_with_second_gradient(layer.shape, layer.pooled) if layer.forked else backward


def nothing(layer: Layer, ops: Metered) -> Passes:
    return Cost(), Cost()


def adding_gradients(layer: Layer, ops: Metered) -> Passes:
    """Only those of the first block's input, which comes from the max pool."""
    return eager(layer) if layer.name == "layer1.0" else nothing(layer, ops)


# kind of a layer -> what replaces `metered`
ALONG_THE_RESIDUAL: dict[str, Callable[[Layer, Metered], Passes]] = {
    "bn_add_relu": adding,
    "bn": nothing,
    "pool": nothing,
    "fork": adding_gradients,
}


def along_the_residual(layer: Layer, ops: Metered) -> Passes:
    return ALONG_THE_RESIDUAL.get(layer.kind, metered)(layer, ops)


# ---- what the graph saves ----


def nodes_of(root: Any) -> Iterator[Any]:
    seen, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions]


def saved_tensors(node: Any) -> Iterator[torch.Tensor]:
    found = getattr(node, "saved_tensors", None) or [
        getattr(node, name) for name in dir(node) if name.startswith("_saved_")
    ]
    return (t for t in found if isinstance(t, torch.Tensor))


def saved_bytes(fused: bool, batch: int = BATCH) -> int:
    """Of storages, each once. Without max pool, head and convolutions."""
    with torch.device("meta"):
        model = resnet50("d", fused=fused).half().to(memory_format=NHWC)
        images = torch.empty(batch, 3, 224, 224, dtype=torch.float16).contiguous(memory_format=NHWC)
    own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    for node in nodes_of(model(images).grad_fn):
        if not any(part in node.name().lower() for part in ("conv", "maxpool", "addmm", "mean")):
            for t in saved_tensors(node):
                kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
    return sum(size for storage, size in kept.items() if storage not in own)


# ---- the lines ----


# by side, what a layer moves
SIDES: dict[str, Callable[[Layer, Metered], Passes]] = {
    "eager": lambda layer, ops: eager(layer),
    "each op by itself": metered,
    "along the residual": along_the_residual,
}


@dataclass(frozen=True)
class Step:
    side: str
    bytes: float
    launches: int
    saved: int


def steps(card: str = "h100") -> list[Step]:
    ops, of_model, sizes = Metered(card), layers(BATCH), parameter_sizes()
    optimizers = {True: eager_optimizer(sizes), False: ops.optimizer(sizes)}
    saved = {True: saved_bytes(fused=False), False: saved_bytes(fused=True)}
    made = []
    for side, passes in SIDES.items():
        is_eager = side == "eager"
        cost = sum((one for layer in of_model for one in passes(layer, ops)), optimizers[is_eager])
        made.append(Step(side, cost.bytes, cost.launches, saved[is_eager]))
    return made


def show(made: list[Step]) -> None:
    print(f"one training step of ResNet-50-D, batch {BATCH}, NHWC, float16, on an H100: what is no convolution")
    for step in made:
        share = step.bytes / made[0].bytes
        print(
            f"{step.side:25} {step.bytes / 1e9:6.1f} GB, {share:6.1%} of eager's; {step.launches:4} launches; "
            f"{step.saved / 1e9:5.2f} GB saved for the backward pass"
        )


def main() -> None:
    made = steps()
    show(made)
    target = Path(__file__).parent / "results" / "step_traffic.json"
    target.write_text(json.dumps([asdict(step) for step in made], indent=1) + "\n")


if __name__ == "__main__":
    main()
