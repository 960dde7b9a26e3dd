"""Reads machine code with cuobjdump: kernels of a library or cubin, their resources, instructions and loops."""

from __future__ import annotations

import functools
import itertools
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


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


_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]+)\s*([^;]*)")
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")


class Instruction(NamedTuple):
    """One line of machine code: its address, opcode and operands."""

    address: int
    opcode: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch or call goes; None where a register says."""
        if not self.opcode.startswith(("BRA", "CALL", "BSYNC", "BREAK")):
            return None
        found = _TARGET.search(self.operands)
        return int(found[1], 16) if found else None

    @property
    def always(self) -> bool:
        return not self.operands.startswith("@")


def instruction(line: str) -> Instruction | None:
    """The instruction of a line of cuobjdump; None if it has none."""
    found = _LINE.match(line) if ";" in line else None  # lines without: the code of the instruction above
    return Instruction(int(found[1], 16), found[3], f"{found[2] or ''}{found[4].strip()}") if found else None


@dataclass
class Kernel:
    """One kernel on one architecture; bytes are a thread's (stack, local) or a block's (shared)."""

    name: str
    arch: int
    registers: int
    stack: int
    local: int
    shared: int
    parameters: int = 0  # bytes of them, and what the driver adds
    opcodes: set[str] = field(default_factory=set)
    divisions: int = 0  # of integers, by numbers that are not constants, inside loops
    in_flight: int = 0  # 128-bit global loads that are issued before the first of them is waited for, at best
    waited: int = 0  # those in loops with tensor-core instructions that are waited for before any of these
    apart: int = 0  # instructions from one asynchronous copy to the next, at best, in a loop with such instructions


def _loops(code: list[Instruction]) -> list[set[int]]:
    """The indices of the instructions of each loop with everything inside it: strongly connected parts of the code."""
    at = {instruction.address: i for i, instruction in enumerate(code)}
    starts = {0}
    for i, instruction in enumerate(code):
        if instruction.opcode.split(".")[0] in ("BRA", "EXIT", "RET", "BRX", "JMP"):
            starts.add(i + 1)
            if instruction.target in at:
                starts.add(at[instruction.target])
    firsts = sorted(i for i in starts if i < len(code))
    block_of = {first: k for k, first in enumerate(firsts)}
    ends = [*firsts[1:], len(code)]
    following: list[list[int]] = []
    for end in ends:
        last, after = code[end - 1], []
        kind = last.opcode.split(".")[0]
        if kind == "BRA" and last.target in at:
            after.append(block_of[at[last.target]])
        if end < len(code) and not (kind in ("BRA", "EXIT", "RET", "BRX", "JMP") and last.always):
            after.append(block_of[end])
        following.append(after)
    # Tarjan 1972, without recursion
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: dict[int, None] = {}  # in the order of its keys
    loops: list[set[int]] = []
    for root in range(len(firsts)):
        if root in index:
            continue
        work = [(root, 0)]
        while work:
            block, k = work.pop()
            if block not in index:
                index[block] = low[block] = len(index)
                stack[block] = None
            for j in range(k, len(following[block])):
                to = following[block][j]
                if to not in index:
                    work += [(block, j), (to, 0)]
                    break
                if to in stack:
                    low[block] = min(low[block], low[to])
            else:
                if low[block] == index[block]:
                    part: set[int] = set()
                    while block not in part:
                        part.add(stack.popitem()[0])
                    if len(part) > 1 or block in following[block]:
                        loops.append({i for b in part for i in range(firsts[b], ends[b])})
    return loops


def _divides(instruction: Instruction) -> bool:
    """Whether it belongs to a division of integers, whose quotient starts from a reciprocal that is rounded up."""
    return re.match(r"I2F\b.*\.RP\b", instruction.opcode) is not None


def _divisions_in_loops(code: list[Instruction], loops: list[set[int]]) -> int:
    # subroutines: from a called address to the next return
    dividing, at = set(), {instruction.address: i for i, instruction in enumerate(code)}
    for to in {c.target for c in code if c.opcode.startswith("CALL") and c.target in at}:
        body = code[at[to] :]
        end = next((i for i, instruction in enumerate(body) if instruction.opcode.startswith("RET")), len(body))
        if any(map(_divides, body[:end])):
            dividing.add(to)
    inside = set().union(*loops)
    return sum(_divides(code[i]) or code[i].target in dividing for i in inside)


def _read(operands: str) -> set[int]:
    """The registers that an instruction names after its first operand, or in it if that is an address."""
    first, _, rest = operands.partition(",")
    named = rest + (first if "[" in first else "")
    found = {int(r) for r in re.findall(r"\bR(\d+)\b", named)}
    return found | {int(r) + 1 for r in re.findall(r"\bR(\d+)\.64\b", named)}


def _first_uses(code: list[Instruction]) -> dict[int, int]:
    """For every 128-bit global load, the index of the first instruction after it that reads what it loaded."""
    uses = {}
    read = functools.cache(lambda j: _read(code[j].operands))
    for i, instruction in enumerate(code):
        if not instruction.opcode.startswith("LDG.") or ".128" not in instruction.opcode:
            continue
        loaded = re.search(r"\bR(\d+)\b", re.sub(r"^@\S+\s+", "", instruction.operands))
        if not loaded:
            continue
        registers = set(range(int(loaded[1]), int(loaded[1]) + 4))
        uses[i] = next((j for j in range(i + 1, len(code)) if registers & read(j)), len(code))
    return uses


def _copies_apart(code: list[Instruction], loop: set[int]) -> int:
    """How far the closest two of a loop's copies from global to shared memory are apart, all of the code if a branch
    lies between any two; 0 if there is no copy.
    """
    copies = sorted(i for i in loop if code[i].opcode.startswith("LDGSTS"))
    straight = [
        b - a for a, b in itertools.pairwise(copies) if not any(code[i].opcode.startswith("BRA") for i in range(a, b))
    ]
    return min(straight, default=len(code)) if copies else 0


def inspect(kernel: Kernel, code: list[Instruction]) -> None:
    """Fills in what the instructions say."""
    loops, uses = _loops(code), _first_uses(code)
    kernel.opcodes = {instruction.opcode for instruction in code}
    kernel.divisions = _divisions_in_loops(code, loops)
    kernel.in_flight = max((sum(i <= j < use for j in uses) for i, use in uses.items()), default=0)
    products = [i for i, instruction in enumerate(code) if re.match(r"(HMMA|HGMMA|UTCHMMA)\b", instruction.opcode)]
    for loop in loops:
        inside = [i for i in products if i in loop]
        kernel.waited += sum(i in loop and not any(i < p < use for p in inside) for i, use in uses.items() if inside)
        if inside:
            kernel.apart = max(kernel.apart, _copies_apart(code, loop))


def short_name(demangled: str) -> str:
    """A kernel's name without return type, arguments and namespaces: bn_stats<Half, true>."""
    name = demangled.removeprefix("void ").replace("(anonymous namespace)::", "").replace("(bool)", "")
    depth, end = 0, len(name)
    for i, letter in enumerate(name):  # the first parenthesis outside the template arguments
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            end = i
            break
    return re.sub(r"\b(?:\w+::)+", "", name[:end])


