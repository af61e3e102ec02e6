"""Framing of upload messages by hand, against protobuf."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datavector.errors import ProtocolError
from datavector.wire.chunks import frame_chunk, read_request
from datavector.wire.v1.exchange_pb2 import UploadFinal, UploadOpen, UploadRequest, VectorInfo

LENGTHS = st.sampled_from([0, 1, 127, 128, 16383, 16384, 1 << 20])


@given(st.binary(max_size=300) | LENGTHS.map(bytes))
def test_a_framed_chunk_is_protobufs_message(data):
    message = frame_chunk(data)
    assert message == UploadRequest(chunk=data).SerializeToString()
    assert read_request(message) == data


@given(st.integers(0, 2**64 - 1), st.text(max_size=64))
def test_other_messages_are_parsed(size, sha256):
    for request in (
        UploadRequest(final=UploadFinal(size=size, sha256=sha256)),
        UploadRequest(open=UploadOpen(vector=VectorInfo(size=size), offset=size)),
    ):
        assert read_request(request.SerializeToString()) == request


@given(st.binary(max_size=40))
def test_any_bytes_are_read_as_protobuf_reads_them_or_refused(message):
    try:
        expected = UploadRequest.FromString(message)
    except Exception:
        with pytest.raises(ProtocolError):
            read_request(message)
        return
    found = read_request(message)
    if isinstance(found, memoryview):
        assert expected.WhichOneof("part") == "chunk"
        assert expected.chunk == found
    else:
        assert found == expected
