"""What each CUDA kernel may use of a multiprocessor, and what its machine code must contain; read by test_cuda_sass.py.

Every kernel of the library matches exactly one pattern. A budget is what keeps the stated number of blocks resident:
65,536 registers and 64 warps a multiprocessor (sm_80, sm_90, sm_100), 164 KiB (sm_80) of shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    threads: int  # of a block
    registers: int  # of a thread, at most
    blocks: int  # resident on a multiprocessor of sm_80, at least
    shared: int = 0  # static bytes of a block, at most
    dynamic: int = 0  # dynamic bytes of a block that its launcher asks for, at most
    wide: tuple[str, ...] = ()  # instructions that must occur 128 bits wide: LDG, STG, LDGSTS, LDS
    tensor_cores: bool = False


# regular expressions of whole kernel names, without the namespace: bn_stats<__half, true>
BUDGETS: dict[str, Budget] = {
    r"probe": Budget(threads=1, registers=16, blocks=8),
}
