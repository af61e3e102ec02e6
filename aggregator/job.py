"""One stage of a version's work, in a process of its own: `python -m aggregator.job STORE VERSION STAGE`.

merge    adds the vectors to the pretrained weights; needs no torch
release  restores the BatchNorm statistics and exports the release

A stage reads the store, writes its result atomically and reports last, so a stage that was killed is simply run
again. The last line on stderr says why a stage failed. Exit codes: 0 done, 1 failed, 2 used wrongly, 3 failed for a
reason that may pass by itself, such as a full disk, or crashed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from aggregator.reconcile import EXIT_PASSING
from aggregator.resources import CalibrationMode, ModelVersion, utc_now
from aggregator.store import Store, Visit
from datavector.errors import DataVectorError, DiskFull, WrongDigest
from datavector.files import disk_full_at, sha256_file
from datavector.merge import merge_vectors
from datavector.merge.batchnorm import Moments, pool_layers, restore, uploaded
from datavector.merge.restored import write_restored
from datavector.model import BaseModel

LONGEST_MESSAGE = 4000  # characters; Kubernetes takes 4096 bytes of a termination message


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m aggregator.job", description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("version")
    parser.add_argument("stage", choices=("merge", "release"))
    parser.add_argument("--termination-log", type=Path, help="file for the report or the reason of a failure")
    parser.add_argument("--end-with-parent", action="store_true", help="end when standard input is closed")
    arguments = parser.parse_args()
    if arguments.end_with_parent:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    code, said = 0, "done"
    try:
        said = json.dumps(run_stage(Store(arguments.store), arguments.version, arguments.stage))
    except (DiskFull, OSError, MemoryError) as error:
        code, said = EXIT_PASSING, str(error) or type(error).__name__
    except DataVectorError as error:
        code, said = error.exit_code, str(error)
    except Exception as error:  # a fault of this program: the next version of it, or the next try, may do better
        traceback.print_exc()
        code, said = EXIT_PASSING, f"{type(error).__name__}: {error}".splitlines()[0]
    if code:
        print(said, file=sys.stderr)
    if arguments.termination_log:
        arguments.termination_log.write_text(said[:LONGEST_MESSAGE])
    sys.exit(code)


def run_stage(store: Store, name: str, stage: str) -> dict[str, Any]:
    """Runs a stage and leaves its report, which it returns, in the store. A stage that has finished is not run again.

    Raises:
        DataVectorError: an input is missing or altered, the disk is full, or the release does not verify.
    """
    if (finished := store.report(name, stage)) is not None:
        return finished
    store.remove_leftovers(name)
    version = ModelVersion.parse(store.read_version(name))
    base = store.base(version.spec.base_model_ref)
    work = {"merge": merge, "release": release}[stage]
    with disk_full_at(store.root):
        report = work(store, version, base)
    store.write_report(name, stage, report)
    return report


def merge(store: Store, version: ModelVersion, base: BaseModel) -> dict[str, Any]:
    """theta_pre + the merged vectors, with the pretrained BatchNorm statistics."""
    vectors = [store.blob(entry.hospital, entry.digest) for entry in version.spec.inputs]
    for entry, path in zip(version.spec.inputs, vectors, strict=True):
        if not path.is_file() or f"sha256:{sha256_file(path)}" != entry.digest:
            raise WrongDigest(
                f"the stored vector {entry.data_vector} is missing or altered",
                remedy="restore the store's volume, or let the hospital send it again",
            )
    method = version.spec.method
    merge_vectors(base, vectors, method.name, method.parameters, store.merged(version.name))
    return {"weights_sha256": sha256_file(store.merged(version.name))}


def release(store: Store, version: ModelVersion, base: BaseModel) -> dict[str, Any]:
    """Restores the BatchNorm statistics and writes the release."""
    from datavector.networks import build, load_file
    from datavector.release import Lineage, write_release

    calibration, moments = calibrate(store, version, base)
    calibrated = store.version(version.name) / "calibrated.safetensors"
    write_restored(calibrated, base, store.merged(version.name), restore(moments))
    network = build(base)
    load_file(network, calibrated, base.layout)
    status, spec = version.status, version.spec
    lineage = Lineage(
        version=version.name,
        created=utc_now().isoformat(timespec="seconds"),
        inputs=[entry.model_dump(mode="json", by_alias=True) for entry in spec.inputs],
        inputs_hash=spec.inputs_hash,
        method=spec.method.name,
        parameters=spec.method.parameters,
        calibration=calibration,
        evaluation={},
        weights_sha256=status.weights_sha256,
        calibrated_sha256=sha256_file(calibrated),
    )
    folder = write_release(
        store.release(version.name), network=network, base=base, lineage=lineage, opset=spec.export.opset
    )
    return {"calibration": calibration, "release_sha256": sha256_file(folder / "SHA256SUMS")}


def calibrate(store: Store, version: ModelVersion, base: BaseModel) -> tuple[dict[str, Any], dict[str, Moments]]:
    """Which statistics a version gets, and from whom.

    Returns:
        What the release says of it (mode, hospitals, images, note), and the moments by layer.
    """
    wanted = version.spec.calibration.mode
    if not base.batchnorm_layers:
        return {"mode": "none", "hospitals": [], "images": 0, "note": "this model has no BatchNorm"}, {}
    if wanted is CalibrationMode.NONE:
        return {"mode": "none", "hospitals": [], "images": 0, "note": "pretrained statistics, as the policy says"}, {}
    visits = [visit for visit in store.visits(version.name) if visit.hospital in version.hospitals]
    needed = version.status.quorum
    if wanted is not CalibrationMode.UPLOADED and len(visits) >= needed:
        return _described(wanted, visits), pool_layers([visit.moments for visit in visits])
    note = "as the policy says"
    if wanted is not CalibrationMode.UPLOADED:
        note = f"last resort: {len(visits)} of {needed} hospitals took part in a {wanted.value} before the deadline"
    inputs = version.spec.inputs
    moments = [uploaded(base, store.blob(each.hospital, each.digest), each.sample_count) for each in inputs]
    images = sum(each.sample_count for each in inputs)
    description = {"mode": "uploaded", "hospitals": list(version.hospitals), "images": images, "note": note}
    return description, pool_layers(moments)


def _described(mode: CalibrationMode, visits: list[Visit]) -> dict[str, Any]:
    least, most = (bound(visit.rounds for visit in visits) for bound in (min, max))
    rounds = f"{least}" if least == most else f"{least} to {most}"
    return {
        "mode": mode.value,
        "hospitals": [visit.hospital for visit in visits],
        "images": sum(visit.images for visit in visits),
        "note": f"{rounds} visit(s) a hospital" if mode is CalibrationMode.VISIT else "",
    }


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
