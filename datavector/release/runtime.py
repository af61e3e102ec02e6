"""ONNX Runtime sessions that are quiet where there is no GPU."""

from __future__ import annotations

import contextlib
import ctypes
import io
from collections.abc import Sequence
from pathlib import Path

import onnxruntime

from datavector.errors import ReleaseError
from datavector.release.probes import Images, Logits

MODEL = "1/model.onnx"
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
FATAL = 4  # ONNX Runtime's log severity; its warnings about a missing CUDA library are no news to a client


def open_session(release: Path, *, gpu: bool) -> onnxruntime.InferenceSession:
    """A session for a release's model, on the GPU if one is wanted and works, else on the CPU.

    Raises:
        ReleaseError: there is no model, or ONNX Runtime cannot load it.
    """
    path = release / MODEL
    if not path.is_file():
        raise ReleaseError(f"{path} does not exist", remedy="give the folder of a release")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints when it falls back
            providers = [CUDA, CPU] if gpu and _prepare_cuda() else [CPU]
            return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # its own exceptions have no common base but this
        raise ReleaseError(
            f"ONNX Runtime cannot load {path} ({_first_line(error)})",
            remedy="check it with `datavector verify`, or fetch the release again",
        ) from error


def onnx_logits(session: onnxruntime.InferenceSession, batches: Sequence[Images]) -> list[Logits]:
    """What ONNX Runtime answers: one array of shape (images, classes) for each batch of images of one shape."""
    return [session.run(["logits"], {"images": images})[0] for images in batches]


def _prepare_cuda() -> bool:
    """Whether the driver has a GPU; then also finds the CUDA libraries that came as Python packages."""
    if CUDA not in onnxruntime.get_available_providers():
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        count = ctypes.c_int()
        if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
            return False
    except (OSError, AttributeError):
        return False
    onnxruntime.set_default_logger_severity(FATAL)
    onnxruntime.preload_dlls()
    return True


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
