"""One primitive of the emulator on known inputs, in a process of its own; exits with what is wrong.

python run_primitive.py LIBRARY NAME FAULT ORDER LANDING       numbers of Order and Landing in cuda_on_cpu/machine.h
"""

from __future__ import annotations

import ctypes
import sys

import numpy as np


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


def check_banks(library: ctypes.CDLL, stride: int) -> None:
    """Of 32 words, stride apart, as many share a bank as the stride has of 32; 16 bytes are loaded by eight threads."""
    meter, y = (ctypes.c_int64 * 8)(), np.zeros(32, np.int32)
    library.emu_meter(meter, ctypes.c_int64(1))
    none, error = ctypes.c_void_p(0), ctypes.create_string_buffer(64)
    library.emu_primitive(b"banks", none, ctypes.c_void_p(y.ctypes.data), none, stride, error, ctypes.c_int64(64))
    library.emu_meter(meter, ctypes.c_int64(0))
    shared = np.gcd(stride, 32)
    want = [shared + 4 * min(shared, 8), 1 + 4]
    if list(meter[6:8]) != want:
        sys.exit(f"{list(meter[6:8])} wavefronts, {want} expected")


def main() -> None:
    path, name, *numbers = sys.argv[1:]
    fault, order, landing = map(int, numbers)
    library = ctypes.CDLL(path)
    if name == "banks":
        return check_banks(library, fault)
    draw = np.random.default_rng(0)
    if name == "product":
        x, y = (draw.standard_normal((16, 16)).astype(np.float16) for _ in range(2))
        z = result = np.full((16, 8), np.nan, np.float32)
    else:
        n = {"neighbours": 384, "ring": 256, "votes": 32}[name]
        x = draw.integers(0, 9, n, dtype=np.int32)
        y, z = np.zeros(4 if name == "votes" else n, np.int32), np.zeros(n, np.int32)
        result = z if name == "ring" else y
    want, error = expected(name, x, y), ctypes.create_string_buffer(4096)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (x, y, z)]
    library.emu_schedule((ctypes.c_int64 * 4)(order, 1, 1, landing))
    if library.emu_primitive(name.encode(), *pointers, fault, error, ctypes.c_int64(4096)):
        sys.exit(error.value.decode())
    if not np.allclose(result, want, rtol=1e-3):
        sys.exit("wrong result")


if __name__ == "__main__":
    main()
