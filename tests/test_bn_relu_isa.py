"""bn_relu and bn_add_relu on the instruction sets that no other test runs on, each forced in a process of its own."""

from __future__ import annotations

import pytest
from isa import instruction_sets, run_on


@pytest.mark.long
@pytest.mark.parametrize("isa", instruction_sets()[:-1])
def test_values_on(isa: str, request: pytest.FixtureRequest) -> None:
    run_on(
        isa,
        "test_bn_relu.py",
        "(values or zero or nan or mask or relu_of or any_channel or half or empty) and not reference and not emulated",
        request.config.getoption("--seed"),
    )
