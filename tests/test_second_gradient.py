"""A shortcut's gradient is handed to the node that made its tensor, and nobody can see a difference."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, relative_error
from torch.utils.checkpoint import checkpoint

import fasttricks
import fasttricks.models
from fasttricks.ops import second_gradient

layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The gradients that were handed over."""
    gradients: list[torch.Tensor] = []
    give = second_gradient.give

    def counted(node: Any, gradient: torch.Tensor) -> None:
        gradients.append(gradient)
        give(node, gradient)

    monkeypatch.setattr(second_gradient, "give", counted)
    return gradients


# on every backend that has kernels: the reference has torch's own graph
on_every_backend = pytest.mark.usefixtures("raw_ops")


@dataclass
class Blocks:
    """A stem and two residual blocks: y1 is read by the first block, y2 by the second, each by both its branches."""

    x: torch.Tensor
    weights: list[torch.Tensor]

    @staticmethod
    def random(layout: torch.memory_format = torch.contiguous_format, dtype: torch.dtype = torch.float64) -> Blocks:
        x = torch.randn(3, 4, 5, 3, dtype=dtype).contiguous(memory_format=layout)
        vectors = [torch.rand(4, dtype=dtype) + 0.5 for _ in range(6)]
        kernels = [torch.randn(4, 4, 1, 1, dtype=dtype) for _ in range(2)]
        return Blocks(x, [t.requires_grad_() for t in (*vectors, *kernels)])

    def outputs(self, fused: bool = True) -> list[torch.Tensor]:
        w1, b1, w2, b2, w3, b3, k2, k3 = self.weights
        y = self._norm(self.x, None, w1, b1, fused)
        ys = [y]
        for weight, bias, kernel in ((w2, b2, k2), (w3, b3, k3)):
            y = self._norm(F.conv2d(y, kernel), y, weight, bias, fused)
            ys.append(y)
        return ys

    @staticmethod
    def _norm(x: torch.Tensor, residual: torch.Tensor | None, weight: Any, bias: Any, fused: bool) -> torch.Tensor:
        if fused and residual is None:
            return fasttricks.bn_relu(x, weight, bias)
        if fused:
            return fasttricks.bn_add_relu(x, residual, weight, bias)
        z = F.batch_norm(x, None, None, weight, bias, training=True)
        return F.relu(z if residual is None else z + residual)

    def gradients(self, loss: torch.Tensor, **options: Any) -> list[torch.Tensor]:
        for w in self.weights:
            w.grad = None
        loss.backward(**options)
        return [w.grad for w in self.weights if w.grad is not None]


def loss_of(y: torch.Tensor) -> torch.Tensor:
    return (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).square().sum()


def assert_equal_to_eager(got: list[torch.Tensor], blocks: Blocks, bound: float = 1e-10) -> None:
    want = blocks.gradients(loss_of(blocks.outputs(fused=False)[-1]))
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < bound


