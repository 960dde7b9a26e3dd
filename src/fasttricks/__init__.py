"""Fused kernels for training image classifiers; `fasttricks.info()` says what is built and what is loaded."""

from .backend import backend
from .diagnostics import info

__all__ = ["backend", "info"]
