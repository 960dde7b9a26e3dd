"""What each CUDA kernel may use of a multiprocessor, and what its machine code must contain; read by test_cuda_sass.py
and benchmarks/predict.py.

Every kernel of the library matches exactly one pattern. A budget is what keeps the stated number of blocks resident:
65,536 registers per multiprocessor, 64 warps (48 on sm_86 and sm_120), 164 KiB (sm_80; sm_86 and sm_120: 100) of shared
memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# of a multiprocessor: KiB of shared memory by architecture, each block needing 1 KiB for the system; warps and blocks
# (CUDA Programming Guide, "Compute Capabilities"); registers come in units of 256 a warp
SHARED = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
REGISTERS, WARPS, BLOCKS = 65536, {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}, {80: 32, 86: 16, 89: 24}


def resident_blocks(arch: int, threads: int, registers: int, shared: int) -> int:
    """Blocks of so many threads, registers a thread and bytes of shared memory that fit on one multiprocessor."""
    warps = -(-threads // 32)
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = SHARED[arch] * 1024 // (shared + 1024)
    return min(by_registers, by_shared, WARPS[arch] // warps, BLOCKS.get(arch, 32))


@dataclass(frozen=True)
class Budget:
    threads: int  # of a block
    registers: int  # of a thread, at most
    blocks: int  # resident on a multiprocessor of sm_80, at least
    shared: int = 0  # static bytes of a block, at most
    dynamic: int = 0  # dynamic bytes of a block that its launcher asks for, at most
    wide: tuple[str, ...] = ()  # instructions that must occur 128 bits wide: LDG, STG, LDGSTS, LDS
    in_flight: int = 0  # 128-bit global loads of a thread that are under way together, at least
    waited: int = 0  # 128-bit global loads in loops with products that are waited for before any of these, at most
    tensor_cores: bool = False


# regular expressions of whole kernel names, without the namespace: bn_stats<__half, true>
BUDGETS: dict[str, Budget] = {
    # bn_relu. Vectorised 16-bit kernels keep 3 or 4 blocks resident, or 2 with twice as many loads under way; single
    # accesses and fp32 2, fp64 1
    r"bn_stats<(Half|BFloat16), true>": Budget(256, registers=64, blocks=4, shared=16_384, wide=("LDG",), in_flight=4),
    r"bn_stats<float, true>": Budget(256, registers=96, blocks=2, shared=16_384, wide=("LDG",), in_flight=8),
    r"bn_backward_reduce<(Half|BFloat16), true, true>": Budget(
        256, registers=80, blocks=3, shared=16_384, wide=("LDG",), in_flight=4
    ),
    r"bn_backward_reduce<(Half|BFloat16), true, false>": Budget(
        256, registers=128, blocks=2, shared=16_384, wide=("LDG",), in_flight=6
    ),
    r"bn_backward_reduce<float, true, (true|false)>": Budget(
        256, registers=128, blocks=2, shared=16_384, wide=("LDG",), in_flight=8
    ),
    r"bn_(stats|backward_reduce)<(Half|BFloat16|float), false.*>": Budget(256, registers=128, blocks=2, shared=16_384),
    r"bn_(stats|backward_reduce)<double, true.*>": Budget(
        256, registers=168, blocks=1, shared=32_768, wide=("LDG",), in_flight=8
    ),
    r"bn_(stats|backward_reduce)<double, false.*>": Budget(256, registers=168, blocks=1, shared=32_768),
    r"bn_apply<(Half|BFloat16), true, (true|false)>": Budget(
        256, registers=80, blocks=3, shared=6_400, wide=("LDG", "STG"), in_flight=4
    ),
    r"bn_backward_apply<(Half|BFloat16), true, true>": Budget(
        256, registers=80, blocks=3, shared=10_752, wide=("LDG", "STG"), in_flight=4
    ),
    r"bn_backward_apply<(Half|BFloat16), true, false>": Budget(
        256, registers=128, blocks=2, shared=10_752, wide=("LDG", "STG"), in_flight=8
    ),
    r"bn_(backward_)?apply<float, true, (true|false)>": Budget(
        256, registers=128, blocks=2, shared=10_752, wide=("LDG", "STG"), in_flight=8
    ),
    r"bn_(backward_)?apply<(Half|BFloat16|float), false, (true|false)>": Budget(
        256, registers=128, blocks=2, shared=10_752
    ),
    r"bn_(backward_)?apply<double, true, (true|false)>": Budget(
        256, registers=168, blocks=1, shared=21_504, wide=("LDG", "STG"), in_flight=4
    ),
    r"bn_(backward_)?apply<double, false, (true|false)>": Budget(256, registers=168, blocks=1, shared=21_504),
    # with a second gradient, whose address is computed where it is one of 2x2 means
    r"bn_backward_reduce_two<(Half|BFloat16|float), true, (true|false)>": Budget(
        256, registers=128, blocks=2, shared=16_384, wide=("LDG", "STG"), in_flight=4
    ),
    r"bn_backward_reduce_two<(Half|BFloat16|float), false, (true|false)>": Budget(
        256, registers=128, blocks=2, shared=16_384
    ),
    r"bn_backward_reduce_two<double, (true|false), (true|false)>": Budget(256, registers=255, blocks=1, shared=32_768),
    # two BatchNorms: twice the parameters, or three sums
    r"bn_add_bn_apply<(Half|BFloat16|float), true>": Budget(
        256, registers=128, blocks=2, shared=6_400, wide=("LDG", "STG"), in_flight=4
    ),
    r"bn_add_bn_apply<(Half|BFloat16|float), false>": Budget(256, registers=128, blocks=2, shared=6_400),
    r"bn_add_bn_apply<double, (true|false)>": Budget(256, registers=255, blocks=1, shared=12_800),
    r"bn_add_bn_reduce<(Half|BFloat16|float), true>": Budget(
        256, registers=128, blocks=2, shared=16_384, wide=("LDG", "STG"), in_flight=6
    ),
    r"bn_add_bn_reduce<(Half|BFloat16|float), false>": Budget(256, registers=128, blocks=2, shared=16_384),
    r"bn_add_bn_reduce<double, (true|false)>": Budget(256, registers=255, blocks=1, shared=32_768),
    r"bn_add_bn_gradients<(Half|BFloat16|float), true>": Budget(
        256, registers=128, blocks=2, shared=10_752, wide=("LDG", "STG"), in_flight=4
    ),
    r"bn_add_bn_gradients<(Half|BFloat16|float), false>": Budget(256, registers=128, blocks=2, shared=10_752),
    r"bn_add_bn_gradients<double, (true|false)>": Budget(256, registers=255, blocks=1, shared=21_504),
    # y and its 2x2 means: all pixels of a window under way, or 4 vectors of memory
    r"bn_apply_pool_pixels<(Half|BFloat16|float)>": Budget(
        256, registers=128, blocks=2, shared=6_400, wide=("LDG", "STG"), in_flight=6
    ),
    r"bn_apply_pool_pixels<double>": Budget(
        256, registers=255, blocks=1, shared=12_800, wide=("LDG", "STG"), in_flight=8
    ),
    r"bn_apply_pool_lines<(Half|BFloat16|float)>": Budget(
        256, registers=80, blocks=3, shared=24_832, wide=("LDG", "STG", "STS"), in_flight=4
    ),
    r"bn_apply_pool_lines<double>": Budget(
        256, registers=128, blocks=2, shared=41_216, wide=("LDG", "STG", "STS"), in_flight=8
    ),
    r"bn_pool_means<.*>": Budget(256, registers=48, blocks=5),
    # one launch: the dynamic part is what the planner finds free
    r"bn_((add_bn_)?forward|backward)_slab<.*>": Budget(
        256, registers=128, blocks=2, shared=16_384, wide=("LDG", "STG", "LDS", "STS"), in_flight=4
    ),
    r"bn_add_bn_backward_slab<.*>": Budget(
        256, registers=128, blocks=2, shared=16_384, wide=("LDG", "STG", "LDS", "STS"), in_flight=6
    ),
    r"bn_backward_slab_two<.*>": Budget(
        256, registers=128, blocks=2, shared=16_384, wide=("LDG", "STG", "LDS", "STS"), in_flight=4
    ),
    r"bn_(add_bn_finalize|finalize_(stats|backward))<.*>": Budget(256, registers=80, blocks=3),
    r"bn_update_stats<512>": Budget(512, registers=64, blocks=2),
    # sgd. A block's scalars and the partial sums of its warps are shared
    r"sgd_step": Budget(256, registers=80, blocks=3, shared=256, wide=("LDG", "STG"), in_flight=4),
    r"sgd_check": Budget(256, registers=64, blocks=4, shared=128, wide=("LDG",)),
    r"sgd_norms": Budget(256, registers=40, blocks=6),
    r"sgd_count": Budget(1, registers=16, blocks=8),
    # avgpool_conv1x1. 16-bit: a warp has 32 x 32 sums; the slab is that of 512 channels (of 1024: one block)
    r"avgpool_conv1x1_forward<(Half|BFloat16), (true|false)>": Budget(
        256, registers=128, blocks=2, dynamic=24_576, wide=("LDG", "LDGSTS", "STG"), tensor_cores=True, in_flight=4
    ),
    r"avgpool_conv1x1_forward_slab<(Half|BFloat16), (true|false)>": Budget(
        256, registers=128, blocks=2, dynamic=81_920, wide=("LDG", "LDGSTS", "STG"), tensor_cores=True, in_flight=8
    ),
    r"avgpool_conv1x1_input<(Half|BFloat16), true>": Budget(
        256, registers=112, blocks=2, dynamic=24_576, wide=("LDGSTS", "STG"), tensor_cores=True
    ),
    # on sm_80 one of its two loads of dy a step is stored before the products
    r"avgpool_conv1x1_input<(Half|BFloat16), false>": Budget(
        256, registers=112, blocks=2, dynamic=24_576, wide=("LDG", "LDGSTS", "STG"), tensor_cores=True, waited=1
    ),
    r"avgpool_conv1x1_weight<(Half|BFloat16), true>": Budget(
        256, registers=128, blocks=2, dynamic=24_576, wide=("LDG", "LDGSTS", "STG"), tensor_cores=True, in_flight=4
    ),
    r"avgpool_conv1x1_weight<(Half|BFloat16), false>": Budget(
        256, registers=128, blocks=2, dynamic=24_576, wide=("LDG", "STG"), tensor_cores=True, in_flight=5
    ),
    r"avgpool_conv1x1_(forward|input|weight)<float, true>": Budget(
        256, registers=128, blocks=2, dynamic=20_480, wide=("LDGSTS", "STG", "LDS")
    ),
    r"avgpool_conv1x1_(forward|input|weight)<float, false>": Budget(
        256, registers=128, blocks=2, dynamic=20_480, wide=("LDG", "STG", "LDS")
    ),
    r"avgpool_conv1x1_(forward|input|weight)<double, true>": Budget(
        256, registers=224, blocks=1, dynamic=36_864, wide=("LDGSTS", "STG", "LDS")
    ),
    r"avgpool_conv1x1_(forward|input|weight)<double, false>": Budget(
        256, registers=224, blocks=1, dynamic=36_864, wide=("LDG", "STG", "LDS")
    ),
    r"avgpool_sum_splits<.*>": Budget(256, registers=48, blocks=5, wide=("LDG", "STG")),
    r"avgpool_bias<.*>": Budget(256, registers=40, blocks=6),
}


def budget_of(name: str) -> Budget:
    fitting = [budget for pattern, budget in BUDGETS.items() if re.fullmatch(pattern, name)]
    assert len(fitting) == 1, f"{name} matches {len(fitting)} patterns of cuda_budgets.py"
    return fitting[0]
