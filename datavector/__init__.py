"""DataVector: one-shot, asynchronous merging of fine-tuned classifiers across hospitals."""

import os

# Since 1.29 ONNX Runtime tells its makers of every process that loads it, unless this is set before it is imported:
# https://github.com/microsoft/onnxruntime/blob/main/docs/Privacy.md. From a hospital only what its ledger lists leaves.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
