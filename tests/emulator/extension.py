"""Loads a library of the emulator as a Python module; without torch, which takes seconds to import."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def module_of(library: Path) -> ModuleType:
    """The module that a library has; its ops, if it has some, are registered."""
    # the last part is the name in control.cpp; pybind11 keeps modules by the whole name, and a process may load several
    name = f"{str(library.parent).replace('.', '_')}.cuda_on_cpu"
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
