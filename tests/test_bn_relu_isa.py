"""bn_relu, bn_add_relu and bn_add_bn_relu on the other instruction sets of this CPU, each in a process of its own."""

from __future__ import annotations

import pytest
from isa import instruction_sets, run_on

CHOSEN = {
    "test_bn_relu.py": "values or zero or nan or mask or relu_of or any_channel or half or empty",
    "test_bn_second_gradient.py": "same_bits_as or equal_those or zero or no_window or special or rounded",
    "test_bn_add_bn_relu.py": "values or evaluation or zero or nan or mask or relu_of or second or half or empty",
}


@pytest.mark.long
@pytest.mark.parametrize("isa", instruction_sets()[:-1])
@pytest.mark.parametrize("file", CHOSEN)
def test_values_on_instruction_set(file: str, isa: str, request: pytest.FixtureRequest) -> None:
    chosen = f"({CHOSEN[file]}) and not reference and not emulated"
    run_on(isa, file, chosen, request.config.getoption("--seed"))
