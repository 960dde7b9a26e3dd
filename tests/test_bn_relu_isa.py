"""bn_relu and bn_add_relu on the other instruction sets of this CPU, each forced in a process of its own."""

from __future__ import annotations

import pytest
from isa import instruction_sets, run_on


@pytest.mark.long
@pytest.mark.parametrize("isa", instruction_sets()[:-1])
def test_values_on_instruction_set(isa: str, request: pytest.FixtureRequest) -> None:
    run_on(
        isa,
        "test_bn_relu.py",
        "(values or zero or nan or mask or relu_of or any_channel or half or empty) and not reference and not emulated",
        request.config.getoption("--seed"),
    )
