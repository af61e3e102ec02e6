"""One stage of a version's work, in a process of its own: `python -m aggregator.job STORE VERSION STAGE`.

merge    adds the vectors to the pretrained weights, in every way that is to be tried; needs no torch
restore  makes the models that hospitals evaluate; needs no torch
release  restores the BatchNorm statistics of the chosen one, and exports the release

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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aggregator.reconcile import EXIT_PASSING
from aggregator.resources import CalibrationMode, HeadMode, ModelVersion, VersionInput, utc_now
from aggregator.store import Store, Visit
from datavector.choice import HEAD, SINGLE, total
from datavector.console import listed
from datavector.errors import DataVectorError, DiskFull, WrongDigest
from datavector.files import disk_full_at, sha256_file
from datavector.layout import FloatArray, TensorFile
from datavector.merge import MergeInput, Share, gram_matrix, merge_vectors
from datavector.merge.batchnorm import Moments, pool_layers, uploaded
from datavector.merge.batchnorm import restore as restored_statistics
from datavector.merge.cohort import cosines
from datavector.merge.head import pool_features, solvable, solve_head
from datavector.merge.outliers import inspect_vectors
from datavector.merge.restored import write_restored, write_tuned
from datavector.model import BaseModel

INDEX = "JOB_COMPLETION_INDEX"  # Kubernetes sets it in the Pods of an Indexed Job
LONGEST_MESSAGE = 4000  # characters; Kubernetes takes 4096 bytes of a termination message


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m aggregator.job", description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("version")
    parser.add_argument("stage", choices=("merge", "restore", "release"))
    parser.add_argument("--termination-log", type=Path, help="file for the report or the reason of a failure")
    parser.add_argument("--end-with-parent", action="store_true", help="end when standard input is closed")
    parser.add_argument("--share-of", type=int, default=1, help="processes that share the merge, told apart by INDEX")
    arguments = parser.parse_args()
    share = Share(int(os.environ[INDEX]), arguments.share_of) if arguments.share_of > 1 else None
    if arguments.end_with_parent:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    code, said = 0, "done"
    try:
        said = json.dumps(run_stage(Store(arguments.store), arguments.version, arguments.stage, share))
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


def run_stage(store: Store, name: str, stage: str, share: Share | None = None) -> dict[str, Any]:
    """Runs a stage and leaves its report, which it returns, in the store. A stage that has finished is not run again.

    Args:
        share: of a merge, where several processes share it; the last of them to end leaves the report.
    Raises:
        DataVectorError: an input is missing or altered, the disk is full, or the release does not verify.
    """
    if (finished := store.report(name, stage)) is not None:
        return finished
    if share is None:  # else the others' files are no leftovers
        store.remove_leftovers(name)
    version = ModelVersion.parse(store.read_version(name))
    base = store.base(version.spec.base_model_ref)
    with disk_full_at(store.root):
        stages: dict[str, Callable[[Store, ModelVersion, BaseModel], dict[str, Any]]] = {
            "merge": partial(merge, share=share),
            "restore": restore,
            "release": release,
        }
        report = stages[stage](store, version, base)
    if report:
        store.write_report(name, stage, report)
    return report


def merge(store: Store, version: ModelVersion, base: BaseModel, share: Share | None = None) -> dict[str, Any]:
    """theta_pre + the merged vectors, with the pretrained BatchNorm statistics, in every way that is to be tried.

    Returns:
        The report; nothing while other shares are not done.
    """
    inputs = [_input(store, version, entry) for entry in version.spec.inputs]
    outputs = {body: store.merged(version.name, body) for body in version.bodies}
    for body, candidate in version.bodies.items():
        if share is None or not outputs[body].is_file():
            merge_vectors(base, inputs, candidate.name, candidate.parameters, outputs[body], share=share)
    if not all(output.is_file() for output in outputs.values()):
        return {}
    weights = {body: sha256_file(output) for body, output in outputs.items()}
    gram = gram_matrix(base, inputs)
    inspections = inspect_vectors(base, inputs, gram)
    outliers = {
        entry.data_vector: found.reason
        for entry, found in zip(version.spec.inputs, inspections, strict=True)
        if found.reason
    }
    return {
        "weights_sha256": next(iter(weights.values())),
        "weights": weights,
        "outliers": outliers,
        "statistics": {entry.data_vector: _statistics(store, version, entry) for entry in version.spec.inputs},
        "cohort": _cohort(version, gram),
    }


def restore(store: Store, version: ModelVersion, base: BaseModel) -> dict[str, Any]:
    """Every model that hospitals shall evaluate: the candidates, and the hospitals' own."""
    _, visits = calibrate(store, version, base)
    names = []
    for body in version.bodies:
        for name, replaced in candidates_of(store, version, base, body, visits).items():
            write_restored(store.restored(version.name, name), base, store.merged(version.name, body), replaced)
            names.append(name)
    if version.singles:
        for entry in version.spec.inputs:
            output = store.restored(version.name, f"{SINGLE}{entry.hospital}")
            write_tuned(output, base, store.blob(entry.hospital, entry.digest))
    return {"candidates": names}


