"""What benchmarks/gpu.sh runs on a card under compute-sanitizer, on the emulated one."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing of Triton is in it", allow_module_level=True)

import emulated
import fast_paths

import fasttricks


@pytest.mark.parametrize("shared", [0, 228 << 10, 60 << 10], ids=["several launches", "one", "a part on the chip"])
def test_small_tensors_take_every_path(shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    library = emulated.load()
    monkeypatch.setattr(fast_paths, "SMALL", (fast_paths.SMALL[0][:2], fast_paths.SMALL[1][1:]))
    with library.shared_per_sm(shared), fasttricks.backend("cuda"), library.metered() as meter:
        assert fast_paths.check(small=True) == 0
    assert (meter.cooperative_launches > 0) == (shared > 0)