def _names(mangled: list[str]) -> dict[str, str]:
    text = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    return {name: short_name(line) for name, line in zip(mangled, text.splitlines(), strict=True)}


def _dump(path: Path, flag: str, arch: str | None = None) -> Iterator[str]:
    """The lines of cuobjdump, those of one architecture (sm_90, sm_90a) if it is given."""
    cuobjdump = tool("cuobjdump")
    assert cuobjdump is not None
    command = [cuobjdump, flag, *(() if arch is None else ("-arch", arch)), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            yield line.rstrip("\n")
    assert running.returncode == 0, command


def architectures(path: Path) -> list[str]:
    """Those that a library has machine code for: sm_80, sm_90a."""
    return sorted({m[1] for line in _dump(path, "-lelf") if (m := re.search(r"\.(sm_\w+)\.cubin", line))})


def _resources(path: Path, arch: str | None) -> dict[tuple[int, str], Kernel]:
    """By architecture and mangled name; a cubin does not say which architecture, and has 0."""
    found: dict[tuple[int, str], Kernel] = {}
    of, name = 0, ""
    for line in _dump(path, "-res-usage", arch):
        if m := re.search(r"arch = sm_(\d+)", line):
            of = int(m[1])
        elif m := re.match(r"\s*Function (\S+):", line):
            name = m[1]
        elif m := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            constants = re.search(r"CONSTANT\[0\]:(\d+)", line)
            found[of, name] = Kernel(
                name, of, int(m[1]), int(m[2]), int(m[4]), int(m[3]), int(constants[1]) if constants else 0
            )
    short = _names(sorted({name for _, name in found}))
    for (_, name), kernel in found.items():
        kernel.name = short[name]
    return found


def resources(path: Path) -> list[Kernel]:
    """Every kernel of every architecture in a library, without what its instructions say."""
    return list(_resources(path, None).values())


def kernels(path: Path, arch: str | None = None) -> list[Kernel]:
    """Every kernel in a library or cubin, of one architecture or of all, with what its instructions say."""
    found = _resources(path, arch)
    code: list[Instruction] = []
    of, next_of, name = 0, 0, ""
    for line in itertools.chain(_dump(path, "-sass", arch), ["Function : "]):
        if made := instruction(line):
            code.append(made)
        elif m := re.search(r"code for sm_(\d+)", line):
            next_of = int(m[1])
        elif "Function : " in line:
            if code:
                kernel = found.get((of, name)) or found[0, name]
                kernel.arch = of
                inspect(kernel, code)
            code, of, name = [], next_of, line.split("Function : ")[1].strip()
    return list(found.values())
