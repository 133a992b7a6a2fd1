"""Frames: 64 bytes of header and a chunk of payload, as docs/protocol.md lays them out.

`frames_of` cuts a message into frames; `Assembler` checks frames and puts messages together again. Whoever
owns an Assembler gives it `admit`, which sees the first header of each message and refuses what
was not negotiated *before* memory is allocated. Only ProtocolError comes out, whatever bytes go in.
Knows nothing of gRPC, codecs' contents or sessions.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.errors import ProtocolError
from fedsplit.transport.codec import CodecId, Dims, Dtype, Encoded

MAGIC = b"FSPL"
VERSION = 2
HEADER_BYTES = 64
CHUNK_BYTES = 512 << 10
MIN_CHUNK_BYTES = 64 << 10
MAX_GRPC_MESSAGE_BYTES = 4 << 20
MAX_JSON_BYTES = 4096
MAX_NDIM = 4

_HEAD = struct.Struct("<4s6BH4I2Q3I")  # bytes 0..55
_SUMS = struct.Struct("<2I")  # of the chunk, of bytes 0..59
_SUM_MODULUS = (1 << 32) - 1
_SAME = 48  # bytes 0..47 are equal in all frames of a message

Payload = NDArray[np.uint8]


class FrameKind(enum.IntEnum):
    """What a message is."""

    HELLO = 1
    WELCOME = 2
    MASK = 3
    ENCODE = 4
    ENCODED = 5
    BACKPROP = 6
    GRAD = 7
    ERROR = 8
    PROBE = 9
    PROBED = 10
    SCORE = 11
    ACK = 12


JSON_KINDS = frozenset({FrameKind.HELLO, FrameKind.WELCOME, FrameKind.ERROR})


class Flag(enum.IntFlag):
    """KEEP holds the step's graph for BACKPROP; MASK says that a MASK of this step came before; QUIET wants no GRAD."""

    NONE = 0
    KEEP = 1
    MASK = 2
    QUIET = 4


class Header(NamedTuple):
    """One frame's header, checked by `parse`."""

    kind: FrameKind
    dtype: Dtype
    codec: CodecId
    flags: Flag
    dims: Dims
    session: int
    step: int
    total: int
    offset: int
    length: int


class Message(NamedTuple):
    """A whole message. `payload` is writable and nobody else's."""

    header: Header
    payload: Payload


