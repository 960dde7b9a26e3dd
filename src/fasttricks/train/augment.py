"""Augmentation and normalisation of images: section 2.1 of He et al. 2018.

The parts that differ per image run where the image is read and end at 8 bits; the normalisation, and the noise of
colours, which is one shift per image, run on the device that trains.
"""

from __future__ import annotations

from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

# Mean and standard deviation of ImageNet's channels, and the eigenvectors and eigenvalues of their covariance
# (Krizhevsky et al. 2012, section 4.1; the figures every ImageNet trainer uses), for images scaled to 0..1.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PCA_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
PCA_VALUES = (0.2175, 0.0188, 0.0045)

PCA_STD = 0.1

Augment = Literal["imagenet", "digits"]


class ScaleHSV(torch.nn.Module):
    """Multiplies hue, saturation and value of an image (PIL, or uint8 (3, H, W)) by a factor each, drawn uniformly
    from [low, high]; returns a PIL image.

    Hue is an angle and wraps around; saturation and value stop at their largest value. Computed by Pillow in 8 bits.
    """

    def __init__(self, low: float, high: float):
        super().__init__()
        self.low, self.high = low, high

    def forward(self, image: Image.Image | Tensor) -> Image.Image:
        image = F.to_pil_image(image) if isinstance(image, Tensor) else image
        factors = torch.empty(3).uniform_(self.low, self.high)
        scaled = torch.arange(256) * factors[:, None]
        tables = torch.cat([scaled[:1].round().remainder(256), scaled[1:].round().clamp(max=255)])
        return image.convert("HSV").point(tables.flatten().int().tolist()).convert("RGB")


def train_transform(augment: Augment, size: int) -> v2.Compose:
    """Image -> uint8 tensor (3, size, size), augmented.

    "imagenet" is section 2.1 of He et al. 2018: a random crop of 8 to 100% of the area, aspect 3/4 to 4/3, a flip,
    hue, saturation and brightness times 0.6 to 1.4; `colour_noise` is the rest of it. "digits" never flips: it turns by
    up to 10 degrees, shifts and scales by up to a tenth.
    """
    if augment == "imagenet":
        steps = [
            v2.RandomResizedCrop(size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), antialias=True),
            v2.RandomHorizontalFlip(),
            ScaleHSV(0.6, 1.4),
        ]
    else:
        steps = [
            v2.Resize((size, size), antialias=True),
            v2.RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR),
        ]
    return v2.Compose([*steps, v2.ToImage(), v2.ToPureTensor()])


def val_transform(augment: Augment, size: int) -> v2.Compose:
    """Image -> uint8 tensor (3, size, size): the shorter edge to 256/224 of size and the centre of it ("imagenet"), or
    the whole image ("digits")."""
    if augment == "imagenet":
        steps = [v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)]
    else:
        steps = [v2.Resize((size, size), antialias=True)]
    return v2.Compose([*steps, v2.ToImage(), v2.ToPureTensor()])


def colour_noise() -> Tensor:
    """A shift of the colours of one image in 0..1: sum_k N(0, 0.1) * value_k * vector_k (Krizhevsky et al. 2012)."""
    return torch.tensor(PCA_VECTORS) @ (torch.randn(3) * PCA_STD * torch.tensor(PCA_VALUES))


def normalise(images: Tensor, shift: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """(images / 255 + shift - MEAN) / STD, in float32, then cast.

    Args:
        images: uint8 (N, 3, H, W).
        shift: float32 (N, 3), see `colour_noise`.
    """
    values = F.to_dtype(images, torch.float32, scale=True)
    if shift is not None:
        values += shift[:, :, None, None]
    return F.normalize(values, list(MEAN), list(STD), inplace=True).to(dtype)
