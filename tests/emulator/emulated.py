"""The CUDA ops compiled for the CPU: csrc/cuda/*.cu, unchanged, as torch.ops.fasttricks_emulated on CPU tensors.

    library = emulated.load()                     # builds what is not up to date, registers the ops
    with fasttricks.backend("cuda"):              # on CPU tensors: the emulated kernels, through the ops' own Python
        ...
    with library.schedule("random", seed=2): ...  # another order of threads and blocks
    with library.metered() as meter: ...          # bytes moved and launches

Builds: ``plain``; ``asan`` (AddressSanitizer and UndefinedBehaviorSanitizer) and ``tsan`` (ThreadSanitizer), which load
in a Python with the environment of `sanitized`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import torch

from fasttricks import backends

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OPS = ("bn_relu", "sgd", "avgpool_conv1x1")

_FLAGS = {
    "plain": ["-O1"],
    "asan": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
    "tsan": ["-O1", "-fsanitize=thread", "-Wno-tsan"],
}
_COMMON = (
    *("-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-attributes", "-Wno-missing-field-initializers"),
    *("-DCUDA_ON_CPU", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DFT_LIBRARY_NAME=fasttricks_emulated"),
)
ORDERS, LANDINGS = ("ascending", "descending", "random"), ("late", "early")  # as in cuda_on_cpu/machine.h


@dataclass(frozen=True)
class Build:
    """One build: a kind, where csrc is (another folder for planted faults), which ops, further sources and flags."""

    kind: str = "plain"
    csrc: Path = ROOT / "csrc"
    ops: tuple[str, ...] = OPS
    sources: tuple[Path, ...] = ()
    flags: tuple[str, ...] = ()
    name: str = ""

    def make(self) -> Path:
        """Builds what is not up to date, by ninja, in build/emulator, and returns the library's path."""
        folder = ROOT / "build" / "emulator" / (self.name or self.kind)
        folder.mkdir(parents=True, exist_ok=True)
        torch_home = Path(torch.__file__).parent
        include = [HERE / "cuda_on_cpu", self.csrc / "cuda", self.csrc]
        system = [torch_home / "include", torch_home / "include/torch/csrc/api/include"]
        flags = [*_COMMON, *_FLAGS[self.kind], *self.flags, *(f"-I{p}" for p in include)]
        flags += [f"-isystem {p}" for p in system]
        link = f"-L{torch_home / 'lib'} -ltorch_cpu" if self.ops else ""
        cxx = os.environ.get("CXX", "g++")
        lines = [
            "rule cxx",
            f"  command = {cxx} {' '.join(flags)} -MMD -MF $out.d -x c++ -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {cxx} {' '.join(_FLAGS[self.kind])} -shared $in -o $out {link}",
        ]
        sources = [HERE / "control.cpp", *self.sources]
        if self.ops:
            sources += [self.csrc / "library.cpp", *(self.csrc / "cuda" / f"{op}.cu" for op in self.ops)]
        for source in sources:
            lines.append(f"build {source.name}.o: cxx {source}")
        target = folder / "libemulated.so"
        lines += [f"build {target.name}: link " + " ".join(f"{s.name}.o" for s in sources), ""]
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            text = "\n".join(lines)
            path = folder / "build.ninja"
            if not path.exists() or path.read_text() != text:
                path.write_text(text)
            ninja = shutil.which("ninja") or str(Path(sys.executable).parent / "ninja")
            done = subprocess.run([ninja, "-C", str(folder), "-j2"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the emulator's {folder.name} build failed:\n{done.stdout}{done.stderr}")
        return target


@dataclass
class Meter:
    """What the kernels moved through the helpers of csrc/cuda/intrinsics.cuh, in bytes, and their launches."""

    loaded: int = 0
    stored: int = 0
    launches: int = 0
    cooperative_launches: int = 0

    @property
    def moved(self) -> int:
        return self.loaded + self.stored


# in which order threads and blocks run, how shared memory starts (poison: NaN, else zeros: poison can mask a fault
# whose right value it is), and when the data of cp.async lands
SCHEDULES: tuple[dict, ...] = (
    {"order": "ascending"},
    {"order": "descending", "landing": "early"},
    {"order": "random", "seed": 1},
    {"order": "random", "seed": 2, "poison": False},
)


@dataclass
class Library:
    path: Path
    c: ctypes.CDLL = field(init=False)

    def __post_init__(self) -> None:
        torch.ops.load_library(str(self.path))
        self.c = ctypes.CDLL(str(self.path))

    @contextlib.contextmanager
    def schedule(self, order: str, seed: int = 1, poison: bool = True, landing: str = "late") -> Iterator[None]:
        settings = (ORDERS.index(order), seed, int(poison), LANDINGS.index(landing))
        self.c.emu_schedule((ctypes.c_int64 * 4)(*settings))
        try:
            yield
        finally:
            self.c.emu_schedule((ctypes.c_int64 * 4)(0, 1, 1, 0))

    @contextlib.contextmanager
    def shared_per_sm(self, size: int) -> Iterator[None]:
        """Launch plans for a card with so many bytes of shared memory a multiprocessor; none: nothing stays on chip."""
        self.c.emu_shared_per_sm(ctypes.c_int64(size))
        try:
            yield
        finally:
            self.c.emu_shared_per_sm(ctypes.c_int64(228 << 10))

    @contextlib.contextmanager
    def metered(self) -> Iterator[Meter]:
        """The meter has its numbers when the context ends."""
        numbers, meter = (ctypes.c_int64 * 4)(), Meter()
        self.c.emu_meter(numbers)
        yield meter
        self.c.emu_meter(numbers)
        meter.loaded, meter.stored, meter.launches, meter.cooperative_launches = numbers


@functools.cache
def sanitized(kind: str) -> dict[str, str]:
    """The environment in which a Python can load a build of this kind."""
    if kind == "plain":
        return dict(os.environ)
    runtimes = {"asan": ("libasan.so", "libubsan.so"), "tsan": ("libtsan.so",)}[kind]
    ask = [os.environ.get("CXX", "g++")]
    paths = [
        subprocess.run([*ask, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in runtimes
    ]
    # the interpreter's allocations at exit are no leaks of ours; torch's own threads are not what is judged
    options = {
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": f"halt_on_error=1:exitcode=66:suppressions={HERE / 'tsan.supp'}",
        "OMP_NUM_THREADS": "1",
    }
    return {**os.environ, **options, "FASTTRICKS_EMULATOR": kind, "LD_PRELOAD": " ".join(paths)}


_libraries: dict[Build, Library] = {}


def load(build: Build | None = None) -> Library:
    """Builds and loads the ops once a process; then fasttricks.backend("cuda") takes CPU tensors.

    The environment's FASTTRICKS_EMULATOR names the kind of build where none is given: plain, asan, tsan.
    """
    build = build or Build(os.environ.get("FASTTRICKS_EMULATOR", "plain"))
    if build not in _libraries:
        _libraries[build] = Library(build.make())
        _register(build.ops)
    return _libraries[build]


def _register(names: tuple[str, ...]) -> None:
    for name in names:
        import_module(f"fasttricks.ops.{name}").register("fasttricks_emulated")
    backends.devices["cuda"] = ("cpu", "meta")
    backends.namespaces["cuda"] = "fasttricks_emulated"
    backends.not_loaded.pop("cuda", None)
