"""Merging data vectors: theta_mix = theta_pre + merge(tau_1..tau_N). numpy only.

One method, one function, one file. A new one is a file with a function marked `@method(name)`, imported here.
"""

from datavector.merge import dare as dare
from datavector.merge import fisher as fisher
from datavector.merge import geometric_median as geometric_median
from datavector.merge import iso_c as iso_c
from datavector.merge import krum as krum
from datavector.merge import mean as mean
from datavector.merge import median as median
from datavector.merge import model_stock as model_stock
from datavector.merge import regmean as regmean
from datavector.merge import sum as sum
from datavector.merge import ties as ties
from datavector.merge import trimmed_mean as trimmed_mean
from datavector.merge import weighted_mean as weighted_mean
from datavector.merge.engine import MergeInput, gram_matrix, merge_digest, merge_tensors, merge_vectors
from datavector.merge.registry import Chosen, body_id, choose, find, method, methods
from datavector.merge.shares import Share

__all__ = [
    "Chosen",
    "MergeInput",
    "Share",
    "body_id",
    "choose",
    "find",
    "gram_matrix",
    "merge_digest",
    "merge_tensors",
    "merge_vectors",
    "method",
    "methods",
]
