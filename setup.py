"""Builds the op libraries: libfasttricks_cpu.so always, libfasttricks_cuda.so if nvcc is installed.

Both use the LibTorch stable ABI only (no ATen, no Python.h): one wheel serves every Python and every torch >= 2.10.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

import build_libraries  # noqa: E402  (beside this file)

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel


class BuildLibraries(build_ext):
    """Compiles csrc/ into src/fasttricks/lib/ (editable) or into the wheel."""

    def run(self) -> None:
        package = ROOT / "src" if self.inplace or self.editable_mode else Path(self.build_lib)
        build_libraries.build(package / "fasttricks" / "lib", debug=bool(self.debug))

    def get_outputs(self) -> list[str]:
        folder = (ROOT / "src" if self.editable_mode else Path(self.build_lib)) / "fasttricks" / "lib"
        return [str(p) for p in folder.glob("*")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """Tags the wheel for any Python 3 on this platform: the libraries do not link to Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    # setuptools builds what is named here; the sources are listed in build_libraries.py
    ext_modules=[Extension("fasttricks.lib", sources=[])],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
)
