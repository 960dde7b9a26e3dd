"""The cards that launch plans are tested for, and the activations of ResNet-50-D."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """Architecture, multiprocessors, shared bytes of one and of a block (CUDA Programming Guide, "Compute
    Capabilities")."""

    arch: int
    sm_count: int
    shared_per_sm: int
    shared_per_block: int


CARDS = {
    "A100": Card(80, 108, 164 << 10, 163 << 10),
    "H100": Card(90, 132, 228 << 10, 227 << 10),
    "B200": Card(100, 148, 228 << 10, 227 << 10),
    "L40S": Card(89, 142, 100 << 10, 99 << 10),
    "RTX 5090": Card(120, 170, 100 << 10, 99 << 10),
}
# channels, height and width of what the BatchNorms of ResNet-50-D normalise, at 224 pixels
BATCH_NORMS = (
    *((32, 112), (64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14), (1024, 14)),
    *((512, 14), (512, 7), (2048, 7)),
)
BATCHES = (32, 64, 256)
