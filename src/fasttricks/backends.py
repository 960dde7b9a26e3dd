"""Selects the implementation of an op: auto, cuda, triton, cpu or reference."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .checks import FLOATS

CHOICES = ("auto", "cuda", "triton", "cpu", "reference")
LIB = Path(__file__).resolve().parent / "lib"

# library -> why it is not loaded; loaded libraries have no entry
not_loaded: dict[str, str] = {}
# the device types of each backend, and the namespace in which its ops are registered. Meta and fake tensors dispatch
# like real ones: the fakes are registered for every library.
devices: dict[str, tuple[str, ...]] = {"cuda": ("cuda",), "triton": ("cuda",), "cpu": ("cpu", "meta")}
namespaces: dict[str, str] = {"cuda": "fasttricks", "triton": "fasttricks_triton", "cpu": "fasttricks"}
# what `auto` tries, by type of device, before the reference; emulated kernels, made for tests, are never among them
_preferred: dict[str, tuple[str, ...]] = {"cuda": ("cuda", "triton"), "cpu": ("cpu",), "meta": ("cpu",)}


def build_facts() -> dict[str, object]:
    """The contents of build.json, which the build wrote: torch, compiler, ISAs, architectures; {} if not built."""
    path = LIB / "build.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _load(name: str) -> None:
    path = LIB / f"libfasttricks_{name}.so"
    if not path.exists():
        reason = build_facts().get(f"no_{name}", f"{path.name} is not in {path.parent}")
        not_loaded[name] = f"not built: {reason}"
        return
    try:
        torch.ops.load_library(str(path))
    except (OSError, ImportError, RuntimeError) as error:
        built = build_facts().get("torch", "unknown")
        not_loaded[name] = f"built with torch {built}, does not load on torch {torch.__version__}: {error}"
        warnings.warn(f"fasttricks: {path.name} {not_loaded[name]}. Plain torch is used instead.", stacklevel=3)


def _load_cuda() -> None:
    if torch.version.cuda is None:
        not_loaded["cuda"] = f"torch {torch.__version__} is built without CUDA"
    elif "cpu" in not_loaded:
        not_loaded["cuda"] = "the schemas of its ops are in the CPU library, which is not loaded"
    else:
        _load("cuda")


def _load_triton() -> None:
    """Registers the Triton ops if this process can run them; otherwise Triton is not imported."""
    if os.environ.get("TRITON_INTERPRET") == "1":  # for tests: the interpreter runs the kernels on the CPU
        devices["triton"] = ("cuda", "cpu", "meta")
    elif not torch.cuda.is_available():
        not_loaded["triton"] = "no CUDA device is available, and TRITON_INTERPRET=1 is not set"
        return
    try:
        importlib.import_module(".kernels", __package__)
    except ImportError as error:
        not_loaded["triton"] = str(error)


def load_libraries() -> None:
    """Loads the op libraries. One that cannot be loaded is skipped with a warning (`fasttricks.info()` says why)."""
    _load("cpu")
    _load_cuda()
    _load_triton()


def _check(name: str, argument: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"{argument} is {name!r}; accepted: {', '.join(CHOICES)}")
    return name


# a plain global, not a context variable: torch.compile guards on it, and autograd's own threads see it
_forced = _check(os.environ.get("FASTTRICKS_BACKEND") or "auto", "FASTTRICKS_BACKEND")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Context manager in which every op runs on the named backend: auto, cuda, triton, cpu or reference.

    Raises ValueError for any other name. An op raises RuntimeError if that backend does not support its tensors.

    Examples:
        >>> x = torch.randn(2, 4, 8, 8)
        >>> with fasttricks.backend("reference"):  # plain torch
        ...     y = fasttricks.bn_relu(x)
        >>> torch.allclose(y, fasttricks.bn_relu(x), atol=1e-5)
        True
    """
    global _forced
    before, _forced = _forced, _check(name, "backend")
    _serving.clear()
    try:
        yield
    finally:
        _forced = before
        _serving.clear()


# the results of namespace_for since the last change: on tiny tensors the search would take a tenth of a call's time
_serving: dict[torch.device, str] = {}
_cards: dict[int, str | None] = {}


def _constant_when_compiled(function: Any) -> Any:
    """As torch.compiler.assume_constant_result, whose call would import torch's compiler: as long as torch itself."""
    function._dynamo_marked_constant = True
    return function


@_constant_when_compiled
def _card_refuses(index: int) -> str | None:
    """Why the CUDA library does not run on this card; None if it does."""
    if index not in _cards:
        _cards[index] = torch.ops.fasttricks.cuda_why_not(index) or None
    return _cards[index]


