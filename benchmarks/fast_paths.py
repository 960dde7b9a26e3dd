"""Every wide path of the CUDA kernels against torch in float64: python benchmarks/fast_paths.py [--small].

FASTTRICKS_TEST_SM_COUNT and FASTTRICKS_TEST_SHARED_BYTES make launch plans for a smaller card, so that --small tensors,
which compute-sanitizer can bear, take every path: one launch that keeps everything or a part on the chip, three
launches, and the pooled product with several tiles of columns for each tile of rows. Without --small, NHWC activations
of 50 to 100 MB, of which a part stays on the chip.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
import torch.nn.functional as F

import fasttricks

EPS = 1e-5
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
# of bn_relu: N, C, H = W; of avgpool_conv1x1: N, C, Cout, H = W
SMALL = (((5, 40, 8), (3, 64, 14), (6, 24, 7)), ((9, 64, 272, 14), (2, 40, 136, 16)))
LARGE = (((64, 64, 112), (64, 256, 56), (256, 2048, 7)), ((32, 256, 512, 56), (32, 512, 1024, 28)))


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.detach().double() - want).norm() / want.norm())


def bn_errors(n: int, c: int, size: int, memory_format: torch.memory_format, add: bool) -> Iterator[tuple[str, float]]:
    """Of the output, the statistics and all gradients, as the output's own mask lets gradients pass."""
    x, *residual, dy = (
        torch.randn(n, c, size, size, dtype=torch.float16).contiguous(memory_format=memory_format)
        for _ in range(2 + add)
    )
    weight, bias, mean, var = torch.rand(c) + 0.5, torch.randn(c), torch.zeros(c), torch.ones(c)
    leaves = [t.requires_grad_() for t in (x, *residual, weight, bias)]
    op = fasttricks.bn_add_relu if add else fasttricks.bn_relu
    y = op(*leaves, mean, var, momentum=1.0)
    grads = torch.autograd.grad(y, leaves, dy)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    pre = F.batch_norm(exact[0], None, None, exact[-2], exact[-1], training=True, eps=EPS)
    pre = pre + exact[1] if add else pre
    wide = torch.autograd.grad(pre, exact, dy.double() * ~(y <= 0))
    yield "y", error(y, pre.detach().relu())
    yield "mean", error(mean, exact[0].detach().mean((0, 2, 3)))
    names = ("dx", "dresidual", "dweight", "dbias") if add else ("dx", "dweight", "dbias")
    for name, got, want in zip(names, grads, wide, strict=True):
        yield name, error(got, want)


def pooled_errors(n: int, c: int, size: int, memory_format: torch.memory_format) -> Iterator[tuple[str, float]]:
    """Of the means of bn_add_relu's output, and of a gradient that comes through them and through the output itself."""
    x, residual, dy = (
        torch.randn(n, c, size, size, dtype=torch.float16).contiguous(memory_format=memory_format) for _ in range(3)
    )
    weight, bias = torch.rand(c) + 0.5, torch.randn(c)
    leaves = [t.requires_grad_() for t in (x, residual)]
    y, means = fasttricks.bn_add_relu(*leaves, weight, bias, pool=True, ceil_mode=True)
    dmeans = torch.randn_like(means)
    grads = torch.autograd.grad([y, means], leaves, [dy, dmeans])
    exact = [t.detach().double().requires_grad_() for t in leaves]
    pre = exact[1] + F.batch_norm(exact[0], None, None, weight.double(), bias.double(), training=True, eps=EPS)
    wide = pre * ~(y <= 0)
    pooled = F.avg_pool2d(wide, 2, ceil_mode=True, count_include_pad=False)
    wanted = torch.autograd.grad([wide, pooled], exact, [dy.double(), dmeans.double()])
    yield "y", error(y, pre.detach().relu())
    for name, got, want in zip(("means", "dx", "dresidual"), (means, *grads), (pooled.detach(), *wanted), strict=True):
        yield name, error(got, want)


def projected_errors(n: int, c: int, size: int, memory_format: torch.memory_format) -> Iterator[tuple[str, float]]:
    """Of two BatchNorms, their sum and the ReLU, and of both gradients."""
    x, residual, dy = (
        torch.randn(n, c, size, size, dtype=torch.float16).contiguous(memory_format=memory_format) for _ in range(3)
    )
    affine = [torch.rand(c) + 0.5, torch.randn(c), torch.rand(c) + 0.5, torch.randn(c)]
    leaves = [t.requires_grad_() for t in (x, residual)]
    y = fasttricks.bn_add_bn_relu(*leaves, *affine[:2], residual_weight=affine[2], residual_bias=affine[3])
    exact, wide = [t.detach().double().requires_grad_() for t in leaves], [t.double() for t in affine]
    pre = sum(
        F.batch_norm(t, None, None, *wide[2 * i : 2 * i + 2], training=True, eps=EPS) for i, t in enumerate(exact)
    )
    wanted = torch.autograd.grad(pre, exact, dy.double() * ~(y <= 0))
    yield "y", error(y, pre.detach().relu())
    grads = torch.autograd.grad(y, leaves, dy)
    for name, got, want in zip(("dx", "dresidual"), grads, wanted, strict=True):
        yield name, error(got, want)


def avgpool_errors(
    n: int, c: int, out: int, size: int, memory_format: torch.memory_format
) -> Iterator[tuple[str, float]]:
    x = torch.randn(n, c, size, size, dtype=torch.float16).contiguous(memory_format=memory_format)
    leaves = [x.requires_grad_(), (torch.randn(out, c, 1, 1) / c**0.5).half().requires_grad_()]
    y = fasttricks.avgpool_conv1x1(*leaves)
    dy = torch.randn_like(y)
    # float32 is exact enough, and float64 takes minutes on many cards
    exact = [t.detach().float().requires_grad_() for t in leaves]
    wide = F.conv2d(F.avg_pool2d(exact[0], 2), exact[1])
    expected = [wide.detach(), *torch.autograd.grad(wide, exact, dy.float())]
    for name, got, want in zip(("y", "dx", "dweight"), (y, *torch.autograd.grad(y, leaves, dy)), expected, strict=True):
        yield name, error(got.detach(), want.double())


def check(small: bool) -> int:
    """Prints the errors; returns how many are too large."""
    bn, pool = SMALL if small else LARGE
    wrong = 0
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for layout, memory_format in LAYOUTS.items():
        cases = [(f"bn_relu {s}", bn_errors(*s, memory_format, False)) for s in bn]
        cases += [(f"bn_add_relu {s}", bn_errors(*s, memory_format, True)) for s in bn]
        cases += [(f"bn_add_relu pool {s}", pooled_errors(*s, memory_format)) for s in bn]
        cases += [(f"bn_add_bn_relu {s}", projected_errors(*s, memory_format)) for s in bn]
        cases += [(f"avgpool_conv1x1 {s}", avgpool_errors(*s, memory_format)) for s in pool]
        for case, errors in cases:
            for name, found in errors:
                wrong += (bad := not found < 4e-3)
                print(f"{case} {layout} {name}: {found:.1e}{'  WRONG' if bad else ''}", flush=True)
    return wrong


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--small", action="store_true", help="tensors of less than a megabyte")
    given = options.parse_args()
    with torch.device("cuda"), fasttricks.backend("cuda"):
        if wrong := check(given.small):
            raise SystemExit(f"{wrong} results are wrong")


if __name__ == "__main__":
    main()
