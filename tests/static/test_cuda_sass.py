"""The CUDA library as machine code: no local memory, budgets of registers and shared memory, wide accesses, HMMA,
loads that overlap with other loads and with products, copies in a row, no divisions inside loops.

Reads what was built; the architectures are those of TORCH_CUDA_ARCH_LIST at build time.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cuda_budgets import BUDGETS, budget_of, resident_blocks
from sass import Kernel, architectures, kernels, resources, tool

from fasttricks.backends import LIB, build_facts

LIBRARY = LIB / "libfasttricks_cuda.so"
CSRC = Path(__file__).resolve().parents[2] / "csrc"
if not LIBRARY.exists():
    pytest.skip(f"no CUDA library was built: {build_facts().get('no_cuda')}", allow_module_level=True)
if tool("cuobjdump") is None:
    pytest.skip("no cuobjdump: neither a CUDA toolkit's nor Triton's", allow_module_level=True)
ARCHS = architectures(LIBRARY)
# nvcc has one compiler for what came before Blackwell and one from there on: make test reads an architecture of each
READ = [pytest.param(arch, marks=pytest.mark.long if arch in ("sm_80", "sm_100") else ()) for arch in ARCHS]


def faults_of_resources(kernel: Kernel) -> list[str]:
    """What a kernel needs beyond its budget."""
    budget = budget_of(kernel.name)
    found = []
    if kernel.stack or kernel.local:
        found.append(f"{kernel.stack} bytes of stack and {kernel.local} of local memory a thread")
    if kernel.registers > budget.registers:
        found.append(f"{kernel.registers} registers, budget {budget.registers}")
    if kernel.shared > budget.shared + 1024:  # the system's own part is counted from sm_90 on
        found.append(f"{kernel.shared} bytes of static shared memory, budget {budget.shared}")
    blocks = resident_blocks(kernel.arch, budget.threads, kernel.registers, kernel.shared + budget.dynamic)
    if (kernel.arch in (80, 90, 100) or not budget.dynamic) and blocks < budget.blocks:
        found.append(f"{blocks} blocks on a multiprocessor, budget {budget.blocks}")
    return [f"{kernel.name} on sm_{kernel.arch}: {fault}" for fault in found]


def faults_of_code(kernel: Kernel) -> list[str]:
    """What a kernel's instructions do against its budget."""
    budget = budget_of(kernel.name)
    found = []
    if local := {op for op in kernel.opcodes if re.match(r"(LDL|STL)\b", op)}:
        found.append(f"accesses to local memory: {local}")
    for access in budget.wide:
        if not any(re.match(rf"{access}\b.*\.128", op) for op in kernel.opcodes):
            found.append(f"no 128-bit {access}")
    if budget.tensor_cores and not any(re.match(r"(HMMA|HGMMA|UTCHMMA)\b", op) for op in kernel.opcodes):
        found.append("no tensor-core instruction")
    if kernel.in_flight < budget.in_flight:
        found.append(f"{kernel.in_flight} wide loads in flight, budget {budget.in_flight}")
    if kernel.waited > budget.waited:
        found.append(f"{kernel.waited} wide loads that are waited for before any product of their loop")
    if kernel.apart > 4:  # copies whose number the compiler does not know have branches and address arithmetic around
        found.append(f"{kernel.apart} instructions between copies to shared memory in a loop with products")
    if kernel.divisions:
        found.append(f"{kernel.divisions} divisions of integers inside loops")
    return [f"{kernel.name} on sm_{kernel.arch}: {fault}" for fault in found]


def test_every_kernel_needs_no_more_than_its_budget() -> None:
    needed = resources(LIBRARY)
    assert len(needed) >= len(BUDGETS) * len(ARCHS)
    assert [fault for kernel in needed for fault in faults_of_resources(kernel)] == []


@pytest.mark.parametrize("arch", READ)
def test_the_code_of_every_kernel_is_within_its_budget(arch: str) -> None:
    read = kernels(LIBRARY, arch)
    assert len(read) >= len(BUDGETS)
    assert {f"sm_{kernel.arch}" for kernel in read} == {arch.rstrip("af")}
    assert all(kernel.opcodes for kernel in read)
    assert [fault for kernel in read for fault in faults_of_code(kernel)] == []


def test_every_budget_has_a_kernel_on_every_architecture() -> None:
    needed = resources(LIBRARY)
    for arch in {kernel.arch for kernel in needed}:
        names = [kernel.name for kernel in needed if kernel.arch == arch]
        unused = [pattern for pattern in BUDGETS if not any(re.fullmatch(pattern, name) for name in names)]
        assert unused == [], f"sm_{arch}"


def test_the_card_is_asked_for_what_needs_most() -> None:
    """A driver too old for 32 KB of parameters must be noticed before the first step: the probe is of such a kernel."""
    probe = re.search(r"cudaFuncGetAttributes\(&\w+, (\w+)_kernel\(\)\)", (CSRC / "cuda/library.cpp").read_text())
    assert probe
    needed = resources(LIBRARY)
    for arch in {kernel.arch for kernel in needed}:
        parameters = {kernel.name: kernel.parameters for kernel in needed if kernel.arch == arch}
        assert parameters[probe[1]] >= 0.99 * max(parameters.values()) > 4096


def test_faults_are_seen() -> None:
    """The checks above do fail: a kernel over each of its limits."""
    bad = Kernel("sgd_step", 90, registers=255, stack=8, local=16, shared=200_000, opcodes={"LDL.64", "LDG.E.64"})
    bad.divisions = bad.waited = 1
    bad.apart = 85
    assert len(faults_of_resources(bad)) == 4
    assert len(faults_of_code(bad)) == 7
