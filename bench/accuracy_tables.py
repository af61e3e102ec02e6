"""Tables of what `bench.accuracy` kept: `python -m bench.accuracy_tables RESULTS`.

Heads and choices are computed here, from features and logits, as the product computes them. Every figure is of the test
images, which nobody trained on and nobody chose by; the choice itself is made on the hospitals' validation images.
`second.` begins the names of merged models that every hospital visited twice.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from agent.features import class_moments
from aggregator.resources import DEFAULT_CANDIDATES, Head
from bench.accuracy import SECOND
from datavector.choice import HEAD, Counts, choose_candidate
from datavector.merge.head import pool_features, solvable, solve_head
from datavector.metrics import accuracy, balanced_accuracy, calibration_error, confusion_matrix, reliability

Logits = NDArray[np.float32]
CONTROLS = ("random", "random-body", "pretrained")
BINS = np.zeros((10, 3))


@dataclass(frozen=True)
class Score:
    """Shares of 1 on the test images."""

    accuracy: float
    balanced: float


@dataclass(frozen=True)
class Cell:
    """A folder of `bench.accuracy`."""

    folder: Path

    @property
    def group(self) -> str:
        return self.folder.name.rpartition("-")[0]

    @cached_property
    def labels(self) -> Mapping[str, NDArray[np.int64]]:
        return dict(np.load(self.folder / "labels.npz"))

    @property
    def hospitals(self) -> list[str]:
        return [name.removeprefix("train.") for name in self.labels if name.startswith("train.")]

    @property
    def said(self) -> list[str]:
        return sorted(path.stem for path in (self.folder / "said").glob("*.npz"))

    @property
    def bodies(self) -> list[str]:
        fixed = ("hospital.", "fedavg.", "attack.", "pooled", *CONTROLS)
        return [name for name in self.said if not name.startswith(fixed)]

    def answers(self, name: str) -> Mapping[str, Logits]:
        """By images (test, validation.HOSPITAL) the logits, of a model or of its variant with a closed-form head."""
        if name.endswith(HEAD):
            return _solved(self, name.removesuffix(HEAD))
        kept = self.kept(name)
        return {key.removeprefix("logits."): kept[key] for key in kept.files if key.startswith("logits.")}

    def kept(self, name: str) -> np.lib.npyio.NpzFile:
        found: np.lib.npyio.NpzFile = np.load(self.folder / "said" / f"{name}.npz")
        return found

    def score(self, name: str) -> Score | None:
        return self.score_of(self.answers(name).get("test"))

    def unsure(self, name: str) -> float:
        """The expected calibration error on the test images."""
        probabilities = torch.from_numpy(self.answers(name)["test"]).softmax(1).numpy()
        return calibration_error(reliability(self.labels["test"], probabilities))

    def score_of(self, logits: Logits | None) -> Score | None:
        if logits is None:
            return None
        confusion = confusion_matrix(self.labels["test"], logits.argmax(1), logits.shape[1])
        return Score(accuracy(confusion), balanced_accuracy(confusion))

    def singles(self) -> list[Score]:
        found = [self.score(f"hospital.{name}") for name in self.hospitals]
        return [each for each in found if each]

    def ensemble(self) -> Score | None:
        logits = [torch.from_numpy(self.answers(f"hospital.{name}")["test"]) for name in self.hospitals]
        return self.score_of(torch.stack([each.softmax(1) for each in logits]).mean(0).numpy())

    def candidates(self, bodies: Sequence[str]) -> dict[str, Mapping[str, Logits]]:
        names = [f"{body}{suffix}" for body in bodies for suffix in (HEAD, "")]
        found = {name: self.answers(name) for name in names}
        return {name: answers for name, answers in found.items() if answers}

    def choice(self, bodies: Sequence[str]) -> str:
        """What `method: auto` takes of these bodies, each with both heads."""
        candidates = self.candidates(bodies)
        evaluations = {
            hospital: {
                name: Counts(self._confusion(answers[f"validation.{hospital}"], hospital), BINS)
                for name, answers in candidates.items()
            }
            for hospital in self.hospitals
        }
        chosen = choose_candidate(evaluations, list(candidates), [], fallback=bodies[0], needed=len(self.hospitals))
        return chosen.chosen

    def _confusion(self, logits: Logits, hospital: str) -> NDArray[np.int64]:
        return confusion_matrix(self.labels[f"validation.{hospital}"], logits.argmax(1), logits.shape[1])


@cache
def _solved(cell: Cell, body: str) -> Mapping[str, Logits]:
    """The answers with a closed-form head, which several tables ask for; empty where there is none."""
    kept = cell.kept(body)
    classes = kept["logits.test"].shape[1]
    moments = pool_features(
        [
            class_moments(
                torch.from_numpy(kept[f"features.train.{hospital}"]),
                torch.from_numpy(cell.labels[f"train.{hospital}"]),
                classes,
                floor=Head().floor,
            )
            for hospital in cell.hospitals
        ]
    )
    if not solvable(moments):
        return {}
    weight, bias = solve_head(moments, kept["head.weight"], kept["head.bias"], strength=Head().strength)
    asked = [key for key in kept.files if key.startswith("features.") and not key.startswith("features.train.")]
    return {key.removeprefix("features."): kept[key] @ weight.T + bias for key in asked}


def main() -> None:
    folders = sorted(path.parent for path in Path(sys.argv[1]).glob("*/said"))
    groups = defaultdict(list)
    for folder in folders:
        if (folder / "said" / "fedavg.visit.npz").is_file():  # else its training is not done
            groups[Cell(folder).group].append(Cell(folder))
    for group, cells in groups.items():
        _scores(group, cells)
    _goals([cell for cells in groups.values() for cell in cells])
    for cells in groups.values():
        for cell in cells:
            if any(name.startswith("attack.") for name in cell.said):
                _attacks(cell)


def _scores(group: str, cells: Sequence[Cell]) -> None:
    print(f"\n{group}: {len(cells)} seeds; mean of accuracy +- largest distance from it (balanced accuracy)\n")
    print("| | merged head | closed-form head |\n|---|---|---|")
    singles = [cell.singles() for cell in cells]
    _row(
        "single hospital: mean",
        [Score(_mean([s.accuracy for s in each]), _mean([s.balanced for s in each])) for each in singles],
    )
    _row(
        "single hospital: best",
        [Score(max(s.accuracy for s in each), max(s.balanced for s in each)) for each in singles],
    )
    _row("pooled training", [cell.score("pooled") for cell in cells])
    _row("federated averaging, statistics averaged", [cell.score("fedavg.averaged") for cell in cells])
    _row("federated averaging, statistics of a visit", [cell.score("fedavg.visit") for cell in cells])
    _row("ensemble of the hospitals' own models", [cell.ensemble() for cell in cells])
    every = sorted({body for cell in cells for body in (*cell.bodies, *CONTROLS) if body in cell.said})
    for body in every:
        having = [cell for cell in cells if body in cell.said]
        name = f"`{body}`" + (f" ({len(having)} seeds)" if len(having) < len(cells) else "")
        _row(name, [cell.score(body) for cell in having], [cell.score(f"{body}{HEAD}") for cell in having])
    for name, bodies in (("**auto**", usual()), ("**auto** after two visits", usual(SECOND))):
        having = [cell for cell in cells if {*bodies} <= {*cell.bodies}]
        _row(name, [cell.score(cell.choice(bodies)) for cell in having])
    print(f"\nauto's calibration error: {', '.join(f'{cell.unsure(cell.choice(usual())):.3f}' for cell in cells)}")


def usual(prefix: str = "") -> list[str]:
    return [f"{prefix}{candidate.body}" for candidate in DEFAULT_CANDIDATES]


def _goals(cells: Sequence[Cell]) -> None:
    print(
        "\n| cell | auto took | accuracy (balanced) | best single | federated | share of the gap | best in hindsight |"
    )
    print("|---|---|---|---|---|---|---|")
    for cell in cells:
        taken, singles, pooled = cell.choice(usual()), cell.singles(), cell.score("pooled")
        auto, federated = cell.score(taken), cell.score("fedavg.visit")
        assert auto
        assert pooled
        mean, best = _mean([each.accuracy for each in singles]), max(each.accuracy for each in singles)
        balanced = max(each.balanced for each in singles)
        found = {name: cell.score_of(answers["test"]) for name, answers in cell.candidates(usual()).items()}
        hindsight = max(found, key=lambda name: found[name].accuracy if found[name] else 0.0)  # type: ignore[union-attr]
        share = (auto.accuracy - mean) / (pooled.accuracy - mean)
        print(
            f"| {cell.folder.name} | {taken} | {_told(auto)} | {best:.3f} ({balanced:.3f}) | {_told(federated)} "
            f"| {share:.2f} | {hindsight} {_told(found[hindsight])} |"
        )


def _attacks(cell: Cell) -> None:
    names = [name.removeprefix("attack.") for name in cell.said if name.startswith("attack.")]
    attacks = sorted({name.partition(".")[0] for name in names})
    print(f"\n{cell.folder.name}, one hospital sends something else; accuracy: merged head / closed-form head\n")
    print(f"| | {' | '.join(attacks)} |\n|---|{'---|' * len(attacks)}")
    for body in sorted({name.partition(".")[2] for name in names}):
        cells = []
        for attack in attacks:
            name = f"attack.{attack}.{body}"
            pair = [cell.score(each) for each in (name, f"{name}{HEAD}")] if name in cell.said else []
            cells.append(" / ".join("-" if score is None else f"{score.accuracy:.3f}" for score in pair))
        print(f"| `{body}` | {' | '.join(cells)} |")
    found = {attack: json.loads((cell.folder / f"gate.{attack}.json").read_text()) for attack in attacks}
    print(f"| the gate | {' | '.join('; '.join(filter(None, found[attack])) or 'passes' for attack in attacks)} |")


def _row(name: str, merged: Sequence[Score | None], solved: Sequence[Score | None] = ()) -> None:
    print(f"| {name} | {_over_seeds(merged)} | {_over_seeds(solved)} |")


def _over_seeds(scores: Sequence[Score | None]) -> str:
    known = [each for each in scores if each]
    if not known:
        return ""
    mean = _mean([each.accuracy for each in known])
    spread = max(abs(each.accuracy - mean) for each in known)
    return f"{mean:.3f} +- {spread:.3f} ({_mean([each.balanced for each in known]):.3f})"


def _told(score: Score | None) -> str:
    return "" if score is None else f"{score.accuracy:.3f} ({score.balanced:.3f})"


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


if __name__ == "__main__":
    main()
