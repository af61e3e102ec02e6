"""How vectors lie to each other, for people: norms and cosines as a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from datavector.errors import UsageError
from datavector.merge.cohort import DoubleArray, cosines


def show_similarity(names: Sequence[str], gram: DoubleArray, picture: Path | None = None) -> None:
    """Prints norms and cosines, and draws them where a picture is asked for."""
    norms, shares = np.sqrt(np.diag(gram)), cosines(gram)
    table = Table("vector", "norm", *(str(number + 1) for number in range(len(names))), title="Cosines of the vectors")
    for number, name in enumerate(names):
        row = [f"{cosine:.3f}" for cosine in shares[number]]
        table.add_row(f"{number + 1} {name}", f"{norms[number]:.4g}", *row)
    console = Console()
    if not console.is_terminal:  # a log has no width of its own
        console = Console(width=40 + 10 * (len(names) + 1))
    console.print(table)
    if picture is not None:
        _draw(names, norms, shares, picture)
        console.print(f"picture: {picture}")


def _draw(names: Sequence[str], norms: DoubleArray, shares: DoubleArray, path: Path) -> None:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise UsageError("the picture needs matplotlib", remedy="run: pip install 'datavector[demo]'") from error
    mpl.use("agg")
    from matplotlib import pyplot as plt

    side = 1.8 + 0.45 * len(names)
    figure, axes = plt.subplots(figsize=(side + 1, side), layout="constrained")
    image = axes.imshow(shares, vmin=-1, vmax=1, cmap="RdBu")
    labels = [f"{name} ({norm:.3g})" for name, norm in zip(names, norms, strict=True)]
    axes.set(title="Cosines (norms in brackets)")
    axes.set_yticks(range(len(names)), labels)
    axes.set_xticks(range(len(names)), [str(number + 1) for number in range(len(names))])
    if len(names) <= 20:
        for (row, column), cosine in np.ndenumerate(shares):
            colour = "white" if abs(cosine) > 0.6 else "black"
            axes.text(column, row, f"{cosine:.2f}", ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(image)
    figure.savefig(path, dpi=110)
    plt.close(figure)
