"""The embedded end-to-end demo: from images to one merged ONNX model, with real processes on this machine alone.

It makes an authority and certificates, starts an aggregator on loopback, runs the hospitals as separate agents, each
gone before the next starts, lets each come back for its visit and to evaluate, and checks and tries the release.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from agent.settings import Data
from agent.train import TrainSettings
from aggregator.main import REGISTRY
from aggregator.registry import SqliteRegistry
from aggregator.resources import AUTO
from datavector.console import progress, say
from datavector.data.images import ImageSet, load_images
from datavector.data.manifest import write_manifest
from datavector.data.records import Record, assign_splits
from datavector.demo import report, sources
from datavector.demo.sites import Sites
from datavector.demo.sources import Source
from datavector.demo.study import Study
from datavector.errors import NotReady, UsageError
from datavector.merge import choose
from datavector.metrics import accuracy, balanced_accuracy, confusion_matrix
from datavector.model import BaseModel
from datavector.networks import create_base
from datavector.release.predict import predict
from datavector.wire.certs import init_authority, issue_aggregator, issue_hospital

ARCHITECTURE = "efficientnet_lite0"
SIZE = 128
READY_SECONDS = 600
SHOWN_PREDICTIONS = 3


@dataclass(frozen=True)
class DemoOptions:
    """What the command `datavector demo` was asked for."""

    output: Path
    data: Path | None
    split_column: str
    hospitals: int
    images: int
    epochs: int
    seed: int
    method: str
    with_controls: bool


def run_demo(options: DemoOptions) -> None:
    """Runs the whole main job and leaves release, report.json and report.png in the output folder.

    Raises:
        UsageError: the output folder holds something.
        ConfigError: there is no such merge method.
        DataVectorError: a site failed; its log is named.
    """
    output = options.output
    if options.method != AUTO:
        choose(options.method, {})
    if output.exists() and any(output.iterdir()):
        raise UsageError(f"{output} is not empty", remedy="remove it, or give another folder with --output")
    clock = _Clock()

    with clock.stage("images"):
        source = _source(options)
        test = f"{len(source.test)} test images"
        say(f"images: {len(source.hospitals)} hospitals, {len(source.classes)} classes, {test}")
    with clock.stage("base model and certificates"):
        base = create_base(
            output / "base", architecture=ARCHITECTURE, classes=source.classes, size=SIZE, seed=options.seed
        )
        say(f"base model: {base.name}, {base.layout.size / 2**20:.1f} MiB, {base.digest[:19]}...")
        certificates = _certificates(output / "certs", list(source.hospitals))

    sites = Sites(output / "sites", certificates)
    with sites.aggregator(base.path, _policy(options)) as store:
        with clock.stage("training and upload"):
            for hospital, records in source.hospitals.items():
                manifest = output / "sites" / hospital / "manifest.csv"
                write_manifest(manifest, records)
                sites.write_agent(hospital, manifest, {"epochs": options.epochs, "seed": options.seed})
                say(f"{hospital}: trains on {len(records)} images, sends its vector, and is gone")
                sites.agent(hospital, "--once")
        with clock.stage("visits"):
            _wait_for(store, "Calibrating", hospitals=set(source.hospitals))
            for hospital in source.hospitals:
                say(f"{hospital}: comes back for one forward pass")
                sites.agent(hospital, "--tasks-only")
        if options.method == AUTO:
            with clock.stage("evaluation"):
                _wait_for(store, "Evaluating", hospitals=set(source.hospitals))
                for hospital in source.hospitals:
                    say(f"{hospital}: comes back to evaluate the candidates, and each hospital's own model")
                    sites.agent(hospital, "--tasks-only")
        with clock.stage("release"):
            version = _wait_for(store, "Ready", hospitals=set(source.hospitals))
            say(f"{version}: Ready")
            _fetch_and_verify(sites, next(iter(source.hospitals)), output / "release")

    release = json.loads((output / "release" / "release.json").read_text())
    method = release["method"]
    outcome = report.Report(
        method=method["name"],
        head=release["head"]["kind"],
        classes=len(source.classes),
        test_images=len(source.test),
        release=output / "release",
    )
    outcome.calibration = release["calibration"]
    if reason := release["evaluation"].get("reason"):
        say(f"chosen: {reason}")
    with clock.stage("test"):
        outcome.merged = _test_release(output / "release", source.classes, source.test)
        _show_predictions(output / "release", source.test)
        study = _study(options, base, source, method["name"], method["parameters"])
        for hospital, images in study.training.items():
            outcome.hospitals[hospital] = (len(images) + len(study.validation[hospital]), study.single(hospital))
    if options.with_controls:
        with clock.stage("controls"):
            _run_controls(options, study, outcome)
    outcome.seconds = clock.seconds
    report.show(outcome, output)
    say(f"release: {output / 'release'}; table: {output / 'report.json'}; picture: {output / 'report.png'}")


class _Clock:
    """Seconds by stage, in the order of the stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started


