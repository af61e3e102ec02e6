"""Merging data vectors: theta_mix = theta_pre + merge(tau_1..tau_N). numpy only.

One method, one function (`sum.py`, `mean.py`). A new one is a file with a function marked `@method(name)`, imported
here.
"""

from datavector.merge import mean as mean
from datavector.merge import sum as sum
from datavector.merge.engine import merge_vectors
from datavector.merge.registry import Block, choose, method, methods

__all__ = ["Block", "choose", "merge_vectors", "method", "methods"]
