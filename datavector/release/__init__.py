"""What inference clients get: an ONNX file that takes raw images, and everything that says where it came from.

A release is one folder, at once a Triton model repository entry and the content of an OCI modelcar:

    config.pbtxt     Triton, onnxruntime backend
    labels.txt       one label a line, in the order of the outputs
    1/model.onnx     uint8 images in, logits and probabilities out
    MODEL_CARD.md    for people
    report.html      how it came about: hospitals, what was tried and what each scored, confusion matrix
    release.json     for machines
    probes.npz       images that a program drew, and what torch answers for them
    SHA256SUMS       of every other file

`write_release` makes one, `verify_release` checks one, `datavector.release.predict` uses one. Importing this package
imports neither torch nor onnx.
"""

from datavector.release.lineage import Lineage
from datavector.release.verify import Check, VerificationReport, verify_release
from datavector.release.write import write_release

__all__ = ["Check", "Lineage", "VerificationReport", "verify_release", "write_release"]
