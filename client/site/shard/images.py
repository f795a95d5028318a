"""Reading image files: one decoder for the check of a shard and for every image encoder."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from common.errors import ShardError

FORMATS = ("JPEG", "PNG", "TIFF")
CURE = f"give a readable file ({', '.join(FORMATS)}; export DICOM first), or remove the row"


def decode_image(data: bytes, where: str) -> Image.Image:
    """Decodes a whole file, so that a truncated one is found here and not while training.

    Args:
        where: File and row, for the error.

    Raises:
        ShardError: Not an image of a known format, damaged, or absurdly large.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        image.load()
    except UnidentifiedImageError:
        raise ShardError(f"{where}: not an image of a known format", cure=CURE) from None
    # Pillow's decoders raise SyntaxError, struct.error, ... for damaged files; all mean the same.
    except Exception as error:
        raise ShardError(f"{where}: unreadable image ({error})", cure=CURE) from None
    return image


def to_grey(image: Image.Image) -> NDArray[np.float32]:
    """Grey values in [0, 1], `[height, width]` float32.

    Of several channels the first is taken, as HAIM does (X-rays repeat it); palettes are resolved
    first. Files of more than 8 bits are divided by 4095 if no pixel is above it, else by 65535:
    detectors store 12 bits in a 16-bit file.
    """
    if image.mode in ("P", "PA", "1", "CMYK", "YCbCr", "LAB", "HSV"):
        image = image.convert("RGB")
    pixels = np.asarray(image)
    if pixels.ndim == 3:
        pixels = pixels[..., 0]
    if pixels.dtype == np.uint8:
        top = 255.0
    elif np.issubdtype(pixels.dtype, np.floating):
        top = float(max(pixels.max(initial=0.0), 1e-12))
    else:
        top = 4095.0 if pixels.max(initial=0) <= 4095 else 65535.0
    grey = np.clip(pixels.astype(np.float32) / np.float32(top), 0.0, 1.0)
    return np.asarray(np.nan_to_num(grey), dtype=np.float32)