def frames_of(
    kind: FrameKind,
    body: Encoded,
    *,
    codec: CodecId = CodecId.RAW,
    flags: Flag = Flag.NONE,
    session: int = 0,
    step: int = 0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[bytes]:
    """Cut a message into frames, lazily: the one copy of a chunk is made when it is about to leave."""
    total = len(body.data)
    dims = (*body.dims, 0, 0, 0, 0)[:MAX_NDIM]
    for offset in range(0, total, chunk_bytes):
        chunk = body.data[offset : offset + chunk_bytes]
        head = _HEAD.pack(
            MAGIC, VERSION, kind, body.dtype, codec, len(body.dims), flags, 0,
            *dims, session, step, total, offset, len(chunk),
        )  # fmt: skip
        chunk_sum = checksum(chunk)
        head_sum = zlib.crc32(chunk_sum.to_bytes(4, "little"), zlib.crc32(head))
        yield b"".join((head, _SUMS.pack(chunk_sum, head_sum), chunk))


def checksum(chunk: memoryview) -> int:
    """Sum of the chunk's little-endian u64 words mod 2^64 (the last padded with zeros), mod 2^32 - 1.

    Finds damage, not malice. CRC-32 took 169 us a MiB where this takes 20, four times a step, and was a quarter of
    the stream's rate (benchmarks/stream_echo.py).
    """
    whole = len(chunk) & ~7
    words = np.frombuffer(chunk, "<u8", whole >> 3)
    return (
        (int(np.add.reduce(words)) + int.from_bytes(chunk[whole:], "little")) % (1 << 64)
    ) % _SUM_MODULUS


def json_frame(kind: FrameKind, text: str, *, session: int = 0) -> bytes:
    """The one frame of a HELLO, WELCOME or ERROR."""
    data = memoryview(text.encode())
    return next(frames_of(kind, Encoded(Dtype.BYTES, (), data), session=session))


def parse(frame: bytes) -> tuple[Header, memoryview]:
    """Header and chunk of one frame. Raises ProtocolError on anything that is not a frame."""
    if len(frame) < HEADER_BYTES:
        raise ProtocolError(
            f"a frame of {len(frame)} bytes is truncated: {HEADER_BYTES} or more are wanted"
        )
    (magic, version, kind, dtype, codec, ndim, flags, reserved, *rest) = _HEAD.unpack_from(frame)
    dims, (session, step, total, offset, length) = tuple(rest[:MAX_NDIM]), rest[MAX_NDIM:]
    if magic != MAGIC:
        raise ProtocolError(
            f"a frame begins with {magic!r}: {MAGIC!r} is wanted; is the peer fedsplit?"
        )
    if version != VERSION:
        raise ProtocolError(
            f"the peer speaks protocol version {version}, this side {VERSION}: install the same fedsplit on both"
        )
    chunk_sum, head_sum = _SUMS.unpack_from(frame, _HEAD.size)
    if zlib.crc32(memoryview(frame)[: HEADER_BYTES - 4]) != head_sum:
        raise ProtocolError("a frame's header fails its checksum: it was damaged on the way")
    if ndim > MAX_NDIM or any(dims[ndim:]) or reserved:
        raise ProtocolError(
            f"a frame's shape is malformed: ndim {ndim}, dims {dims}, reserved {reserved}"
        )
    if flags & ~int(Flag.KEEP | Flag.MASK | Flag.QUIET):
        raise ProtocolError(f"a frame has unknown flags {flags:#04x}")
    chunk = memoryview(frame)[HEADER_BYTES:]
    if length != len(chunk):
        raise ProtocolError(
            f"a frame names {length} bytes of payload and brings {len(chunk)}: truncated?"
        )
    if checksum(chunk) != chunk_sum:
        raise ProtocolError("a frame's payload fails its checksum: it was damaged on the way")
    try:
        known = FrameKind(kind), Dtype(dtype), CodecId(codec), Flag(flags)
    except ValueError as error:
        raise ProtocolError(f"a frame has an unknown kind, dtype or codec: {error}") from error
    return Header(*known, dims[:ndim], session, step, total, offset, length), chunk


def check_json(header: Header) -> None:
    """The rules of HELLO, WELCOME and ERROR. Part of every `admit`."""
    if header.dtype is not Dtype.BYTES or header.codec is not CodecId.RAW or header.dims:
        raise ProtocolError(f"{header.kind.name} must be JSON: dtype BYTES, codec RAW and no dims")
    if header.total > MAX_JSON_BYTES:
        raise ProtocolError(
            f"{header.kind.name} of {header.total} bytes: at most {MAX_JSON_BYTES} are allowed"
        )


class Assembler:
    """Puts the messages of one direction of one stream together. For one thread."""

    def __init__(self, admit: Callable[[Header], None]) -> None:
        """`admit(header)` raises if the message that begins is not welcome; nothing is allocated before."""
        self._admit = admit
        self._same = b""
        self._payload: Payload | None = None
        self._filled = 0

    def feed(self, frame: bytes) -> Message | None:
        """Take one frame; return the message that it completes. Raises ProtocolError."""
        header, chunk = parse(frame)
        end = header.offset + header.length
        if header.length == 0 or end > header.total:
            raise ProtocolError(
                f"a chunk at {header.offset} of {header.length} bytes does not fit a payload of {header.total}"
            )
        if end < header.total and header.length < MIN_CHUNK_BYTES:
            raise ProtocolError(
                f"a chunk of {header.length} bytes: all but the last hold {MIN_CHUNK_BYTES} or more"
            )
        payload = self._begin(header, frame) if self._payload is None else self._payload
        if frame[:_SAME] != self._same or header.offset != self._filled:
            raise ProtocolError(
                f"a chunk of {header.kind.name} step {header.step} at {header.offset} is out of order: "
                f"the one at {self._filled} of the message begun before is wanted"
            )
        payload[header.offset : end] = chunk
        self._filled = end
        if end < header.total:
            return None
        self._payload = None
        return Message(header, payload)

    def finish(self) -> None:
        """Raise ProtocolError if the stream's end cuts a message in two."""
        if self._payload is not None:
            raise ProtocolError(
                f"the stream ended {self._filled} bytes into a message of {len(self._payload)}"
            )

    def _begin(self, header: Header, frame: bytes) -> Payload:
        self._admit(header)
        self._same, self._filled = frame[:_SAME], 0
        self._payload = np.empty(header.total, np.uint8)
        return self._payload
