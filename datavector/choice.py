"""Which candidate becomes the merged model: hospitals evaluate, counts are summed, a rule decides.

Pure: no file, no clock. A hospital gives a confusion matrix for each candidate, over its own validation images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datavector.metrics import Confusion, accuracy, balanced_accuracy

SINGLE = "hospital."  # how the name of a hospital's own model begins, beside the candidates
HEAD = ".head"  # how the name of a candidate with the closed-form head ends
FEWEST = 2  # hospitals that must evaluate: never only the one whose vector is judged
MARGIN = 1.0  # standard errors within which an earlier candidate is as good


@dataclass(frozen=True, eq=False)
class Counts:
    """What one hospital found for one model on its validation images.

    Attributes:
        confusion: int64, shape (classes, classes): images by class (row) and prediction (column).
        bins: float64, shape (bins, 3), as `datavector.metrics.reliability` gives them.
    """

    confusion: Confusion
    bins: NDArray[np.float64]

    @property
    def images(self) -> int:
        return int(self.confusion.sum())


Evaluations = Mapping[str, Mapping[str, Counts]]
"""By hospital and model: a candidate's name, or SINGLE and the name of the hospital whose own model it is."""


@dataclass(frozen=True)
class Result:
    """How well a model did on some images, as shares of 1."""

    images: int
    accuracy: float
    balanced_accuracy: float


@dataclass(frozen=True)
class Score:
    """A model's result on everybody's validation images together, and on each hospital's."""

    name: str
    all: Result
    hospitals: Mapping[str, Result]


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why.

    Attributes:
        chosen: name of a candidate.
        validated: whether enough hospitals evaluated it.
        reason: why it, as a sentence.
        margin: of error of the best candidate's balanced accuracy, as a share of 1; 0 where nothing was evaluated.
        hospitals: who evaluated, sorted.
        scores: of the candidates, in the order given.
        singles: of the hospitals' own models.
        worse_than: the hospital whose own model is better than the chosen candidate in accuracy or in balanced
            accuracy; empty where there is none, or the hospitals' own models were not evaluated.
    """

    chosen: str
    validated: bool
    reason: str
    margin: float = 0.0
    hospitals: tuple[str, ...] = ()
    scores: tuple[Score, ...] = ()
    singles: tuple[Score, ...] = ()
    worse_than: str = ""


def choose_candidate(
    evaluations: Evaluations, candidates: Sequence[str], singles: Sequence[str], *, fallback: str, needed: int
) -> Choice:
    """Chooses by balanced accuracy of the summed counts: the first candidate within the margin of error of the best.

    Args:
        candidates: names in the order of preference.
        singles: names of the hospitals' own models; may be empty.
        fallback: the candidate where fewer than `needed` (and FEWEST) hospitals have evaluated every model.
    """
    models = [*candidates, *singles]
    complete = sorted(name for name, counts in evaluations.items() if _complete(counts, models))
    needed = max(needed, FEWEST)
    if len(complete) < needed:
        reason = f"unvalidated: {len(complete)} of {needed} hospitals evaluated the candidates, so it is {fallback}"
        return Choice(fallback, False, reason)
    totals = {model: total([evaluations[name][model] for name in complete]) for model in models}
    results = {model: _result(counts.confusion) for model, counts in totals.items()}
    best = max(candidates, key=lambda name: results[name].balanced_accuracy)
    margin = MARGIN * standard_error(totals[best].confusion)
    limit = results[best].balanced_accuracy - margin
    chosen = next(name for name in candidates if name == best or results[name].balanced_accuracy >= limit)

    def score(model: str) -> Score:
        each = {name: _result(evaluations[name][model].confusion) for name in complete}
        return Score(model, results[model], each)

    return Choice(
        chosen=chosen,
        validated=True,
        reason=_reason(chosen, best, results, margin, len(complete)),
        margin=margin,
        hospitals=tuple(complete),
        scores=tuple(score(model) for model in candidates),
        singles=tuple(score(model) for model in singles),
        worse_than=_better_single(results[chosen], {name: results[name] for name in singles}),
    )


def total(counts: Iterable[Counts]) -> Counts:
    """What several hospitals found for one model, together."""
    every = list(counts)
    return Counts(np.sum([each.confusion for each in every], axis=0), np.sum([each.bins for each in every], axis=0))


def standard_error(confusion: Confusion) -> float:
    """Of a balanced accuracy: binomial in each class, with two more images right and two wrong (Agresti and Coull)."""
    support = confusion.sum(axis=1)
    present = support > 0
    images = support[present] + 4
    shares = (np.diag(confusion)[present] + 2) / images
    return float(math.sqrt((shares * (1 - shares) / images).sum()) / max(present.sum(), 1))


def _complete(counts: Mapping[str, Counts], models: Sequence[str]) -> bool:
    return all(model in counts and counts[model].images for model in models)


def _result(confusion: Confusion) -> Result:
    return Result(int(confusion.sum()), accuracy(confusion), balanced_accuracy(confusion))


def _reason(chosen: str, best: str, results: Mapping[str, Result], margin: float, hospitals: int) -> str:
    first = f"{chosen} has a balanced accuracy of {results[chosen].balanced_accuracy:.1%}"
    where = f"on {results[chosen].images} validation images of {hospitals} hospitals"
    if chosen == best:
        return f"{first} {where}, the highest of {sum(not name.startswith(SINGLE) for name in results)} candidates"
    return (
        f"{first} {where}, within the margin of error ({margin:.1%}) of the highest "
        f"({best}: {results[best].balanced_accuracy:.1%}), and comes first in the list"
    )


def _better_single(chosen: Result, singles: Mapping[str, Result]) -> str:
    better = [
        name
        for name, result in singles.items()
        if result.balanced_accuracy > chosen.balanced_accuracy or result.accuracy > chosen.accuracy
    ]
    best = max(better, key=lambda name: (singles[name].balanced_accuracy, name), default="")
    return best.removeprefix(SINGLE)
