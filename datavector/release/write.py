"""Writes a release: whole or not at all, and the same bytes for the same inputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datavector.errors import ReleaseError
from datavector.files import disk_full_at, fsync, write_json
from datavector.model import BaseModel
from datavector.release.card import model_card, triton_config
from datavector.release.checksums import SUMS, compare_sums, write_sums
from datavector.release.lineage import Lineage, describe, model_metadata
from datavector.release.report import report_page

if TYPE_CHECKING:
    from torch import nn

    from datavector.release.probes import Parity

DESCRIPTION, CARD, LABELS, CONFIG, PROBES = "release.json", "MODEL_CARD.md", "labels.txt", "config.pbtxt", "probes.npz"
REPORT = "report.html"
OPSET = 20


def write_release(
    output: Path,
    *,
    network: nn.Module,
    base: BaseModel,
    lineage: Lineage,
    opset: int = OPSET,
) -> Path:
    """Exports a network as a release folder.

    Everything is written into a folder beside `output` that takes its place at the end. A complete release of the
    same version that is already there is left as it is; what a killed run left behind is replaced.

    Args:
        output: the folder to make.
        network: the merged and calibrated network, on the CPU; it is switched to eval mode and not changed otherwise.
        base: the base model that it came from, for the classes and the input.
        opset: of the ONNX file, 18 or more.
    Returns:
        `output`.
    Raises:
        ReleaseError: the network cannot be exported, its logits do not depend on the image or are not finite, ONNX
            Runtime answers otherwise than torch, or `output` holds something else.
        DiskFull: no space is left.
    """
    if _is_done(output, lineage):
        return output
    _demand_one_line(base.classes)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with disk_full_at(output):
        try:
            _fill(partial, network, base, lineage, opset)
            _make_durable(partial)
            partial.rename(output)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        fsync(output.parent)
    return output


def _fill(folder: Path, network: nn.Module, base: BaseModel, lineage: Lineage, opset: int) -> None:
    """Writes all files of a release."""
    from datavector.release.export import Served, export_onnx, save_onnx, torch_logits  # torch takes seconds to import
    from datavector.release.probes import compare, draw_probes, save_probes
    from datavector.release.runtime import MODEL, onnx_logits, open_session

    model_path = folder / MODEL
    model_path.parent.mkdir(parents=True)
    served = Served(network, base.input).eval()
    probes = draw_probes()
    expected = torch_logits(served, probes)
    _demand_sound(compare(expected, expected))  # before the slow part

    model = export_onnx(served, opset=opset)
    description = describe(lineage, base, opset=opset, parity={})
    save_onnx(model, model_path, model_metadata(description))
    parity = compare(expected, onnx_logits(open_session(folder, gpu=False), probes))
    _demand_sound(parity)
    description["parity"] = {
        "max_abs_difference": parity.max_abs_difference,
        "logit_spread": parity.logit_spread,
    }
    save_probes(folder / PROBES, probes, expected)
    write_json(folder / DESCRIPTION, description)
    (folder / LABELS).write_text("".join(f"{label}\n" for label in base.classes), encoding="utf-8")
    (folder / CONFIG).write_text(triton_config(len(base.classes)), encoding="utf-8")
    (folder / CARD).write_text(model_card(description), encoding="utf-8")
    (folder / REPORT).write_text(report_page(description), encoding="utf-8")
    write_sums(folder)


def _demand_sound(parity: Parity) -> None:
    if not parity.spread_ok:
        raise ReleaseError(
            f"the network's logits hardly depend on the image (standard deviation {parity.logit_spread:.1e})",
            remedy="check the merge and its BatchNorm calibration: fine-tuning diverged, or the statistics are wrong",
        )
    if not parity.difference_ok:
        raise ReleaseError(
            f"ONNX Runtime differs from torch by {parity.max_abs_difference:.1e} in a logit, "
            f"more than {parity.allowed:.1e}",
            remedy="restore its BatchNorm statistics (wrong ones amplify rounding), or use another opset",
        )


def _is_done(output: Path, lineage: Lineage) -> bool:
    """Whether `output` is a complete release of this lineage; an absent or empty folder is not."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    remedy = "give a new folder, or remove this one"
    if not (output / SUMS).is_file() or (differences := compare_sums(output)):
        what = f": {differences}" if (output / SUMS).is_file() else ""
        raise ReleaseError(f"{output} exists and is no complete release{what}", remedy=remedy)
    found: dict[str, Any] = json.loads((output / DESCRIPTION).read_text(encoding="utf-8"))
    if (found.get("version"), found.get("calibrated_sha256")) != (lineage.version, lineage.calibrated_sha256):
        raise ReleaseError(f"{output} holds another release, {found.get('version')}", remedy=remedy)
    return True


def _demand_one_line(classes: tuple[str, ...]) -> None:
    for label in classes:
        if label.splitlines() != [label]:
            raise ReleaseError(
                f"the class {label!r} does not fit on one line of {LABELS}",
                remedy="create the base model with class names of one line",
            )


def _make_durable(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        fsync(path)
    fsync(folder)
