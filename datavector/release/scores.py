"""What the model card and the merge report both say of an evaluation, from the content of `release.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datavector.choice import MARGIN, SINGLE

MOST_COLUMNS = 8  # hospitals whose results stand side by side; of more the lowest and the highest are shown
MOST_SINGLES = 8  # hospitals' own models that are listed, the best ones

Score = Mapping[str, Any]

OPTIMISM = (
    "The same validation images chose the candidate and gave its figures, so these are a little too good; "
    "only images that nobody has used yet give an estimate without that."
)


def model_name(score: Score) -> str:
    """A model as people call it."""
    name: str = score["name"]
    return f"own model of {name.removeprefix(SINGLE)}" if name.startswith(SINGLE) else name


def best_single(evaluation: Mapping[str, Any]) -> Score | None:
    """The hospital's own model with the highest balanced accuracy, or None where none was evaluated."""
    return max(evaluation["singles"], key=lambda score: (score["balancedAccuracy"], score["name"]), default=None)


def listed_singles(evaluation: Mapping[str, Any]) -> Sequence[Score]:
    """The hospitals' own models: all of them, or the best ones first where there are many."""
    singles: Sequence[Score] = evaluation["singles"]
    if len(singles) <= MOST_SINGLES:
        return singles
    return sorted(singles, key=lambda score: (-score["balancedAccuracy"], score["name"]))[:MOST_SINGLES]


def range_of(score: Score) -> tuple[float, float]:
    """The lowest and the highest balanced accuracy on one hospital's validation images."""
    each = [result["balancedAccuracy"] for result in score["hospitals"].values()] or [score["balancedAccuracy"]]
    return min(each), max(each)


def columns(evaluation: Mapping[str, Any]) -> list[str]:
    """Headings of the balanced accuracies by hospital: hospitals' names, or lowest and highest where there are many."""
    hospitals = list(evaluation["hospitals"])
    return hospitals if len(hospitals) <= MOST_COLUMNS else ["lowest hospital", "highest hospital"]


def cells(score: Score, evaluation: Mapping[str, Any]) -> list[float]:
    """The balanced accuracies that stand below `columns`."""
    hospitals = list(evaluation["hospitals"])
    if len(hospitals) > MOST_COLUMNS:
        return list(range_of(score))
    return [score["hospitals"][hospital]["balancedAccuracy"] for hospital in hospitals]


def notes(evaluation: Mapping[str, Any]) -> list[str]:
    """What a reader of the scores must know, one sentence each."""
    known = [
        f"Margin of error of the highest: {evaluation['margin']:.1%} ({MARGIN:g} standard errors); of the candidates "
        "within it, the first in the list is chosen."
    ]
    if len(evaluation["hospitals"]) > MOST_COLUMNS:
        known.append(
            f"{len(evaluation['hospitals'])} hospitals evaluated; release.json has each model's score on each."
        )
    left = len(evaluation["singles"]) - MOST_SINGLES
    if left > 0:
        known.append(
            f"Of the hospitals' own models the best {MOST_SINGLES} are listed; {left} more are in release.json."
        )
    return [*known, OPTIMISM]
