"""Reads machine code with cuobjdump: kernels of a library or cubin, their resources and instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path


def tool(name: str) -> str | None:
    """cuobjdump of a toolkit, or the one that Triton brings; None if neither is here."""
    try:
        import triton

        brought = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    except ImportError:
        brought = Path()
    return shutil.which(name) or next(
        (str(p) for p in (Path("/usr/local/cuda/bin") / name, brought) if p.is_file()), None
    )


@dataclass
class Kernel:
    """One kernel on one architecture; bytes are a thread's (stack, local) or a block's (shared)."""

    name: str
    arch: int
    registers: int
    stack: int
    local: int
    shared: int
    opcodes: set[str] = field(default_factory=set)


def _names(mangled: list[str]) -> dict[str, str]:
    """Demangled, without return type, arguments and namespaces: bn_stats<__half, true>."""
    text = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    short = {}
    for name, line in zip(mangled, text.splitlines(), strict=True):
        line = line.removeprefix("void ").replace("(anonymous namespace)::", "").replace("(bool)", "")
        depth, end = 0, len(line)
        for i, letter in enumerate(line):  # the first parenthesis outside the template arguments
            depth += {"<": 1, ">": -1}.get(letter, 0)
            if letter == "(" and depth == 0:
                end = i
                break
        short[name] = re.sub(r"\b(?:\w+::)+", "", line[:end])
    return short


def kernels(path: Path) -> list[Kernel]:
    """Every kernel of every architecture in a library or cubin, with the opcodes that occur in it."""
    cuobjdump = tool("cuobjdump")
    assert cuobjdump is not None

    def dump(flag: str) -> str:
        return subprocess.run([cuobjdump, flag, str(path)], capture_output=True, text=True, check=True).stdout

    found: dict[tuple[int, str], Kernel] = {}
    arch, name = 0, ""
    for line in dump("-res-usage").splitlines():
        if m := re.search(r"arch = sm_(\d+)", line):
            arch = int(m[1])
        elif m := re.match(r"\s*Function (\S+):", line):
            name = m[1]
        elif m := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            found[arch, name] = Kernel(name, arch, int(m[1]), int(m[2]), int(m[4]), int(m[3]))
    for line in dump("-sass").splitlines():
        if m := re.search(r"code for sm_(\d+)", line):
            arch = int(m[1])
        elif m := re.match(r"\s*Function : (\S+)", line):
            name = m[1]
        elif m := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", line):
            found[arch, name].opcodes.add(m[1])
    short = _names(sorted({k.name for k in found.values()}))
    for kernel in found.values():
        kernel.name = short[kernel.name]
    return list(found.values())
