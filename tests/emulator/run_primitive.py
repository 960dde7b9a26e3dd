"""One primitive of the emulator on known inputs, in a process of its own; exits with what is wrong.

python run_primitive.py LIBRARY NAME FAULT ORDER LANDING
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
from extension import module_of


def expected(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if name == "neighbours":
        blocks = np.roll(x.reshape(3, 128), -1, 1)
        sums = np.repeat(blocks.reshape(3, 4, 32).sum(2), 32, 1)
        return (blocks + 1000 * sums + 1000000 * (blocks == 7).any(1, keepdims=True)).ravel()
    if name == "ring":
        return np.roll(x.reshape(4, 64), -1, 0).ravel()
    if name == "votes":
        odd = sum(int(v & 1) << lane for lane, v in enumerate(x))
        return np.array([x.sum(), x.max(), np.uint32(odd).astype(np.int32), x[31]])
    return (x.astype(np.float32) @ y.astype(np.float32))[:, :8]


def check_banks(module: ModuleType, stride: int) -> None:
    """Of 32 words, stride apart, as many share a bank as the stride has of 32; 16 bytes are loaded by eight threads."""
    y = np.zeros(32, np.int32)
    module.take_meter(True)
    module.run_primitive("banks", y, y, y, stride)
    meter = module.take_meter(False)
    shared = np.gcd(stride, 32)
    got, want = (meter.wavefronts, meter.least_wavefronts), (shared + 4 * min(shared, 8), 1 + 4)
    if got != want:
        sys.exit(f"{got} wavefronts, {want} expected")


def main() -> None:
    path, name, number, order, landing = sys.argv[1:]
    module, fault = module_of(Path(path)), int(number)
    if name == "banks":
        return check_banks(module, fault)
    draw = np.random.default_rng(0)
    if name == "product":
        x, y = (draw.standard_normal((16, 16)).astype(np.float16) for _ in range(2))
        z = result = np.full((16, 8), np.nan, np.float32)
    else:
        n = {"neighbours": 384, "ring": 256, "votes": 32}[name]
        x = draw.integers(0, 9, n, dtype=np.int32)
        y, z = np.zeros(4 if name == "votes" else n, np.int32), np.zeros(n, np.int32)
        result = z if name == "ring" else y
    want = expected(name, x, y)
    module.schedule(getattr(module.Order, order), 1, True, getattr(module.Landing, landing))
    try:
        module.run_primitive(name, x, y, z, fault)
    except RuntimeError as error:
        sys.exit(str(error))
    if not np.allclose(result, want, rtol=1e-3):
        sys.exit("wrong result")


if __name__ == "__main__":
    main()
