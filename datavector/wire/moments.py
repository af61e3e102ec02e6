"""Moments of BatchNorm inputs as messages."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from datavector.errors import ProtocolError
from datavector.merge.batchnorm import Moments
from datavector.wire.v1.exchange_pb2 import LayerMoments

# Beyond these no float32 activation comes from: sums over hospitals stay finite, and counts fit their field.
MOST_VALUES = 2**48
LARGEST = float(np.finfo(np.float32).max)


def to_message(layer: str, moments: Moments) -> LayerMoments:
    return LayerMoments(
        layer=layer, count=moments.count, mean=moments.mean.tolist(), variance=moments.variance.tolist()
    )


def from_message(message: LayerMoments, channels: Mapping[str, int] | None = None) -> Moments:
    """The moments of a message.

    Args:
        channels: if given, the layers that may come, with their numbers of channels.

    Raises:
        ProtocolError: the layer is another model's, or the numbers are beyond those of any activations.
        ArtifactError: the numbers are not finite, or cannot be moments of anything.
    """
    if channels is not None and len(message.mean) != channels.get(message.layer):
        raise ProtocolError(
            f"moments of layer {message.layer!r} with {len(message.mean)} channels are not of this base model",
            remedy="fetch the base model again and run the task again",
        )
    moments = Moments(message.count, np.array(message.mean, np.float64), np.array(message.variance, np.float64))
    too_large = (np.abs(moments.mean) > LARGEST).any() or (moments.variance > LARGEST**2).any()
    if moments.count > MOST_VALUES or too_large:
        raise ProtocolError(
            f"the moments of layer {message.layer!r} are beyond those of any activations",
            remedy="check the images and run the task again",
        )
    return moments
