import random

import numpy as np
import pytest

from datavector.errors import ConfigError, MergeError, NotFinite, WrongLayout
from datavector.layout import TensorFile, write_tensors
from datavector.merge import engine, merge_vectors, parallel
from datavector.vector import open_vector


def merged(base, vectors, output, method="sum", **parameters):
    merge_vectors(base, vectors, method, parameters, output)
    return output.read_bytes()


def read(path, layout):
    with TensorFile(path, layout) as file:
        return {spec.name: file.read(spec.name) for spec in layout.tensors}


@pytest.mark.parametrize(("method", "factor"), [("sum", 1.0), ("mean", 0.2)])
def test_the_merged_model_is_the_base_plus_the_merged_vectors(base, vectors, tmp_path, method, factor):
    merged(base, vectors, tmp_path / "out", method)
    pretrained = read(base.path / "base.safetensors", base.layout)
    found = read(tmp_path / "out", base.layout)
    taus = [read(path, base.vector_layout) for path in vectors]
    for name in ("body.weight", "norm.bias", "scalar"):
        expected = pretrained[name] + factor * np.sum([tau[name].astype(np.float64) for tau in taus], axis=0)
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=3e-7)


def test_batchnorm_statistics_stay_the_pretrained_ones(base, vectors, tmp_path):
    merged(base, vectors, tmp_path / "out")
    pretrained, found = read(base.path / "base.safetensors", base.layout), read(tmp_path / "out", base.layout)
    for name in ("norm.running_mean", "norm.running_var"):
        np.testing.assert_array_equal(found[name], pretrained[name])


@pytest.mark.parametrize("method", ["sum", "mean"])
def test_any_order_of_the_files_gives_the_same_bytes(base, vectors, tmp_path, method):
    expected = merged(base, vectors, tmp_path / "out", method)
    shuffled = vectors.copy()
    for seed in range(4):
        random.Random(seed).shuffle(shuffled)
        assert merged(base, shuffled, tmp_path / f"{seed}", method) == expected


def test_any_length_of_blocks_and_any_number_of_threads_gives_the_same_bytes(base, vectors, tmp_path, monkeypatch):
    expected = merged(base, vectors, tmp_path / "out")
    for most, run, threads in ((333, 2, 3), (1, 10_000, 1), (1 << 20, 1, 4)):
        if most == 1:
            monkeypatch.setattr(engine, "BLOCK_BYTES", 4096)
        monkeypatch.setattr(engine, "MOST_ELEMENTS", max(most, 100))
        monkeypatch.setattr(engine, "FEWEST_ELEMENTS", 64)
        monkeypatch.setattr(engine, "RUN", run)
        monkeypatch.setattr(parallel, "MOST_THREADS", threads)
        assert merged(base, vectors, tmp_path / f"{most}") == expected


def test_a_merge_without_a_hospital_is_the_base_plus_the_exact_sum_of_the_others(base, vectors, tmp_path):
    others = vectors[:2] + vectors[3:]
    assert merged(base, others, tmp_path / "left") != merged(base, vectors, tmp_path / "everybody")
    pretrained, found = read(base.path / "base.safetensors", base.layout), read(tmp_path / "left", base.layout)
    taus = [read(path, base.vector_layout) for path in others]
    for name in ("body.weight", "norm.bias", "scalar"):
        steps = sum(np.rint(tau[name].astype(np.float64) * 2**45).astype(np.int64) for tau in taus)  # whole numbers
        np.testing.assert_array_equal(found[name], pretrained[name] + (steps / 2**45).astype(np.float32))


def test_the_mean_of_one_vector_is_the_sum_of_one_vector(base, vectors, tmp_path):
    assert merged(base, vectors[:1], tmp_path / "a", "mean") == merged(base, vectors[:1], tmp_path / "b", "sum")


def test_progress_ends_at_the_total(base, vectors, tmp_path):
    seen = []
    merge_vectors(base, vectors, "sum", {}, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (70 * 1000 + 4 + 1, 70 * 1000 + 4 + 1)


def test_nothing_to_merge_is_an_error(base, tmp_path):
    with pytest.raises(MergeError):
        merged(base, [], tmp_path / "out")


def test_a_vector_of_another_model_leaves_no_output(base, vectors, tmp_path):
    stranger = tmp_path / "stranger"
    stranger.write_bytes(vectors[0].read_bytes()[:-4])
    with pytest.raises(WrongLayout):
        merged(base, [vectors[0], stranger], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stranger"]


def test_an_overflow_is_an_error_and_the_former_output_stays(base, vectors, tmp_path):
    with open_vector(vectors[0], base) as file:
        tensors = {spec.name: file.read(spec.name) for spec in base.layout.tensors}
    tensors["body.weight"][3, 4] = 3e38
    names = [spec.name for spec in base.layout.tensors]
    for name in ("a", "b"):
        write_tensors(tmp_path / name, base.vector_layout, (tensors[each] for each in names))
    (tmp_path / "out").write_bytes(b"former")
    with pytest.raises(NotFinite, match="body"):
        merged(base, [tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"former"


def test_an_unknown_method_is_refused_before_a_file_is_opened(base, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'mean'"):
        merged(base, [tmp_path / "absent"], tmp_path / "out", "meen")
