"""Fused kernels for training image classifiers; `fasttricks.info()` reports what was built and loaded."""

from . import nn, optim
from .backends import backend
from .diagnostics import info
from .memory import keep_freed_memory
from .nn import zero_init_last
from .ops.avgpool_conv1x1 import avgpool_conv1x1
from .ops.bn_add_bn_relu import bn_add_bn_relu
from .ops.bn_relu import bn_add_relu, bn_relu
from .ops.sgd import sgd_check, sgd_step
from .patch import fuse, fusions, unfuse, unfused
from .recomputation import recompute

__all__ = [
    "avgpool_conv1x1",
    "backend",
    "bn_add_bn_relu",
    "bn_add_relu",
    "bn_relu",
    "fuse",
    "fusions",
    "info",
    "keep_freed_memory",
    "nn",
    "optim",
    "recompute",
    "sgd_check",
    "sgd_step",
    "unfuse",
    "unfused",
    "zero_init_last",
]
