"""Modules on the fused ops; constructor arguments and state_dict keys are those of torch.nn."""

from .avgpool_conv1x1 import AvgPoolConv1x1

__all__ = ["AvgPoolConv1x1"]
