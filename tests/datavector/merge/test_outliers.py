import numpy as np
import pytest

from datavector.layout import write_tensors
from datavector.merge import MergeInput, gram_matrix
from datavector.merge.outliers import inspect_vectors
from tests.datavector.merge.small import read, small_base, small_input


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def honest(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    return [small_input(folder, base, seed) for seed in range(5)]


def look(base, inputs):
    return inspect_vectors(base, inputs, gram_matrix(base, inputs))


def changed(base, true, path, change):
    tensors = read(true.path, base.vector_layout)
    write_tensors(path, base.vector_layout, (change(tensors[spec.name]) for spec in base.layout.tensors))
    return MergeInput(path)


def test_honest_vectors_are_in_line(base, honest):
    found = look(base, honest)
    assert [each.reason for each in found] == [""] * 5
    assert all(0.4 < each.cosine < 0.6 for each in found)
    assert all(0 < each.sign_conflict < 0.5 for each in found)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensor: 100 * tensor, "norm is 99.6 times the median"),
        (lambda tensor: tensor / 100, "norm is 0.00996 times the median"),
        (lambda tensor: -tensor, "cosine to the others is -0."),
        (
            lambda tensor: np.random.default_rng(tensor.size).normal(0, 0.014, tensor.shape).astype(np.float32),
            "cosine to the others is ",
        ),
        (lambda tensor: 0 * tensor, "unchanged: nothing was learnt"),
    ],
)
def test_what_is_no_training_is_out_of_line_with_its_figure(base, honest, tmp_path, change, says):
    inputs = [changed(base, honest[0], tmp_path / "odd", change), *honest[1:]]
    first, *others = look(base, inputs)
    assert says in first.reason
    assert [each.reason for each in others] == [""] * 4


def test_of_two_vectors_nobody_can_say_which_is_out_of_line(base, honest, tmp_path):
    inputs = [changed(base, honest[0], tmp_path / "odd", lambda tensor: 100 * tensor), honest[1]]
    assert [each.reason for each in look(base, inputs)] == ["", ""]


def test_of_three_vectors_nobody_can_say_whose_direction_is_odd(base, honest, tmp_path):
    flipped = changed(base, honest[0], tmp_path / "odd", lambda tensor: -tensor)
    assert [each.reason for each in look(base, [flipped, *honest[1:3]])] == ["", "", ""]
    assert look(base, [flipped, *honest[1:4]])[0].reason


def test_figures_are_those_of_the_whole_arrays(base, honest):
    rows = [
        np.concatenate([v.reshape(-1) for k, v in read(each.path, base.vector_layout).items() if "running" not in k])
        for each in honest
    ]
    found = look(base, honest)[0]
    others = np.sum(rows[1:], axis=0)
    conflict = np.abs(rows[0][rows[0] * others < 0]).sum() / np.abs(rows[0]).sum()
    cosines = [rows[0] @ row / np.linalg.norm(rows[0]) / np.linalg.norm(row) for row in rows[1:]]
    assert found.norm == pytest.approx(np.linalg.norm(rows[0]), rel=1e-5)
    assert found.cosine == pytest.approx(np.mean(cosines), rel=1e-4)
    assert found.sign_conflict == pytest.approx(conflict, rel=1e-4)
    assert (found.zeros, found.unchanged) == (0, 0)
