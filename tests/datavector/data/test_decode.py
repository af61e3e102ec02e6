from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datavector.data.decode import decode
from datavector.errors import UnreadableData

Paint = Callable[..., Path]
ORIENTATION = 0x0112


@pytest.mark.parametrize("extension", ["png", "bmp", "tif", "webp", "jpg"])
def test_every_kind_of_file_gives_rgb_pixels(paint: Paint, extension: str) -> None:
    options = {"lossless": True} if extension == "webp" else {}
    pixels = decode(paint(f"a.{extension}", (200, 30, 10), (12, 10), **options))
    assert pixels.shape == (10, 12, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels[5, 5], (200, 30, 10), atol=2)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_colour_mode_gives_rgb_pixels(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.tif"
    Image.new("RGB", (5, 4), "white").convert(mode).save(path)
    assert decode(path).shape == (4, 5, 3)
    assert decode(path).min() >= 250


def test_an_image_stands_upright_as_its_exif_says(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[[255, 0, 0], [0, 255, 0]]], dtype=np.uint8))  # red left of green
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # turn it clockwise to see it
    image.save(tmp_path / "a.png", exif=exif)
    assert decode(tmp_path / "a.png").tolist() == [[[255, 0, 0]], [[0, 255, 0]]]


@pytest.mark.parametrize("brightest", [4095, 65535])
def test_deep_greyscale_is_scaled_not_clipped(paint: Paint, brightest: int) -> None:
    path = paint("deep.png", np.linspace(0, brightest, 256).astype(np.uint16).reshape(16, 16))
    pixels = decode(path)
    assert pixels.shape == (16, 16, 3)
    np.testing.assert_allclose(pixels[..., 0].ravel(), np.arange(256), atol=1)


def test_deep_greyscale_of_one_value_is_black(paint: Paint) -> None:
    assert not decode(paint("flat.png", np.full((4, 4), 900, dtype=np.uint16))).any()


def test_floating_point_greyscale_with_gaps_is_scaled(paint: Paint) -> None:
    path = paint("f.tif", np.array([[np.nan, -1.0, 0.0, 1.0]], dtype=np.float32))
    assert decode(path)[0, :, 0].tolist() == [0, 0, 128, 255]


def test_a_truncated_file_is_named_with_the_reason(paint: Paint) -> None:
    path = paint("cut.jpg", (9, 9, 9), (64, 64))
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(UnreadableData, match=r"cut\.jpg cannot be decoded \(OSError: (?i:.*truncated)"):
        decode(path)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_bytes_that_are_no_image_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UnreadableData, match="cannot be decoded"):
        decode(tmp_path / "a.png")


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableData, match="FileNotFoundError"):
        decode(tmp_path / "absent.png")


def test_a_client_that_decodes_images_does_not_load_torch() -> None:
    program = "import sys, datavector.data.decode; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
