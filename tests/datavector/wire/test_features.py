import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datavector.choice import Counts
from datavector.errors import ProtocolError
from datavector.merge.head import FeatureMoments
from datavector.wire import features as wire
from datavector.wire.counts import from_counts_message, to_counts_message
from datavector.wire.features import FeatureReader, to_rows


def moments(classes=3, width=5, seed=0):
    random = np.random.default_rng(seed)
    rows = random.normal(size=(4 * classes, width))
    labels = np.arange(len(rows)) % classes
    sums = np.stack([rows[labels == each].sum(axis=0) for each in range(classes)])
    return FeatureMoments(np.bincount(labels, minlength=classes), sums, rows.T @ rows)


def read(messages, merges=("sum",), classes=3, width=5, images=12):
    reader = FeatureReader(dict.fromkeys(merges), classes, width)
    for message in messages:
        reader.feed(message)
    return reader.finish(images)


@given(st.integers(2, 6), st.integers(1, 9), st.integers(1, 400))
@settings(deadline=None)
def test_moments_come_through_in_chunks_of_any_size(classes, width, chunk):
    sent, before = moments(classes, width), wire.CHUNK
    wire.CHUNK = chunk
    try:
        messages = list(to_rows("sum", sent))
    finally:
        wire.CHUNK = before
    found = read(messages, classes=classes, width=width, images=4 * classes)["sum"]
    np.testing.assert_array_equal(found.counts, sent.counts)
    np.testing.assert_array_equal(found.sums, sent.sums)
    np.testing.assert_allclose(found.second, sent.second, rtol=1e-12)


def test_no_features_are_no_features():
    assert read([]) == {}


@pytest.mark.parametrize(
    "change",
    [
        lambda message: setattr(message, "merge", "other"),
        lambda message: setattr(message, "first", 1),
        lambda message: setattr(message, "rows", message.rows[:-1]),
        lambda message: setattr(message, "rows", message.rows[:40]),
        lambda message: setattr(message, "rows", message.rows * 2),
        lambda message: setattr(message, "rows", b"\xff" * len(message.rows)),
        lambda message: message.counts.append(1),
        lambda message: message.counts.__setitem__(0, 1000),
        lambda message: message.counts.__setitem__(0, 0),
    ],
)
def test_rows_that_cannot_be_are_refused(change):
    (message,) = to_rows("sum", moments())
    change(message)
    with pytest.raises(ProtocolError):
        read([message])


def test_all_merges_bring_features_or_none():
    with pytest.raises(ProtocolError, match="missing"):
        read(to_rows("sum", moments()), merges=("sum", "mean"))


def some_counts():
    confusion = np.array([[5, 0, 1], [0, 0, 0], [2, 0, 7]])
    bins = np.zeros((10, 3))
    bins[9], bins[4] = (10, 9, 9.5), (5, 3, 2.2)
    return Counts(confusion, bins)


def test_counts_come_through():
    sent = some_counts()
    found = from_counts_message(to_counts_message("sum", sent), 3)
    np.testing.assert_array_equal(found.confusion, sent.confusion)
    np.testing.assert_array_equal(found.bins, sent.bins)


@pytest.mark.parametrize(
    "change",
    [
        lambda message: message.labels.append(0),
        lambda message: message.labels.__setitem__(0, 3),
        lambda message: message.images.__setitem__(0, 1 << 60),
        lambda message: message.images.__setitem__(0, 6),
        lambda message: message.bin_images.append(0),
        lambda message: message.bin_recognised.__setitem__(9, 8),
        lambda message: message.bin_confidence.__setitem__(9, float("nan")),
        lambda message: message.bin_confidence.__setitem__(9, 11.0),
    ],
)
def test_counts_that_do_not_add_up_are_refused(change):
    message = to_counts_message("sum", some_counts())
    change(message)
    with pytest.raises(ProtocolError, match="do not add up"):
        from_counts_message(message, 3)
