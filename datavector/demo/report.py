"""What the demo shows at its end: a table, a picture of it, and report.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from datavector.errors import UsageError
from datavector.files import write_json


@dataclass(frozen=True)
class Score:
    """Results on the common test set, as shares of 1."""

    accuracy: float
    balanced_accuracy: float


@dataclass
class Report:
    """Everything that the demo measured.

    Attributes:
        hospitals: name to (training images, score of the hospital's own model).
        controls: pooled, random, random_body, no_restoration; empty without controls.
        calibrations: the merged weights under each way to restore BatchNorm; empty without controls.
        seconds: by stage.
    """

    method: str
    head: str
    classes: int
    test_images: int
    hospitals: dict[str, tuple[int, Score]] = field(default_factory=dict)
    merged: Score = Score(0.0, 0.0)
    calibration: dict[str, Any] = field(default_factory=dict)
    controls: dict[str, Score] = field(default_factory=dict)
    calibrations: dict[str, Score] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    release: Path = Path()

    @property
    def mean_single(self) -> float:
        return sum(score.accuracy for _, score in self.hospitals.values()) / len(self.hospitals)

    @property
    def best_single(self) -> Score:
        return max((score for _, score in self.hospitals.values()), key=lambda score: score.accuracy)

    @property
    def gap_recovered(self) -> float | None:
        """(merged - mean single) / (pooled - mean single); None where pooling gained nothing or was not tried."""
        pooled = self.controls.get("pooled")
        if pooled is None or pooled.accuracy <= self.mean_single:
            return None
        return (self.merged.accuracy - self.mean_single) / (pooled.accuracy - self.mean_single)

    def verdict(self) -> str:
        """How the merged model compares with the best single hospital, in words."""
        best_balanced = max(score.balanced_accuracy for _, score in self.hospitals.values())
        gain = 100 * (self.merged.accuracy - self.best_single.accuracy)
        balanced_gain = 100 * (self.merged.balanced_accuracy - best_balanced)
        if gain > 0 and balanced_gain > 0:
            text = f"The merged model beats the best single hospital by {gain:.1f} points."
        elif gain > 0 or balanced_gain > 0:
            text = (
                f"The merged model is {_signed(gain)} points on accuracy and {_signed(balanced_gain)} on balanced "
                "accuracy from the best single hospital: better on one, not on both."
            )
        else:
            text = (
                f"The merged model is WORSE than the best single hospital: {_signed(gain)} points on accuracy, "
                f"{_signed(balanced_gain)} on balanced accuracy. Do not put it to use."
            )
        if (share := self.gap_recovered) is not None:
            text += f" It recovers {share:.0%} of the gap between the mean single hospital and pooled training."
        return text

    def rows(self) -> list[tuple[str, str, Score]]:
        """Group, label and score of every line of table and picture."""
        rows = [("single", f"{name} alone", score) for name, (_, score) in self.hospitals.items()]
        how = f"{self.method}, {self.calibration.get('mode', 'none')}"
        head = ", closed-form head" if self.head == "closed-form" else ""
        rows.append(("merged", f"merged ({how}{head})", self.merged))
        rows += [("control", _CONTROLS[name], score) for name, score in self.controls.items()]
        rows += [("calibration", f"merged, BatchNorm by {name}", self.calibrations[name]) for name in self._others()]
        return rows

    def _others(self) -> list[str]:
        """The ways to restore BatchNorm that have no line of their own yet."""
        return [name for name in self.calibrations if name not in (self.calibration.get("mode"), "none")]

    def dump(self) -> dict[str, Any]:
        """The content of report.json."""
        return {
            "hospitals": [
                {"name": name, "images": images, **vars(score)} for name, (images, score) in self.hospitals.items()
            ],
            "mean_single": self.mean_single,
            "best_single": self.best_single.accuracy,
            "merged": {"method": self.method, "head": self.head, **vars(self.merged), "calibration": self.calibration},
            "gap_recovered": self.gap_recovered,
            "controls": {name: score.accuracy for name, score in self.controls.items()},
            "calibrations": {name: vars(score) for name, score in self.calibrations.items()},
            "seconds": {stage: round(seconds, 2) for stage, seconds in self.seconds.items()},
            "classes": self.classes,
            "test_images": self.test_images,
            "release": str(self.release),
        }


_CONTROLS = {
    "pooled": "pooled training (nobody may)",
    "random": "random vectors of the same norms",
    "random_body": "random body, true head",
    "no_restoration": "merged, no BatchNorm restoration",
}
_COLOURS = {"single": "#8fa3b5", "merged": "#1f6f54", "control": "#c9b458", "calibration": "#7fb59b"}


def show(report: Report, folder: Path) -> None:
    """Prints the table, and writes report.json and report.png into `folder`."""
    write_json(folder / "report.json", report.dump())
    _draw(report, folder / "report.png")
    table = Table("model", "accuracy", "balanced", title=f"On {report.test_images} test images that nobody trained on")
    for group, label, score in report.rows():
        style = "bold green" if group == "merged" else ""
        table.add_row(label, f"{score.accuracy:.1%}", f"{score.balanced_accuracy:.1%}", style=style)
    console = Console()
    console.print(table)
    console.print(report.verdict())
    stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in report.seconds.items())
    console.print(f"Time: {stages}; {sum(report.seconds.values()):.0f} s in all")


def _draw(report: Report, path: Path) -> None:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise UsageError("the picture needs matplotlib", remedy="run: pip install 'datavector[demo]'") from error
    mpl.use("agg")
    from matplotlib import pyplot as plt

    rows = report.rows()[::-1]
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(rows) + 1.2), layout="constrained")
    bars = axes.barh(
        [label for _, label, _ in rows],
        [100 * score.accuracy for _, _, score in rows],
        color=[_COLOURS[group] for group, _, _ in rows],
    )
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.axvline(100 / report.classes, color="grey", linestyle=":", linewidth=1)
    axes.set(xlim=(0, 105), xlabel="accuracy on the common test set, % (dotted: chance)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _signed(points: float) -> str:
    return f"{points:+.1f}"
