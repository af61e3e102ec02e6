"""What a client does with a release: image files in, one line of JSON each out.

Besides the standard library this needs onnxruntime, numpy and pillow only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from datavector.data.decode import decode
from datavector.errors import DataVectorError, ReleaseError
from datavector.release.runtime import open_session


def predict(release: Path, images: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Classifies image files, on a GPU where there is one.

    Args:
        release: the folder that holds `1/model.onnx`.
    Returns:
        For each image `{"image", "label", "probability", "probabilities": {label: p}, "version"}`; for one that cannot
        be read or classified `{"image", "error"}` instead, and the others go on.
    Raises:
        ReleaseError: at once, if the model cannot be loaded or does not say its labels.
    """
    session = open_session(release, gpu=True)
    labels, version = _identity(session, release)
    return (_classify(session, image, labels, version) for image in images)


def _identity(session: onnxruntime.InferenceSession, release: Path) -> tuple[list[str], str]:
    metadata = session.get_modelmeta().custom_metadata_map
    try:
        return json.loads(metadata["labels"]), metadata["version"]
    except (KeyError, ValueError) as error:
        raise ReleaseError(
            f"the model in {release} does not say its labels and version",
            remedy="give a release that DataVector wrote; check it with `datavector verify`",
        ) from error


def _classify(
    session: onnxruntime.InferenceSession, image: Path, labels: Sequence[str], version: str
) -> dict[str, Any]:
    try:
        probabilities = session.run(["probabilities"], {"images": decode(image)[None]})[0][0].tolist()
    except DataVectorError as error:
        return {"image": str(image), "error": str(error)}
    except Exception as error:  # ONNX Runtime's own, such as too little memory for a huge image
        return {"image": str(image), "error": f"{image} cannot be classified ({type(error).__name__}: {error})"}
    best = max(range(len(labels)), key=probabilities.__getitem__)
    return {
        "image": str(image),
        "label": labels[best],
        "probability": probabilities[best],
        "probabilities": dict(zip(labels, probabilities, strict=True)),
        "version": version,
    }