@on_every_backend
@layouts
def test_both_blocks_hand_their_shortcuts_gradient_over(
    layout: torch.memory_format, handed: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = Blocks.random(layout)
    got = blocks.gradients(loss_of(blocks.outputs()[-1]))
    assert len(handed) == 2
    assert_equal_to_eager(got, blocks)
    monkeypatch.setattr(second_gradient, "receiver", lambda ctx, argument: None)
    for a, b in zip(got, blocks.gradients(loss_of(blocks.outputs()[-1])), strict=True):
        assert torch.equal(a, b)  # autograd's own addition rounds the same


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_sum_is_rounded_as_autograd_rounds_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = Blocks.random(dtype=torch.float32)
    blocks.x = blocks.x.to(dtype)
    blocks.weights[-2:] = [k.detach().to(dtype).requires_grad_() for k in blocks.weights[-2:]]
    got = blocks.gradients(loss_of(blocks.outputs()[-1]))
    monkeypatch.setattr(second_gradient, "receiver", lambda ctx, argument: None)
    for a, b in zip(got, blocks.gradients(loss_of(blocks.outputs()[-1])), strict=True):
        assert torch.equal(a, b)


# ---- whoever looks at the gradient of a block's output sees the whole of it ----

Seen = dict[str, torch.Tensor]


def hook_at_once(y: torch.Tensor, seen: Seen) -> None:
    y.register_hook(lambda g: seen.update(y=g))


def hook_of_all(y: torch.Tensor, seen: Seen) -> None:
    torch.autograd.graph.register_multi_grad_hook((y,), lambda gs: seen.update(y=gs[0]))


def hook_before_node(y: torch.Tensor, seen: Seen) -> None:
    y.grad_fn.register_prehook(lambda gs: seen.update(y=gs[0]))


def hook_after_node(y: torch.Tensor, seen: Seen) -> None:
    y.grad_fn.register_hook(lambda _, gs: seen.update(y=gs[0]))


def hook_that_changes(y: torch.Tensor, seen: Seen) -> None:
    y.register_hook(lambda g: seen.setdefault("y", g) * 1.0)


def retain(y: torch.Tensor, seen: Seen) -> None:
    y.retain_grad()
    seen["kept"] = y


OBSERVERS = (hook_at_once, hook_of_all, hook_before_node, hook_after_node, hook_that_changes, retain)


@pytest.mark.parametrize("late", [False, True], ids=["before it is read", "after the forward pass"])
@pytest.mark.parametrize("observe", OBSERVERS, ids=lambda f: f.__name__)
def test_observers_of_an_output(
    observe: Callable[[torch.Tensor, Seen], None], late: bool, handed: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    blocks, seen, expected = Blocks.random(), Seen(), Seen()
    norm = Blocks._norm

    def observed(x: torch.Tensor, residual: Any, *rest: Any) -> torch.Tensor:
        y = norm(x, residual, *rest)
        if residual is None:
            observe(y, seen)
        return y

    if not late:
        monkeypatch.setattr(Blocks, "_norm", staticmethod(observed))
    ys = blocks.outputs()
    if late:
        observe(ys[0], seen)
    loss = loss_of(ys.pop())
    del ys  # the hooks belong to the node, which outlives the tensor
    got = blocks.gradients(loss)
    monkeypatch.undo()
    assert_equal_to_eager(got, blocks)
    ys = blocks.outputs(fused=False)
    hook_at_once(ys[0], expected)
    blocks.gradients(loss_of(ys[-1]))
    value = seen["kept"].grad if "kept" in seen else seen["y"]
    assert relative_error(value, expected["y"]) < 1e-10


@pytest.mark.parametrize("which", ["output", "output and weight", "weight", "last weight"])
@pytest.mark.parametrize("how", ["grad", "edge", "backward"])
def test_gradients_of_chosen_tensors(which: str, how: str, handed: list[torch.Tensor]) -> None:
    blocks = Blocks.random()

    def chosen(fused: bool) -> list[torch.Tensor]:
        ys = blocks.outputs(fused)
        of = {"output": [ys[0]], "output and weight": [ys[1], blocks.weights[0]], "weight": blocks.weights[:2]}
        inputs = of.get(which, blocks.weights[4:6])
        if how == "backward":
            for t in inputs:
                t.grad = None
                t.retain_grad()
            loss_of(ys[-1]).backward(inputs=inputs)
            return [t.grad for t in inputs]
        asked = [torch.autograd.graph.get_gradient_edge(t) for t in inputs] if how == "edge" else inputs
        return list(torch.autograd.grad(loss_of(ys[-1]), asked))

    for got, want in zip(chosen(True), chosen(False), strict=True):
        assert relative_error(got, want) < 1e-10
    assert not handed


def test_module_hooks_see_the_whole_gradient() -> None:
    model = fasttricks.models.resnet18("d", num_classes=3, width=4).double()
    seen: Seen = {}
    model.layer1[0].register_full_backward_hook(lambda m, grad_in, grad_out: seen.update(y=grad_out[0]))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model(x).square().sum().backward()
    eager = fasttricks.models.resnet18("d", num_classes=3, width=4, fused=False).double()
    eager.load_state_dict(model.state_dict())
    expected: Seen = {}
    eager.layer1[0].register_full_backward_hook(lambda m, grad_in, grad_out: expected.update(y=grad_out[0]))
    eager(x).square().sum().backward()
    assert relative_error(seen["y"], expected["y"]) < 1e-8


# ---- other passes over the same graph ----


def test_two_backward_passes_over_one_graph(handed: list[torch.Tensor]) -> None:
    blocks = Blocks.random()
    loss = loss_of(blocks.outputs()[-1])
    loss.backward(retain_graph=True)
    once = [w.grad.clone() for w in blocks.weights]
    loss.backward()
    assert len(handed) == 4
    for w, g in zip(blocks.weights, once, strict=True):
        assert torch.equal(w.grad, 2 * g)


def test_a_backward_pass_that_failed_leaves_nothing(handed: list[torch.Tensor]) -> None:
    """The second block hands over, then the kernel of its convolution raises before the first block runs."""
    blocks = Blocks.random()
    loss = loss_of(blocks.outputs()[-1])

    def fail(gradient: torch.Tensor) -> None:
        raise RuntimeError("planned")

    handle = blocks.weights[-1].register_hook(fail)
    with pytest.raises(RuntimeError, match="planned"):
        loss.backward(retain_graph=True)
    assert handed
    handle.remove()
    assert_equal_to_eager(blocks.gradients(loss), blocks)


def test_threads_over_one_graph() -> None:
    blocks = Blocks.random()
    loss = loss_of(blocks.outputs()[-1])
    want = blocks.gradients(loss, retain_graph=True)
    rounds = 20
    threads = [
        threading.Thread(target=lambda: [loss.backward(retain_graph=True) for _ in range(rounds)]) for _ in range(2)
    ]
    for w in blocks.weights:
        w.grad = None
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for w, g in zip(blocks.weights, want, strict=True):
        assert relative_error(w.grad, 2 * rounds * g) < 1e-12


def test_second_derivatives() -> None:
    blocks = Blocks.random()

    def of(*weights: torch.Tensor) -> torch.Tensor:
        return Blocks(blocks.x, list(weights)).outputs()[-1]

    assert torch.autograd.gradgradcheck(of, blocks.weights, atol=1e-4, nondet_tol=1e-12)
    loss = loss_of(blocks.outputs()[-1])
    loss.backward(create_graph=True)
    (first,) = torch.autograd.grad(sum(w.grad.square().sum() for w in blocks.weights), blocks.weights[:1])
    for w in blocks.weights:
        w.grad = None
    loss_of(blocks.outputs(fused=False)[-1]).backward(create_graph=True)
    (want,) = torch.autograd.grad(sum(w.grad.square().sum() for w in blocks.weights), blocks.weights[:1])
    assert relative_error(first, want) < 1e-8


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_within_a_checkpoint(reentrant: bool) -> None:
    blocks = Blocks.random()

    def of(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return Blocks(x, list(weights)).outputs()[-1]

    x = blocks.x.clone().requires_grad_()
    got = blocks.gradients(loss_of(checkpoint(of, x, *blocks.weights, use_reentrant=reentrant)))
    assert_equal_to_eager(got, blocks)


def test_recomputed_outputs() -> None:
    blocks = Blocks.random()
    with fasttricks.recompute():
        loss = loss_of(blocks.outputs()[-1])
    assert_equal_to_eager(blocks.gradients(loss), blocks)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend: str) -> None:
    blocks = Blocks.random()

    def of(*weights: torch.Tensor) -> torch.Tensor:
        return loss_of(Blocks(blocks.x, list(weights)).outputs()[-1])

    compiled = torch.compile(of, fullgraph=True, backend=backend)
    assert_equal_to_eager(blocks.gradients(compiled(*blocks.weights)), blocks)


def test_compiled_autograd() -> None:
    blocks = Blocks.random()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        got = blocks.gradients(loss_of(blocks.outputs()[-1]))
    assert_equal_to_eager(got, blocks)


# ---- other graphs ----


def compared(fused: Callable[[Any], torch.Tensor], leaves: list[torch.Tensor]) -> None:
    """fused takes fasttricks or `Eager`; the gradients of both are equal."""

    def grads(ops: Any) -> list[torch.Tensor]:
        for leaf in leaves:
            leaf.grad = None
        loss_of(fused(ops)).backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    got, want = grads(fasttricks), grads(Eager)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-10


class Eager:
    """The functions of fasttricks in operations of torch."""

    @staticmethod
    def bn_relu(x: torch.Tensor, weight: Any = None, bias: Any = None) -> torch.Tensor:
        return F.relu(F.batch_norm(x, None, None, weight, bias, training=True))

    @staticmethod
    def bn_add_relu(x: torch.Tensor, residual: torch.Tensor, weight: Any = None, bias: Any = None) -> torch.Tensor:
        return F.relu(F.batch_norm(x, None, None, weight, bias, training=True) + residual)

    @staticmethod
    def bn_add_bn_relu(x: torch.Tensor, residual: torch.Tensor, weight: Any = None, bias: Any = None) -> torch.Tensor:
        return F.relu(
            F.batch_norm(x, None, None, weight, bias, training=True) + F.batch_norm(residual, None, None, training=True)
        )

    @staticmethod
    def avgpool_conv1x1(x: torch.Tensor, weight: torch.Tensor, *, ceil_mode: bool) -> torch.Tensor:
        return F.conv2d(F.avg_pool2d(x, 2, ceil_mode=ceil_mode, count_include_pad=False), weight)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("size", [(6, 4), (7, 5), (1, 3), (4, 5)], ids=str)
@pytest.mark.parametrize("ceil_mode", [False, True])
@layouts
@on_every_backend
def test_the_gradient_of_a_pool(
    size: tuple[int, int], ceil_mode: bool, layout: torch.memory_format, handed: list[torch.Tensor]
) -> None:
    """A projection block of ResNet-D: its shortcut pools the output of the block before."""
    if min(size) == 1 and not ceil_mode:
        size = (2, 2)
    x, weight, main, shortcut = random(6, 4, *size), random(4), random(5, 4, 2, 2), random(5, 4, 1, 1)

    def block(ops: Any) -> torch.Tensor:
        y = ops.bn_relu(x.contiguous(memory_format=layout), weight)
        padded = F.pad(y, (0, y.shape[3] % 2, 0, y.shape[2] % 2)) if ceil_mode else y
        out = F.conv2d(padded, main, stride=2)
        return ops.bn_add_relu(out, ops.avgpool_conv1x1(y, shortcut, ceil_mode=ceil_mode))

    compared(block, [x, weight, main, shortcut])
    assert len(handed) == 1
    assert handed[0].shape[2:] == tuple((s + ceil_mode) // 2 for s in size)


@on_every_backend
def test_an_output_that_only_a_pool_reads() -> None:
    """A transition of DenseNet."""
    x, weight, kernel = random(2, 4, 5, 6), random(4), random(3, 4, 1, 1)
    compared(lambda ops: ops.avgpool_conv1x1(ops.bn_relu(x, weight), kernel, ceil_mode=True), [x, weight, kernel])


def test_an_output_that_only_a_shortcut_reads() -> None:
    x, z, weight = random(2, 4, 3, 3), random(2, 4, 3, 3), random(4)
    compared(lambda ops: ops.bn_add_relu(z, ops.bn_relu(x, weight)), [x, z, weight])


def test_an_output_that_two_shortcuts_read(handed: list[torch.Tensor]) -> None:
    x, z, w, weight = random(2, 4, 3, 3), random(2, 4, 3, 3), random(2, 4, 3, 3), random(4)

    def twice(ops: Any) -> torch.Tensor:
        y = ops.bn_relu(x, weight)
        return ops.bn_add_relu(z, y, weight) * ops.bn_add_relu(w, y, weight)

    compared(twice, [x, z, w, weight])
    assert len(handed) == 1


def test_an_output_that_is_both_operands() -> None:
    x, weight = random(2, 4, 3, 3), random(4)

    def same(ops: Any) -> torch.Tensor:
        y = ops.bn_relu(x, weight)
        return ops.bn_add_relu(y, y, weight)

    compared(same, [x, weight])


def test_a_projection_block_receives(handed: list[torch.Tensor]) -> None:
    a, b, z, weight, kernel = random(2, 4, 3, 3), random(2, 4, 3, 3), random(2, 4, 3, 3), random(4), random(4, 4, 1, 1)

    def blocks(ops: Any) -> torch.Tensor:
        y = ops.bn_add_bn_relu(a, b, weight)
        return ops.bn_add_relu(F.conv2d(y, kernel) + z, y)

    compared(blocks, [a, b, z, weight, kernel])
    assert not handed  # the last BatchNorm has no parameter that would say which gradients backward was called for
    compared(lambda ops: ops.bn_add_relu(F.conv2d(y := ops.bn_add_bn_relu(a, b), kernel), y, weight), [a, b, kernel])
    assert len(handed) == 1


@pytest.mark.parametrize("change", ["view", "slice", "cast"])
def test_a_tensor_made_from_the_output(change: str, handed: list[torch.Tensor]) -> None:
    x, z, weight, kernel = random(2, 4, 3, 3), random(2, 4, 3, 3), random(4), random(4, 4, 1, 1)

    def changed(ops: Any) -> torch.Tensor:
        y = ops.bn_relu(x, weight)
        main = F.conv2d(y, kernel)
        other = {"view": y.view(2, 2, 2, 3, 3).view(2, 4, 3, 3), "slice": y[:, :, :, :1].expand(2, 4, 3, 3)}
        return ops.bn_add_relu(main + z, other.get(change, y.float().double() if change == "cast" else y), weight)

    compared(changed, [x, z, weight, kernel])
    assert not handed


@pytest.mark.parametrize("frozen", ["norms", "convolutions", "all but the input"])
def test_frozen_parameters(frozen: str) -> None:
    blocks = Blocks.random()
    blocks.x.requires_grad_(frozen != "convolutions")
    for i, w in enumerate(blocks.weights):
        w.requires_grad_({"norms": i >= 6, "convolutions": i < 6}.get(frozen, False))

    def grads(fused: bool) -> list[torch.Tensor]:
        leaves = [t for t in (blocks.x, *blocks.weights) if t.requires_grad]
        for t in leaves:
            t.grad = None
        loss_of(blocks.outputs(fused)[-1]).backward()
        return [t.grad for t in leaves]

    for got, want in zip(grads(True), grads(False), strict=True):
        assert relative_error(got, want) < 1e-10


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_a_pool_left_to_torch(ceil_mode: bool, handed: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch's pool and convolution are faster: no pooled tensor is saved, and the gradient is handed over."""
    from fasttricks.ops import avgpool_conv1x1 as op

    monkeypatch.setattr(op, "_chosen", lambda x: op.BY_TORCH)
    x, weight, main, shortcut = random(2, 4, 6, 4), random(4), random(5, 4, 2, 2), random(5, 4, 1, 1)

    def block(ops: Any) -> torch.Tensor:
        y = ops.bn_relu(x, weight)
        return ops.bn_add_relu(F.conv2d(y, main, stride=2), ops.avgpool_conv1x1(y, shortcut, ceil_mode=ceil_mode))

    compared(block, [x, weight, main, shortcut])
    assert len(handed) == 1
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        y = fasttricks.avgpool_conv1x1(x, shortcut, ceil_mode=ceil_mode)
    assert saved == [tuple(x.shape), tuple(shortcut.shape)]
    (twice,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert torch.autograd.gradcheck(lambda t: fasttricks.avgpool_conv1x1(t, shortcut, ceil_mode=ceil_mode), x)
    assert twice.requires_grad
