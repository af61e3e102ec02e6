"""The stages of a job: what they compute, and as processes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aggregator.job import calibrate, candidates_of, head_report, moments_of
from aggregator.reconcile import EXIT_PASSING, Base, World, desired_version, eligible
from aggregator.resources import ModelVersion, Phase, utc_now
from aggregator.store import Store, Visit
from datavector.files import sha256_file
from datavector.layout import TensorFile, write_tensors
from datavector.merge.batchnorm import Moments, pool, restore
from datavector.merge.head import FeatureMoments, pool_features, solve_head
from datavector.merge.restored import write_restored
from datavector.merge.statistics import FISHER, layout_of
from datavector.model import BaseModel, Input, is_statistic, save_base
from datavector.vector import open_vector
from tests.aggregator.objects import policy

HOSPITALS = ("north", "south", "east")


@pytest.fixture
def store(tmp_path: Path, small_base: BaseModel) -> Store:
    made = Store(tmp_path / "store")
    made.import_base(small_base.path)
    return made


@pytest.fixture
def start(store, small_base, deliver):
    """Makes a version of the hospitals' vectors, ready for its first stage: `start(mode="visit")`."""

    def make(*hospitals: str, base: BaseModel = small_base, **rules: object) -> ModelVersion:
        vectors = tuple(
            deliver(store, base, name, images=100 * number)
            for number, name in enumerate(hospitals or HOSPITALS, start=1)
        )
        world = World(policy(base=base.digest, **rules), Base(base.digest, has_batchnorm=True), vectors)
        version = desired_version(world, eligible(world)).with_phase(
            Phase.RELEASING, now=utc_now(), quorum=rules.get("quorum", 0)
        )
        store.write_version(version.name, version.dump())
        return version

    return make


