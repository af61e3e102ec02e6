import re
import subprocess
import sys

import numpy as np
import pytest

from datavector.errors import ConfigError
from datavector.merge import body_id, choose, method, methods
from datavector.merge.cohort import Block, Cohort

BLOCK = np.array([[1, 2], [3, 5]], dtype=np.float32)


def merged(name, **parameters):
    return choose(name, parameters).ready(Cohort((), (), (), ()))(Block(BLOCK))


def test_the_paper_and_the_mean_are_there():
    assert {"mean", "sum"} <= set(methods())


def test_a_parameter_reaches_its_method():
    np.testing.assert_array_equal(merged("sum", scale=0.5), np.array([2, 3.5], dtype=np.float32))


def test_results_are_float32():
    assert all(merged(name).dtype == np.float32 for name in ("mean", "sum", "median"))


def test_an_unknown_parameter_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match="did you mean 'scale'"):
        choose("sum", {"scael": 1})
    with pytest.raises(ConfigError, match="no parameters"):
        choose("mean", {"scale": 1})


@pytest.mark.parametrize("value", ["1", True, None, float("nan"), float("inf")])
def test_a_value_that_is_no_finite_number_is_refused(value):
    with pytest.raises(ConfigError, match=r"sum\.scale"):
        choose("sum", {"scale": value})


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        ("sum", {}, "sum"),
        ("sum", {"scale": 1}, "sum"),
        ("sum", {"scale": 0.5}, "sum-scale0.5"),
        ("sum", {"scale": -2.0}, "sum-scale-2"),
        ("ties", {"scale": 2, "density": 0.3}, "ties-density0.3-scale2"),
        ("sum", {"scale": 0.1234567891}, "sum-scale0.1234567891"),
        ("sum", {"scale": 1e-30}, "sum-scale1e-30"),
        ("dare", {"seed": 2147483647}, "dare-seed2147483647"),
    ],
)
def test_a_merge_is_named_after_what_is_not_default(name, parameters, expected):
    assert body_id(name, parameters) == expected
    assert re.fullmatch("[a-z0-9]([a-z0-9.-]*[a-z0-9])?", expected)


def test_two_methods_of_one_name_are_a_mistake():
    with pytest.raises(ValueError, match="sum"):
        method("sum")(lambda block: block[0])


def test_merging_needs_no_torch():
    code = "import sys, datavector.merge, datavector.merge.batchnorm; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
