"""Compiles csrc/ against the torch that is installed: called by setup.py, without setuptools."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)
OLDEST_CUDA = (12, 1)  # from here on kernels take 32,764 bytes of parameters
CUDA_ARCHS = ("8.0", "9.0", "10.0", "12.0")  # 8.6 and 8.9 run the code of 8.0, 10.3 that of 10.0, 12.1 that of 12.0
ISA_FLAGS = {
    "generic": [],
    "avx2": ["-DFT_ISA_AVX2", "-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-DFT_ISA_AVX512",
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
        *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # false alarms in GCC 12's own AVX-512 headers
    ],
}


@dataclass(frozen=True)
class Torch:
    version: str
    cuda: str | None
    include: Path
    lib: Path


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit, its version, and the architectures to build for: ("9.0", ..., "12.0+PTX")."""

    home: Path
    nvcc: Path
    version: tuple[int, int]
    archs: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """One command, its output and its inputs (headers: see the depfile that the compiler writes)."""

    title: str
    command: tuple[str, ...]
    output: Path
    inputs: tuple[Path, ...]
    depfile: Path | None = None


def compile_step(command: list[str], source: Path, output: Path, title: str = "") -> Step:
    """`source` compiled to `output` by `command`, again when one of the headers that it includes is newer."""
    depfile = Path(f"{output}.d")
    full = (*command, "-MMD", "-MF", str(depfile), "-c", str(source), "-o", str(output))
    return Step(title or f"compiling {source.name}", full, output, (source,), depfile)


def link_step(command: list[str], objects: list[Path], library: Path, libraries: list[str]) -> Step:
    """A shared library of `objects`; `libraries` are flags that come after them."""
    full = (*command, "-shared", "-o", str(library), *map(str, objects), *libraries)
    return Step(f"linking {library.name}", full, library, tuple(objects))


def stop(sentence: str) -> None:
    """Ends the build with one sentence that says what is missing and what to do."""
    raise SystemExit(f"fasttricks: {sentence}")


def find_torch() -> Torch:
    """The installed torch, found without an import, which takes seconds and may fail on a machine that can build."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        stop(
            "torch is not installed in the environment that builds; install torch>=2.10 first, then "
            "`pip install --no-build-isolation .`, or let pip's build isolation fetch one."
        )
    folder = Path(spec.origin).parent
    scope: dict[str, str] = {}
    exec((folder / "version.py").read_text(), scope)
    version = scope["__version__"]
    if tuple(int(p) for p in version.split("+")[0].split(".")[:2]) < OLDEST_TORCH:
        stop(f"torch {version} is too old: the libraries need torch>=2.10 (its stable ABI); `pip install -U torch`.")
    return Torch(version, scope.get("cuda"), folder / "include", folder / "lib")


def find_compiler() -> str:
    chosen = os.environ.get("CXX")
    for name in [chosen] if chosen else ["g++", "c++", "clang++"]:
        path = shutil.which(shlex.split(name)[0])
        if path:
            return name if chosen else path
    stop(
        f"no C++ compiler found ({'CXX=' + chosen if chosen else 'tried g++, c++, clang++'}); install one "
        "(Debian: `apt install g++`), or install a prebuilt wheel."
    )
    raise AssertionError


def cpu_isas() -> list[str]:
    return list(ISA_FLAGS) if platform.machine().lower() in ("x86_64", "amd64") else ["generic"]


def cpu_steps(torch: Torch, objects: Path, library: Path, debug: bool) -> list[Step]:
    cxx = shlex.split(find_compiler())
    common = [
        *cxx,
        "-std=c++20",
        "-O0" if debug else "-O3",
        "-g" if debug else "-g0",
        "-fPIC",
        "-fvisibility=hidden",
        "-ffp-contract=off",  # fused multiply-adds only where written: forward and backward must round identically
        "-fno-math-errno",
        "-Wall",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-I{ROOT / 'csrc'}",
    ]
    torch_flags = ["-isystem", str(torch.include), "-isystem", str(torch.include / "torch/csrc/api/include")]
    steps: list[Step] = []

    for source in [ROOT / "csrc/library.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]:
        steps.append(compile_step([*common, *torch_flags], source, objects / f"cpu_{source.name}.o"))
    for isa in cpu_isas():
        for source in sorted((ROOT / "csrc/cpu/isa").glob("*.cpp")):
            command = [*common, f"-DFT_ISA={isa}", *ISA_FLAGS[isa]]
            output = objects / f"cpu_{source.stem}.{isa}.o"
            steps.append(compile_step(command, source, output, f"compiling {source.name} for {isa}"))
    # every shim that the stable ABI calls lives in libtorch_cpu, in both CPU and CUDA builds of torch
    made = [step.output for step in steps]
    return [*steps, link_step(cxx, made, library, [f"-L{torch.lib}", "-ltorch_cpu"])]


def _toolkit_folders() -> list[Path]:
    """Candidate locations of a toolkit, in order: the environment's, that of the nvcc on the PATH, the default one."""
    named = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = [Path(nvcc).resolve().parent.parent] if (nvcc := shutil.which("nvcc")) else []
    return [*named, *on_path, Path("/usr/local/cuda")]


