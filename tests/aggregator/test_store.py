"""The aggregator's files: whole or absent, and never outside their folder."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.store import Store, Visit
from datavector.errors import BaseModelError, NotFound
from datavector.merge.batchnorm import Moments
from datavector.model import DESCRIPTION, WEIGHTS


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def visit(hospital: str, *, rounds: int = 1, images: int = 7) -> Visit:
    random = np.random.default_rng(rounds)
    layers = {name: Moments(49 * images, random.normal(size=3), random.uniform(size=3)) for name in ("a.bn", "b.bn")}
    return Visit(hospital, images, rounds, layers)


def same(one: Visit, other: Visit) -> bool:
    plain = [
        (each.hospital, each.images, each.rounds, {
            layer: (moments.count, moments.mean.tolist(), moments.variance.tolist())
            for layer, moments in each.moments.items()
        })
        for each in (one, other)
    ]  # fmt: skip
    return plain[0] == plain[1]


# --- Base models


def test_a_base_is_imported_once_and_found_by_name_and_digest(store, small_base):
    first, second = store.import_base(small_base.path), store.import_base(small_base.path)
    assert first == second
    assert store.base(small_base.digest).path == store.base(small_base.name).path == first.path
    assert sorted(path.name for path in first.path.iterdir()) == [DESCRIPTION, WEIGHTS]


def test_nothing_but_the_artifact_is_copied(store, small_base, tmp_path):
    source = shutil.copytree(small_base.path, tmp_path / "source")
    (source / "notes.txt").write_text("private")
    assert sorted(path.name for path in store.import_base(source).path.iterdir()) == [DESCRIPTION, WEIGHTS]


def test_an_import_that_was_cut_short_is_not_there_and_is_mended_by_the_next(store, small_base):
    target = store.import_base(small_base.path).path
    (target / DESCRIPTION).unlink()
    assert store.bases() == []
    assert store.import_base(small_base.path).digest == small_base.digest


def test_an_altered_base_is_not_imported(store, small_base, tmp_path):
    source = shutil.copytree(small_base.path, tmp_path / "source")
    (source / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes()[:-1] + b"!")
    with pytest.raises(BaseModelError, match="altered"):
        store.import_base(source)
    assert store.bases() == []


def test_an_unknown_base_names_those_there_are(store, small_base):
    store.import_base(small_base.path)
    with pytest.raises(BaseModelError, match=rf"0 base models 'lite'.*small \({small_base.digest}\)"):
        store.base("lite")


def test_only_the_files_of_the_artifact_are_handed_out(store, small_base):
    store.import_base(small_base.path)
    assert store.base_file(small_base.digest, WEIGHTS).is_file()
    assert store.base_file(small_base.digest, "../../registry.sqlite") is None
    assert store.base_file("sha256:" + "0" * 64, WEIGHTS) is None


# --- Names


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/etc", "../x", ".hidden", "a\n", "a\x00b", "A", "é", "a/"])
@pytest.mark.parametrize("method", ["version", "release"])
def test_a_name_that_is_not_plain_becomes_no_path(store, method, name):
    with pytest.raises(NotFound):
        getattr(store, method)(name)
    with pytest.raises(NotFound):
        store.merged("brain-1", name)
    for hospital, digest in ((name, "0" * 64), ("north", name)):
        with pytest.raises(NotFound):
            store.blob(hospital, digest)
    with pytest.raises(NotFound):
        store.upload(name, "0" * 64)
    with pytest.raises(NotFound):
        store.base_file(f"sha256:{name}", WEIGHTS)


@given(st.text(max_size=20))
def test_whatever_the_name_a_path_stays_below_the_store(name):
    root = Path("/store")
    store = object.__new__(Store)
    store.root = root
    for path in (store.version, store.release, lambda name: store.merged(name, name)):
        try:
            found = path(name)
        except NotFound:
            continue
        assert ".." not in found.parts
        assert found.is_relative_to(root)


# --- Visits


def test_a_visit_comes_back_as_it_was_left(store):
    store.save_visit("brain-1", left := visit("st.mary"))
    (found,) = store.visits("brain-1")
    assert same(found, left)
    assert store.rounds("brain-1") == {"st.mary": 1}


def test_a_later_round_replaces_the_earlier_and_the_order_is_by_hospital(store):
    for each in (visit("south"), visit("north"), visit("south", rounds=2)):
        store.save_visit("brain-1", each)
    assert [(each.hospital, each.rounds) for each in store.visits("brain-1")] == [("north", 1), ("south", 2)]


def test_the_visits_of_a_meeting_appear_together_and_replace_a_part_of_one(store):
    store.save_visit("brain-1", visit("west"))
    seen = []

    def cut_short():
        yield visit("north")
        seen.append(store.rounds("brain-1"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.save_meeting("brain-1", cut_short())
    assert seen == [{"west": 1}]
    assert store.rounds("brain-1") == {"west": 1}
    store.save_meeting("brain-1", [visit("south"), visit("east")])
    assert store.rounds("brain-1") == {"east": 1, "south": 1}


# --- Reports, erasure


def test_there_is_no_report_until_a_stage_has_finished(store):
    assert store.report("brain-1", "merge") is None
    store.write_report("brain-1", "merge", {"weights_sha256": "m"})
    assert store.report("brain-1", "merge") == {"weights_sha256": "m"}


def test_erasing_a_version_leaves_nothing_of_it_and_nothing_else_is_touched(store):
    for name in ("brain-1", "brain-10"):
        store.write_version(name, {})
        store.write_report(name, "merge", {})
        store.save_visit(name, visit("north"))
        store.release(name).mkdir()
        store.release(name).with_name(f".{name}.partial").mkdir()
    assert store.has_version("brain-1")
    store.erase_version("brain-1")
    store.erase_version("brain-1")
    assert not store.has_version("brain-1")
    left = {path.relative_to(store.root).parts[1] for path in store.root.glob("*/*")}
    assert left == {"brain-10", ".brain-10.partial"}


def test_nobody_sees_half_an_erased_release_and_erasing_goes_on_after_a_kill(store, monkeypatch):
    store.write_version("brain-1", {})
    store.release("brain-1").mkdir()
    (store.release("brain-1") / "SHA256SUMS").touch()

    def killed(folder, **_):
        if folder.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            store.erase_version("brain-1")
    assert not store.release("brain-1").exists()
    assert store.has_version("brain-1"), "or nobody would go on"
    store.erase_version("brain-1")
    assert not store.has_version("brain-1")
    assert not list((store.root / "releases").iterdir())


def test_what_hospitals_sent_is_for_the_aggregators_user_alone(store):
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in store.root.iterdir()}
    assert {name for name, mode in modes.items() if mode & 0o077 == 0} == {"uploads", "blobs", "statistics", "versions"}


def test_a_version_that_cannot_be_erased_is_an_error(store):
    store.version("brain-1").write_text("no folder")
    with pytest.raises(NotADirectoryError):
        store.erase_version("brain-1")


def test_erasing_a_blob_twice_is_erasing_it(store):
    store.erase_blob("north", "sha256:" + "0" * 64)
    blob = store.blob("north", "sha256:" + "0" * 64)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"x")
    store.erase_blob("north", "sha256:" + "0" * 64)
    assert not blob.exists()


def test_what_a_killed_writer_left_is_removed_but_no_finished_file(store):
    store.write_version("brain-1", {})
    store.save_visit("brain-1", visit("north"))
    being_written = store.version("brain-1") / "visits" / ".south.npz.x7_abcde.tmp"
    being_written.write_bytes(b"half")
    (store.version("brain-1") / ".merged.safetensors.x7_abcde.tmp").write_bytes(b"half")
    store.remove_leftovers("brain-1")
    assert sorted(path.name for path in store.version("brain-1").iterdir()) == ["version.json", "visits"]
    assert being_written.exists(), "by the receiver, which runs beside the jobs"
