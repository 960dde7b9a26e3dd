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

from fasttricks.kernels import bn_relu, launch  # noqa: E402

TARGETS = (80, 90, 100)
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
}
EPS = 1e-5
# registers a thread at most, by kernel: at 64 a multiprocessor holds 1024 threads, half of what it can, at 96 a third
REGISTERS = {
    "bn_stats_kernel": 96,
    "bn_merge_kernel": 40,
    "bn_apply_kernel": 64,
    "bn_backward_reduce_kernel": 100,
    "bn_sum_kernel": 40,
    "bn_backward_apply_kernel": 80,
    "bn_update_stats_kernel": 40,
}
# accesses of activations must be 128 bits wide in these
STREAMING = ("bn_stats_kernel", "bn_apply_kernel", "bn_backward_reduce_kernel", "bn_backward_apply_kernel")

Launch = tuple[Any, dict[str, Any], dict[str, Any], int]


def meta(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def bn_launches(dtype: torch.dtype, layout: torch.memory_format, shape: tuple[int, ...]) -> None:
    x = meta(shape, dtype, layout)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    w, b, mean, var = (torch.empty(shape[1], dtype=statistics, device="meta") for _ in range(4))
    bn_relu.bn_relu_forward(x, w, b, EPS)
    mask = bn_relu.bn_add_relu_forward(x, x, w, b, EPS)[3]
    bn_relu.bn_relu_apply(x, w, b, mean, var, EPS)
    bn_relu.bn_relu_backward(x, x, None, w, b, mean, var, EPS, True, False)
    bn_relu.bn_relu_backward(x, x, mask, w, b, mean, var, EPS, True, True)
    bn_relu.bn_update_stats_(mean, var, mean, var, 100, 0.1)


def taken_down(run: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    launches: list[Launch] = []
    monkeypatch.setattr(launch, "launch", lambda kernel, grid, a, c, warps: launches.append((kernel, a, c, warps)))
    run()
    return launches


def compiled(kernel: Any, arguments: dict[str, Any], constants: dict[str, Any], warps: int, target: int) -> Any:
    """The launch compiled as the launcher compiles it: pointers aligned to 16 bytes, sizes of unknown divisibility."""
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
            signature[name] = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
    source = ASTSource(
        kernel, signature, constexprs={(kernel.arg_names.index(k),): v for k, v in values.items()}, attrs=attributes
    )
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": warps})


def resources(cubin: bytes, tmp_path: Path) -> tuple[int, int]:
    """(registers, bytes of stack and spills a thread) of the one kernel in a cubin."""
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
        (torch.float16, (512, 64, 256, 256)),
    ],
    ids=["fp16", "bf16-7x7", "fp32-14x14", "fp16-2^31"],
)
def test_bn_relu(
    dtype: torch.dtype, shape: tuple[int, ...], layout: torch.memory_format, target: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    launches = taken_down(lambda: bn_launches(dtype, layout, shape), monkeypatch)
    assert {kernel.__name__ for kernel, *_ in launches} == REGISTERS.keys()
    seen = set()
    for kernel, arguments, constants, warps in launches:
        name = kernel.__name__
        key = (name, tuple(k for k, v in arguments.items() if v is None), tuple(constants.items()))
        if key in seen:
            continue
        seen.add(key)
        binary = compiled(kernel, arguments, constants, warps, target)
        registers, spilled = resources(binary.asm["cubin"], tmp_path)
        assert spilled == 0, f"{name} uses {spilled} bytes of local memory"
        assert registers <= REGISTERS[name], f"{name} has {registers} registers"
        # planes of 7x7 pixels start at odd offsets: no wide access exists in the reductions' two-dimensional tiles
        odd = constants.get("VEC") == 1 and "ROWS" in constants
        if name in STREAMING and not odd:
            assert re.search(
                r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|ld\.global\S*\.v8\.b32", binary.asm["ptx"]
            ), name
            if name.endswith("apply_kernel"):
                assert re.search(r"st\.global\S*\.v4\.b32|st\.global\S*\.v2\.b64", binary.asm["ptx"]), name
