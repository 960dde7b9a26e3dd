"""Optimizers built on sgd_step, loss scaling, parameter groups and schedules."""

from .groups import linear_scaled_lr, param_groups
from .lars import FusedLARS
from .scaler import LossScaler
from .schedules import warmup_cosine, warmup_step
from .sgd import FusedSGD

__all__ = [
    "FusedLARS",
    "FusedSGD",
    "LossScaler",
    "linear_scaled_lr",
    "param_groups",
    "warmup_cosine",
    "warmup_step",
]
