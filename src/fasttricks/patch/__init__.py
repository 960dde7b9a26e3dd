"""fuse(model): the pairs of a model that is already built run as one op each; its modules stay what they are."""

from .fuse import fuse, fusions, unfuse, unfused
from .report import Fusion, Fusions

__all__ = ["Fusion", "Fusions", "fuse", "fusions", "unfuse", "unfused"]