def why_not(name: str, device: torch.device) -> str | None:
    """Why backend `name` cannot serve tensors on `device`; None if it can."""
    if name == "reference":
        return None
    if name not in devices:
        raise ValueError(f"backend is {name!r}; accepted: {', '.join(CHOICES[1:])}")
    if device.type not in devices[name]:
        takes = {"cuda": "CUDA tensors", "triton": "CUDA tensors", "cpu": "tensors on the CPU"}[name]
        return f"the {name} backend takes {takes}, these are on {device}"
    if name in not_loaded:
        return not_loaded[name]
    if name == "cuda" and device.type == "cuda":
        return _card_refuses(torch.cuda.current_device() if device.index is None else device.index)
    return None


def select(op: str, device: torch.device) -> str:
    """The backend for `op` on `device`: the forced one, else the first of cuda, triton, cpu, reference that fits."""
    if _forced != "auto":
        if reason := why_not(_forced, device):
            raise RuntimeError(f"fasttricks.{op}: backend {_forced!r} was asked for, but {reason}")
        return _forced
    for name in _preferred.get(device.type, ()):
        if why_not(name, device) is None:
            return name
    return "reference"


def _search(op: str, device: torch.device) -> str | None:
    chosen = select(op, device)
    return None if chosen == "reference" else namespaces[chosen]


def namespace_for(op: str, device: torch.device) -> str | None:
    """The namespace of `torch.ops` with the raw ops of `op` for `device`; None: the reference runs."""
    if torch.compiler.is_compiling():  # it would guard on the contents of the dictionary
        return _search(op, device)
    known = _serving.get(device)
    if known is None and (known := _search(op, device)) is not None:
        _serving[device] = known
    return known


def ops_for(op: str, device: torch.device) -> Any:
    """As `namespace_for`, but the namespace itself."""
    namespace = namespace_for(op, device)
    return None if namespace is None else getattr(torch.ops, namespace)


# What `auto` leaves to torch's own operators on a card of the CUDA library, because ours are predicted to be slower:
# from a compute capability, bytes of an element and number of input channels on. avgpool_conv1x1 is a product of its
# own with mma.sync: from 9.0 on only wgmma and tcgen05 reach the full rate (H100, fp16, NHWC, batch 256, forward and
# backward: 512 -> 1024 channels 0.9 ms against 0.7, 1024 -> 2048 0.97 against 0.5, 256 -> 512 even), and float32 and
# float64 run on the general cores. Predicted from counts of operations and bytes; benchmarks/card.py measures both.
LEFT_TO_TORCH: dict[str, tuple[tuple[tuple[int, int], int, int], ...]] = {
    "avgpool_conv1x1": (((8, 0), 4, 1), ((9, 0), 2, 512)),
}
_capabilities: dict[torch.device, tuple[int, int]] = {}


@_constant_when_compiled
def _capability(device: torch.device) -> tuple[int, int]:
    if device not in _capabilities:
        _capabilities[device] = torch.cuda.get_device_capability(device)
    return _capabilities[device]


def left_to_torch(op: str, device: torch.device, element_bytes: int, channels: int) -> bool:
    """Whether `auto` does not take the CUDA library's `op` for such tensors on `device`; see LEFT_TO_TORCH."""
    if _forced != "auto":
        return False
    capability = _capability(device)
    return any(capability >= c and element_bytes >= b and channels >= n for c, b, n in LEFT_TO_TORCH.get(op, ()))


def _of_cpu() -> tuple[torch.dtype, ...]:
    return (torch.bfloat16,) if torch.cpu._is_avx512_bf16_supported() else ()


# The dtypes for which a block hands the 2x2 means of its output to the shortcut of the next one (ops/pooled_output.py),
# whose 1x1 convolution is then torch's, by backend. On cards that saves a read of the block's output (predicted from
# bytes; the product is cuBLAS's). On the CPU it was measured against bn_add_relu, then avgpool_conv1x1, forward and
# backward, at the stage changes of ResNet-50-D (batch 8, one thread, EPYC with AVX-512): 0.75 to 1.02 times as fast in
# float32, 0.05 to 0.09 in float16, 1.4 to 1.7 in bfloat16, and 0.4 there without the instructions for bfloat16.
# benchmarks/bench_bn_add_relu_pool.py repeats it.
MEANS_HANDED_ON: dict[str, tuple[torch.dtype, ...]] = {"cuda": FLOATS, "triton": FLOATS, "cpu": _of_cpu()}


def hands_means_on(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `op` on such tensors hands the means of its output on; see MEANS_HANDED_ON."""
    return dtype in MEANS_HANDED_ON.get(select(op, device), ())


def loaded_namespaces() -> list[str]:
    """The namespaces in which ops are defined; each module of fasttricks.ops registers fakes and autograd in them."""
    return [namespaces[name] for name in ("cpu", "triton") if name not in not_loaded]


load_libraries()
