"""The wheel, what it links to, what the build says where something is missing, and imports where parts are absent."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import fasttricks
from fasttricks import backend as backend_context
from fasttricks.backend import CPU_LIBRARY, LIB

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(fasttricks.__file__).resolve().parent


def python(code: str, *flags: str, path: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a fresh interpreter, with `path` first on its import path."""
    full = {**os.environ, "PYTHONWARNINGS": "always", **env}
    if path is not None:
        full["PYTHONPATH"] = str(path)
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, env=full, cwd="/")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(folder), "."]
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


def test_wheel_is_for_every_python_3_on_this_platform(wheel: Path) -> None:
    assert re.fullmatch(r"fasttricks-[\d.]+-py3-none-(linux|manylinux|macosx)\w+\.whl", wheel.name), wheel.name


def test_wheel_holds_what_a_checkout_holds(unpacked: Path) -> None:
    """Every module of the source tree, the library, the build's facts and the typing marker are in the wheel."""
    names = {p.relative_to(unpacked / "fasttricks").as_posix() for p in (unpacked / "fasttricks").rglob("*.py")}
    here = {p.relative_to(ROOT / "src/fasttricks").as_posix() for p in (ROOT / "src/fasttricks").rglob("*.py")}
    assert here <= names
    for name in ("lib/libfasttricks_cpu.so", "lib/build.json", "py.typed"):
        assert (unpacked / "fasttricks" / name).is_file(), name


def test_wheel_runs_the_library_it_brings(unpacked: Path) -> None:
    code = (
        "import fasttricks, torch; from fasttricks.backend import LIB; print(LIB); "
        "y = fasttricks.avgpool_conv1x1(torch.randn(2, 3, 4, 4), torch.randn(5, 3, 1, 1)); "
        "print(fasttricks.info()['backend'], y.shape)"
    )
    done = python(code, path=unpacked)
    assert done.returncode == 0, done.stderr
    assert str(unpacked) in done.stdout
    assert "'cpu': 'cpu'" in done.stdout


def test_wheel_asks_for_torch_without_a_pin(unpacked: Path) -> None:
    (metadata,) = unpacked.glob("fasttricks-*.dist-info/METADATA")
    text = metadata.read_text()
    assert "Requires-Dist: torch>=2.10\n" in text
    assert "Requires-Python: >=3.10\n" in text


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_library_links_to_the_stable_shims_only() -> None:
    """No ATen, c10 or Python symbol: what is undefined is the C shim of torch, or the C and C++ runtime."""
    listing = subprocess.run(["nm", "-D", "--undefined-only", str(CPU_LIBRARY)], capture_output=True, text=True)
    symbols = [line.split()[-1] for line in listing.stdout.splitlines()]
    assert any(s.startswith("aoti_torch_") for s in symbols), "not the library's symbols"
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


# What is missing is said in one sentence.


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
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import build_libraries as b; b.find_torch()"
    done = python(code, "-S", path=tmp_path)
    assert done.returncode != 0
    assert "torch 2.9.1+cu130 is too old" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("env", [{"PATH": "/nonexistent"}, {"CXX": "/nonexistent/g++"}])
def test_build_without_a_compiler_says_so(env: dict[str, str]) -> None:
    done = python("import build_libraries as b; b.find_compiler()", path=ROOT, **{"CXX": "", **env})
    assert done.returncode != 0
    assert "no C++ compiler found" in done.stderr
    assert "Traceback" not in done.stderr


# Imports where parts are absent or broken.


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


def test_a_library_that_does_not_load_is_one_warning_and_the_reference_runs(tmp_path: Path) -> None:
    copy_package(tmp_path)
    (tmp_path / "fasttricks/lib" / CPU_LIBRARY.name).write_bytes(b"\x7fELF, but no library")
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


def test_import_needs_no_triton_ninja_or_torchvision(tmp_path: Path) -> None:
    """None of them, nor any compiler on the PATH (K05): importing never compiles."""
    block = "import sys\nfor name in ('triton', 'ninja', 'torchvision', 'timm'): sys.modules[name] = None\n"
    done = python(block + USE_OPS, PATH="/nonexistent")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cpu ")


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    done = python("import torch, fasttricks; fasttricks.info()", FASTTRICKS_CPU_ISA="avx1024")
    assert done.returncode != 0
    assert "FASTTRICKS_CPU_ISA=avx1024; accepted: generic, avx2, avx512" in done.stderr


# Choosing a backend.


def test_backend_names_are_checked() -> None:
    with (
        pytest.raises(ValueError, match="backend is 'gpu'; accepted: auto, cuda, triton, cpu, reference"),
        backend_context("gpu"),
    ):
        pass
    done = python("import fasttricks", FASTTRICKS_BACKEND="fast")
    assert "FASTTRICKS_BACKEND is 'fast'; accepted: auto, cuda, triton, cpu, reference" in done.stderr


def test_a_backend_that_cannot_serve_is_refused_by_the_op() -> None:
    with (
        backend_context("cuda"),
        pytest.raises(RuntimeError, match=r"fasttricks.avgpool_conv1x1: backend 'cuda' was asked for"),
    ):
        fasttricks.avgpool_conv1x1(torch.randn(2, 3, 4, 4), torch.randn(5, 3, 1, 1))


def test_backend_context_ends_with_its_block() -> None:
    from fasttricks.backend import select

    before = select("avgpool_conv1x1", torch.device("cpu"))
    with backend_context("reference"):
        assert select("avgpool_conv1x1", torch.device("cpu")) == "reference"
    assert select("avgpool_conv1x1", torch.device("cpu")) == before
