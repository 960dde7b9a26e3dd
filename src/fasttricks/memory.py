"""Memory of tensors on the CPU that are freed and made anew in every step."""

from __future__ import annotations

import ctypes
import platform

# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Keeps the memory of freed CPU tensors in the process, for the next tensors, where the C library is glibc.

    By default glibc gives blocks of more than 32 MB back to the system as soon as they are freed, and the next tensor
    of that size waits until the system has cleared its pages. A training step on a CPU makes the same tensors again and
    again, so that this can take longer than the kernels. After this call (mallopt: M_MMAP_MAX=0, M_TRIM_THRESHOLD=-1)
    the process stays as large as it was at its largest. It concerns every large block of the process, not only tensors;
    `fasttricks train` calls it when it trains on a CPU.

    Returns:
        Whether glibc accepted the settings; False with another C library, where nothing happens.

    Examples:
        >>> kept = fasttricks.keep_freed_memory()  # once, before training
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(option, value) == 1 for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)))
