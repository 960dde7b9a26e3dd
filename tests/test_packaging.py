"""The sdist, the wheel and its symbols; messages of the build if something is missing; imports without some parts."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from isa import instruction_sets

import fasttricks
from build_libraries import targets
from fasttricks import backend as backend_context
from fasttricks import backends
from fasttricks.backends import LIB

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(fasttricks.__file__).resolve().parent


def python(code: str, *flags: str, path: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a fresh interpreter, with `path` first on its import path."""
    full = {**os.environ, "PYTHONWARNINGS": "always", **env}
    if path is not None:
        full["PYTHONPATH"] = str(path)
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, env=full, cwd="/")


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Context manager that runs one build at a time: builds share build/ and src/fasttricks.egg-info."""
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build/packaging.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(folder), "."]
    with alone():
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


of_the_wheel = pytest.mark.xdist_group("wheel")  # one process builds it once


@of_the_wheel
def test_sdist_contains_all_that_the_build_reads(tmp_path: Path) -> None:
    """All modules, sources and headers are regular files; in a checkout src/fasttricks/kernels is a link."""
    command = [sys.executable, "-m", "build", "-q", "--sdist", "--no-isolation", "-o", str(tmp_path)]
    with alone():
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = tmp_path.glob("fasttricks-*.tar.gz")
    with tarfile.open(made) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
        assert [m.name for m in archive.getmembers() if m.issym() or m.islnk()] == []
    needed = {"setup.py", "pyproject.toml", "build_libraries.py", "README.md", "LICENSE", "src/fasttricks/py.typed"}
    needed |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    needed |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "src/fasttricks").rglob("*.py")}
    needed |= {f"src/fasttricks/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    assert needed - names == set()
    assert [name for name in names if name.endswith((".pyc", ".so"))] == []


@of_the_wheel
def test_wheel_is_for_every_python_3_on_this_platform(wheel: Path) -> None:
    assert re.fullmatch(r"fasttricks-[\d.]+-py3-none-(linux|manylinux|macosx)\w+\.whl", wheel.name), wheel.name


@of_the_wheel
def test_wheel_contains_every_module_of_a_checkout(unpacked: Path) -> None:
    """It also contains the library, build.json and py.typed."""
    names = {p.relative_to(unpacked / "fasttricks").as_posix() for p in (unpacked / "fasttricks").rglob("*.py")}
    here = {p.relative_to(ROOT / "src/fasttricks").as_posix() for p in (ROOT / "src/fasttricks").rglob("*.py")}
    here |= {f"kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}  # a link, which rglob may not follow
    assert here - names == set()
    for name in ("lib/libfasttricks_cpu.so", "lib/build.json", "py.typed"):
        assert (unpacked / "fasttricks" / name).is_file(), name


@of_the_wheel
def test_wheel_runs_its_own_library(unpacked: Path) -> None:
    code = (
        "import fasttricks, torch; from fasttricks.backends import LIB; print(LIB); "
        "y = fasttricks.avgpool_conv1x1(torch.randn(2, 3, 4, 4), torch.randn(5, 3, 1, 1)); "
        "print(fasttricks.info()['backend'], y.shape)"
    )
    done = python(code, path=unpacked)
    assert done.returncode == 0, done.stderr
    assert str(unpacked) in done.stdout
    assert "'cpu': 'cpu'" in done.stdout


@of_the_wheel
def test_wheel_requires_torch_without_a_pin(unpacked: Path) -> None:
    (metadata,) = unpacked.glob("fasttricks-*.dist-info/METADATA")
    text = metadata.read_text()
    assert "Requires-Dist: torch>=2.10\n" in text
    assert "Requires-Python: >=3.10\n" in text


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
@pytest.mark.parametrize("library", sorted(LIB.glob("*.so")), ids=lambda p: p.stem)
def test_library_links_only_to_the_stable_shims(library: Path) -> None:
    """Undefined symbols belong to torch's C shim or to the C and C++ runtimes, none to ATen, c10 or Python."""
    listing = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True)
    symbols = [line.split()[-1] for line in listing.stdout.splitlines()]
    assert any(s.startswith("aoti_torch_") for s in symbols), "nm did not list the symbols of the library"
    unversioned = [s for s in symbols if "@" not in s]  # versioned: glibc, libstdc++, libgcc
    weak_runtime = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
    strangers = [s for s in unversioned if not re.match(r"(aoti_torch_|torch_)", s) and s not in weak_runtime]
    assert strangers == []


def test_build_facts_name_what_was_built() -> None:
    facts = json.loads((LIB / "build.json").read_text())
    assert facts["torch"]
    assert "generic" in facts["cpu_isas"]


