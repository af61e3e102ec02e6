from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from datavector.merge.exact import exact_sum

usual = st.floats(-1, 1, width=32)
huge = st.floats(-(2.0**100), 2.0**100, width=32)
tiny = st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1e-38, 2.0**-46, -(2.0**-46), 3 * 2.0**-46, 2.0**-23])
limits = st.sampled_from([16.0, -16.0, 16.000002, 48.0, -24.0, 24.000002, 3e38, -3e38])


anything = st.one_of(usual, tiny, huge, limits)


@st.composite
def blocks(draw, elements=anything):
    shape = (draw(st.integers(1, 9)), draw(st.integers(1, 24)))
    return draw(npst.arrays(np.float32, shape, elements=elements))


@given(blocks(), st.randoms(use_true_random=False))
def test_any_order_of_hospitals_gives_the_same_bits(block, random):
    order = list(range(len(block)))
    random.shuffle(order)
    assert exact_sum(block[order]).tobytes() == exact_sum(block).tobytes()


@given(blocks(), st.data())
def test_any_cut_between_elements_gives_the_same_bits(block, data):
    cut = data.draw(st.integers(0, block.shape[1]))
    parts = np.concatenate([exact_sum(block[:, :cut]), exact_sum(block[:, cut:])])
    assert parts.tobytes() == exact_sum(block).tobytes()


@given(blocks(elements=st.one_of(usual, tiny)))
def test_values_of_usual_size_are_off_by_half_a_grid_step_each_at_most(block):
    for column, total in zip(block.T, exact_sum(block), strict=True):
        true = sum(Fraction(float(value)) for value in column)
        assert abs(Fraction(float(total)) - true) <= len(block) * Fraction(1, 2**46)


@given(blocks())
def test_values_of_any_size_are_summed_to_double_precision(block):
    expected = block.astype(np.float64).sum(axis=0)
    scale = np.abs(block.astype(np.float64)).sum(axis=0)
    assert (np.abs(exact_sum(block) - expected) <= 1e-14 * scale + len(block) * 2.0**-46).all()


@given(blocks(elements=st.integers(-(2**20), 2**20).map(lambda k: k * 2.0**-24)))
def test_a_hospital_can_be_subtracted_again_to_the_bit(block):
    if len(block) > 1:
        assert (exact_sum(block) - exact_sum(block[:1])).tobytes() == (exact_sum(block[1:]) + 0.0).tobytes()


@pytest.mark.parametrize("hospitals", [2, 3, 4, 7, 50, 200])
def test_a_hospital_whose_values_lie_between_the_grids_steps_can_be_subtracted_too(hospitals):
    random = np.random.default_rng(hospitals)
    sizes = 10.0 ** random.uniform(-9, -1.6, (hospitals, 500))
    block = random.normal(0, sizes).astype(np.float32)
    assert (block.astype(np.float64) * 2**45 % 1).any()
    for left in (0, hospitals - 1):
        others = np.delete(block, left, axis=0)
        difference = exact_sum(block) - exact_sum(block[left : left + 1])
        np.testing.assert_array_equal(difference, exact_sum(others))


@pytest.mark.parametrize("hospitals", [1, 2, 3, 200])
def test_one_huge_value_does_not_change_its_neighbours(hospitals):
    block = np.random.default_rng(0).standard_normal((hospitals, 50), dtype=np.float32)
    spiked = block.copy()
    spiked[0, 7] = 1e30
    same = np.arange(50) != 7
    assert exact_sum(spiked)[same].tobytes() == exact_sum(block)[same].tobytes()


def test_nothing_but_zeros_sums_to_zero():
    assert not exact_sum(np.zeros((5, 3), dtype=np.float32)).any()