def run(store: Store, version: ModelVersion, stage: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aggregator.job", str(store.root), version.name, stage],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def visit(base: BaseModel, hospital: str, images: int, *, rounds: int = 1) -> Visit:
    random = np.random.default_rng(images)
    channels = {layer: base.layout.by_name[f"{layer}.running_mean"].elements for layer in base.batchnorm_layers}
    moments = {
        f"sum/{layer}": Moments(49 * images, random.normal(size=n), random.uniform(size=n))
        for layer, n in channels.items()
    }
    return Visit(hospital, images, rounds, moments)


def features(base: BaseModel, seed: int, counts: tuple[int, ...]) -> FeatureMoments:
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    values = random.normal(size=(len(labels), base.features))
    sums = np.stack([values[labels == each].sum(axis=0) for each in range(len(counts))])
    return FeatureMoments(np.array(counts), sums, values.T @ values)


def damaged(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


# --- merge


def test_a_merge_adds_the_vectors_to_the_pretrained_weights_but_not_to_the_statistics(store, start, small_base):
    version = start()
    done = run(store, version, "merge")
    assert (done.returncode, done.stderr) == (0, "")
    report = store.report(version.name, "merge")
    sha256 = sha256_file(store.merged(version.name, "sum"))
    assert (report["weights_sha256"], report["weights"], report["outliers"]) == (sha256, {"sum": sha256}, {})
    assert report["cohort"]["hospitals"] == ["east", "north", "south"]
    assert np.diag(report["cohort"]["cosine"]).tolist() == [1, 1, 1]
    blobs = [store.blob(entry.hospital, entry.digest) for entry in version.spec.inputs]
    with TensorFile(store.merged(version.name, "sum"), small_base.layout) as merged, small_base.open() as pretrained:
        for spec in small_base.layout.tensors:
            expected = pretrained.read(spec.name).astype("f8")
            for blob in blobs * (not is_statistic(spec.name)):
                with open_vector(blob, small_base) as vector:
                    expected += vector.read(spec.name)
            assert np.allclose(merged.read(spec.name), expected, rtol=0, atol=1e-6)


def test_a_merge_that_is_run_again_gives_the_same_bytes_and_clears_what_a_killed_one_left(store, start):
    version = start()
    run(store, version, "merge")
    first = store.merged(version.name, "sum").read_bytes()
    (store.version(version.name) / "report-merge.json").unlink()  # it was killed before it could report
    (store.version(version.name) / ".sum.safetensors.halfhalf.tmp").write_bytes(b"half")
    run(store, version, "merge")
    assert store.merged(version.name, "sum").read_bytes() == first
    assert list(store.version(version.name).glob(".*")) == []


def test_a_stage_that_has_reported_is_not_run_again(store, start):
    version = start()
    run(store, version, "merge")
    store.merged(version.name, "sum").unlink()
    assert run(store, version, "merge").returncode == 0
    assert not store.merged(version.name, "sum").exists()


@pytest.mark.parametrize("damage", ["altered", "cut", "gone"])
def test_a_blob_that_is_not_what_was_recorded_fails_the_merge_with_a_sentence(store, start, damage):
    version = start()
    entry = version.spec.inputs[1]
    blob = store.blob(entry.hospital, entry.digest)
    content = blob.read_bytes()
    blob.write_bytes(damaged(content) if damage == "altered" else content[:-4])
    if damage == "gone":
        blob.unlink()
    done = run(store, version, "merge")
    assert done.returncode == 1
    assert done.stderr == (
        f"the stored vector {entry.data_vector} is missing or altered; "
        "restore the store's volume, or let the hospital train and send a new one\n"
    )
    assert store.report(version.name, "merge") is None
    assert not store.merged(version.name, "sum").exists()


def test_statistics_are_read_and_altered_ones_fail_the_merge_with_a_sentence(store, start, small_base):
    vectors, layout = start().spec.inputs, layout_of(FISHER, small_base)
    for number, entry in enumerate(vectors):
        part = store.root / "part"
        write_tensors(part, layout, (np.full(spec.shape, 1.0 + number, np.float32) for spec in layout.tensors))
        target = store.statistics_file(entry.hospital, entry.digest, FISHER, sha256_file(part))
        target.parent.mkdir()
        part.rename(target)
    version = start(method="fisher")
    assert run(store, version, "merge").returncode == 0
    reported = store.report(version.name, "merge")["statistics"]
    assert reported == {each.data_vector: store.statistics(each.hospital, each.digest) for each in vectors}
    with TensorFile(store.merged(version.name, "fisher"), small_base.layout) as merged, small_base.open() as before:
        change = merged.read("head.weight") - before.read("head.weight")
    weighted = np.zeros_like(change, dtype=np.float64)
    for number, entry in enumerate(vectors):
        with open_vector(store.blob(entry.hospital, entry.digest), small_base) as vector:
            weighted += (1.0 + number) * vector.read("head.weight") / 6
    np.testing.assert_allclose(change, weighted, atol=1e-6)

    (store.version(version.name) / "report-merge.json").unlink()
    entry = version.spec.inputs[0]
    file = store.statistics_file(entry.hospital, entry.digest, FISHER, reported[entry.data_vector][FISHER])
    file.write_bytes(damaged(file.read_bytes()))
    done = run(store, version, "merge")
    assert done.returncode == 1
    assert f"the stored file of fisher statistics of {entry.data_vector} is missing or altered" in done.stderr


def test_an_unknown_method_is_named(store, start):
    done = run(store, start(method="meen"), "merge")
    assert done.returncode == 2
    assert "mean" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_lost_base_fails_the_stage_with_a_sentence(store, start, small_base):
    version = start()
    (store.base(small_base.digest).path / "base.json").unlink()
    done = run(store, version, "merge")
    assert done.returncode == 1
    assert "the store has 0 base models" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_job_ends_with_its_parent(store, start):
    version = start()
    description = store.version(version.name) / "version.json"
    description.unlink()
    os.mkfifo(description)  # reading it blocks for ever
    with subprocess.Popen(
        [sys.executable, "-m", "aggregator.job", "--end-with-parent", str(store.root), version.name, "merge"],
        stdin=subprocess.PIPE,
    ) as job:
        job.stdin.close()
        assert job.wait() == 1
    assert store.report(version.name, "merge") is None


def test_a_failure_that_may_pass_has_an_exit_code_of_its_own(store, start):
    version = start()
    store.merged(version.name, "sum").mkdir(parents=True)  # in the way of the rename
    done = run(store, version, "merge")
    assert done.returncode == EXIT_PASSING
    assert "Traceback" not in done.stderr
    store.merged(version.name, "sum").rmdir()
    assert run(store, version, "merge").returncode == 0


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_processes_that_share_a_merge_come_to_the_same_bytes_and_the_last_one_reports(store, start, order):
    version = start()
    assert run(store, version, "merge").returncode == 0
    alone = store.merged(version.name, "sum").read_bytes()
    expected = store.report(version.name, "merge")
    (store.version(version.name) / "report-merge.json").unlink()
    store.merged(version.name, "sum").unlink()
    command = [sys.executable, "-m", "aggregator.job", "--share-of=3", str(store.root), version.name, "merge"]
    for index in order:
        assert store.report(version.name, "merge") is None
        subprocess.run(command, env={**os.environ, "JOB_COMPLETION_INDEX": str(index)}, check=True)
    assert store.merged(version.name, "sum").read_bytes() == alone
    assert store.report(version.name, "merge") == expected
    store.remove_leftovers(version.name)  # as the next stage does
    assert [path.name for path in store.merged(version.name, "sum").parent.iterdir()] == ["sum.safetensors"]


# --- calibration


def test_uploaded_statistics_are_those_of_the_hospitals_own_models_weighted_by_their_images(store, start, small_base):
    version = start(mode="uploaded")
    described, visits = calibrate(store, version, small_base)
    moments = moments_of(store, version, small_base, "sum", visits)
    assert described == {
        "mode": "uploaded", "hospitals": ["east", "north", "south"], "images": 600, "note": "as the policy says",
    }  # fmt: skip
    own = []
    for entry in version.spec.inputs:
        with open_vector(store.blob(entry.hospital, entry.digest), small_base) as vector, small_base.open() as weights:
            mean, variance = (
                (weights.read(f"bn1.{name}") + vector.read(f"bn1.{name}")).astype("f8")
                for name in ("running_mean", "running_var")
            )
        own.append(Moments(entry.sample_count, mean, variance))
    pooled = pool(own)
    assert np.array_equal(moments["bn1"].mean, pooled.mean)
    assert np.array_equal(moments["bn1"].variance, pooled.variance)
    assert set(moments) == set(small_base.batchnorm_layers)


@pytest.mark.parametrize("mode", ["visit", "meeting"])
def test_what_visitors_left_is_pooled_once_there_is_a_quorum(store, start, small_base, mode):
    version = start(mode=mode, quorum=2)
    for name, images in (("north", 30), ("east", 50), ("stranger", 999)):
        store.save_visit(version.name, visit(small_base, name, images))
    described, visits = calibrate(store, version, small_base)
    moments = moments_of(store, version, small_base, "sum", visits)
    assert (described["mode"], described["hospitals"], described["images"]) == (mode, ["east", "north"], 80)
    expected = pool(
        [visit(small_base, name, images).of("sum")["bn0"] for name, images in (("north", 30), ("east", 50))]
    )
    assert np.array_equal(moments["bn0"].variance, expected.variance)


@pytest.mark.parametrize(
    ("rounds", "note"), [((2, 2), "2 visit(s) a hospital"), ((1, 3), "1 to 3 visit(s) a hospital")]
)
def test_a_release_says_how_often_every_hospital_was_visited(store, start, small_base, rounds, note):
    version = start(mode="visit", quorum=2)
    for name, done in zip(("north", "east"), rounds, strict=True):
        store.save_visit(version.name, visit(small_base, name, 30, rounds=done))
    assert calibrate(store, version, small_base)[0]["note"] == note


def test_a_head_is_solved_around_the_merged_one_also_where_nobody_gave_features_of_a_class(store, start, tmp_path):
    random = np.random.default_rng(0)
    shapes = {"bn0.running_mean": 4, "bn0.running_var": 4, "last.weight": (3, 5), "last.bias": 3}
    base = save_base(
        tmp_path / "base", name="headed", architecture="handmade", classes=("a", "b", "c"),
        input=Input(8, (0.5,) * 3, (0.5,) * 3), head_seed=0, pretrained="",
        tensors={name: random.uniform(1, 2, shape).astype("f4") for name, shape in shapes.items()},
    )  # fmt: skip
    store.import_base(base.path)
    version = start(base=base, mode="visit", quorum=2)
    assert run(store, version, "merge").returncode == 0
    with TensorFile(store.merged(version.name, "sum"), base.layout) as merged:
        head = [merged.read(name) for name in ("last.weight", "last.bias")]

    def outcome(north: tuple[int, ...], east: tuple[int, ...]):
        given = [features(base, 1, north), features(base, 2, east)]
        for name, each in zip(("north", "east"), given, strict=True):
            store.save_visit(version.name, replace(visit(base, name, 50), features={"sum": each}))
        _, visits = calibrate(store, version, base)
        candidates = candidates_of(store, version, base, "sum", visits)
        return candidates, head_report(version, base, next(iter(candidates)), visits), pool_features(given)

    for north, east, note in (
        ((20, 10, 9), (5, 0, 8), ""),
        ((20, 10, 0), (5, 0, 0), "as merged for c, of which nobody gave features"),
    ):
        candidates, report, pooled = outcome(north, east)
        weight, bias = solve_head(pooled, *head, strength=version.spec.head.strength)
        assert list(candidates) == ["sum.head", "sum"]
        assert np.array_equal(candidates["sum.head"]["last.weight"], weight)
        assert np.array_equal(candidates["sum.head"]["last.bias"], bias)
        assert set(candidates["sum"]) == {"bn0.running_mean", "bn0.running_var"}
        images = sum(north + east)
        assert report == {"kind": "closed-form", "hospitals": ["east", "north"], "images": images, "note": note}

    candidates, report, _ = outcome((20, 0, 0), (5, 0, 0))
    assert list(candidates) == ["sum"]
    assert report["note"] == "fewer than two classes have 5 images or more at any one hospital"


def test_below_the_quorum_the_uploaded_statistics_are_the_last_resort_and_labelled(store, start, small_base):
    version = start(mode="visit", quorum=2)
    store.save_visit(version.name, visit(small_base, "north", 30))
    described, _ = calibrate(store, version, small_base)
    assert described["mode"] == "uploaded"
    assert described["note"] == "last resort: 1 of 2 hospitals took part in a visit before the deadline"


def test_no_calibration_keeps_the_pretrained_statistics(store, start, small_base):
    version = start(mode="none")
    described, visits = calibrate(store, version, small_base)
    assert (described["mode"], visits) == ("none", [])
    assert moments_of(store, version, small_base, "sum", visits) == {}


def test_restoring_replaces_the_statistics_and_nothing_else(store, start, small_base, tmp_path):
    version = start()
    run(store, version, "merge")
    moments = visit(small_base, "north", 30).of("sum")
    moments.pop("bn1")
    write_restored(tmp_path / "restored", small_base, store.merged(version.name, "sum"), restore(moments))
    with (
        TensorFile(tmp_path / "restored", small_base.layout) as restored,
        TensorFile(store.merged(version.name, "sum"), small_base.layout) as merged,
    ):
        for spec in small_base.layout.tensors:
            expected = merged.read(spec.name)
            if spec.name == "bn0.running_mean":
                expected = moments["bn0"].mean.astype("f4")
            if spec.name == "bn0.running_var":
                expected = moments["bn0"].variance.astype("f4")
            assert np.array_equal(restored.read(spec.name), expected)


# --- release


def test_a_release_of_a_network_that_nobody_knows_fails_with_a_sentence(store, start):
    version = start(mode="none")
    run(store, version, "merge")
    done = run(store, version, "release")
    assert done.returncode == 1
    assert "cannot be built" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not store.release(version.name).exists()


def test_a_crash_is_tried_again_and_shows_where_it_was(store, start):
    version = start()
    (store.version(version.name) / "version.json").write_text("{")
    done = run(store, version, "merge")
    assert done.returncode == EXIT_PASSING
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("JSONDecodeError: ")
