"""Pictures in files: which are read, and how they become arrays."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
"""Of the files that are read, in small or capital letters."""

# Pillow has more formats, some of which start other programs.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")
# What it raises over broken pictures, and over those that no memory may hold.
DAMAGE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    OverflowError,
    SyntaxError,
    NotImplementedError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def decoded(content: bytes, channels: int | None) -> Image.Image:
    """A picture in mode L (grey) or RGB, whichever it was or `channels` asks for."""
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(content), formats=FORMATS))
    if turned.mode.startswith("I"):  # 16 bits, which Pillow would clip
        turned = Image.fromarray((np.asarray(turned) >> 8).astype(np.uint8))
    if turned.has_transparency_data:
        turned = turned.convert("RGBA")
        paper = Image.new("RGBA", turned.size, "white")
        turned = Image.alpha_composite(paper, turned)
    if channels == 1 or turned.mode in ("1", "L"):
        return turned.convert("L")
    return turned.convert("RGB")


def resized(image: Image.Image, size: int) -> Image.Image:
    """Brought to this height and width: bilinear; to half or less by means of boxes."""
    shrinks = min(image.size) >= 2 * size
    return image.resize((size, size), Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR)


def array(image: Image.Image) -> np.ndarray:
    """uint8 `[1, H, W]` or `[3, H, W]`; three equal channels are one."""
    pixels = np.asarray(image)
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def extent(image: np.ndarray) -> str:
    """Width and height, in words, of an array `[channels, H, W]`."""
    return f"{image.shape[2]} x {image.shape[1]}"
