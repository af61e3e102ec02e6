"""Moments of BatchNorm inputs as messages."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from datavector.errors import ProtocolError
from datavector.merge.batchnorm import Moments
from datavector.wire.v1.exchange_pb2 import LayerMoments


def to_message(layer: str, moments: Moments) -> LayerMoments:
    return LayerMoments(
        layer=layer, count=moments.count, mean=moments.mean.tolist(), variance=moments.variance.tolist()
    )


def from_message(message: LayerMoments, channels: Mapping[str, int] | None = None) -> Moments:
    """The moments of a message.

    Args:
        channels: if given, the layers that may come, with their numbers of channels.

    Raises:
        ProtocolError: the layer is another model's, or the numbers cannot be moments of anything.
    """
    if channels is not None and len(message.mean) != channels.get(message.layer):
        raise ProtocolError(
            f"moments of layer {message.layer!r} with {len(message.mean)} channels are not of this base model",
            remedy="fetch the base model again and run the task again",
        )
    mean, variance = np.array(message.mean, dtype=np.float64), np.array(message.variance, dtype=np.float64)
    sound = mean.shape == variance.shape and np.isfinite(mean).all() and np.isfinite(variance).all()
    if not sound or message.count < 1 or (variance < 0).any():
        raise ProtocolError(
            f"the moments of layer {message.layer!r} are not finite, or of no image",
            remedy="check the images and run the task again",
        )
    return Moments(message.count, mean, variance)
