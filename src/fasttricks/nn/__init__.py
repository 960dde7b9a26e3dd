"""Modules on the fused ops; constructor arguments and state_dict keys are those of torch.nn."""

from .avgpool_conv1x1 import AvgPoolConv1x1
from .batchnorm import BatchNormAddReLU2d, BatchNormReLU2d
from .zero_init import zero_init_last

__all__ = ["AvgPoolConv1x1", "BatchNormAddReLU2d", "BatchNormReLU2d", "zero_init_last"]
