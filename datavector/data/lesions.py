"""Cartoons of skin lesions: first the skin and what grows on it, then the photograph that a hospital takes of it.

A lesion is a depth field (1 in its centre, 0 on its border) with a colour and layers of structures painted over it. All
is drawn from a random generator that the caller gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

FloatArray = NDArray[np.float32]
Colour = tuple[float, float, float]

ATYPICAL = 0.45  # largest share of another class's traits in an image: the difficulty


@dataclass(frozen=True)
class Traits:
    """What a lesion looks like: typical strengths, around which images scatter."""

    pigment: Colour  # colour of its bulk, RGB 0..1
    second: Colour  # and of its darker parts
    density: float  # how much of the skin shows through
    elongation: float
    irregularity: float  # of the border
    sharpness: float  # of the border
    variegation: float  # how patchy its colours are
    network: float  # pigmented honeycomb
    globules: float  # brown dots in its inside
    streaks: float  # dark lines across its border
    veil: float  # blue-white patches
    cysts: float  # white dots
    openings: float  # black plugs
    lacunae: float  # red to purple lakes
    scar: float  # white centre
    vessels: float  # red lines and dots


LESIONS: Final = {
    "dermatofibroma": Traits(
        (0.66, 0.46, 0.38), (0.52, 0.33, 0.26), 0.55, 0.12, 0.10, 0.25, 0.25, 0.55, 0.10, 0.05, 0, 0.1, 0, 0, 0.8, 0.3
    ),
    "keratosis": Traits(
        (0.60, 0.46, 0.32),
        (0.40, 0.28, 0.19),
        0.75,
        0.20,
        0.20,
        0.90,
        0.45,
        0.10,
        0.15,
        0.05,
        0.1,
        0.8,
        0.7,
        0,
        0,
        0.15,
    ),
    "melanoma": Traits(
        (0.45, 0.29, 0.22),
        (0.20, 0.14, 0.14),
        0.85,
        0.28,
        0.38,
        0.55,
        0.85,
        0.40,
        0.45,
        0.60,
        0.6,
        0.05,
        0,
        0.05,
        0.1,
        0.3,
    ),
    "nevus": Traits(
        (0.54, 0.36, 0.25), (0.38, 0.24, 0.17), 0.75, 0.15, 0.12, 0.45, 0.25, 0.60, 0.40, 0.05, 0, 0.05, 0, 0, 0, 0.05
    ),
    "vascular": Traits(
        (0.62, 0.28, 0.29), (0.42, 0.15, 0.23), 0.60, 0.18, 0.15, 0.55, 0.40, 0.00, 0.05, 0.00, 0.15, 0, 0, 0.9, 0, 0.4
    ),
}
LABELS: Final = tuple(LESIONS)


@dataclass(frozen=True)
class Look:
    """A hospital's patients and equipment."""

    tone: float  # mean skin tone, 0 light .. 1 dark
    gains: Colour  # white balance
    light: float  # exposure, 1 is neutral
    contrast: float
    vignette: float
    blur: float  # pixels at size 160
    noise: float
    quality: int  # of JPEG
    zoom: float  # typical radius of a lesion, as a share of half the image
    hairs: float  # mean number
    ruler: float  # share of images with one
    weights: tuple[float, ...]  # of the classes


def draw_lesion(label: str, look: Look, rng: Generator, size: int) -> FloatArray:
    """A lesion on a hospital's skin, before it is photographed.

    Returns:
        float32, shape (size, size, 3), RGB about 0..1.
    """
    traits = _individual(label, rng)
    image = _skin(look, rng, size)
    depth, angle = _shape(traits, look, rng, size)  # 1 in the centre, 0 on the border, negative outside
    inside = 0.5 + 0.5 * np.tanh(depth * np.float32(3 + 18 * traits.sharpness))
    patches = np.clip(0.5 + traits.variegation * _noise(rng, size, 6) + 0.25 * (depth - 0.4), 0, 1)
    bulk = _rgb(traits.pigment) + patches[..., None] * (_rgb(traits.second) - _rgb(traits.pigment))
    image += (inside * (0.45 + 0.5 * traits.density))[..., None] * (bulk * (1.12 - 0.5 * look.tone) - image)

    _paint(image, inside * traits.veil * _above(_noise(rng, size, 4), 0.55), (0.50, 0.55, 0.66), 0.75)
    lines = _honeycomb(rng, size) * np.clip(1.2 - 1.1 * np.abs(depth - 0.25), 0, 1)
    _paint(image, inside * traits.network * lines, (0.22, 0.13, 0.09), 0.7)
    _paint(image, inside * traits.scar * np.clip(1.6 * depth - 0.65, 0, 1), (0.90, 0.80, 0.76), 0.8)
    _paint(image, inside * _dots(rng, size, depth, 45 * traits.globules, 0.018), (0.20, 0.12, 0.09), 0.65)
    _paint(image, inside * _dots(rng, size, depth, 16 * traits.openings, 0.028), (0.10, 0.07, 0.05), 0.85)
    _paint(image, inside * _dots(rng, size, depth, 22 * traits.cysts, 0.022), (0.96, 0.90, 0.78), 0.8)
    _paint(image, inside * _dots(rng, size, depth, 22 * traits.lacunae, 0.065), (0.55, 0.08, 0.16), 0.7)
    _paint(image, _streaks(rng, size, depth, angle, traits.streaks), (0.13, 0.09, 0.08), 0.8)
    _paint(image, inside * _curves(rng, size, 9 * traits.vessels, 0.25, 1), (0.70, 0.12, 0.14), 0.75)
    return image


