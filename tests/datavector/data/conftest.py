"""Small image files, written as hospitals leave them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Paint = Callable[..., Path]


@pytest.fixture
def paint(tmp_path: Path) -> Paint:
    """Writes an image of one colour, or of the given pixels, below the test's folder."""

    def write(name: str, pixels: object = (200, 30, 10), size: tuple[int, int] = (12, 10), **options: object) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else Image.new("RGB", size, pixels)
        image.save(path, **options)
        return path

    return write
