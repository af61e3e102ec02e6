"""The pictures of a merge report: inline SVG whose colours come from the page's style sheet.

Those that repeat a number in the same row of a table are hidden from screen readers; others carry a title and a
description.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from datavector.release.markup import Html, element

STRIP_WIDTH, STRIP_HEIGHT, MARGIN = 132, 16, 6  # MARGIN keeps a dot at either end whole
PLOT, LEFT, TOP = 260, 62, 10  # side of the reliability diagram's square, and where it begins
TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)


def length_bar(share: float) -> Html:
    """A bar over `share` of its cell, 0 to 1."""
    length = f"{(STRIP_WIDTH - 2) * min(max(share, 0.0), 1.0):.1f}"
    return _strip(element("rect", class_="bar", x=0, y=3, width=length, height=10, rx=2))


def spread_strip(value: float, lowest: float, highest: float, *, beside: float | None = None) -> Html:
    """A scale from 0 to 1: a dot at a value, a line over its range, a tick at a figure to compare with."""
    middle = STRIP_HEIGHT / 2
    parts = [
        element("line", class_="track", x1=_at(0), x2=_at(1), y1=middle, y2=middle),
        element("line", class_="range", x1=_at(lowest), x2=_at(highest), y1=middle, y2=middle),
    ]
    if beside is not None:
        parts.append(element("line", class_="beside", x1=_at(beside), x2=_at(beside), y1=1, y2=STRIP_HEIGHT - 1))
    return _strip(*parts, element("circle", class_="dot", cx=_at(value), cy=middle, r=4.5))


def reliability_diagram(bins: NDArray[np.float64], *, title: str, description: str) -> Html:
    """How often answers were right, by how sure the model was.

    Args:
        bins: shape (bins, 3): by confidence, in equal steps from 0 to 1: images, those recognised, and the sum of the
            confidences.
    """
    bottom, right, step = TOP + PLOT, LEFT + PLOT, PLOT / len(bins)
    parts = [
        element("title", title, id="reliability-title"),
        element("desc", description, id="reliability-description"),
        *_grid(TICKS),
    ]
    for place, (images, recognised, _) in enumerate(bins):
        if images:
            height = PLOT * recognised / images
            parts.append(
                element(
                    "rect",
                    element("title", f"{recognised / images:.0%} of {int(images)} images recognised"),
                    class_="bar",
                    x=f"{LEFT + place * step + 1.5:.1f}",
                    y=f"{bottom - height:.1f}",
                    width=f"{step - 3:.1f}",
                    height=f"{height:.1f}",
                )
            )
    parts += [
        element("line", class_="ideal", x1=LEFT, y1=bottom, x2=right, y2=TOP),
        element("text", "confidence", x=LEFT + PLOT / 2, y=bottom + 38, text_anchor="middle"),
        element("text", "recognised", transform=f"translate(12 {TOP + PLOT / 2:g}) rotate(-90)", text_anchor="middle"),
    ]
    return element(
        "svg",
        *parts,
        role="img",
        aria_labelledby="reliability-title",
        aria_describedby="reliability-description",
        class_="plot",
        viewBox=f"0 0 {right + 24} {bottom + 44}",
        width=right + 24,
        height=bottom + 44,
    )


def _grid(ticks: Sequence[float]) -> list[Html]:
    """Lines and figures of both axes."""
    bottom, right, parts = TOP + PLOT, LEFT + PLOT, []
    for tick in ticks:
        x, y = LEFT + PLOT * tick, bottom - PLOT * tick
        parts += [
            element("line", class_="grid", x1=LEFT, x2=right, y1=f"{y:g}", y2=f"{y:g}"),
            element("text", f"{tick:.0%}", x=LEFT - 6, y=f"{y + 4:g}", text_anchor="end"),
            element("text", f"{tick:.0%}", x=f"{x:g}", y=bottom + 18, text_anchor="middle"),
        ]
    return parts


def _strip(*parts: Html) -> Html:
    size = {"width": STRIP_WIDTH, "height": STRIP_HEIGHT, "viewBox": f"0 0 {STRIP_WIDTH} {STRIP_HEIGHT}"}
    return element("svg", *parts, aria_hidden="true", class_="strip", **size)


def _at(share: float) -> str:
    return f"{MARGIN + (STRIP_WIDTH - 2 * MARGIN) * min(max(share, 0.0), 1.0):.1f}"