def photograph(image: FloatArray, look: Look, rng: Generator) -> Image.Image:
    """What the hospital's camera makes of it: hairs, ruler, light, lens and sensor."""
    size = image.shape[0]
    _paint(image, _curves(rng, size, rng.poisson(look.hairs), 0.9, 2), (0.13, 0.09, 0.07), 0.85)
    if rng.random() < look.ruler:
        _paint(image, _ruler(rng, size), (0.10, 0.10, 0.12), 0.85)
    x, y = _grid(size)
    light = look.light * rng.normal(1, 0.05) * (1 + rng.normal(0, 0.06) * x + rng.normal(0, 0.06) * y)
    light *= 1 - look.vignette * np.clip(x * x + y * y - 0.35, 0, 2)
    gains = _rgb(look.gains) * (1 + 0.025 * rng.standard_normal(3, dtype=np.float32))
    image = (0.55 + look.contrast * (image - 0.55)) * light.astype(np.float32)[..., None] * gains
    grain = rng.standard_normal((size, size, 1), dtype=np.float32) + 0.6 * rng.standard_normal(image.shape, np.float32)
    blurred = _as_image(image).filter(ImageFilter.GaussianBlur(look.blur * size / 160))
    return _as_image(np.asarray(blurred, np.float32) / 255 + look.noise * grain)


def _as_image(image: NDArray[np.floating]) -> Image.Image:
    return Image.fromarray((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8))


def _individual(label: str, rng: Generator) -> Traits:
    """The class's traits, blended with those of another class and scattered."""
    other = LESIONS[LABELS[(LABELS.index(label) + rng.integers(1, len(LABELS))) % len(LABELS)]]
    share = ATYPICAL * rng.random()
    values: dict[str, object] = {}
    for field in fields(Traits):
        mean = (1 - share) * np.float64(getattr(LESIONS[label], field.name)) + share * np.float64(
            getattr(other, field.name)
        )
        values[field.name] = mean + rng.normal(0, 0.035, 3) if mean.ndim else float(mean * rng.uniform(0.35, 1.65))
    return Traits(**values)  # type: ignore[arg-type]


def _rgb(colour: Colour) -> FloatArray:
    return np.array(colour, dtype=np.float32)


@lru_cache(maxsize=4)
def _grid(size: int) -> tuple[FloatArray, FloatArray]:
    """Coordinates of the pixels, -1..1 to the right and downwards."""
    line = np.linspace(-1, 1, size, dtype=np.float32)
    x, y = np.meshgrid(line, line)
    return x, y


def _noise(rng: Generator, size: int, cells: int) -> FloatArray:
    """Smooth noise of about unit variance, shape (size, size), with about `cells` bumps along a side."""
    coarse = Image.fromarray(rng.standard_normal((cells + 2, cells + 2), dtype=np.float32))
    fine: FloatArray = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) * np.float32(1.3)
    return fine


def _above(noise: FloatArray, level: float) -> FloatArray:
    above: FloatArray = np.clip(4 * (noise - level), 0, 1)
    return above


def _paint(image: FloatArray, cover: FloatArray, colour: Colour, strength: float) -> None:
    """Blends `colour` into the image where `cover` (size, size) is above 0; in place."""
    if not cover.any():
        return
    image += np.clip(strength * cover, 0, 1).astype(np.float32)[..., None] * (_rgb(colour) - image)


