"""Moments of features as messages of whole rows, none of them larger than a chunk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from datavector.errors import ProtocolError
from datavector.merge.head import FeatureMoments
from datavector.wire.chunks import CHUNK
from datavector.wire.v1.exchange_pb2 import FeatureRows

DOUBLE = np.dtype("<f8")
LARGEST = 1e30  # of a sum: beyond what any float32 features give, and sums of it stay finite
REMEDY = "use a matching version, and run the task again"


def to_rows(merge: str, moments: FeatureMoments) -> Iterator[FeatureRows]:
    """The messages of one merge's features."""
    matrix = np.concatenate([moments.sums, moments.second]).astype(DOUBLE)
    length = max(1, CHUNK // (matrix.shape[1] * DOUBLE.itemsize))
    for first in range(0, len(matrix), length):
        counts = moments.counts.tolist() if first == 0 else []
        yield FeatureRows(merge=merge, first=first, rows=matrix[first : first + length].tobytes(), counts=counts)


class FeatureReader:
    """Puts messages together again; memory is bounded by what the base model demands.

    Args:
        merges: names that may come.
        classes, features: of the base model.
    """

    def __init__(self, merges: Mapping[str, object], classes: int, features: int) -> None:
        self._merges = merges
        self._classes = classes
        self._features = features
        self._matrices: dict[str, NDArray[np.float64]] = {}
        self._counts: dict[str, list[int]] = {}
        self._rows: dict[str, int] = {}

    def feed(self, message: FeatureRows) -> None:
        """
        Raises:
            ProtocolError: rows of another model, or out of their order.
        """
        merge, width = message.merge, self._features * DOUBLE.itemsize
        height, done = self._classes + self._features, self._rows.get(message.merge, 0)
        rows = len(message.rows) // width if width else 0
        fits = merge in self._merges and rows and len(message.rows) == rows * width and done + rows <= height
        if not fits or message.first != done or (not done and len(message.counts) != self._classes):
            raise ProtocolError("rows of features are not those that the task asks for", remedy=REMEDY)
        if not done:
            self._matrices[merge] = np.empty((height, self._features))
            self._counts[merge] = list(message.counts)
        values = np.frombuffer(message.rows, dtype=DOUBLE).reshape(rows, self._features)
        if not (np.abs(values) <= LARGEST).all():  # a NaN is in no order
            raise ProtocolError("sums of features are not finite, or beyond those of any images", remedy=REMEDY)
        self._matrices[merge][done : done + rows] = values
        self._rows[merge] = done + rows

    def finish(self, images: int) -> dict[str, FeatureMoments]:
        """The moments by merge; empty where no features came.

        Args:
            images: that the hospital says it used.
        Raises:
            ProtocolError: those of a merge are missing or incomplete, or their counts cannot be.
        """
        if not self._rows:
            return {}
        height = self._classes + self._features
        if set(self._rows) != set(self._merges) or any(rows != height for rows in self._rows.values()):
            raise ProtocolError("features are missing of some merge", remedy=REMEDY)
        if any(sum(counts) > images for counts in self._counts.values()):
            raise ProtocolError("features are of more images than were used", remedy=REMEDY)
        return {merge: self._moments(merge) for merge in self._rows}

    def _moments(self, merge: str) -> FeatureMoments:
        sums, second = np.split(self._matrices[merge], [self._classes])
        counts = np.array(self._counts[merge], dtype=np.int64)
        if not np.allclose(second, second.T, rtol=1e-6, atol=1e-6 * (np.abs(second).max() or 1.0)):
            raise ProtocolError("a second moment of features is not symmetric", remedy=REMEDY)
        if sums[counts == 0].any() or (np.diag(second) < 0).any():
            raise ProtocolError("sums of features belong to no images", remedy=REMEDY)
        return FeatureMoments(counts, sums, (second + second.T) / 2)