def _nvcc_version(nvcc: Path) -> tuple[int, int]:
    text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _cuda_archs(nvcc: Path) -> tuple[str, ...]:
    """TORCH_CUDA_ARCH_LIST, or those of CUDA_ARCHS that this nvcc supports, the last one with PTX for newer cards."""
    listing = subprocess.run([str(nvcc), "--list-gpu-code"], capture_output=True, text=True).stdout
    known = set(re.findall(r"sm_(\w+)", listing))
    chosen = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(";, "))
    if chosen == [""]:
        fit = [arch for arch in CUDA_ARCHS if arch.replace(".", "") in known]
        return *fit[:-1], f"{fit[-1]}+PTX"
    for arch in chosen:
        number = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", arch)
        if not number or number[1] + number[2].rstrip("af") not in known:
            stop(
                f"TORCH_CUDA_ARCH_LIST holds {arch!r}; accepted: numbers such as 9.0 or 12.0+PTX that {nvcc} knows "
                f"({', '.join(sorted(known, key=lambda k: int(k.rstrip('af'))))})."
            )
    return tuple(chosen)


def find_cuda(torch: Torch) -> Cuda | str:
    """The toolkit to build with, or why there is none. FASTTRICKS_CUDA=0: do not look; 1: end the build without one."""
    chosen = os.environ.get("FASTTRICKS_CUDA", "")
    if chosen not in ("", "0", "1"):
        stop(f"FASTTRICKS_CUDA is {chosen!r}; accepted: 0 (build no CUDA library), 1 (end where it cannot be built).")
    if chosen == "0":
        return "FASTTRICKS_CUDA=0 at build time"
    reason = ""
    if torch.cuda is None:
        reason = f"torch {torch.version}, which built this, has no CUDA"
    else:
        # a wrapper called nvcc may be anywhere: a toolkit is identified by its header
        homes = [home for home in _toolkit_folders() if (home / "include/cuda_runtime.h").is_file()]
        homes = [home for home in homes if (home / "bin/nvcc").is_file()]
        if not homes:
            reason = "no CUDA toolkit was found (a folder with include/cuda_runtime.h and bin/nvcc; see CUDA_HOME)"
        else:
            nvcc = homes[0] / "bin/nvcc"
            version = _nvcc_version(nvcc)
            if version >= OLDEST_CUDA:
                return Cuda(homes[0], nvcc, version, _cuda_archs(nvcc))
            reason = f"{nvcc} is of CUDA {version[0]}.{version[1]}; {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]} is needed"
    if chosen == "1":
        stop(f"FASTTRICKS_CUDA=1, but the CUDA library cannot be built: {reason}.")
    return reason


def targets(archs: tuple[str, ...]) -> list[str]:
    """nvcc's options for these architectures.

    The source is the same for all of them, and nvcc has one compiler to PTX for those before Blackwell and one from
    there on: each runs once, for the oldest of its architectures. Those with a letter (9.0a) take no other's PTX.
    """
    numbers = {arch: arch.removesuffix("+PTX").replace(".", "") for arch in archs}
    groups: dict[str, list[str]] = {}
    for arch, number in numbers.items():
        group = number if not number.isdigit() else "Blackwell" if int(number) >= 100 else "before"
        groups.setdefault(group, []).append(arch)
    made: list[str] = []
    for members in groups.values():
        oldest = min((numbers[arch] for arch in members), key=lambda number: (len(number), number))
        codes = list(dict.fromkeys(f"sm_{numbers[arch]}" for arch in members))
        codes += [f"compute_{oldest}"] if any(arch.endswith("+PTX") for arch in members) else []
        made += ["-gencode", f"arch=compute_{oldest},code=[{','.join(codes)}]"]
    return made