def _source(options: DemoOptions) -> Source:
    if options.data is not None:
        return sources.from_manifest(
            options.data / "manifest.csv",
            column=options.split_column,
            hospitals=options.hospitals,
            images=options.images,
            seed=options.seed,
        )
    with progress("drawing images") as show:
        return sources.synthesised(
            options.output / "images", hospitals=options.hospitals, images=options.images, seed=options.seed,
            progress=show,
        )  # fmt: skip


def _certificates(folder: Path, hospitals: list[str]) -> Path:
    init_authority(folder)
    issue_aggregator(folder, server_names=["localhost", "127.0.0.1"])
    for hospital in hospitals:
        issue_hospital(folder, hospital)
    say(f"certificates: an authority, an aggregator, {', '.join(hospitals)} in {folder}")
    return folder


def _policy(options: DemoOptions) -> dict[str, object]:
    return {
        "apiVersion": "datavector.dev/v1alpha1",
        "kind": "MergePolicy",
        "metadata": {"name": "demo"},
        "spec": {
            "baseModelRef": ARCHITECTURE,
            "method": {"name": options.method},
            "trigger": {"minHospitals": 2, "quietPeriodSeconds": 1, "maxWaitSeconds": 60},
            "calibration": {"mode": "visit"},
            # The demo says itself, on its test images, if the merged model is worse than a hospital's own.
            "evaluation": {"allowWorse": True} if options.method == AUTO else None,
        },
    }


def _wait_for(store: Path, phase: str, *, hospitals: set[str]) -> str:
    """Waits until the version of all hospitals is in a phase; returns its name.

    Raises:
        NotReady: it failed, or took too long.
    """
    registry = SqliteRegistry(store / REGISTRY)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            for version in registry.versions():
                if set(version.hospitals) == hospitals:
                    found = version.status.phase.value
                    if found in (phase, "Ready"):
                        return version.name
                    if found == "Failed":
                        raise NotReady(version.status.message, remedy="see the aggregator's log")
            time.sleep(0.1)
    finally:
        registry.close()
    raise NotReady(f"no version was {phase} in {READY_SECONDS} s", remedy="see the aggregator's log")


def _fetch_and_verify(sites: Sites, hospital: str, release: Path) -> None:
    """A hospital downloads the release over mutual TLS, which verifies it."""
    sites.run(hospital, "release", "fetch", "--output", str(release))
    say(f"{hospital}: fetched and verified the release")


def _test_release(release: Path, classes: tuple[str, ...], test: Sequence[Record]) -> report.Score:
    """Accuracy of the released ONNX model itself on the original files."""
    results = list(predict(release, [record.path for record in test]))
    for result in results:
        if "error" in result:
            say(f"test image left out: {result['error']}")
    read = [(record.label, result["label"]) for record, result in zip(test, results, strict=True) if "label" in result]
    confusion = confusion_matrix(
        [classes.index(label) for label, _ in read], [classes.index(found) for _, found in read], len(classes)
    )
    return report.Score(accuracy(confusion), balanced_accuracy(confusion))


def _show_predictions(release: Path, test: Sequence[Record]) -> None:
    chosen = [test[index * len(test) // SHOWN_PREDICTIONS] for index in range(SHOWN_PREDICTIONS)]
    for record, result in zip(chosen, predict(release, [record.path for record in chosen]), strict=True):
        answer = f"{result['label']} ({result['probability']:.0%})" if "label" in result else result["error"]
        say(f"predict {record.path.name}: {answer}; the label is {record.label}")


def _study(
    options: DemoOptions, base: BaseModel, source: Source, method: str, parameters: Mapping[str, float]
) -> Study:
    """Everybody's images in one place, divided as each agent divided its own."""
    output, validation = options.output, Data.model_fields["validation"].default

    def load(records: Sequence[Record]) -> ImageSet:
        return load_images(records, base.classes, base.input.size)

    training, validating, vectors = {}, {}, {}
    for hospital, records in source.hospitals.items():
        assigned = assign_splits(
            [replace(record, split="") for record in records], validation=validation, seed=options.seed
        )
        training[hospital] = load([record for record in assigned if record.split == "train"])
        validating[hospital] = load([record for record in assigned if record.split == "val"])
        vectors[hospital] = output / "sites" / hospital / "state" / "vector.safetensors"
    folder = output / "study"
    folder.mkdir()
    return Study(base, vectors, training, validating, load(source.test), method, parameters, folder)


def _run_controls(options: DemoOptions, study: Study, outcome: report.Report) -> None:
    say("controls: pooled training, random vectors, BatchNorm restored in other ways")
    settings = TrainSettings(epochs=options.epochs, seed=options.seed)
    outcome.controls["pooled"] = study.pooled(settings)
    outcome.controls["random"] = study.random(keep_head=False, seed=options.seed)
    outcome.controls["random_body"] = study.random(keep_head=True, seed=options.seed)
    outcome.calibrations = study.calibrations()
    outcome.controls["no_restoration"] = outcome.calibrations["none"]
