"""The table of bytes moved (benchmarks/traffic.py): within 5% of every formula, with the documented launches."""

from __future__ import annotations

import os

from traffic import Row, rows


def launches(row: Row) -> tuple[int, ...]:
    """How many launches a call may take."""
    if row.op.startswith("bn"):
        one_pass = row.backend == "cuda"  # if the tensor fits in shared memory
        if row.op.startswith("bn_add_bn_relu"):
            several = 3 if "backward" in row.op else 5
            return (1, several) if one_pass else (several,)
        if "pool" in row.op and "dy2" not in row.op:
            several = not row.bounded  # the means in a launch of their own
            return (1 + several,) if "evaluation" in row.op else (3 + several,)
        return (1,) if "evaluation" in row.op else (1, 3) if one_pass else (3,)
    if row.op == "sgd_step":
        return (1,) if row.backend == "cuda" else (2,)
    return (2,) if "dweight" in row.op else (1,)


def check(backend: str) -> None:
    made = rows()
    assert {r.backend for r in made} == {backend}
    assert [f"{r.op} {r.case}: {r.ratio:.3f}" for r in made if r.bounded and not 0.999 <= r.ratio <= 1.05] == []
    assert [f"{r.op} {r.case}: {r.launches}" for r in made if r.launches not in launches(r)] == []
    # what several blocks read of an operand, DRAM serves once
    read_once = [r for r in made if r.dram is not None and not r.bounded and "dweight" not in r.op]
    assert [f"{r.op} {r.case}: {r.dram}" for r in read_once if r.dram > 1.05 * r.formula] == []
    assert bool(read_once) == (backend == "cuda")
    used = {r.launches for r in made if r.op == "bn_relu forward"}
    assert used == set(launches(next(r for r in made if r.op == "bn_relu forward"))), "all variants are in the table"


if os.environ.get("TRITON_INTERPRET") == "1":

    def test_bytes_and_launches_of_triton() -> None:
        check("triton")

else:

    def test_bytes_and_launches_of_cuda() -> None:
        check("cuda")