def cuda_steps(torch: Torch, cuda: Cuda, objects: Path, library: Path, debug: bool) -> list[Step]:
    nvcc = [str(cuda.nvcc)]
    if chosen := os.environ.get("CXX"):
        nvcc += ["-ccbin", shlex.split(chosen)[0]]
    common = [
        *nvcc,
        *targets(cuda.archs),
        "-std=c++20",
        f"--threads={min(jobs(), len(cuda.archs))}",  # architectures side by side
        *(["-O0", "-g"] if debug else ["-O3"]),
        "--fmad=false",  # fused multiply-adds only where written: forward and backward must round identically
        "--expt-relaxed-constexpr",
        "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-DUSE_CUDA",  # the stable headers' name for: shims that need CUDA may be used
        *(f"-I{ROOT / folder}" for folder in ("csrc", "csrc/cuda")),
        *("-isystem", str(torch.include), "-isystem", str(torch.include / "torch/csrc/api/include")),
    ]
    archs = f"for {', '.join(cuda.archs)}"
    steps = [
        compile_step(common, source, objects / f"cuda_{source.stem}.o", f"compiling {source.name} {archs}")
        for source in sorted((ROOT / "csrc/cuda").glob("*.c*"))
        if source.suffix in (".cu", ".cpp")
    ]
    # the CUDA runtime is linked statically and not exported: torch brings its own, possibly of another version
    link = [*nvcc, *targets(cuda.archs), "--cudart=static", "-Xlinker", "--exclude-libs=ALL"]
    made = [step.output for step in steps]
    return [*steps, link_step(link, made, library, [f"-L{torch.lib}", "-ltorch_cpu", "-ltorch_cuda"])]


def jobs() -> int:
    """How many commands run at a time: MAX_JOBS, or the number of cores."""
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def _ninja() -> list[str] | None:
    """How to call ninja, as a program or as the module that pip installs; None if it is not installed."""
    if program := shutil.which("ninja"):
        return [program]
    return [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else None


def _write_ninja(steps: list[Step], path: Path) -> None:
    def escape(p: object) -> str:
        return str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = ["ninja_required_version = 1.5"]
    for i, step in enumerate(steps):
        lines += [f"rule r{i}", f"  command = {shlex.join(step.command).replace('$', '$$')}"]
        lines += [f"  description = {step.title}"]
        if step.depfile:
            lines += ["  deps = gcc", f"  depfile = {escape(step.depfile)}"]
        lines += [f"build {escape(step.output)}: r{i} {' '.join(map(escape, step.inputs))}"]
    path.write_text("\n".join(lines) + "\n")


def _run_step(step: Step) -> None:
    print(step.title, flush=True)
    if subprocess.run(step.command).returncode:
        stop(f"the compiler failed on {step.output.name}; the command was: {shlex.join(step.command)}")


def run_steps(steps: list[Step], folder: Path) -> None:
    """Runs compile and link steps: by ninja (only what changed) if it is installed, else all of them."""
    if ninja := _ninja():
        _write_ninja(steps, folder / "build.ninja")
        env = {"NINJA_STATUS": "fasttricks: [%f/%t, %e s] ", **os.environ}
        if subprocess.run([*ninja, f"-j{jobs()}"], cwd=folder, env=env).returncode:
            stop("the compiler failed; see its messages above.")
        return
    made = {s.output for s in steps}
    with ThreadPoolExecutor(jobs()) as pool:
        list(pool.map(_run_step, [s for s in steps if not made.intersection(s.inputs)]))
    for step in steps:
        if made.intersection(step.inputs):
            _run_step(step)


def _compiler_version() -> str:
    command = [*shlex.split(find_compiler()), "--version"]
    return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()[0]


def build(folder: Path, debug: bool = False) -> None:
    """Builds the libraries into `folder`, with a build.json that says what was built and why anything is missing."""
    torch = find_torch()
    objects = ROOT / "build" / f"objects-{torch.version}-{platform.machine()}{'-debug' if debug else ''}"
    objects.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    with open(objects / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        libraries = [objects / "libfasttricks_cpu.so"]
        steps = cpu_steps(torch, objects, libraries[0], debug)
        facts: dict[str, object] = {"torch": torch.version, "compiler": _compiler_version(), "cpu_isas": cpu_isas()}
        cuda = find_cuda(torch)
        if isinstance(cuda, Cuda):
            libraries.append(objects / "libfasttricks_cuda.so")
            steps += cuda_steps(torch, cuda, objects, libraries[1], debug)
            facts |= {"cuda": "{}.{}".format(*cuda.version), "cuda_archs": list(cuda.archs)}
        else:
            print(f"fasttricks: the CUDA library is not built: {cuda}", flush=True)
            facts["no_cuda"] = cuda
        run_steps(steps, objects)
        for stale in set(folder.glob("libfasttricks_*.so")) - {folder / made.name for made in libraries}:
            stale.unlink()
        # replaced by rename: a process that has loaded the old library keeps it intact
        for made in libraries:
            partial = folder / f".{made.name}.new"
            shutil.copy2(made, partial)
            os.replace(partial, folder / made.name)
        (folder / "build.json").write_text(json.dumps(facts, indent=2) + "\n")
