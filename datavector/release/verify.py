"""Checks a release where it lies: that it is complete, says one thing everywhere, and answers as torch did.

Needs onnx and onnxruntime, not torch; onnx is imported late, since those who only predict may not have it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime

from datavector.errors import ReleaseError
from datavector.release.checksums import compare_sums
from datavector.release.lineage import FORMAT, model_metadata
from datavector.release.probes import Parity, compare, load_probes
from datavector.release.report import version_on
from datavector.release.runtime import MODEL, onnx_logits, open_session
from datavector.release.write import DESCRIPTION, LABELS, PROBES, REPORT


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: a word or two.
        ok: whether it is as it should be.
        detail: what was found; if not `ok`, what is wrong.
    """

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class VerificationReport:
    """What `verify_release` found. Checks that need sound files are left out where the files are not."""

    path: Path
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)


def verify_release(path: Path) -> VerificationReport:
    """Checks a release folder.

    First that every file is there and has its SHA-256; a model that was altered is not even loaded.

    Raises:
        ReleaseError: `path` is not the folder of a release.
    """
    differences = compare_sums(path)
    files = Check("files", not differences, str(differences) or "every file has its SHA-256")
    if not files.ok:
        return VerificationReport(path, (files,))
    return VerificationReport(path, (files, *(_run(name, check, path) for name, check in _CHECKS.items())))


class _Wrong(Exception):
    """A check failed; the text says why."""


def _run(name: str, check: Callable[[Path], str], path: Path) -> Check:
    try:
        return Check(name, True, check(path))
    except (_Wrong, ReleaseError) as wrong:
        return Check(name, False, str(wrong))
    except Exception as error:  # parsers of files that only look like what they should be raise nearly anything
        return Check(name, False, f"{type(error).__name__}: {error}")


def _description(path: Path) -> dict[str, Any]:
    description: dict[str, Any] = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
    if description.get("format") != FORMAT:
        raise _Wrong(
            f"{DESCRIPTION} has the format {description.get('format')!r}, not {FORMAT!r}: verify it with the version "
            "of datavector that made it"
        )
    return description


def _session(path: Path) -> onnxruntime.InferenceSession:
    return open_session(path, gpu=False)


def _check_onnx(path: Path) -> str:
    import onnx

    onnx.checker.check_model(str(path / MODEL), full_check=True)
    return "a valid model"


def _check_opset(path: Path) -> str:
    import onnx

    opsets = {entry.domain: entry.version for entry in onnx.load(path / MODEL).opset_import}
    wanted = {"": _description(path)["opset"]}
    if opsets != wanted:
        raise _Wrong(f"the model uses {opsets}, {DESCRIPTION} says {wanted}")
    return f"opset {wanted['']}, standard operators only"


def _check_metadata(path: Path) -> str:
    found, wanted = _session(path).get_modelmeta().custom_metadata_map, model_metadata(_description(path))
    wrong = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if wrong:
        raise _Wrong(f"the model and {DESCRIPTION} differ in {', '.join(wrong)}")
    return f"the model says what {DESCRIPTION} says"


def _check_labels(path: Path) -> str:
    session = _session(path)
    labels = {
        DESCRIPTION: _description(path)["classes"],
        LABELS: (path / LABELS).read_text(encoding="utf-8").splitlines(),
        MODEL: json.loads(session.get_modelmeta().custom_metadata_map["labels"]),
    }
    if len({tuple(names) for names in labels.values()}) != 1:
        raise _Wrong("; ".join(f"{place} says {names}" for place, names in labels.items()))
    widths = {output.name: output.shape[-1] for output in session.get_outputs()}
    if set(widths.values()) != {len(labels[LABELS])}:
        raise _Wrong(f"{len(labels[LABELS])} labels, but the outputs have {widths} columns")
    return f"{len(labels[LABELS])} labels, everywhere the same"


def _check_report(path: Path) -> str:
    if not (path / REPORT).is_file():
        raise _Wrong(f"there is no {REPORT}")
    found, wanted = version_on((path / REPORT).read_text(encoding="utf-8")), _description(path)["version"]
    if found != wanted:
        raise _Wrong(f"{REPORT} is of the version {found!r}, {DESCRIPTION} of {wanted!r}")
    return f"{REPORT} is of this version"


def _check_interface(path: Path) -> str:
    session = _session(path)
    found = {value.name: (value.type, value.shape) for value in (*session.get_inputs(), *session.get_outputs())}
    if set(found) != {"images", "logits", "probabilities"}:
        raise _Wrong(f"inputs and outputs are {', '.join(found)}")
    kind, shape = found["images"]
    fixed = [size for size in shape[:-1] if not isinstance(size, str)]
    if kind != "tensor(uint8)" or len(shape) != 4 or shape[-1] != 3 or fixed:
        raise _Wrong(f"images is {kind} {shape}, not uint8 with open batch, height and width and 3 channels")
    for name in ("logits", "probabilities"):
        kind, shape = found[name]
        if kind != "tensor(float)" or len(shape) != 2 or not isinstance(shape[0], str):
            raise _Wrong(f"{name} is {kind} {shape}, not float with an open batch")
    return "uint8 images of any number and size in, float logits and probabilities out"


def _measure(path: Path) -> Parity:
    images, logits = load_probes(path / PROBES)
    return compare(logits, onnx_logits(_session(path), images))


def _check_spread(path: Path) -> str:
    parity = _measure(path)
    if not parity.spread_ok:
        raise _Wrong(f"the stored logits hardly depend on the image (standard deviation {parity.logit_spread:.1e})")
    return f"logits depend on the image (standard deviation {parity.logit_spread:.2g} at least)"


def _check_parity(path: Path) -> str:
    parity = _measure(path)
    if not parity.difference_ok:
        raise _Wrong(
            f"ONNX Runtime differs from torch by {parity.max_abs_difference:.1e} in a logit, "
            f"more than {parity.allowed:.1e}"
        )
    return f"ONNX Runtime differs from torch by {parity.max_abs_difference:.1e} in a logit at most"


_CHECKS: dict[str, Callable[[Path], str]] = {
    "onnx": _check_onnx,
    "opset": _check_opset,
    "metadata": _check_metadata,
    "labels": _check_labels,
    "report": _check_report,
    "interface": _check_interface,
    "spread": _check_spread,
    "parity": _check_parity,
}
