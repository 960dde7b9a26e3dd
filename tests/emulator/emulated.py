"""The CUDA ops compiled for the CPU: csrc/cuda/*.cu, unchanged, as torch.ops.fasttricks_emulated on CPU tensors.

    library = emulated.load()                     # builds what is not up to date, registers the ops
    with fasttricks.backend("cuda"):              # on CPU tensors: the emulated kernels, through the ops' own Python
        ...
    with library.schedule("random", seed=2): ...  # another order of threads and blocks
    with library.metered() as meter: ...          # bytes moved and launches
    plans().bn_tile(...)                          # the launch planners of csrc/cuda, and what the ops launch on a card

Every build is a Python module, bound with pybind11 (bindings.h). Builds: ``plain``; ``asan`` (AddressSanitizer and
UndefinedBehaviorSanitizer) and ``tsan`` (ThreadSanitizer), which load in a Python with the environment of `sanitized`.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch
from extension import module_of

from build_libraries import Step, compile_step, find_compiler, link_step, run_steps, stop
from fasttricks import backends

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OPS = ("bn_relu", "bn_add_relu_pool", "bn_add_bn_relu", "sgd", "avgpool_conv1x1")

# under the sanitizers avgpool_conv1x1 takes several launches above 1400 pixels, which leaves the forward product of the
# larger case enough tiles for blocks that go through several; elsewhere only above 2^31
_FLAGS = {
    "plain": ["-O1"],
    "asan": [
        *("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
        "-DFT_AVGPOOL_MAX_PIXELS=1400",
    ],
    "tsan": ["-O1", "-fsanitize=thread", "-Wno-tsan", "-DFT_AVGPOOL_MAX_PIXELS=1400"],
    "plans": ["-O0", "-g0"],
}
_COMMON = (
    *("-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-attributes", "-Wno-missing-field-initializers"),
    *("-DCUDA_ON_CPU", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DFT_LIBRARY_NAME=fasttricks_emulated"),
)


@dataclass(frozen=True)
class Build:
    """One build: a kind, where csrc is (another folder for planted faults), which ops, further sources."""

    kind: str = "plain"
    csrc: Path = ROOT / "csrc"
    ops: tuple[str, ...] = OPS
    sources: tuple[Path, ...] = ()
    name: str = ""

    @property
    def folder(self) -> Path:
        """In build/emulator; for another csrc, next to it: each planted fault has a folder of its own."""
        inside = ROOT / "build" / "emulator" if self.csrc == ROOT / "csrc" else self.csrc.parent
        return inside / (self.name or self.kind)

    def make(self) -> Path:
        """Compiles what is not up to date and returns the library's path."""
        command = compiler(self.kind, [self.csrc / "cuda", self.csrc])
        sources = list(self.sources)
        if self.ops:
            sources += [self.csrc / "library.cpp", *(self.csrc / "cuda" / f"{op}.cu" for op in self.ops)]
        steps = [
            compile_step(command, source, self.folder / f"{source.name}.o", f"emulator ({self.kind}): {source.name}")
            for source in sources
        ]
        libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"] if self.ops else []
        made = [control(self.kind), *(step.output for step in steps)]
        linker = [*shlex.split(find_compiler()), *_FLAGS[self.kind]]
        steps.append(link_step(linker, made, self.folder / "libemulated.so", libraries))
        run_locked(steps, self.folder)
        return steps[-1].output


def compiler(kind: str, include: list[Path]) -> list[str]:
    torch_headers = Path(torch.__file__).parent / "include"
    system = [*python_headers(), torch_headers, torch_headers / "torch/csrc/api/include"]
    command = [*shlex.split(find_compiler()), *_COMMON, *_FLAGS[kind], f"-I{HERE / 'cuda_on_cpu'}"]
    return [*command, *(f"-I{p}" for p in include), *(f"-isystem{p}" for p in system), "-x", "c++"]


@functools.cache
def control(kind: str) -> Path:
    """control.cpp, which needs nothing of csrc: compiled once for all builds of a kind."""
    folder = ROOT / "build" / "emulator" / f"control-{kind}"
    source = HERE / "control.cpp"
    step = compile_step(compiler(kind, []), source, folder / "control.cpp.o", f"emulator ({kind}): {source.name}")
    run_locked([step], folder)
    return step.output


