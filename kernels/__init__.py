"""The ops in Triton, as `torch.ops.fasttricks_triton.*` with the schemas of `torch.ops.fasttricks.*`.

Importing this package imports Triton and registers the ops; fasttricks.backend does so where a CUDA device or the
interpreter (TRITON_INTERPRET=1) can run them.
"""

from __future__ import annotations

import triton

OLDEST = (3, 4)


def version() -> tuple[int, int]:
    """Triton's (major, minor)."""
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


if version() < OLDEST:
    raise ImportError(f"Triton {triton.__version__} is installed; the kernels need {OLDEST[0]}.{OLDEST[1]} or newer")

from . import bn_relu, sgd  # noqa: E402

# the ops with kernels here, by the names that they pass to fasttricks.backend.select
SERVED = frozenset({"bn_relu", "bn_add_relu", "sgd"})

__all__ = ["OLDEST", "SERVED", "bn_relu", "sgd", "version"]
