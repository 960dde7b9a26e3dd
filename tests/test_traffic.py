"""The table of bytes moved (benchmarks/traffic.py): every formula is kept to 5%, and launches are as documented."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the emulated CUDA kernels are not for this process", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from traffic import rows


def test_bytes_and_launches() -> None:
    made = rows()
    assert [f"{r.op} {r.case}: {r.ratio:.3f}" for r in made if r.bounded and not 0.999 <= r.ratio <= 1.05] == []
    for row in made:
        if row.op.startswith("bn"):
            assert row.launches in ((1,) if "evaluation" in row.op else (1, 3))
        else:
            assert row.launches == (2 if "dweight" in row.op else 1)
    assert {row.launches for row in made if row.op == "bn_relu forward"} == {1, 3}, "both variants are in the table"