def _skin(look: Look, rng: Generator, size: int) -> FloatArray:
    tone = np.clip(look.tone + rng.normal(0, 0.09), 0, 1)
    colour = _rgb((0.94, 0.78, 0.69)) - np.float32(tone) * _rgb((0.45, 0.47, 0.47))
    texture: FloatArray = (
        0.022 * _noise(rng, size, 5) + 0.014 * _noise(rng, size, size // 6) + 0.010 * _noise(rng, size, size // 3)
    )
    flush: FloatArray = 0.012 * _noise(rng, size, 4)
    skin: FloatArray = colour + texture[..., None] + flush[..., None] * _rgb((1, -0.6, -0.4))
    return skin


def _shape(traits: Traits, look: Look, rng: Generator, size: int) -> tuple[FloatArray, FloatArray]:
    """How deep in the lesion each pixel lies (1 centre, 0 border, negative outside), and in which direction."""
    x, y = _grid(size)
    x, y = x - rng.normal(0, 0.09), y - rng.normal(0, 0.09)
    tilt = rng.uniform(0, math.pi)
    along = (x * math.cos(tilt) + y * math.sin(tilt)) * (1 - min(traits.elongation, 0.5))
    across = y * math.cos(tilt) - x * math.sin(tilt)
    angle = np.arctan2(across, along)
    radius = look.zoom * math.exp(rng.normal(0, 0.16))
    turn = np.linspace(-np.pi, np.pi, 181)
    waves = [rng.normal(0, 0.9) / k**0.8 * np.cos(k * turn + rng.uniform(0, 2 * np.pi)) for k in range(2, 8)]
    bumps = np.interp(angle, turn, np.sum(waves, axis=0)).astype(np.float32) + 0.25 * _noise(rng, size, 12)
    border = radius * np.clip(1 + traits.irregularity * bumps, 0.35, 1.7)
    depth: FloatArray = 1 - np.hypot(along, across) / border
    return depth, angle


def _honeycomb(rng: Generator, size: int) -> FloatArray:
    """Lines of a slightly bent hexagonal lattice."""
    x, y = _grid(size)
    pitch, turn = rng.uniform(32, 48), rng.uniform(0, math.pi)
    x, y = x + 0.022 * _noise(rng, size, 7), y + 0.022 * _noise(rng, size, 7)
    ways = [turn + way * 2 * math.pi / 3 for way in range(3)]
    waves = [np.cos(pitch * math.cos(way) * x + pitch * math.sin(way) * y) for way in ways]
    return np.clip(0.35 - 0.6 * (waves[0] + waves[1] + waves[2]), 0, 1).astype(np.float32)


def _canvas(size: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    canvas = Image.new("L", (2 * size, 2 * size))
    return canvas, ImageDraw.Draw(canvas)


def _cover(canvas: Image.Image) -> FloatArray:
    cover: FloatArray = np.asarray(canvas.reduce(2), np.float32) / np.float32(255)
    return cover


def _dots(rng: Generator, size: int, depth: FloatArray, mean: float, radius: float) -> FloatArray:
    """About `mean` soft round spots inside the lesion."""
    canvas, draw = _canvas(size)
    for _ in range(rng.poisson(mean)):
        x, y = rng.uniform(0.1, 0.9, 2)
        r = 2 * size * radius * rng.uniform(0.5, 1.4) / 2
        if depth[int(y * size), int(x * size)] > 0.1:
            x, y, shade = 2 * size * x, 2 * size * y, int(rng.uniform(140, 255))
            draw.ellipse((x - r, y - r * rng.uniform(0.7, 1), x + r, y + r), fill=shade)
    return _cover(canvas)


def _streaks(rng: Generator, size: int, depth: FloatArray, angle: FloatArray, strength: float) -> FloatArray:
    """Dark fingers across the border, on one side of the lesion."""
    count, phase = rng.uniform(14, 30), rng.uniform(0, 2 * np.pi)
    fingers = _above(np.cos(count * angle + 2 * _noise(rng, size, 8)), 0.45)
    side = np.clip(0.5 + 1.2 * np.cos(angle - phase), 0, 1)
    across = np.clip(1 - np.abs(depth - 0.02) / 0.22, 0, 1)
    cover: FloatArray = np.float32(strength) * fingers * side * across
    return cover


def _curves(rng: Generator, size: int, mean: float, length: float, width: int) -> FloatArray:
    """About `mean` thin bent lines anywhere (hairs, vessels)."""
    canvas, draw = _canvas(size)
    t = np.linspace(0, 1, 9)[:, None]
    for _ in range(rng.poisson(mean) if length < 0.5 else int(mean)):
        start, turn = rng.uniform(0, 1, 2), rng.uniform(0, 2 * np.pi)
        reach = length * rng.uniform(0.4, 1.2) * np.array([np.cos(turn), np.sin(turn)])
        bend = start + reach / 2 + rng.normal(0, 0.12 * length**0.5, 2)
        points = 2 * size * ((1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * (start + reach))
        draw.line([(float(x), float(y)) for x, y in points], fill=int(rng.uniform(150, 255)), width=width)
    return _cover(canvas)


def _ruler(rng: Generator, size: int) -> FloatArray:
    """Ticks of a millimetre scale along one side."""
    canvas, draw = _canvas(size)
    step = 2 * size * rng.uniform(0.04, 0.08)
    for tick in range(int(2 * size / step) + 1):
        long = 0.07 if tick % 5 == 0 else 0.04
        draw.line((tick * step, 0, tick * step, 2 * size * long), fill=230, width=2)
    return np.rot90(_cover(canvas), int(rng.integers(4)))
