"""The files of an aggregator: everything that is not an object's text.

    bases/<hex>/                  base model artifacts, content-addressed
    uploads/<hospital>/<hex>/     vectors that are not recorded yet: vector.json (what will be recorded) and part
    blobs/<hospital>/<hex>        committed vectors
    statistics/<hospital>/<hex>.<kind>.<own hex>    what came beside a vector; with .part while it comes
    versions/<version>/           what jobs and hospitals left for a version:
        merged/<body>.safetensors       each way to merge it
        visits/<hospital>.npz           moments and sums of features, of every body
        restored/<model>.safetensors    what hospitals evaluate
        evaluations/<hospital>.json     what they found
        report-<stage>.json             of each finished stage
    releases/<version>/           what clients get
    outbox/<vector>.json          in a cluster: objects that the API does not have yet
    orphans/<mark>                files that no object names, since the mark was made

Every file is written atomically, so receiver and jobs share nothing but this folder, and both survive a kill. Only base
models and releases can be read by other users of the machine.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from aggregator.resources import DataVector
from datavector.choice import Counts
from datavector.errors import BaseModelError, NotFound, StoreMissing
from datavector.files import BLOCK, atomic_write, claim_folder, fsync, remove_leftovers, write_json
from datavector.merge.batchnorm import Moments
from datavector.merge.head import FeatureMoments
from datavector.model import DESCRIPTION, DIGEST, FILES, BaseModel


@dataclass(frozen=True)
class Visit:
    """What a hospital left for a version.

    Attributes:
        images: how many were used.
        rounds: done so far.
        moments: by `<body>/<BatchNorm layer>`.
        features: by body; empty where none were asked for.
    """

    hospital: str
    images: int
    rounds: int
    moments: dict[str, Moments]
    features: dict[str, FeatureMoments] = field(default_factory=dict)

    def of(self, body: str) -> dict[str, Moments]:
        """The moments of one body by BatchNorm layer."""
        prefix = f"{body}/"
        return {name.removeprefix(prefix): moments for name, moments in self.moments.items() if name.startswith(prefix)}


FOLDERS = {
    "bases": 0o755,
    "uploads": 0o700,
    "blobs": 0o700,
    "statistics": 0o700,
    "versions": 0o700,
    "releases": 0o755,
}

_PLAIN = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
PART, RECORD = "part", "vector.json"
WEIGHTS = ".safetensors"


class Store:
    """Paths and atomic operations below one folder.

    Every name that becomes part of a path must be plain, wherever it came from; any other is NotFound.

    Raises:
        UsageError: the folder holds other files.
    """

    def __init__(self, root: Path, *, read_only: bool = False) -> None:
        self.root = root
        if not read_only:
            root.mkdir(parents=True, exist_ok=True)
            claim_folder(root, "aggregator")
            for folder, mode in FOLDERS.items():
                (root / folder).mkdir(mode, exist_ok=True)

    def check(self) -> None:
        """
        Raises:
            StoreMissing: the folder is gone, or another is in its place.
        """
        if not (self.root / ".datavector-aggregator").is_file():
            raise StoreMissing(self.root)

    # --- base models

    def import_base(self, source: Path) -> BaseModel:
        """Copies a base model artifact into the store (or finds it there).

        Raises:
            BaseModelError: the source, or the copy that is already there, is incomplete or altered.
            DiskFull: no space is left.
        """
        base = BaseModel.load(source)
        target = self._base(base.digest)
        target.mkdir(exist_ok=True)
        for name in reversed(FILES):  # the description last: without it there is no base model
            if not (target / name).is_file():
                with atomic_write(target / name) as copy, (source / name).open("rb") as original:
                    shutil.copyfileobj(original, copy, BLOCK)
        fsync(target.parent)
        return BaseModel.load(target, digest=base.digest)

    def bases(self) -> list[BaseModel]:
        """All base models, sorted by digest, by their descriptions; one whose import was cut short is not there yet."""
        return [BaseModel.describe(path.parent) for path in sorted((self.root / "bases").glob(f"*/{DESCRIPTION}"))]

    def base(self, reference: str) -> BaseModel:
        """The base model of that digest or name, verified.

        Raises:
            BaseModelError: none, or several of that name, or it is altered.
        """
        if DIGEST.fullmatch(reference) and self.base_file(reference, DESCRIPTION):
            return BaseModel.load(self._base(reference), digest=reference)
        bases = self.bases()
        found = find_bases(bases, reference)
        if len(found) != 1:
            known = ", ".join(f"{base.name} ({base.digest})" for base in bases) or "none"
            raise BaseModelError(
                f"the store has {len(found)} base models {reference!r}; it has: {known}",
                remedy="import it with `datavector aggregator --base DIR`, or name its digest",
            )
        return BaseModel.load(found[0].path, digest=found[0].digest)

    def base_file(self, digest: str, name: str) -> Path | None:
        path = self._base(digest) / name
        return path if name in FILES and path.is_file() else None

    def _base(self, digest: str) -> Path:
        return self._path("bases", digest.removeprefix("sha256:"))

    # --- vectors

    def upload(self, hospital: str, sha256: str) -> Path:
        """The folder of a vector on its way in."""
        return self._path("uploads", hospital, sha256)

    def uploads(self, hospital: str) -> list[Path]:
        """The folders of a hospital's vectors on their way in, least recently written first."""
        folders = self._path("uploads", hospital).glob("*")
        return sorted(folders, key=lambda folder: (_written_at(folder / PART), folder.name))

    def blob(self, hospital: str, sha256: str) -> Path:
        return self._path("blobs", hospital, sha256.removeprefix("sha256:"))

    def blob_size(self, vector: DataVector) -> int | None:
        """Bytes of a vector's file, or None where there is none."""
        path = self.blob(vector.spec.hospital, vector.spec.artifact.digest)
        return path.stat().st_size if path.is_file() else None

    def statistics(self, hospital: str, digest: str) -> dict[str, str]:
        """What a hospital sent beside the vector of that digest: digests by kind."""
        found = sorted(self._statistics(hospital).glob(f"{digest.removeprefix('sha256:')}.*"))
        names = [path.name.split(".") for path in found if path.suffix != f".{PART}"]
        return {kind: f"sha256:{sha256}" for _, kind, sha256 in names}

    def statistics_file(self, hospital: str, digest: str, kind: str, own: str) -> Path:
        """The file of those statistics, whose own digest is `own`."""
        vector, own = (each.removeprefix("sha256:") for each in (digest, own))
        return self._path("statistics", hospital, f"{vector}.{kind}.{own}")

    def _statistics(self, hospital: str) -> Path:
        return self._path("statistics", hospital)

    # --- versions and their calibration

    def version(self, name: str) -> Path:
        return self._path("versions", name)

    def has_version(self, name: str) -> bool:
        return self.version(name).is_dir() or self.release(name).is_dir()

    def write_version(self, name: str, version: dict[str, Any]) -> None:
        """Leaves a version's object where its jobs read it."""
        write_json(self.version(name) / "version.json", version)

    def read_version(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.version(name) / "version.json").read_text())
        return content

    def merged(self, version: str, body: str) -> Path:
        """The weights of one way to merge a version, before calibration."""
        return self._path("versions", version, "merged", f"{body}{WEIGHTS}")

    def restored(self, version: str, model: str) -> Path:
        """The weights of a candidate or of a hospital's own model, as hospitals evaluate them."""
        return self._path("versions", version, "restored", f"{model}{WEIGHTS}")

    def erase_restored(self, version: str) -> None:
        """Removes the models that hospitals have evaluated: each is as large as the base model."""
        shutil.rmtree(self.version(version) / "restored", ignore_errors=True)

    def release(self, version: str) -> Path:
        return self._path("releases", version)

    def write_report(self, version: str, stage: str, report: dict[str, Any]) -> None:
        write_json(self.version(version) / f"report-{stage}.json", report)

    def report(self, version: str, stage: str) -> dict[str, Any] | None:
        """What a job's stage reported, or None while it has not finished."""
        path = self.version(version) / f"report-{stage}.json"
        if not path.is_file():
            return None
        report: dict[str, Any] = json.loads(path.read_text())
        return report

    def save_visit(self, version: str, visit: Visit) -> None:
        _write_visit(self._path("versions", version, "visits", f"{visit.hospital}.npz"), visit)

    def save_meeting(self, version: str, visits: Iterable[Visit]) -> None:
        """Saves what hospitals left in one meeting: all of it appears at once, in place of whatever was there."""
        partial = self._path("versions", version, "visits.partial")
        shutil.rmtree(partial, ignore_errors=True)
        for visit in visits:
            _write_visit(self._path("versions", version, partial.name, f"{visit.hospital}.npz"), visit)
        target = self.version(version) / "visits"
        if target.is_dir():
            shutil.rmtree(target)
        partial.rename(target)
        fsync(target.parent)

    def visits(self, version: str) -> list[Visit]:
        """Sorted by hospital."""
        return [_visit(path) for path in sorted((self.version(version) / "visits").glob("*.npz"))]

    def rounds(self, version: str) -> dict[str, int]:
        """Visits done, by hospital."""
        rounds = {}
        for path in sorted((self.version(version) / "visits").glob("*.npz")):
            with np.load(path) as arrays:
                rounds[path.stem] = int(arrays["rounds"])
        return rounds

    def save_evaluation(self, version: str, hospital: str, counts: Mapping[str, Counts]) -> None:
        """Leaves what a hospital found, by model."""
        content = {
            name: {"confusion": each.confusion.tolist(), "bins": each.bins.tolist()} for name, each in counts.items()
        }
        write_json(self._path("versions", version, "evaluations", f"{hospital}.json"), content)

    def evaluators(self, version: str) -> list[str]:
        """Hospitals that have evaluated a version, sorted."""
        return sorted(path.stem for path in (self.version(version) / "evaluations").glob("*.json"))

    def evaluations(self, version: str) -> dict[str, dict[str, Counts]]:
        """What hospitals found, by hospital and model."""
        found = {}
        for path in sorted((self.version(version) / "evaluations").glob("*.json")):
            content = json.loads(path.read_text())
            found[path.stem] = {
                name: Counts(np.array(each["confusion"], dtype=np.int64), np.array(each["bins"], dtype=np.float64))
                for name, each in content.items()
            }
        return found

    def erase_version(self, version: str) -> None:
        """Removes a version's weights, moments and release; what one release reveals about a vector goes with it.

        The reports go first: a version that is taken up again after a half-done erasure starts from nothing. Nobody
        ever sees half a release, and the version's folder goes last: as long as it is there, erasing is not done.

        Raises:
            StoreMissing: there is no telling what is there.
        """
        self.check()
        for report in self.version(version).glob("report-*.json"):
            report.unlink()
        release, erased = self.release(version), self._erased(version)
        unfinished = release.with_name(f".{version}.partial")
        if release.is_dir():
            shutil.rmtree(erased, ignore_errors=True)
            release.rename(erased)
        for folder in (unfinished, erased, self.version(version)):
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(folder)
            fsync(folder.parent)

    def remove_leftovers(self, version: str) -> None:
        """Removes what killed jobs and a half-done erasure of a version left; none of them may be running.

        The visits below are the receiver's, who may be writing one.
        """
        folder = self.version(version)
        for jobs in (folder, folder / "merged", folder / "restored"):
            remove_leftovers(jobs, recursive=False)
        for shares in (folder / "merged").glob("*.shares"):
            shutil.rmtree(shares)
        shutil.rmtree(self._erased(version), ignore_errors=True)

    def erase_blob(self, hospital: str, sha256: str) -> None:
        """Removes a vector's file, and the statistics beside it.

        Raises:
            StoreMissing: there is no telling whether it is there.
        """
        self.check()
        folder = self._statistics(hospital)
        for statistics in folder.glob(f"{sha256.removeprefix('sha256:')}.*"):
            statistics.unlink(missing_ok=True)
        if folder.is_dir():
            fsync(folder)
        path = self.blob(hospital, sha256)
        path.unlink(missing_ok=True)
        if path.parent.is_dir():
            fsync(path.parent)

    # --- files without an object

    def blobs(self) -> set[tuple[str, str]]:
        """Hospital and SHA-256 of every vector with files, but those whose object is about to be made."""
        coming = {(path.parent.name, path.name) for path in (self.root / "uploads").glob("*/*")}
        for path in (self.root / "outbox").glob("*.json"):
            with contextlib.suppress(FileNotFoundError):  # the receiver has just sent it
                spec = json.loads(path.read_text())["spec"]
                coming.add((spec["hospital"], spec["artifact"]["digest"].removeprefix("sha256:")))
        vectors = {(path.parent.name, path.name) for path in (self.root / "blobs").glob("*/*")}
        statistics = {(path.parent.name, path.name.split(".")[0]) for path in (self.root / "statistics").glob("*/*")}
        return (vectors | statistics) - coming

    def versions(self) -> set[str]:
        """Names of the versions with files."""
        folders = [*(self.root / "versions").glob("*"), *(self.root / "releases").glob("*")]
        return {folder.name for folder in folders if _PLAIN.fullmatch(folder.name)}

    def mark_orphans(self, names: Collection[str], before: datetime) -> list[str]:
        """Marks what has no object, and takes the marks of the rest away.

        Returns:
            What was marked `before` then, sorted.
        """
        folder = self.root / "orphans"
        folder.mkdir(0o700, exist_ok=True)
        for mark in folder.iterdir():
            if mark.name not in names:
                mark.unlink()
        for name in names:
            if not (folder / name).exists():
                (folder / name).touch()
        return sorted(name for name in names if (folder / name).stat().st_mtime < before.timestamp())

    def unmark_orphan(self, name: str) -> None:
        (self.root / "orphans" / name).unlink(missing_ok=True)

    def _erased(self, version: str) -> Path:
        return self.release(version).with_name(f".{version}.erased")

    def _path(self, *parts: str) -> Path:
        for part in parts:
            if not _PLAIN.fullmatch(part):
                raise NotFound(f"{part!r} is no name in the store", remedy="use a name that the aggregator gave")
        return self.root.joinpath(*parts)


