"""The ops in Triton, as `torch.ops.fasttricks_triton.*` with the schemas of `torch.ops.fasttricks.*`.

Importing this package imports Triton and defines the ops; fasttricks.backends does so where a CUDA device or the
interpreter (TRITON_INTERPRET=1) can run them, and fasttricks.ops gives them fakes and autograd.
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

from . import avgpool_conv1x1, bn_add_bn_relu, bn_add_relu_pool, bn_relu, sgd  # noqa: E402

__all__ = ["OLDEST", "avgpool_conv1x1", "bn_add_bn_relu", "bn_add_relu_pool", "bn_relu", "sgd", "version"]
