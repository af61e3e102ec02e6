"""The texts of a release: its model card, its labels and Triton's configuration, all from `release.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datavector.release.scores import best_single, cells, columns, listed_singles, model_name, notes

MAX_BATCH = 32  # images of one shape that Triton puts together


def triton_config(classes: int) -> str:
    """`config.pbtxt`; Triton takes the model's name from the folder's."""
    return f"""\
backend: "onnxruntime"
default_model_filename: "model.onnx"
max_batch_size: {MAX_BATCH}
input [
  {{
    name: "images"
    data_type: TYPE_UINT8
    dims: [ -1, -1, 3 ]
  }}
]
output [
  {{
    name: "logits"
    data_type: TYPE_FP32
    dims: [ {classes} ]
    label_filename: "labels.txt"
  }},
  {{
    name: "probabilities"
    data_type: TYPE_FP32
    dims: [ {classes} ]
    label_filename: "labels.txt"
  }}
]
dynamic_batching {{ }}
"""


def model_card(release: Mapping[str, Any]) -> str:
    """`MODEL_CARD.md`, after "Model Cards for Model Reporting" (arXiv 1810.03993)."""
    base, size = release["base"], release["input"]["size"]
    classes = ", ".join(_escape(label) for label in release["classes"])
    parity = release["parity"]
    return f"""\
# {_escape(release["version"])}

An image classifier for {len(release["classes"])} classes: {classes}. Made on {release["created"]} by merging
what the hospitals below learnt, each on its own images, from one base model: {_escape(base["name"])}
({_escape(base["architecture"])}), digest `{base["digest"]}`.
Each hospital sent the difference between its fine-tuned and the base model's weights, not its images.

## Hospitals

| hospital | training images | data vector |
|---|---|---|
{_hospitals(release)}

Merge method: {_method(release["method"])} (data vectors: arXiv 2408.13038).

BatchNorm calibration: {_calibration(release["calibration"])}

Classification head: {_head(release["head"])}

## Evaluation

{_evaluation(release["evaluation"])}

## Use

Input `images`: uint8, shape (batch, height, width, 3), RGB, upright, any height and width; images of one batch
share them. A file's EXIF orientation is the client's to apply.
The graph squashes them to {size} x {size} pixels (antialiased bilinear), normalises them and runs the network. Outputs
`logits` and `probabilities`: float32, shape (batch, {len(release["classes"])}), columns in the order of `labels.txt`.
Greyscale images are repeated over three channels; scale those of more than 8 bits to 0..255 first.

```python
import json, numpy as np, onnxruntime as ort; from PIL import Image, ImageOps
session = ort.InferenceSession("1/model.onnx")
image = np.asarray(ImageOps.exif_transpose(Image.open("image.png")).convert("RGB"))[None]
probabilities = session.run(["probabilities"], {{"images": image}})[0][0]
labels = json.loads(session.get_modelmeta().custom_metadata_map["labels"])
```

`datavector verify` checks this folder. ONNX (opset {release["opset"]}) and torch differed by at most
{parity["max_abs_difference"]:.1e} in a logit on the images in `probes.npz`, which a program drew.

## Limits

- This is not a medical device. No authority has approved it, and it must not decide about a patient.
- It is for images like those that the hospitals above trained on; on others its answers may be wrong and sure of
  themselves. Probabilities are not calibrated.
- No image is in this folder, but weights carry traces of the images that they were trained on. Nothing here claims that
  the model or its data are anonymous or de-identified.
- A hospital may withdraw. Ask whoever gave you this release whether the version is revoked.
"""


def _hospitals(release: Mapping[str, Any]) -> str:
    return "\n".join(
        f"| {_escape(entry['hospital'])} | {entry['sampleCount']} | `{entry['digest']}` |"
        for entry in release["inputs"]
    )


def _method(method: Mapping[str, Any]) -> str:
    parameters = ", ".join(f"{key} = {value}" for key, value in method["parameters"].items())
    return f"{method['name']} ({parameters})" if parameters else str(method["name"])


def _calibration(calibration: Mapping[str, Any]) -> str:
    note = f"; {calibration['note']}" if calibration["note"] else ""
    if calibration["mode"] == "none":
        return f"none{note}."
    hospitals = ", ".join(_escape(name) for name in calibration["hospitals"])
    return f"`{calibration['mode']}`, by {hospitals}, over {calibration['images']} images{note}."


def _head(head: Mapping[str, Any]) -> str:
    if not head:
        return "as merged."
    who = f", from features of {head['images']} images of {', '.join(map(_escape, head['hospitals']))}"
    note = f"; {_escape(head['note'])}" if head["note"] else ""
    return f"{head['kind']}{who if head['hospitals'] else ''}{note}."


def _evaluation(evaluation: Mapping[str, Any]) -> str:
    if not evaluation:
        return "None: this version is unvalidated. Evaluate it on your own images before any use."
    reason = _escape(evaluation["reason"])
    if not evaluation["validated"]:
        return f"{reason}. Evaluate it on your own images before any use."
    rows = [
        f"| {_escape(model_name(each))}{' (chosen)' if each['name'] == evaluation['chosen'] else ''} "
        f"| {each['balancedAccuracy']:.1%} | {each['accuracy']:.1%} |"
        + "".join(f" {share:.1%} |" for share in cells(each, evaluation))
        for each in [*evaluation["candidates"], *listed_singles(evaluation)]
    ]
    headings = columns(evaluation)
    worse, single = evaluation["worseThan"], best_single(evaluation)
    warning = f"**Worse than the own model of {_escape(worse)}.** " if worse else ""
    beside = (
        ""
        if single is None
        else (f" The best single hospital: {_escape(model_name(single))}, {single['balancedAccuracy']:.1%}.")
    )
    return "\n".join(
        [
            f"{warning}{reason}.{beside} Hospitals evaluated every model on their own validation images;",
            "columns of hospitals are balanced accuracies there:",
            "",
            f"| model | balanced accuracy | accuracy |{''.join(f' {_escape(name)} |' for name in headings)}",
            f"|---|---|---|{'---|' * len(headings)}",
            *rows,
            "",
            *(f"- {note}" for note in notes(evaluation)),
            "",
            "`report.html` shows the same with the confusion matrix and how sure the model is.",
        ]
    )


def _escape(text: str) -> str:
    """Keeps a name from being read as Markdown or HTML, or from ending a line."""
    escaped = "".join(f"\\{letter}" if letter in r"\`*_[]<>|#&" else letter for letter in text)
    return " ".join(escaped.split())
