"""Upload messages without copies: a chunk's bytes go between file and socket with one copy on each side.

`UploadRequest.chunk` is field 2 of type bytes. On the wire (https://protobuf.dev/programming-guides/encoding) such a
message is the tag 0x12, the length as a varint, and the bytes, so a vector's 350 MiB need not pass through protobuf
objects. Everything else, and every message that is not exactly of that form, is parsed by protobuf.
"""

from __future__ import annotations

from google.protobuf.message import DecodeError

from datavector.errors import ProtocolError
from datavector.wire.v1.exchange_pb2 import UploadRequest

CHUNK = 1 << 20
MAX_MESSAGE = CHUNK + (64 << 10)  # a chunk, or a layer's moments, with all that belongs to it

_TAG = UploadRequest.CHUNK_FIELD_NUMBER << 3 | 2


def frame_chunk(data: bytes) -> bytes:
    """The serialised `UploadRequest(chunk=data)`."""
    return b"".join((_prefix(len(data)), data))


def read_request(message: bytes) -> memoryview | UploadRequest:
    """A chunk's bytes as a view into `message`, or any other upload message parsed.

    Raises:
        ProtocolError: the bytes are no UploadRequest.
    """
    if message[:1] == bytes((_TAG,)):
        length, begin = _varint(message, 1)
        if begin and begin + length == len(message):
            return memoryview(message)[begin:]
    try:
        request = UploadRequest.FromString(message)
    except DecodeError as error:
        raise ProtocolError("the stream holds bytes that are no message", remedy="use a matching version") from error
    return memoryview(request.chunk) if request.WhichOneof("part") == "chunk" else request


def _prefix(length: int) -> bytes:
    encoded = bytearray((_TAG,))
    while length > 0x7F:
        encoded.append(length & 0x7F | 0x80)
        length >>= 7
    encoded.append(length)
    return bytes(encoded)


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """The value and where it ends; (0, 0) if it is longer than any message may be."""
    value = 0
    for shift in range(0, 35, 7):
        if position >= len(message):
            break
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    return 0, 0
