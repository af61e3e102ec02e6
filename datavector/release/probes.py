"""Images that a program drew, and the comparison of two runtimes' answers for them.

A release carries its probes with torch's logits, so that anyone can check without torch that ONNX Runtime gives the
same answers on their machine. No hospital's image is among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datavector.data.lesions import LABELS, draw_lesion, photograph
from datavector.data.synthetic import hospital_look
from datavector.errors import ReleaseError

Images = NDArray[np.uint8]
Logits = NDArray[np.float32]

SHAPES = ((128, 128), (61, 147), (224, 168))  # height, width
BATCH = 3  # images of each shape
SEED = 20240819

TOLERANCE = 1e-3  # largest difference between two runtimes' logits, where logits are of ordinary size
SPREAD_FLOOR = 1e-4  # smallest standard deviation over the probes that a comparison can see


@dataclass(frozen=True)
class Parity:
    """How well two runtimes agree.

    Attributes:
        max_abs_difference: over all probes and classes.
        logit_spread: standard deviation over the probes, of the class where it is smallest.
    """

    max_abs_difference: float
    logit_spread: float

    @property
    def spread_ok(self) -> bool:
        """Whether the logits depend on the image; if they do not, any two constant models agree."""
        return bool(self.logit_spread > SPREAD_FLOOR)  # False for NaN

    @property
    def allowed(self) -> float:
        """float32 rounding grows with the logits, and a difference must stay small beside what the images cause."""
        return min(TOLERANCE * max(1.0, self.logit_spread), 0.1 * self.logit_spread)

    @property
    def difference_ok(self) -> bool:
        return bool(self.max_abs_difference <= self.allowed)


def draw_probes() -> list[Images]:
    """The probes: batches of photographs of procedural skin lesions, each of one shape.

    Returns:
        One array for each of SHAPES: uint8, shape (BATCH, height, width, 3), RGB.
    """
    return [
        np.stack([_draw(BATCH * batch + index, height, width) for index in range(BATCH)])
        for batch, (height, width) in enumerate(SHAPES)
    ]


def compare(first: Sequence[Logits], second: Sequence[Logits]) -> Parity:
    """Compares logits, arrays of shape (images, classes) for each batch; the spread is that of `first`."""
    left, right = np.concatenate(first).astype(np.float64), np.concatenate(second).astype(np.float64)
    return Parity(float(np.abs(left - right).max()), float(left.std(axis=0).min()))


def save_probes(path: Path, images: Sequence[Images], logits: Sequence[Logits]) -> None:
    """Writes `images_0`, `logits_0`, `images_1`, ...; the same arrays give the same bytes."""
    named: dict[str, Any] = {}
    for batch, (pixels, answers) in enumerate(zip(images, logits, strict=True)):
        named |= {f"images_{batch}": pixels, f"logits_{batch}": answers}
    np.savez_compressed(path, **named)


def load_probes(path: Path) -> tuple[list[Images], list[Logits]]:
    """Reads what `save_probes` wrote.

    Raises:
        ReleaseError: it holds no images, or not one row of logits for each.
    """
    with np.load(path, allow_pickle=False) as file:
        content: Mapping[str, Any] = dict(file)
    images = [content[f"images_{batch}"] for batch in range(len(content) // 2)]
    logits = [content[f"logits_{batch}"] for batch in range(len(content) // 2)]
    if not images or any(len(pixels) != len(rows) for pixels, rows in zip(images, logits, strict=True)):
        raise ReleaseError(f"{path} does not hold images with logits", remedy="fetch the release again")
    return images, logits


def _draw(number: int, height: int, width: int) -> Images:
    rng = np.random.default_rng([SEED, number])
    look = hospital_look(SEED, number)
    side = max(height, width)
    square = np.asarray(photograph(draw_lesion(LABELS[number % len(LABELS)], look, rng, side), look, rng))
    top, left = (side - height) // 2, (side - width) // 2
    return square[top : top + height, left : left + width]