def find_bases(bases: Iterable[BaseModel], reference: str) -> list[BaseModel]:
    """Those of a digest or a name: a reference is clear if there is exactly one."""
    return [base for base in bases if reference in (base.digest, base.name)]


def _written_at(path: Path) -> int:
    return path.stat().st_mtime_ns if path.is_file() else 0


def _write_visit(path: Path, visit: Visit) -> None:
    arrays = {
        f"{kind}:{layer}": getattr(moments, kind)
        for layer, moments in visit.moments.items()
        for kind in ("count", "mean", "variance")
    }
    for body, features in visit.features.items():
        arrays |= {f"{kind}~{body}": getattr(features, kind) for kind in ("counts", "sums", "second")}
    with atomic_write(path) as file:
        np.savez(file, images=visit.images, rounds=visit.rounds, **arrays)


def _visit(path: Path) -> Visit:
    with np.load(path) as arrays:
        layers = [name.removeprefix("count:") for name in arrays.files if name.startswith("count:")]
        moments = {
            layer: Moments(int(arrays[f"count:{layer}"]), arrays[f"mean:{layer}"], arrays[f"variance:{layer}"])
            for layer in layers
        }
        bodies = [name.removeprefix("counts~") for name in arrays.files if name.startswith("counts~")]
        features = {
            body: FeatureMoments(*(arrays[f"{kind}~{body}"] for kind in ("counts", "sums", "second")))
            for body in bodies
        }
        return Visit(path.stem, int(arrays["images"]), int(arrays["rounds"]), moments, features)
