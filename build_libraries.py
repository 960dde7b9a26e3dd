"""Compiles csrc/ against the torch that is installed: what setup.py calls, and nothing of setuptools."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)
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
    include: Path
    lib: Path


@dataclass(frozen=True)
class Step:
    """One command, what it makes, and what it reads (headers: see the depfile that the compiler writes)."""

    command: tuple[str, ...]
    output: Path
    inputs: tuple[Path, ...]
    depfile: Path | None = None


def stop(sentence: str) -> None:
    """Ends the build with one sentence that says what is missing and what to do."""
    raise SystemExit(f"fasttricks: {sentence}")


def find_torch() -> Torch:
    """The installed torch, found without importing it: that takes seconds, and may fail where building need not."""
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
    return Torch(version, folder / "include", folder / "lib")


def find_compiler() -> str:
    wish = os.environ.get("CXX")
    for name in [wish] if wish else ["g++", "c++", "clang++"]:
        path = shutil.which(shlex.split(name)[0])
        if path:
            return name if wish else path
    stop(
        f"no C++ compiler found ({'CXX=' + wish if wish else 'tried g++, c++, clang++'}); install one "
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
        "-ffp-contract=off",  # a fused multiply-add only where it is written, so that forward and backward round alike
        "-fno-math-errno",
        "-Wall",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-I{ROOT / 'csrc'}",
    ]
    torch_flags = ["-isystem", str(torch.include), "-isystem", str(torch.include / "torch/csrc/api/include")]
    steps: list[Step] = []

    def compile_(source: Path, suffix: str, flags: list[str]) -> Path:
        output = objects / f"{source.relative_to(ROOT / 'csrc').as_posix().replace('/', '_')}{suffix}.o"
        depfile = Path(f"{output}.d")
        command = (*common, *flags, "-MMD", "-MF", str(depfile), "-c", str(source), "-o", str(output))
        steps.append(Step(command, output, (source,), depfile))
        return output

    outputs = [
        compile_(source, "", torch_flags)
        for source in [ROOT / "csrc/library.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
    ]
    for isa in cpu_isas():
        for source in sorted((ROOT / "csrc/cpu/isa").glob("*.cpp")):
            outputs.append(compile_(source, f".{isa}", [f"-DFT_ISA={isa}", *ISA_FLAGS[isa]]))
    # every shim that the stable ABI calls lives in libtorch_cpu, in CPU and CUDA builds of torch alike
    link = (*cxx, "-shared", "-o", str(library), *map(str, outputs), f"-L{torch.lib}", "-ltorch_cpu")
    steps.append(Step(link, library, tuple(outputs)))
    return steps


def _ninja() -> list[str] | None:
    """How to call ninja, as a program or as the module that pip installs; None where there is none."""
    if program := shutil.which("ninja"):
        return [program]
    return [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else None


def _write_ninja(steps: list[Step], path: Path) -> None:
    def escape(p: object) -> str:
        return str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = ["ninja_required_version = 1.5"]
    for i, step in enumerate(steps):
        lines += [f"rule r{i}", f"  command = {shlex.join(step.command).replace('$', '$$')}"]
        lines += [f"  description = {step.output.name}"]
        if step.depfile:
            lines += ["  deps = gcc", f"  depfile = {escape(step.depfile)}"]
        lines += [f"build {escape(step.output)}: r{i} {' '.join(map(escape, step.inputs))}"]
    path.write_text("\n".join(lines) + "\n")


def _run_step(step: Step) -> None:
    print(f"fasttricks: building {step.output.name}", flush=True)
    if subprocess.run(step.command).returncode:
        stop(f"the compiler failed on {step.output.name}; the command was: {shlex.join(step.command)}")


def run_steps(steps: list[Step], folder: Path) -> None:
    """Runs compile and link steps: by ninja (only what changed) where there is one, else all of them."""
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    if ninja := _ninja():
        _write_ninja(steps, folder / "build.ninja")
        if subprocess.run([*ninja, f"-j{jobs}", "-C", str(folder)]).returncode:
            stop("the compiler failed; its messages stand above.")
        return
    made = {s.output for s in steps}
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(_run_step, [s for s in steps if not made.intersection(s.inputs)]))
    for step in steps:
        if made.intersection(step.inputs):
            _run_step(step)


def build(folder: Path, debug: bool = False) -> None:
    """Builds the libraries into `folder`, with a build.json that says what was built and why not the rest."""
    torch = find_torch()
    objects = ROOT / "build" / f"objects-{torch.version}-{platform.machine()}{'-debug' if debug else ''}"
    objects.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    with open(objects / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = objects / "libfasttricks_cpu.so"
        run_steps(cpu_steps(torch, objects, library, debug), objects)
        # replaced by rename: a process that has the old library loaded keeps it whole
        for made in [library]:
            partial = folder / f".{made.name}.new"
            shutil.copy2(made, partial)
            os.replace(partial, folder / made.name)
        facts = {
            "torch": torch.version,
            "compiler": subprocess.run(
                [*shlex.split(find_compiler()), "--version"], capture_output=True, text=True
            ).stdout.splitlines()[0],
            "cpu_isas": cpu_isas(),
        }
        (folder / "build.json").write_text(json.dumps(facts, indent=2) + "\n")
