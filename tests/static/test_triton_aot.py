"""Every Triton kernel compiled ahead of time for sm_80, sm_90, sm_100, with no GPU: spills, registers, wide accesses.

What is compiled is what the launcher is given: the ops run on meta tensors of real shapes, and their launches are taken
down instead of run. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fasttricks.kernels import (  # noqa: E402
    avgpool_conv1x1,
    bn_add_bn_relu,
    bn_add_relu_pool,
    bn_relu,
    launch,
    sgd,
    tune,
    version,
)

TARGETS = (pytest.param(80, marks=pytest.mark.long), 90, pytest.param(100, marks=pytest.mark.long))
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}
EPS = 1e-5
# registers per thread at most, by kernel: at 64 a multiprocessor holds 1024 threads, half its capacity; at 96 a third.
# As Triton 3.8 allocates them, at most 4 bytes per value; older ones take up to a quarter more, 64-bit offsets a third,
# float64 up to twice.
REGISTERS = {
    "bn_stats_kernel": 96,
    "bn_merge_kernel": 40,
    "bn_apply_kernel": 64,
    "bn_apply_pool_kernel": 128,
    "bn_pool_means_kernel": 48,
    "bn_backward_reduce_kernel": 104,
    "bn_sum_kernel": 40,
    "bn_backward_apply_kernel": 80,
    "bn_update_stats_kernel": 40,
    "bn_add_bn_apply_kernel": 96,
    "bn_add_bn_backward_reduce_kernel": 128,
    "bn_add_bn_backward_apply_kernel": 112,
    "sgd_table_kernel": 40,
    "sgd_check_kernel": 64,
    "sgd_norms_kernel": 40,
    "sgd_step_kernel": 80,
    "sgd_count_kernel": 40,
    "avgpool_conv1x1_forward_kernel": 176,
    "avgpool_conv1x1_input_kernel": 176,
    "avgpool_conv1x1_weight_kernel": 208,
    "avgpool_conv1x1_bias_kernel": 80,
    "avgpool_conv1x1_sum_kernel": 40,
}
# activations and parameters are read, or written, 128 bits at a time in these
WIDE_LOADS = (
    "bn_stats_kernel", "bn_apply_kernel", "bn_apply_pool_kernel", "bn_backward_reduce_kernel",
    "bn_backward_apply_kernel", "bn_add_bn_apply_kernel", "bn_add_bn_backward_reduce_kernel",
    "bn_add_bn_backward_apply_kernel",
    "sgd_check_kernel", "sgd_step_kernel", "avgpool_conv1x1_forward_kernel", "avgpool_conv1x1_input_kernel",
    "avgpool_conv1x1_weight_kernel", "avgpool_conv1x1_bias_kernel",
)  # fmt: skip
WIDE_STORES = (
    "bn_apply_kernel", "bn_backward_apply_kernel", "bn_add_bn_apply_kernel", "bn_add_bn_backward_apply_kernel",
    "sgd_step_kernel", "avgpool_conv1x1_forward_kernel", "avgpool_conv1x1_input_kernel",
    "avgpool_conv1x1_weight_kernel",
)  # fmt: skip

WIDE = re.compile(r"(ld|st)\.global\S*\.(v4\.b32|v2\.b64|v8\.b32|v4\.b64)|cp\.async\.cg\S*")
TENSOR_CORES = ("avgpool_conv1x1_forward_kernel", "avgpool_conv1x1_input_kernel", "avgpool_conv1x1_weight_kernel")
PRODUCTS = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}

# kernel, arguments, constants, warps, stages
Launch = tuple[Any, dict[str, Any], dict[str, Any], int, int]


def meta(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def bn_launches(dtype: torch.dtype, layout: torch.memory_format, shape: tuple[int, ...]) -> None:
    x = meta(shape, dtype, layout)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    w, b, mean, var = (torch.empty(shape[1], dtype=statistics, device="meta") for _ in range(4))
    bn_relu.bn_relu_forward(x, w, b, EPS)
    mask = bn_relu.bn_add_relu_forward(x, x, w, b, EPS)[3]
    bn_relu.bn_relu_apply(x, w, b, mean, var, EPS)
    # the means with y, and in a pass of their own
    for each in (
        x,
        meta((*shape[:2], 8, 8), dtype, layout),
        meta((*shape[:2], 12, 12), dtype, torch.contiguous_format),
    ):
        bn_add_relu_pool.bn_add_relu_pool_forward(each, each, w, b, EPS, None, None, None, None, True)
    bn_relu.bn_relu_backward(x, x, None, w, b, mean, var, EPS, True, False)
    bn_relu.bn_relu_backward(x, x, mask, w, b, mean, var, EPS, True, True)
    bn_add_bn_relu.bn_add_bn_relu_forward(x, x, w, b, w, b, EPS, EPS)
    bn_add_bn_relu.bn_add_bn_relu_apply(x, x, w, b, w, b, mean, var, mean, var, EPS, EPS)
    bn_add_bn_relu.bn_add_bn_relu_backward(x, x, x, mask, w, w, mean, var, mean, var, EPS, EPS, True)
    pooled = meta((*shape[:2], shape[2] // 2, shape[3] // 2), dtype, layout)
    for dy2 in (x, pooled):
        bn_relu.bn_relu_backward(x, x, mask, w, b, mean, var, EPS, True, True, dy2)
        bn_relu.bn_relu_backward(x, x, None, w, b, mean, var, EPS, True, False, dy2)
        bn_add_bn_relu.bn_add_bn_relu_backward(x, x, x, mask, w, w, mean, var, mean, var, EPS, EPS, True, dy2)
    batches = torch.empty((), dtype=torch.int64, device="meta")
    bn_relu.bn_relu_forward(x, w, b, EPS, mean, var, batches)
    bn_relu.bn_update_stats_(mean, var, mean, var, batches.double(), batches, None)


def variant(launched: Launch) -> tuple[Any, ...]:
    """What Triton compiles a kernel for: the same for launches that run the same code."""
    kernel, arguments, constants, *options = launched
    types = tuple(v.dtype if isinstance(v, torch.Tensor) else v is None for v in arguments.values())
    return (kernel.__name__, types, tuple(constants.items()), *options)


def taken_down(
    run: Callable[[], None], monkeypatch: pytest.MonkeyPatch, every_choice_of_tiles: bool = True
) -> list[Launch]:
    """What `run` launches, one launch of each variant."""
    launches: list[Launch] = []
    sgd._kept_table.cache_clear()
    monkeypatch.setattr(
        launch, "launch", lambda kernel, grid, a, c, warps, stages=1: launches.append((kernel, a, c, warps, stages))
    )

    def every_choice(name: str, family: Any, device: torch.device, choices: Any, run: Callable[[Any], Any]) -> Any:
        for choice in choices[1:]:
            run(choice)
        return choices[0]

    if every_choice_of_tiles:
        monkeypatch.setattr(tune, "fastest", every_choice)
    run()
    return list({variant(launched): launched for launched in launches}.values())


def compiled(launched: Launch, target: int) -> Any:
    """The launch compiled as the launcher compiles it: pointers aligned to 16 bytes, sizes of unknown divisibility."""
    kernel, arguments, constants, warps, stages = launched
    signature, attributes, values = {}, {}, dict(constants)
    for position, name in enumerate(kernel.arg_names):
        value = arguments.get(name)
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif name in constants or value is None:
            signature[name] = "constexpr"
            values.setdefault(name, None)
        else:
            by_value = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
            signature[name] = kernel.params[position].annotation_type or by_value
    source = ASTSource(
        kernel, signature, constexprs={(kernel.arg_names.index(k),): v for k, v in values.items()}, attrs=attributes
    )
    return triton.compile(
        source, target=GPUTarget("cuda", target, 32), options={"num_warps": warps, "num_stages": stages}
    )


def resources(cubin: bytes, tmp_path: Path) -> tuple[int, int]:
    """(registers, bytes of stack and spills per thread) of the one kernel in a cubin."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2]) + int(found[3])


