"""Image files of any kind as 8-bit RGB."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

# Of damaged files: UnidentifiedImageError and truncation are OSError, broken PNG chunks SyntaxError, bad headers
# ValueError, a header of absurd size DecompressionBombError; decode_jpeg raises RuntimeError.
BAD_FILE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError, RuntimeError)


def decode_rgb(file: bytes) -> Image.Image | Tensor:
    """An image file as 8-bit RGB, upright: grey and colour JPEGs as uint8 tensors (3, H, W), which torchvision decodes
    and crops faster than Pillow, every other file as a PIL image.

    Alpha is dropped; 16-bit grey is scaled to 8 bits (Pillow alone would clip it). An EXIF orientation is applied.

    Raises:
        OSError, ValueError, SyntaxError, RuntimeError: the file is not an image, is truncated, or its values have no
            known range.
    """
    if not file:
        raise ValueError("the file is empty")
    with Image.open(io.BytesIO(file)) as image:
        if image.format == "JPEG" and image.mode in ("RGB", "L"):
            stored = torch.frombuffer(bytearray(file), dtype=torch.uint8)
            return decode_jpeg(stored, mode=ImageReadMode.RGB, apply_exif_orientation=True)
        image.load()
        return _rgb(ImageOps.exif_transpose(image))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", None)):
        grey = np.asarray(image, dtype=np.float64)
        return Image.fromarray(np.round(grey / 257.0).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}) have no known range")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")
