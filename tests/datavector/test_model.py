"""Base model artifacts: addressed by content, and verified whenever they are loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from datavector.errors import BaseModelError
from datavector.files import canonical_json, sha256_file
from datavector.model import DESCRIPTION, FILES, BaseModel, Input, is_statistic, save_base

INPUT = Input(32, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))


def save(path: Path, **changes: object) -> BaseModel:
    tensors = {
        "bn.running_mean": np.zeros(3, np.float32),
        "bn.running_var": np.ones(3, np.float32),
        "bn.weight": np.ones(3, np.float32),
        "head.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    }
    given = {
        "name": "tiny", "architecture": "handmade", "classes": ("cat", "dog"), "input": INPUT, "head_seed": 7,
        "pretrained": "", "tensors": tensors,
    }  # fmt: skip
    return save_base(path, **{**given, **changes})


@pytest.fixture
def base(tmp_path: Path) -> BaseModel:
    return save(tmp_path / "base")


def describe_anew(path: Path, **changes: object) -> None:
    """Changes a description and makes its own digest fit."""
    content = {**json.loads((path / DESCRIPTION).read_text()), **changes}
    content = {key: value for key, value in content.items() if key != "digest" and value is not None}
    (path / "canonical").write_bytes(canonical_json(content))
    (path / DESCRIPTION).write_text(json.dumps({**content, "digest": f"sha256:{sha256_file(path / 'canonical')}"}))


def test_an_artifact_comes_back_as_it_was_saved(base):
    loaded = BaseModel.load(base.path, digest=base.digest)
    assert loaded == base
    assert (loaded.name, loaded.classes, loaded.input, loaded.head_seed) == ("tiny", ("cat", "dog"), INPUT, 7)
    assert loaded.batchnorm_layers == ("bn",)
    with loaded.open() as weights:
        assert weights.read("head.weight").tolist() == [[0, 1, 2], [3, 4, 5]]


def test_equal_artifacts_have_equal_digests_wherever_they_are(base, tmp_path):
    assert save(tmp_path / "again").digest == base.digest
    assert BaseModel.load(shutil.copytree(base.path, tmp_path / "copy")).digest == base.digest


@pytest.mark.parametrize(
    "change",
    [{"name": "other"}, {"classes": ("dog", "cat")}, {"head_seed": 8}, {"input": Input(33, INPUT.mean, INPUT.std)}],
    ids=lambda change: next(iter(change)),
)
def test_everything_that_matters_is_in_the_digest(base, tmp_path, change):
    assert save(tmp_path / "other", **change).digest != base.digest


def test_the_weights_are_in_the_digest(base, tmp_path):
    with base.open() as weights:
        tensors = {spec.name: weights.read(spec.name) for spec in base.layout.tensors}
    tensors["bn.weight"] = tensors["bn.weight"] * 2
    assert save(tmp_path / "other", tensors=tensors).digest != base.digest


@pytest.mark.parametrize("name", FILES)
def test_an_altered_or_missing_file_is_refused(base, name):
    path = base.path / name
    whole = path.read_bytes()
    for position in range(0, len(whole), max(len(whole) // 40, 1)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(BaseModelError):
            BaseModel.load(base.path)
    path.write_bytes(whole[:-2])
    with pytest.raises(BaseModelError):
        BaseModel.load(base.path)
    path.unlink()
    with pytest.raises(BaseModelError):
        BaseModel.load(base.path)


def test_another_artifact_than_the_one_asked_for_is_refused(base):
    with pytest.raises(BaseModelError, match=f"is {base.digest}, but sha256:0 was asked for"):
        BaseModel.load(base.path, digest="sha256:0")


@pytest.mark.parametrize("text", ["[]", "null", "3", "{}", "{", '"x"', "\ud800".encode("utf-8", "surrogatepass")])
def test_a_description_that_is_none_is_refused(base, text):
    (base.path / DESCRIPTION).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BaseModelError):
        BaseModel.load(base.path)


@pytest.mark.parametrize(
    "change",
    [
        {"classes": None},
        {"input": {"size": 3}},
        {"input": None},
        {"weights_sha256": None},
        {"tensors": [["a"]]},
        {"tensors": [["b", [1]], ["a", [1]]]},
        {"tensors": [["a", [1]]]},
        {"tensors": 5},
        {"format": "datavector-base/2"},
    ],
    ids=str,
)
def test_a_description_with_a_fitting_digest_but_wrong_content_is_refused(base, change):
    describe_anew(base.path, **change)
    with pytest.raises(BaseModelError):
        BaseModel.load(base.path)


@pytest.mark.parametrize("classes", [(), ("cat",), ("cat", "cat")])
def test_classes_are_two_or_more_and_each_once(tmp_path, classes):
    with pytest.raises(BaseModelError, match="classes are"):
        save(tmp_path / "base", classes=classes)
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_are_finite(tmp_path, bad):
    with pytest.raises(BaseModelError, match=r"tensor w is not finite"):
        save(tmp_path / "base", tensors={"w": np.array([1, bad], np.float32)})


def test_the_layout_of_vectors_names_the_base(base):
    assert dict(base.vector_layout.metadata) == {"format": "datavector/1", "base": base.digest}
    assert base.vector_layout.tensors == base.layout.tensors


def test_statistics_are_told_from_weights():
    assert is_statistic("bn.running_mean")
    assert is_statistic("bn.running_var")
    assert not is_statistic("bn.weight")
    assert not is_statistic("running_mean.bias")
