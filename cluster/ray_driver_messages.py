"""Reads and writes the messages between ComfyUI and the driver: a JSON header and raw bytes."""
import json
import struct
from typing import BinaryIO

LENGTHS = struct.Struct(">IQ")  # bytes of the header, bytes of the data
MAX_HEADER = 1 << 28  # bytes; a request holds the workflow, which may have pictures in it
MAX_DATA = 1 << 32  # bytes; a picture of 16384 x 16384 takes 3.2 GB


class MessageError(ValueError):
    """What was sent or received is not a message, or is too large for one."""


def write(stream: BinaryIO, header: dict, data: bytes | memoryview = b""):
    """Writes one message and flushes. Raises MessageError, OSError."""
    try:
        text = json.dumps(header).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise MessageError(f"a value cannot be sent as JSON: {error}") from error
    _check(len(text), len(data))
    for part in (LENGTHS.pack(len(text), len(data)), text, data):
        stream.write(part)
    stream.flush()


def read(stream: BinaryIO) -> tuple[dict, bytes] | None:
    """Returns the next (header, data), or None at the end of the stream. Raises MessageError."""
    head = stream.read(LENGTHS.size)
    if len(head) < LENGTHS.size:
        return None
    sizes = LENGTHS.unpack(head)
    _check(*sizes)
    text, data = (stream.read(size) for size in sizes)
    if (len(text), len(data)) != sizes:
        return None
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"the header of a message is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise MessageError("the header of a message is not a JSON object")
    return header, data


def _check(header: int, data: int):
    for name, size, limit in (("header", header, MAX_HEADER), ("data", data, MAX_DATA)):
        if size > limit:
            raise MessageError(f"the {name} of a message has {size} bytes, {limit} are allowed")