def release(store: Store, version: ModelVersion, base: BaseModel) -> dict[str, Any]:
    """Restores the chosen candidate and writes the release."""
    from datavector.networks import build, load_file
    from datavector.release import Lineage, write_release

    status, spec = version.status, version.spec
    calibration, visits = calibrate(store, version, base)
    body = status.evaluation.chosen.removesuffix(HEAD) if status.evaluation else next(iter(version.bodies))
    candidates = candidates_of(store, version, base, body, visits)
    chosen = status.evaluation.chosen if status.evaluation else next(iter(candidates))
    head = head_report(version, base, chosen, visits)
    calibrated = store.version(version.name) / "calibrated.safetensors"
    write_restored(calibrated, base, store.merged(version.name, body), candidates[chosen])
    network = build(base)
    load_file(network, calibrated, base.layout)
    merged = store.report(version.name, "merge") or {}
    candidate, weights = version.bodies[body], merged["weights"][body]
    lineage = Lineage(
        version=version.name,
        created=utc_now().isoformat(timespec="seconds"),
        inputs=[
            entry.model_dump(mode="json", by_alias=True) | {"statistics": merged["statistics"][entry.data_vector]}
            for entry in spec.inputs
        ],
        inputs_hash=spec.inputs_hash,
        method=candidate.name,
        parameters=candidate.parameters,
        calibration=calibration,
        evaluation=_evaluation(store, version),
        weights_sha256=weights,
        calibrated_sha256=sha256_file(calibrated),
        head=head,
        cohort=merged.get("cohort", {}),
    )
    folder = write_release(
        store.release(version.name), network=network, base=base, lineage=lineage, opset=spec.export.opset
    )
    store.erase_restored(version.name)
    return {
        "calibration": calibration,
        "head": head,
        "weights_sha256": weights,
        "release_sha256": sha256_file(folder / "SHA256SUMS"),
    }


def _input(store: Store, version: ModelVersion, entry: VersionInput) -> MergeInput:
    """A vector and what the version's method reads beside it, each checked against the digest that it was stored by.

    Raises:
        WrongDigest: a file is missing or altered.
    """
    vector = store.blob(entry.hospital, entry.digest)
    _demand(vector, entry.digest, f"vector {entry.data_vector}", "let the hospital train and send a new one")
    statistics = {}
    for kind, digest in _statistics(store, version, entry).items():
        statistics[kind] = store.statistics_file(entry.hospital, entry.digest, kind, digest)
        what = f"file of {kind} statistics of {entry.data_vector}"
        _demand(statistics[kind], digest, what, "remove it, and the hospital is asked again")
    return MergeInput(vector, entry.digest, entry.sample_count, statistics)


def _statistics(store: Store, version: ModelVersion, entry: VersionInput) -> dict[str, str]:
    """Digests, by kind, of what was sent beside a vector and the version's method reads."""
    found = store.statistics(entry.hospital, entry.digest)
    return {kind: found[kind] for kind in sorted(found) if kind in version.spec.method.statistics}


def _demand(path: Path, digest: str, what: str, remedy: str) -> None:
    if not path.is_file() or f"sha256:{sha256_file(path)}" != digest:
        raise WrongDigest(f"the stored {what} is missing or altered", remedy=f"restore the store's volume, or {remedy}")


def _cohort(version: ModelVersion, gram: NDArray[np.float64]) -> dict[str, Any]:
    """Norms and cosines of the vectors, sorted by hospital."""
    hospitals = [entry.hospital for entry in version.spec.inputs]
    order = sorted(range(len(hospitals)), key=hospitals.__getitem__)
    ordered = gram[np.ix_(order, order)]
    norms = np.sqrt(np.diag(ordered))
    return {
        "hospitals": [hospitals[index] for index in order],
        "norms": [float(f"{norm:.6g}") for norm in norms],
        "cosine": [[round(float(value), 4) for value in row] for row in cosines(ordered)],
    }


