"""What a hospital found for a model, as a message."""

from __future__ import annotations

import numpy as np

from datavector.choice import Counts
from datavector.errors import ProtocolError
from datavector.metrics import BINS
from datavector.wire.v1.exchange_pb2 import ModelCounts

MOST_IMAGES = 10**9  # of one hospital


def to_counts_message(name: str, counts: Counts) -> ModelCounts:
    labels, predictions = np.nonzero(counts.confusion)
    return ModelCounts(
        name=name,
        labels=labels.tolist(),
        predictions=predictions.tolist(),
        images=counts.confusion[labels, predictions].tolist(),
        bin_images=counts.bins[:, 0].astype(np.int64).tolist(),
        bin_recognised=counts.bins[:, 1].astype(np.int64).tolist(),
        bin_confidence=counts.bins[:, 2].tolist(),
    )


def from_counts_message(message: ModelCounts, classes: int) -> Counts:
    """
    Raises:
        ProtocolError: it is of other classes, or its numbers do not agree with each other.
    """
    confusion = np.zeros((classes, classes), dtype=np.int64)
    cells = len(message.labels)
    sound = cells == len(message.predictions) == len(message.images) <= classes * classes
    sound = sound and max([*message.labels, *message.predictions], default=0) < classes
    sound = sound and sum(message.images) <= MOST_IMAGES
    lengths = {len(message.bin_images), len(message.bin_recognised), len(message.bin_confidence)}
    if not sound or lengths != {BINS}:
        raise _refused(message)
    np.add.at(confusion, (list(message.labels), list(message.predictions)), list(message.images))
    columns = [message.bin_images, message.bin_recognised, message.bin_confidence]
    bins = np.stack([np.array(column, dtype=np.float64) for column in columns], axis=1)
    images, recognised = int(confusion.sum()), int(np.trace(confusion))
    agrees = bins[:, 0].sum() == images and bins[:, 1].sum() == recognised and (bins[:, 1] <= bins[:, 0]).all()
    if not agrees or not ((bins[:, 2] >= 0) & (bins[:, 2] <= bins[:, 0] + 1e-6)).all():  # a NaN is in no order
        raise _refused(message)
    return Counts(confusion, bins)


def _refused(message: ModelCounts) -> ProtocolError:
    return ProtocolError(
        f"the counts of {message.name[:80]!r} are not those of this base model's classes, or do not add up",
        remedy="use a matching version, and run the task again",
    )