def test_info_command_prints_every_part() -> None:
    done = subprocess.run([sys.executable, "-m", "fasttricks.info"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for word in ("fasttricks:", f"torch: {torch.__version__}", "cpu_isas:", "cpu_isa:", "loaded: cpu", "not_loaded:"):
        assert word in done.stdout, word


# ---- builds with something missing: one sentence says what ----


def test_build_without_torch_says_so() -> None:
    done = python("import build_libraries as b; b.find_torch()", "-S", path=ROOT)
    assert done.returncode != 0
    assert "torch is not installed" in done.stderr
    assert "--no-build-isolation" in done.stderr
    assert "Traceback" not in done.stderr


def test_build_with_too_old_a_torch_says_so(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("")
    (tmp_path / "torch/version.py").write_text("__version__ = '2.9.1+cu130'\n")
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    done = python("import build_libraries as b; b.find_torch()", "-S", PYTHONPATH=path)
    assert done.returncode != 0
    assert "torch 2.9.1+cu130 is too old" in done.stderr
    assert "Traceback" not in done.stderr


TORCH = "torch = b.Torch('2.12.0', '13.0', b.ROOT, b.ROOT)"


def fake_toolkit(home: Path, release: str = "13.0", known: str = "sm_80 sm_90 sm_100") -> Path:
    """Makes a folder like a CUDA toolkit, with an nvcc that prints its version and its architectures."""
    (home / "include").mkdir(parents=True)
    (home / "include/cuda_runtime.h").touch()
    (home / "bin").mkdir()
    nvcc = home / "bin/nvcc"
    answers = f'case "$1" in --version) echo "release {release}, V{release}.1";; *) echo "{known}";; esac'
    nvcc.write_text(f"#!/bin/sh\n{answers}\n")
    nvcc.chmod(0o755)
    return home


def find_cuda(path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    full = {
        "CUDA_HOME": "",
        "CUDA_PATH": "",
        "TORCH_CUDA_ARCH_LIST": "",
        "FASTTRICKS_CUDA": "",
        "PATH": "/bin:/usr/bin",
    }
    return python(f"import build_libraries as b; {TORCH}; print(b.find_cuda(torch))", path=path, **(full | env))


def test_toolkit_is_where_its_header_is(tmp_path: Path) -> None:
    """Even if the nvcc on the PATH is a link in another folder, to which CUDA_HOME points."""
    home = fake_toolkit(tmp_path / "toolkit")
    shim = tmp_path / "shim/bin/nvcc"
    shim.parent.mkdir(parents=True)
    shim.symlink_to(home / "bin/nvcc")
    done = find_cuda(ROOT, PATH=f"{shim.parent}:/bin:/usr/bin", CUDA_HOME=str(tmp_path / "shim"))
    assert f"home={str(home)!r}" in done.stdout.replace("PosixPath(", "").replace(")", ""), done
    assert "archs=('8.0', '9.0', '10.0+PTX')" in done.stdout


def test_an_unusable_toolkit_is_reported_and_fails_only_on_request(tmp_path: Path) -> None:
    old = fake_toolkit(tmp_path / "old", release="11.8")
    assert "is of CUDA 11.8; 12.1 is needed" in find_cuda(ROOT, CUDA_HOME=str(old)).stdout
    assert "FASTTRICKS_CUDA=0" in find_cuda(ROOT, FASTTRICKS_CUDA="0").stdout
    done = find_cuda(ROOT, CUDA_HOME=str(old), FASTTRICKS_CUDA="1")
    assert done.returncode != 0
    assert "FASTTRICKS_CUDA=1, but the CUDA library cannot be built" in done.stderr
    assert "accepted: 0" in find_cuda(ROOT, FASTTRICKS_CUDA="yes").stderr


def test_architectures_are_those_requested(tmp_path: Path) -> None:
    home = str(fake_toolkit(tmp_path / "toolkit"))
    assert "archs=('9.0', '10.0+PTX')" in find_cuda(ROOT, CUDA_HOME=home, TORCH_CUDA_ARCH_LIST="9.0 10.0+PTX").stdout
    for wrong in ("13.5", "Hopper"):
        done = find_cuda(ROOT, CUDA_HOME=home, TORCH_CUDA_ARCH_LIST=wrong)
        assert f"TORCH_CUDA_ARCH_LIST holds {wrong!r}; accepted:" in done.stderr
        assert "Traceback" not in done.stderr


def test_architectures_share_a_compilation_to_ptx() -> None:
    """Those before Blackwell one, the others one; a letter takes no other's."""
    shared = ["arch=compute_80,code=[sm_80,sm_90]", "arch=compute_100,code=[sm_100,sm_120,compute_100]"]
    alone = ["arch=compute_90a,code=[sm_90a]", "arch=compute_75,code=[sm_86,sm_75,compute_75]"]
    for archs, groups in [(("8.0", "9.0", "10.0", "12.0+PTX"), shared), (("9.0a", "8.6+PTX", "7.5"), alone)]:
        assert targets(archs) == [part for group in groups for part in ("-gencode", group)]


@pytest.mark.parametrize("env", [{"PATH": "/nonexistent"}, {"CXX": "/nonexistent/g++"}])
def test_build_without_a_compiler_says_so(env: dict[str, str]) -> None:
    done = python("import build_libraries as b; b.find_compiler()", path=ROOT, **{"CXX": "", **env})
    assert done.returncode != 0
    assert "no C++ compiler found" in done.stderr
    assert "Traceback" not in done.stderr


# ---- imports with parts missing or broken ----


def copy_package(to: Path) -> Path:
    shutil.copytree(PACKAGE, to / "fasttricks", ignore=shutil.ignore_patterns("__pycache__"))
    return to


USE_OPS = """
import torch, fasttricks
x = torch.randn(2, 3, 4, 4, requires_grad=True)
fasttricks.bn_relu(x).sum().backward()
fasttricks.bn_add_relu(x, x).sum().backward()
fasttricks.avgpool_conv1x1(x, torch.randn(5, 3, 1, 1)).sum().backward()
p = torch.nn.Parameter(torch.randn(3)); p.grad = torch.ones(3)
fasttricks.optim.FusedSGD([p], lr=0.1, momentum=0.9).step()
print(fasttricks.info()["backend"]["cpu"], fasttricks.info()["not_loaded"].get("cpu"))
"""


def test_a_library_that_does_not_load_warns_once_and_the_reference_runs(tmp_path: Path) -> None:
    copy_package(tmp_path)
    (tmp_path / "fasttricks/lib" / "libfasttricks_cpu.so").write_bytes(b"\x7fELF, but no library")
    done = python(USE_OPS, path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("UserWarning") == 1
    built = json.loads((LIB / "build.json").read_text())["torch"]
    assert f"built with torch {built}, does not load on torch {torch.__version__}" in done.stderr
    assert done.stdout.startswith("reference built with torch")


def test_a_tree_that_was_never_built_runs_the_reference(tmp_path: Path) -> None:
    copy_package(tmp_path)
    shutil.rmtree(tmp_path / "fasttricks/lib")
    done = python(USE_OPS, path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("reference not built")


def test_import_needs_torch_alone(tmp_path: Path) -> None:
    """No Triton, ninja, torchvision, timm or compiler: importing never compiles."""
    block = "import sys\nfor name in ('triton', 'ninja', 'torchvision', 'timm'): sys.modules[name] = None\n"
    done = python(block + USE_OPS, PATH="/nonexistent")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cpu ")


def test_import_takes_nothing_of_torch_that_torch_leaves_for_later() -> None:
    """Such as its compiler, which takes as long to import as torch itself."""
    done = python(
        "import sys, torch; before = set(sys.modules); import fasttricks; print(*(set(sys.modules) - before))"
    )
    assert done.returncode == 0, done.stderr
    roots = {name.split(".")[0] if name[:6] != "torch." else name for name in done.stdout.split()}
    assert "fasttricks" in roots
    assert roots & {"torch._dynamo", "torch._inductor", "sympy", "torchvision", "timm"} == set()


@pytest.mark.skipif("FASTTRICKS_CPU_ISA" in os.environ, reason="FASTTRICKS_CPU_ISA forces one")
def test_the_best_instruction_set_is_used() -> None:
    assert torch.ops.fasttricks.cpu_isa() == instruction_sets()[-1]


def test_an_unknown_instruction_set_is_refused() -> None:
    done = python("import torch, fasttricks; fasttricks.info()", FASTTRICKS_CPU_ISA="avx1024")
    assert done.returncode != 0
    assert "FASTTRICKS_CPU_ISA=avx1024; accepted: generic, avx2, avx512" in done.stderr


# ---- the choice of a backend ----


def test_backend_names_are_checked() -> None:
    with (
        pytest.raises(ValueError, match="backend is 'gpu'; accepted: auto, cuda, triton, cpu, reference"),
        backend_context("gpu"),
    ):
        pass
    done = python("import fasttricks", FASTTRICKS_BACKEND="fast")
    assert "FASTTRICKS_BACKEND is 'fast'; accepted: auto, cuda, triton, cpu, reference" in done.stderr


def test_answers_about_cards_are_constants_of_compiled_code() -> None:
    marked = vars(torch.compiler.assume_constant_result(lambda: None))
    assert marked
    for function in (backends._card_refuses, backends._capability):
        assert vars(function) == marked


def test_a_backend_that_cannot_serve_is_refused_by_the_op() -> None:
    """In a process of its own: in this one the emulated kernels may serve cuda on the CPU."""
    done = python(
        "import torch, fasttricks\n"
        "with fasttricks.backend('cuda'):\n"
        "    fasttricks.avgpool_conv1x1(torch.randn(2, 3, 4, 4), torch.randn(5, 3, 1, 1))"
    )
    assert done.returncode != 0
    assert "RuntimeError: fasttricks.avgpool_conv1x1: backend 'cuda' was asked for, but the cuda backend" in done.stderr


def test_backend_context_ends_with_its_block() -> None:
    from fasttricks.backends import select

    before = select("avgpool_conv1x1", torch.device("cpu"))
    with backend_context("reference"):
        assert select("avgpool_conv1x1", torch.device("cpu")) == "reference"
    assert select("avgpool_conv1x1", torch.device("cpu")) == before
