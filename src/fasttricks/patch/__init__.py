"""fuse(model): runs the pairs of an existing model as one op each; its modules stay the same objects."""

from .fuse import fuse, fusions, unfuse, unfused
from .report import Fusion, Fusions

__all__ = ["Fusion", "Fusions", "fuse", "fusions", "unfuse", "unfused"]
