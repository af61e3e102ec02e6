"""Where a release comes from: what the aggregator knows, and the `release.json` that says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datavector.files import canonical_json
from datavector.model import BaseModel

FORMAT = "datavector-release/2"


@dataclass(frozen=True)
class Lineage:
    """What went into a version.

    Attributes:
        version: its name.
        created: RFC 3339 text; the only time that a release contains.
        inputs: one entry a vector, with the keys of a ModelVersion's inputs: dataVector, hospital, digest, sampleCount,
            and `statistics` where the method read some.
        inputs_hash: the hash that names the version.
        method: name of the merge method.
        parameters: of the method.
        calibration: how BatchNorm statistics were restored: mode, hospitals, images (how many), note.
        evaluation: of the candidates by the hospitals, with the keys of a ModelVersion's evaluation, and where they
            validated it `confusion` and `bins` of the chosen one (datavector.metrics); empty where there was none.
        weights_sha256: of the merged weights, before calibration.
        calibrated_sha256: of the weights that were exported.
        head: where the classification head comes from: kind, hospitals, images, note.
        cohort: how the vectors lie to each other: hospitals, norms, cosine (a matrix).
    """

    version: str
    created: str
    inputs: Sequence[Mapping[str, Any]]
    inputs_hash: str
    method: str
    parameters: Mapping[str, Any]
    calibration: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    weights_sha256: str
    calibrated_sha256: str
    head: Mapping[str, Any] = field(default_factory=dict)
    cohort: Mapping[str, Any] = field(default_factory=dict)


def describe(lineage: Lineage, base: BaseModel, *, opset: int, parity: Mapping[str, float]) -> dict[str, Any]:
    """The content of `release.json`."""
    return {
        "format": FORMAT,
        "version": lineage.version,
        "created": lineage.created,
        "base": {"name": base.name, "digest": base.digest, "architecture": base.architecture},
        "classes": list(base.classes),
        "input": {"size": base.input.size, "mean": list(base.input.mean), "std": list(base.input.std)},
        "inputs": [_input(entry) for entry in lineage.inputs],
        "inputsHash": lineage.inputs_hash,
        "method": {"name": lineage.method, "parameters": dict(lineage.parameters)},
        "calibration": dict(lineage.calibration),
        "head": dict(lineage.head),
        "cohort": dict(lineage.cohort),
        "evaluation": dict(lineage.evaluation),
        "weights_sha256": lineage.weights_sha256,
        "calibrated_sha256": lineage.calibrated_sha256,
        "opset": opset,
        "parity": dict(parity),
    }


def _input(entry: Mapping[str, Any]) -> dict[str, Any]:
    described = {
        "vector": entry["dataVector"],
        "hospital": entry["hospital"],
        "digest": entry["digest"],
        "sampleCount": entry["sampleCount"],
    }
    return described | ({"statistics": dict(entry["statistics"])} if entry.get("statistics") else {})


def model_metadata(description: Mapping[str, Any]) -> dict[str, str]:
    """What the ONNX file itself says, text to text, from the content of `release.json`."""
    return {
        "labels": _json(description["classes"]),
        "version": description["version"],
        "base": description["base"]["digest"],
        "vectors": _json([entry["digest"] for entry in description["inputs"]]),
        "inputs_hash": description["inputsHash"],
        "method": _json(description["method"]),
        "calibration": _json(description["calibration"]),
        "evaluation": _json(_summary(description["evaluation"])),
        "weights_sha256": description["weights_sha256"],
        "calibrated_sha256": description["calibrated_sha256"],
    }


def _summary(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What fits into the model file: whether hospitals validated it, what they chose, and how good it is."""
    if not evaluation:
        return {"validated": False}
    scores = {score["name"]: score["balancedAccuracy"] for score in evaluation["candidates"]}
    summary = {"validated": evaluation["validated"], "chosen": evaluation["chosen"]}
    return summary | {"balancedAccuracy": scores[evaluation["chosen"]]} if evaluation["validated"] else summary


def _json(value: Any) -> str:
    return canonical_json(value).decode()
