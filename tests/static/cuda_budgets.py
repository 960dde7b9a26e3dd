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
    # avgpool_conv1x1. 16-bit: a warp has 32 x 32 sums; the slab is that of 512 channels (of 1024: one block)
    r"pool_conv_forward<(Half|BFloat16), (true|false)>": Budget(
        256, registers=128, blocks=2, dynamic=24_576, wide=("LDG", "LDGSTS", "STG"), tensor_cores=True
    ),
    r"pool_conv_forward_slab<(Half|BFloat16), (true|false)>": Budget(
        256, registers=128, blocks=2, dynamic=81_920, wide=("LDG", "LDGSTS", "STG"), tensor_cores=True
    ),
    r"pool_conv_input<(Half|BFloat16), true>": Budget(
        256, registers=112, blocks=2, dynamic=24_576, wide=("LDGSTS", "STG"), tensor_cores=True
    ),
    r"pool_conv_input<(Half|BFloat16), false>": Budget(
        256, registers=112, blocks=2, dynamic=24_576, wide=("LDG", "LDGSTS", "STG"), tensor_cores=True
    ),
    r"pool_conv_weight<(Half|BFloat16), true>": Budget(
        256, registers=128, blocks=2, dynamic=24_576, wide=("LDG", "LDGSTS", "STG"), tensor_cores=True
    ),
    r"pool_conv_weight<(Half|BFloat16), false>": Budget(
        256, registers=128, blocks=2, dynamic=24_576, wide=("LDG", "STG"), tensor_cores=True
    ),
    r"pool_conv_(forward|input|weight)<float, true>": Budget(
        256, registers=128, blocks=2, dynamic=20_480, wide=("LDGSTS", "STG", "LDS")
    ),
    r"pool_conv_(forward|input|weight)<float, false>": Budget(
        256, registers=128, blocks=2, dynamic=20_480, wide=("LDG", "STG", "LDS")
    ),
    r"pool_conv_(forward|input|weight)<double, true>": Budget(
        256, registers=224, blocks=1, dynamic=36_864, wide=("LDGSTS", "STG", "LDS")
    ),
    r"pool_conv_(forward|input|weight)<double, false>": Budget(
        256, registers=224, blocks=1, dynamic=36_864, wide=("LDG", "STG", "LDS")
    ),
    r"pool_sum_splits<.*>": Budget(256, registers=48, blocks=5, wide=("LDG", "STG")),
    r"pool_bias<.*>": Budget(256, registers=40, blocks=6),
}
