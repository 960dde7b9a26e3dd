"""fasttricks.keep_freed_memory."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

import fasttricks

# page faults of a tensor of 36 MB after some that were freed: posix_memalign joins freed blocks only after some calls
CODE = """
import resource, sys, torch, fasttricks
if sys.argv[1] == "kept":
    assert fasttricks.keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(9 << 20).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(20):
    faults()
print(faults())
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    assert faults("kept") * 10 < faults("as usual")


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert fasttricks.keep_freed_memory() is False
