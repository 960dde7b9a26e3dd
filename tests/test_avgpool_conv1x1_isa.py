"""avgpool_conv1x1 on the other instruction sets of this CPU, each forced in a process of its own."""

from __future__ import annotations

import pytest
from isa import instruction_sets, run_on


@pytest.mark.long
@pytest.mark.parametrize("isa", instruction_sets()[:-1])
def test_values_on_instruction_set(isa: str, request: pytest.FixtureRequest) -> None:
    run_on(
        isa,
        "test_avgpool_conv1x1.py",
        "(test_values or test_any or test_one or test_nan or test_windows or test_half or test_gradient)"
        " and not reference and not emulated",
        request.config.getoption("--seed"),
    )
