"""Merging: one method, one function, one file; an engine that streams; BatchNorm statistics, pooled."""

from datavector.merge import mean, sum  # noqa: F401  importing a method registers it
from datavector.merge.engine import merge_vectors
from datavector.merge.methods import method, methods

__all__ = ["merge_vectors", "method", "methods"]