def run_locked(steps: list[Step], folder: Path) -> None:
    """Runs the steps; of several processes the first one does it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run_steps(steps, folder)


def python_headers() -> list[Path]:
    """Of Python and of pybind11; torch has pybind11's, too, and a machine with a card may have no other ones."""
    python = Path(sysconfig.get_paths()["include"])
    if not (python / "Python.h").is_file():
        stop(f"{python} has no Python.h; install the headers of this Python (Debian: `apt install python3-dev`).")
    try:
        import pybind11
    except ImportError:
        return [python]
    return [python, Path(pybind11.get_include())]


PLANS = Build("plans", ops=(), sources=tuple(HERE / f"{op}_plan.cpp" for op in OPS))


@functools.cache
def plans() -> ModuleType:
    """The launch planners, for tests and predictions: a build without ops, whose kernels are rarely run."""
    return module_of(PLANS.make())


def kept_bytes(x: torch.Tensor, arrays: int, shared: int = 228 << 10, pair: bool = False) -> int:
    """Bytes of x (1 array: forward), or of x and dz (2: backward), that stay in the emulated card's shared memory.

    pair: of bn_add_bn_relu, and so of the residual, too (2 and 3 arrays).
    """
    n, c, h, w = x.shape
    plan = plans()
    nhwc = x.is_contiguous(memory_format=torch.channels_last)
    card = plan.Device(4, shared, shared - 1024)

    def resident(kernel: str, threads: int, dynamic_bytes: int) -> int:  # as csrc/cuda/launch.cuh
        return min(3, shared // (dynamic_bytes + (17 << 10))) if dynamic_bytes else 3

    of: tuple = (plan.bn_shape(n, c, h * w, nhwc), card, resident, x.element_size())
    forward = arrays == 1 + pair
    if pair:
        passes = plan.bn_add_bn_relu_forward_launches, plan.bn_add_bn_relu_backward_launches
    else:
        passes = plan.bn_forward_launches, plan.bn_backward_launches
        of = (*of, False)  # without a residual
    launches = passes[0](*of) if forward else passes[1](*of, False)
    return min(arrays * x.nbytes, sum(one.dynamic_bytes * one.grid[0] for one in launches if one.cooperative))


def run(script: str, build: Build) -> str:
    """What a script of this folder says is wrong with a build's results, in a process of its own; "" if nothing is."""
    build.make()
    command = [sys.executable, str(HERE / script), build.kind, str(build.csrc), *build.ops]
    done = subprocess.run(command, capture_output=True, text=True, env=sanitized(build.kind))
    return "" if done.returncode == 0 else done.stderr


def judge(wrong: Callable[[Library, str, dict], str]) -> NoReturn:
    """The main function of a script that `run` starts: exits with what wrong(library, kind of build, schedule) says."""
    kind, csrc, *ops = sys.argv[1:]
    library = load(Build(kind, Path(csrc), tuple(ops)))
    for schedule in SCHEDULES if kind == "plain" else SCHEDULES[2:3]:
        if said := wrong(library, kind, schedule):
            sys.exit(said)
    os._exit(0)  # torch's destructors, which ThreadSanitizer has something to say on, are not what is judged


def judge_dtypes(wrong: Callable[[Library, dict, torch.dtype], str]) -> NoReturn:
    """As `judge`, of wrong(library, schedule, dtype) for each dtype that the kind of build asks for."""

    def of_all(library: Library, kind: str, schedule: dict) -> str:
        return next(filter(None, (wrong(library, schedule, dtype) for dtype in dtypes_of(kind))), "")

    judge(of_all)


def dtypes_of(kind: str) -> tuple[torch.dtype, ...]:
    """What a script judges under a kind of build: for ThreadSanitizer one type, since the barriers are the same."""
    return (torch.float16,) if kind == "tsan" else (torch.float16, torch.float32)


def changed(folder: Path, file: str, before: str, after: str) -> Path:
    """A copy of csrc in which one text of csrc/cuda/`file`, which occurs once, is replaced."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    path = folder / "csrc/cuda" / file
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, after))
    return folder / "csrc"


@dataclass
class Meter:
    """What the kernels moved through the helpers of csrc/cuda/intrinsics.cuh, in bytes, their launches and blocks.

    Every load passes through the L2 cache; first_loaded are those of 32-byte sectors that a launch had not touched,
    which is what DRAM serves if the cache keeps everything. wavefronts: of the accesses to shared memory, if counted.
    """

    loaded: int = 0
    stored: int = 0
    launches: int = 0
    cooperative_launches: int = 0
    first_loaded: int = 0
    blocks: int = 0
    wavefronts: int = 0
    least_wavefronts: int = 0

    @property
    def moved(self) -> int:
        return self.loaded + self.stored

    @property
    def dram(self) -> int:
        return self.first_loaded + self.stored

    @property
    def conflicts(self) -> float:
        """How many times as many wavefronts as without bank conflicts."""
        return self.wavefronts / max(1, self.least_wavefronts)


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
    module: ModuleType = field(init=False)

    def __post_init__(self) -> None:
        self.module = module_of(self.path)

    @contextlib.contextmanager
    def schedule(self, order: str, seed: int = 1, poison: bool = True, landing: str = "late") -> Iterator[None]:
        orders, landings = self.module.Order, self.module.Landing
        self.module.schedule(getattr(orders, order), seed, poison, getattr(landings, landing))
        try:
            yield
        finally:
            self.module.schedule(orders.ascending, 1, True, landings.late)

    @contextlib.contextmanager
    def shared_per_sm(self, size: int) -> Iterator[None]:
        """Launch plans for a card with so many bytes of shared memory a multiprocessor; none: nothing stays on chip."""
        self.module.shared_per_sm(size)
        try:
            yield
        finally:
            self.module.shared_per_sm(228 << 10)

    @contextlib.contextmanager
    def refused_cooperative_launches(self) -> Iterator[None]:
        """As on a card of which other processes have a part (MPS, green contexts)."""
        self.module.refuse_cooperative(True)
        try:
            yield
        finally:
            self.module.refuse_cooperative(False)

    @contextlib.contextmanager
    def metered(self, conflicts: bool = False) -> Iterator[Meter]:
        """The meter has its numbers when the context ends; those of bank conflicts take longer."""
        meter = Meter()
        self.module.take_meter(conflicts)
        yield meter
        counted = self.module.take_meter(False)
        for each in fields(meter):
            setattr(meter, each.name, getattr(counted, each.name))


@functools.cache
def sanitized(kind: str) -> dict[str, str]:
    """The environment in which a Python can load a build of this kind."""
    # what the scripts of this folder import
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT / "tests", ROOT)))}
    if kind == "plain":
        return environment
    runtimes = {"asan": ("libasan.so", "libubsan.so"), "tsan": ("libtsan.so",)}[kind]
    ask = shlex.split(find_compiler())
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
    return {**environment, **options, "FASTTRICKS_EMULATOR": kind, "LD_PRELOAD": " ".join(paths)}


_libraries: dict[Build, Library] = {}


def load(build: Build | None = None) -> Library:
    """Builds and loads the ops once a process; then fasttricks.backend("cuda") takes CPU tensors.

    FASTTRICKS_EMULATOR in the environment is the default kind of build: plain, asan or tsan.
    """
    build = build or Build(os.environ.get("FASTTRICKS_EMULATOR", "plain"))
    if build not in _libraries:
        _libraries[build] = Library(build.make())
        _register(build.ops)
    return _libraries[build]


def _register(names: tuple[str, ...]) -> None:
    for name in names:
        importlib.import_module(f"fasttricks.ops.{name}").register("fasttricks_emulated")
    backends.devices["cuda"] = ("cpu", "meta")
    backends.namespaces["cuda"] = "fasttricks_emulated"
    backends.not_loaded.pop("cuda", None)


if __name__ == "__main__":  # python emulated.py KIND...: builds ahead of the tests
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda kind: (PLANS if kind == PLANS.kind else Build(kind)).make(), sys.argv[1:]))
