"""Evaluations: which versions want their candidates judged, by whom, and what the hospitals found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from aggregator.calibration import not_waiting
from aggregator.registry import Registry
from aggregator.resources import ModelVersion, Phase
from aggregator.store import Store
from datavector.choice import Counts
from datavector.errors import ProtocolError

TASK = "evaluate"


@dataclass(frozen=True)
class OpenEvaluation:
    """A version whose models wait to be evaluated.

    Attributes:
        models: names of the candidates and of the hospitals' own models.
    """

    version: str
    base_digest: str
    models: tuple[str, ...]
    hospitals: tuple[str, ...]

    @property
    def id(self) -> str:
        return f"{self.version}.{TASK}"


class OpenEvaluations:
    """The open evaluations: those of versions that are Evaluating, under a policy that is there.

    Args:
        wake: called after every stored evaluation.
    """

    def __init__(self, store: Store, registry: Registry, wake: Callable[[], None]) -> None:
        self._store = store
        self._registry = registry
        self._wake = wake

    def offers(self, hospital: str) -> Iterator[OpenEvaluation]:
        """What waits for a hospital: each version once."""
        for evaluation in self._open():
            if hospital in evaluation.hospitals and hospital not in self._store.evaluators(evaluation.version):
                yield evaluation

    def find(self, hospital: str, task_id: str) -> OpenEvaluation:
        """The evaluation of that name, whether the hospital has done it or not.

        Raises:
            NotFound: it is not wanted (any more), or not of this hospital.
        """
        for evaluation in self._open():
            if evaluation.id == task_id and hospital in evaluation.hospitals:
                return evaluation
        raise not_waiting(hospital, task_id)

    def complete(self, hospital: str, evaluation: OpenEvaluation, counts: Mapping[str, Counts]) -> str:
        """Stores what a hospital found; what it told before stays as it is, since the answer may have got lost.

        Returns:
            What the evaluation still waits for, as a sentence.
        Raises:
            ProtocolError: a model is missing, or the models were evaluated on different images, or on none.
        """
        found = self._store.evaluators(evaluation.version)
        if hospital not in found:
            images = {each.images for each in counts.values()}
            if set(counts) != set(evaluation.models) or len(images) != 1 or images == {0}:
                raise ProtocolError(
                    "an evaluation is of all models of its task, and on the same images",
                    remedy="run the task again",
                )
            self._store.save_evaluation(evaluation.version, hospital, counts)
            self._wake()
        missing = sorted(set(evaluation.hospitals) - set(found) - {hospital})
        return f"waiting for {', '.join(missing)}" if missing else "complete"

    def _open(self) -> Iterator[OpenEvaluation]:
        policies = {policy.name for policy in self._registry.policies()}
        for version in self._registry.versions():
            if version.spec.policy_ref in policies and version.status.phase is Phase.EVALUATING:
                yield _opened(version)


def _opened(version: ModelVersion) -> OpenEvaluation:
    models = (*version.status.candidates, *version.singles)
    return OpenEvaluation(version.name, version.spec.base_model_ref, models, version.hospitals)
