"""Host code that launches CUDA kernels, on a CUDA runtime that counts its calls: no card is needed, but nvcc.

No thread lowers another's limit of shared memory, a call asks the driver nothing that an earlier one has asked, and a
cooperative launch that does not fit is no error.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from emulated import changed

from build_libraries import ROOT, Cuda, find_cuda, find_torch, targets

pytestmark = pytest.mark.long
SOURCE = Path(__file__).with_name("launch_calls.cu")


def counted(folder: Path, csrc: Path = ROOT / "csrc") -> dict[str, str]:
    """What launch_calls.cu prints, compiled with the headers in `csrc`."""
    torch = find_torch()
    cuda = find_cuda(torch)
    if not isinstance(cuda, Cuda):
        pytest.skip(cuda)
    program = folder / "launch_calls"
    include = [torch.include, torch.include / "torch/csrc/api/include"]
    command = [
        *(cuda.nvcc, *targets(cuda.archs[:1]), "-std=c++20"),
        *("--expt-relaxed-constexpr", "-Xlinker", "--allow-multiple-definition"),  # its functions win
        *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"),
        *(f"-I{path}" for path in (csrc, csrc / "cuda")),
        *(part for path in include for part in ("-isystem", path)),
        *(SOURCE, "-o", program),
    ]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    return dict(line.split() for line in done.stdout.splitlines())


RIGHT = {
    "launches": "800",
    "refused": "0",
    "settings": "1",
    "least": "199000",  # all that a block can have
    "questions": "0",
    "attributes": "4",  # three of the card, one of its kernels
    "fits": "launched",
    "too_large": "refused",
    "cleared": "1",
    "broken": "thrown",
}
# what is planted in launch.cuh -> the lines that it changes
FAULTS = {
    "every call allows what it needs": (
        "if (dynamic_bytes > 0) allow_dynamic(reinterpret_cast<const void*>(kernel));",
        "if (dynamic_bytes > 0)\n    cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), "
        "cudaFuncAttributeMaxDynamicSharedMemorySize, int(dynamic_bytes));",
        {"settings", "least", "questions", "refused"},
    ),
    "every call asks again": ("found != values_.end() ? found->second : ", "", {"settings", "questions", "attributes"}),
    "a launch that does not fit throws": (
        "error == cudaErrorCooperativeLaunchTooLarge || ",
        "",
        {"too_large", "cleared"},
    ),
}


def test_limits_are_set_once_and_questions_are_asked_once(tmp_path: Path) -> None:
    assert counted(tmp_path) == RIGHT


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str, tmp_path: Path) -> None:
    before, after, lines = FAULTS[fault]
    found = counted(tmp_path, changed(tmp_path, "launch.cuh", before, after))
    assert {name for name in RIGHT if found[name] != RIGHT[name]} <= lines
    assert found != RIGHT
