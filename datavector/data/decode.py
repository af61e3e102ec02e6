"""From an image file to RGB pixels, with Pillow and numpy only: also what a client of a release needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from datavector.errors import UnreadableData

DEEP_GREY = ("I", "F")  # Pillow's modes of more than 8 bits: I, I;16, I;16B, I;16L, I;16N, F


def decode(path: Path) -> NDArray[np.uint8]:
    """The pixels of an image, upright as its EXIF orientation says.

    Greyscale of more than 8 bits is scaled from its own darkest and brightest value to 0..255: such files rarely use
    their whole range (12 bits in 16), and Pillow's own conversion would clip all above 255.

    Returns:
        uint8, shape (height, width, 3), RGB.
    Raises:
        UnreadableData: the file is absent, truncated, or no image that Pillow can decode.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            return _scaled(image) if image.mode.startswith(DEEP_GREY) else np.array(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged bytes raise nearly anything: OSError, SyntaxError, struct.error
        raise UnreadableData(
            f"{path} cannot be decoded ({type(error).__name__}: {error})", remedy="replace or remove the file"
        ) from error


def _scaled(image: Image.Image) -> NDArray[np.uint8]:
    values = np.asarray(image, dtype=np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    grey = np.rint((np.nan_to_num(values, nan=low) - low) * (255 / (high - low) if high > low else 0.0))
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
