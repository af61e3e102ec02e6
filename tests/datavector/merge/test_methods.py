"""Every method against a plain one: whole arrays, float64, no stream, none of the product's code."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from datavector.errors import ConfigError, MergeError
from datavector.layout import TensorSpec
from datavector.merge import MergeInput, choose, methods
from datavector.merge.statistics import FISHER, REGMEAN
from datavector.merge.ties import kth_largest
from tests.datavector.merge.small import matrix, merged_bytes, read, small_base, small_input

HOSPITALS = 5


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def inputs(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    return [small_input(folder, base, seed) for seed in range(HOSPITALS)]


def weighted(taus, weights):
    return {name: sum(w * tau[name] for w, tau in zip(weights, taus, strict=True)) for name in taus[0]}


def flat(tau):
    return np.concatenate([tau[name].reshape(-1) for name in sorted(tau) if "running" not in name])


def plain_ties(taus, density=0.2):
    merged = {}
    for name in taus[0]:
        trimmed = []
        for tau in taus:
            magnitudes = np.sort(np.abs(tau[name]).reshape(-1))
            threshold = magnitudes[-max(1, int(density * magnitudes.size))]
            trimmed.append(np.where(np.abs(tau[name]) >= threshold, tau[name], 0))
        sign = np.where(np.sum(trimmed, axis=0) >= 0, 1, -1)
        agree = [np.where(np.sign(each) == sign, each, 0) for each in trimmed]
        merged[name] = np.sum(agree, axis=0) / np.maximum(np.sum([each != 0 for each in agree], axis=0), 1)
    return merged


def plain_iso(taus):
    merged = {}
    for name in taus[0]:
        total = np.sum([tau[name] for tau in taus], axis=0)
        if (rows := matrix(total)) is not None:
            u, s, v = np.linalg.svd(rows, full_matrices=False)
            total = (np.sqrt((s**2).mean()) * u @ v).reshape(total.shape)
        merged[name] = total
    return merged


def plain_geometric_median(taus):
    points = np.stack([flat(tau) for tau in taus])
    centre, weights = points.mean(axis=0), np.zeros(len(points))
    for _ in range(2000):
        inverse = 1 / np.linalg.norm(points - centre, axis=1)
        weights = inverse / inverse.sum()
        centre = weights @ points
    return weighted(taus, weights)


def plain_krum(taus, byzantine=1):
    points = np.stack([flat(tau) for tau in taus])
    distances = np.linalg.norm(points[:, None] - points[None], axis=2) ** 2
    neighbours = len(points) - byzantine - 2
    return taus[int(np.argmin([np.sort(row)[1 : neighbours + 1].sum() for row in distances]))]


def plain_model_stock(taus):
    merged = {}
    for name in taus[0]:
        rows = [tau[name].reshape(-1) for tau in taus]
        pairs = [(a, b) for index, a in enumerate(rows) for b in rows[index + 1 :]]
        cosine = np.mean([a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in pairs])
        ratio = len(taus) * cosine / (1 + (len(taus) - 1) * cosine)
        merged[name] = ratio * np.mean([tau[name] for tau in taus], axis=0)
    return merged


def plain_fisher(taus, base, inputs):
    fishers = [
        read(each.statistics[FISHER], base.layout.with_metadata(format="datavector-fisher/1", base=base.digest))
        for each in inputs
    ]
    return {
        name: sum(f[name].astype(float) * tau[name] for f, tau in zip(fishers, taus, strict=True))
        / sum(f[name].astype(float) for f in fishers)
        for name in taus[0]
    }


def plain_regmean(taus, inputs, offdiagonal=0.9):
    from safetensors.numpy import load_file

    grams = [load_file(each.statistics[REGMEAN]) for each in inputs]
    merged = {}
    for name in taus[0]:
        if name not in grams[0]:
            merged[name] = np.mean([tau[name] for tau in taus], axis=0)
            continue
        scaled = [offdiagonal * each[name] + (1 - offdiagonal) * np.diag(np.diag(each[name])) for each in grams]
        answers = sum(g.astype(float) @ matrix(tau[name]).T for g, tau in zip(scaled, taus, strict=True))
        merged[name] = np.linalg.solve(sum(scaled).astype(float), answers).T.reshape(taus[0][name].shape)
    return merged


def plain_trimmed(taus, cut):
    ordered = {name: np.sort([tau[name] for tau in taus], axis=0) for name in taus[0]}
    return {name: each[cut : len(taus) - cut].mean(axis=0) for name, each in ordered.items()}


PLAIN = {
    "mean": lambda taus, _: weighted(taus, [1 / HOSPITALS] * HOSPITALS),
    "sum": lambda taus, _: weighted(taus, [1] * HOSPITALS),
    "weighted-mean": lambda taus, inputs: weighted(
        taus, [each.samples / sum(other.samples for other in inputs) for each in inputs]
    ),
    "ties": lambda taus, _: plain_ties(taus),
    "iso-c": lambda taus, _: plain_iso(taus),
    "trimmed-mean": lambda taus, _: plain_trimmed(taus, 1),
    "median": lambda taus, _: {name: np.median([tau[name] for tau in taus], axis=0) for name in taus[0]},
    "geometric-median": lambda taus, _: plain_geometric_median(taus),
    "krum": lambda taus, _: plain_krum(taus),
    "model-stock": lambda taus, _: plain_model_stock(taus),
}


@pytest.mark.parametrize("method", [*PLAIN, "fisher", "regmean"])
def test_a_method_gives_what_its_plain_definition_gives(base, inputs, tmp_path, method):
    taus = [{k: v.astype(float) for k, v in read(each.path, base.vector_layout).items()} for each in inputs]
    if method == "fisher":
        expected = plain_fisher(taus, base, inputs)
    elif method == "regmean":
        expected = plain_regmean(taus, inputs)
    else:
        expected = PLAIN[method](taus, inputs)
    merged_bytes(base, inputs, tmp_path / "out", method)
    pretrained, found = read(base.path / "base.safetensors", base.layout), read(tmp_path / "out", base.layout)
    for name in found:
        change = 0 if "running" in name else expected[name]
        np.testing.assert_allclose(found[name], pretrained[name] + change, rtol=2e-6, atol=2e-6, err_msg=name)


def test_every_method_but_the_random_one_has_a_plain_definition():
    assert set(methods()) == {*PLAIN, "fisher", "regmean", "dare"}


def test_what_dare_keeps_is_rescaled_and_depends_on_the_seed_and_the_vector_alone(base, inputs, tmp_path):
    first = inputs[:1]
    tau = read(first[0].path, base.vector_layout)["wide.weight"].astype(float)
    pretrained = read(base.path / "base.safetensors", base.layout)["wide.weight"]

    def change(name, seed, density=0.25):
        merged_bytes(base, first, tmp_path / name, "dare", density=density, seed=seed)
        return read(tmp_path / name, base.layout)["wide.weight"].astype(float) - pretrained

    drawn, again, other = change("a", 1), change("b", 1), change("c", 2)
    kept = np.abs(drawn) > 1e-5
    np.testing.assert_array_equal(drawn, again)
    assert 0.2 < kept.mean() < 0.3
    np.testing.assert_allclose(drawn[kept], 4 * tau[kept], atol=2e-6)
    assert (kept != (np.abs(other) > 1e-5)).any()
    np.testing.assert_allclose(change("d", 1, density=1), tau, atol=1e-6)


def test_a_method_says_what_it_lacks(base, inputs, tmp_path):
    bare = [MergeInput(each.path, each.digest) for each in inputs]
    for method in ("fisher", "regmean"):
        with pytest.raises(MergeError, match="statistics"):
            merged_bytes(base, bare, tmp_path / "out", method)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"density": 0}),
        ("ties", {"density": 1.5}),
        ("krum", {"byzantine": 0.5}),
        ("trimmed-mean", {"trim": 0.5}),
    ],
)
def test_a_parameter_out_of_range_is_refused(method, parameters):
    with pytest.raises(ConfigError, match="number from"):
        choose(method, parameters)


@pytest.mark.parametrize("method", methods())
def test_one_hospital_alone_merges_to_its_own_model_where_nothing_is_taken_away(base, inputs, tmp_path, method):
    parameters = {"density": 1} if method in ("ties", "dare") else {}
    alone = merged_bytes(base, inputs[:1], tmp_path / "out", method, **parameters)
    if method in ("iso-c", "fisher", "regmean"):  # these change a single vector, or round otherwise
        expected = read(base.path / "base.safetensors", base.layout)["bias"]
        tau = read(inputs[0].path, base.vector_layout)["bias"]
        np.testing.assert_allclose(read(tmp_path / "out", base.layout)["bias"], expected + tau, rtol=1e-6)
    else:
        assert alone == merged_bytes(base, inputs[:1], tmp_path / "sum", "sum")


@given(
    npst.arrays(np.float32, st.integers(1, 300), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    st.integers(1, 300),
)
def test_the_kth_largest_magnitude_is_found_in_memory_and_by_bits(values, rank):
    spec, k = TensorSpec("a", values.shape), min(rank, len(values))
    expected = np.sort(np.abs(values))[-k]
    with pytest.MonkeyPatch.context() as patch:
        assert kth_largest(Whole(values), spec, k) == expected
        patch.setattr("datavector.merge.ties.SELECTED", 0)
        patch.setattr("datavector.merge.ties.PASS", 7)
        assert kth_largest(Whole(values), spec, k) == expected


class Whole:
    """Tensors that are all the same array."""

    def __init__(self, values):
        self.values = values

    def read_slice(self, values, tensor, start):
        values[:] = self.values[start : start + len(values)]


def test_dare_of_density_1_keeps_everything(base, inputs, tmp_path):
    assert merged_bytes(base, inputs, tmp_path / "a", "dare", density=1) == merged_bytes(
        base, inputs, tmp_path / "b", "sum"
    )


def test_hospitals_without_any_image_have_no_weighted_mean(base, inputs, tmp_path):
    with pytest.raises(MergeError, match="0, 0"):
        merged_bytes(base, [MergeInput(each.path, samples=0) for each in inputs[:2]], tmp_path / "a", "weighted-mean")