def candidates_of(
    store: Store, version: ModelVersion, base: BaseModel, body: str, visits: list[Visit]
) -> dict[str, dict[str, FloatArray]]:
    """The candidates of one merge, the preferred first: by name the tensors that take the places of merged ones.

    Args:
        visits: those that count, as `calibrate` gives them.
    """
    statistics = restored_statistics(moments_of(store, version, base, body, visits))
    solved = _solved_head(store, version, base, body, visits)
    if solved is None:
        return {body: statistics}
    found = {f"{body}{HEAD}": statistics | solved}
    return found if version.spec.head.mode is HeadMode.CLOSED_FORM else found | {body: statistics}


def calibrate(store: Store, version: ModelVersion, base: BaseModel) -> tuple[dict[str, Any], list[Visit]]:
    """Which BatchNorm statistics a version gets, and from whom.

    Returns:
        What the release says of it (mode, hospitals, images, note), and the visits that count; none of them where the
        statistics are other ones.
    """
    wanted = version.spec.calibration.mode
    visits = [visit for visit in store.visits(version.name) if visit.hospital in version.hospitals]
    needed = version.status.quorum
    enough = wanted in (CalibrationMode.VISIT, CalibrationMode.MEETING) and 0 < len(visits) >= needed
    if not base.batchnorm_layers:
        note = "this model has no BatchNorm"
        return {"mode": "none", "hospitals": [], "images": 0, "note": note}, visits if enough else []
    if wanted is CalibrationMode.NONE:
        return {"mode": "none", "hospitals": [], "images": 0, "note": "pretrained statistics, as the policy says"}, []
    if enough:
        return _described(wanted, visits), visits
    note = "as the policy says"
    if wanted is not CalibrationMode.UPLOADED:
        note = f"last resort: {len(visits)} of {needed} hospitals took part in a {wanted.value} before the deadline"
    images = sum(each.sample_count for each in version.spec.inputs)
    return {"mode": "uploaded", "hospitals": list(version.hospitals), "images": images, "note": note}, []


def moments_of(
    store: Store, version: ModelVersion, base: BaseModel, body: str, visits: list[Visit]
) -> dict[str, Moments]:
    """The BatchNorm moments of one merge: of the visits that count, or those uploaded with the vectors."""
    if not base.batchnorm_layers or version.spec.calibration.mode is CalibrationMode.NONE:
        return {}
    if visits:
        return pool_layers([visit.of(body) for visit in visits])
    inputs = version.spec.inputs
    return pool_layers([uploaded(base, store.blob(each.hospital, each.digest), each.sample_count) for each in inputs])


def _solved_head(
    store: Store, version: ModelVersion, base: BaseModel, body: str, visits: list[Visit]
) -> dict[str, FloatArray] | None:
    """The closed-form head's tensors, or None where there is none."""
    given = [visit.features[body] for visit in visits if body in visit.features]
    if version.spec.head.mode is HeadMode.MERGED or not base.head or not given:
        return None
    pooled = pool_features(given)
    if not solvable(pooled):
        return None
    names = f"{base.head}.weight", f"{base.head}.bias"
    with TensorFile(store.merged(version.name, body), base.layout) as merged:
        head = [merged.read(name) for name in names]
    return dict(zip(names, solve_head(pooled, *head, strength=version.spec.head.strength), strict=True))


def head_report(version: ModelVersion, base: BaseModel, chosen: str, visits: list[Visit]) -> dict[str, Any]:
    """What the release says of the chosen candidate's head."""
    given = [visit for visit in visits if visit.features]
    if chosen.endswith(HEAD):
        hospitals = [visit.hospital for visit in given]
        counts = np.sum([visit.features[chosen.removesuffix(HEAD)].counts for visit in given], axis=0)
        without = [base.classes[index] for index in np.flatnonzero(counts == 0)]
        note = f"as merged for {listed(without)}, of which nobody gave features" if without else ""
        return {"kind": "closed-form", "hospitals": hospitals, "images": int(counts.sum()), "note": note}
    if version.spec.head.mode is HeadMode.MERGED:
        note = "as the policy says"
    elif version.status.evaluation:
        note = "chosen among the candidates"
    elif not base.head:
        note = "this model's head is no linear layer"
    elif not given:
        note = "no visitor gave features"
    else:
        note = f"fewer than two classes have {version.spec.head.floor} images or more at any one hospital"
    return {"kind": "merged", "hospitals": [], "images": 0, "note": note}


def _evaluation(store: Store, version: ModelVersion) -> dict[str, Any]:
    """What the release says of the evaluation; empty where nobody evaluated."""
    report = version.status.evaluation
    if report is None:
        return {}
    content = report.model_dump(mode="json", by_alias=True)
    if report.validated:
        found = store.evaluations(version.name)
        counts = total(found[hospital][report.chosen] for hospital in report.hospitals)
        content |= {"confusion": counts.confusion.tolist(), "bins": counts.bins.tolist()}
    return content


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