@pytest.mark.parametrize("target", TARGETS, ids="sm_{}".format)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.float16, (256, 64, 56, 56)),
        (torch.bfloat16, (256, 2048, 7, 7)),
        (torch.float32, (256, 256, 14, 14)),
        pytest.param(torch.float16, (512, 64, 256, 256), marks=pytest.mark.long),
    ],
    ids=["fp16", "bf16-7x7", "fp32-14x14", "fp16-2^31"],
)
def test_bn_relu(
    dtype: torch.dtype, shape: tuple[int, ...], layout: torch.memory_format, target: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    check(lambda: bn_launches(dtype, layout, shape), "bn_", target, tmp_path, monkeypatch)


def sgd_launches(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """With norms, clipping and LARS, and without."""
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    one, lr = torch.empty((), device="meta"), torch.empty((), dtype=torch.float64, device="meta")
    squares = torch.empty(1, dtype=torch.float64, device="meta")
    param, grad = (torch.empty(9216, dtype=d, device="meta") for d in (dtype, grad_dtype))
    buffer = torch.empty(9216, dtype=statistics, device="meta")
    masters = [buffer] if dtype in (torch.float16, torch.bfloat16) else []
    sgd.sgd_check([grad], [], [], one, None, None)
    sgd.sgd_check([grad], [param], masters, one, squares, squares)
    for momentum, eta, norm in ((0.9, 0.0, 0.0), (0.9, 1e-3, 1.0), (0.0, 0.0, 0.0)):
        lists = ([param], [grad], [buffer], [one]) if momentum else ([param], [grad], [], [])
        options = [1], [lr], [momentum], [0.0], [1e-4], [True], [False], [eta], 0.0, eta > 0, norm
        sgd.sgd_step(*lists, masters, *options, one, one, squares, squares)


@pytest.mark.parametrize("target", TARGETS, ids="sm_{}".format)
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_sgd(
    dtype: torch.dtype, grad_dtype: torch.dtype, target: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(lambda: sgd_launches(dtype, grad_dtype), "sgd_", target, tmp_path, monkeypatch)


@pytest.mark.parametrize("target", TARGETS, ids="sm_{}".format)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.float16, (256, 256, 56, 56)),
        (torch.bfloat16, (256, 1024, 14, 14)),
        (torch.float32, (256, 256, 56, 56)),
        (torch.float32, (256, 1024, 14, 14)),
        pytest.param(torch.float16, (1024, 256, 128, 128), marks=pytest.mark.long),
        (torch.float16, (64, 32, 57, 57)),
        (torch.float64, (64, 32, 56, 56)),
    ],
    ids=["fp16", "bf16-14x14", "fp32", "fp32-14x14", "fp16-2^31", "fp16-57x57", "fp64"],
)
def test_avgpool_conv1x1(
    dtype: torch.dtype, shape: tuple[int, ...], layout: torch.memory_format, target: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def run() -> None:
        x = meta(shape, dtype, layout)
        weight = torch.empty(2 * shape[1], shape[1], 1, 1, dtype=dtype, device="meta")
        for stride in (1, 2):
            y = avgpool_conv1x1.avgpool_conv1x1_forward(x, weight, weight[:, 0, 0, 0].contiguous(), stride, True)
            for pooled_dx in (False, True):
                avgpool_conv1x1.avgpool_conv1x1_backward(y, x, weight, stride, True, True, True, True, pooled_dx)

    check(run, "avgpool_conv1x1_", target, tmp_path, monkeypatch)


def check(run: Callable[[], None], prefix: str, target: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles the launches of `run`, in which every kernel with this prefix must be, and checks each."""
    launches = taken_down(run, monkeypatch)
    assert {kernel.__name__ for kernel, *_ in launches} == {name for name in REGISTERS if name.startswith(prefix)}
    for launched in launches:
        kernel, arguments, constants, *_ = launched
        name = kernel.__name__
        binary = compiled(launched, target)
        registers, spilled = resources(binary.asm["cubin"], tmp_path)
        assert spilled == 0, f"{name} uses {spilled} bytes of local memory"
        most = REGISTERS[name] if version() >= (3, 8) else REGISTERS[name] * 5 // 4
        most = most * 4 // 3 if constants.get("WIDE") else most
        if any(isinstance(v, torch.Tensor) and v.dtype == torch.float64 and v.dim() == 4 for v in arguments.values()):
            most *= 2
        assert registers <= most, f"{name} has {registers} registers"
        ptx = binary.asm["ptx"]
        if name in WIDE_LOADS and not narrow(arguments, constants):
            assert any(WIDE.fullmatch(access) for access in re.findall(r"ld\.global\S*|cp\.async\S*", ptx)), name
        if name in WIDE_STORES and not narrow(arguments, constants):  # the bit mask of the ReLU is one byte per thread
            assert {a for a in re.findall(r"st\.global\S*", ptx) if not WIDE.fullmatch(a)} <= {"st.global.b8"}, name
        if arguments.get("dz") is not None and not narrow(arguments, constants):  # besides the sums of each split
            assert any(WIDE.fullmatch(access) for access in re.findall(r"st\.global\S*", ptx)), name
        if name in TENSOR_CORES and arguments["dy" if "dy" in arguments else "x"].dtype.itemsize == 2:
            # tiles of few channels are too small for the instructions of whole groups of warps
            few = min(constants[size] for size in "QMN" if size in constants) < 64
            assert re.search("|".join(PRODUCTS.values()) if few else PRODUCTS[target], ptx), name


def narrow(arguments: dict[str, Any], constants: dict[str, Any]) -> bool:
    """Whether it is NCHW with planes or rows, of 7 or 14 pixels, that start between the places of wide accesses."""
    if constants.get("NHWC", True):
        return False
    if "ROWS" in constants:  # the two-dimensional tiles of bn_relu's reductions
        return constants["VEC"] == 1
    size = next(t.dtype.itemsize for t in arguments.values() if isinstance(t, torch.Tensor))
    return min(constants.get(v, 8) for v in ("XV", "YV")) * size < 16
