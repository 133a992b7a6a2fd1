"""How a tensor becomes bytes and comes back: the `Codec` seam and the table of codecs.

Adding one is a class and a line in `_ALL`. Knows nothing of frames or gRPC. Decoded arrays are
float32, writable and their owner's: torch takes them without a copy.
"""

from __future__ import annotations

import enum
import math
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.encoder import Array, Mask
from fedsplit.core.errors import ConfigError, ProtocolError

Dims = tuple[int, ...]
MAX_ABS = 1e12
"""Largest value of a tensor on the wire. Activations stay below 1e5; the square of 1e20 is no float32 any more."""


class Dtype(enum.IntEnum):
    """The fixed table of element types; what is not in it does not exist on the wire."""

    BYTES = 0
    FLOAT32 = 1
    FLOAT16 = 2
    UINT8 = 3
    BOOL = 4
    INT8 = 5


class CodecId(enum.IntEnum):
    """A frame's codec field. RAW is for what is no float tensor: JSON and masks."""

    RAW = 0
    FP32 = 1
    FP16 = 2


class Encoded(NamedTuple):
    """A tensor as it travels: `dims` are the tensor's, `data` is the codec's business."""

    dtype: Dtype
    dims: Dims
    data: memoryview


class Codec(Protocol):
    """One way to write float tensors as bytes."""

    name: str
    id: CodecId
    dtype: Dtype

    def payload_range(self, dims: Dims) -> tuple[int, int]:
        """Fewest and most payload bytes that a tensor of `dims` can have."""
        ...

    def encode(self, array: Array) -> Encoded:
        """Raises ProtocolError when this codec cannot carry the values."""
        ...

    def decode(self, dims: Dims, payload: NDArray[np.uint8]) -> Array:
        """Bytes, whose number is within `payload_range`, to float32. May reuse `payload`'s memory."""
        ...


class Fp32:
    """Bit-exact, no copy on either side."""

    name = "fp32"
    id = CodecId.FP32
    dtype = Dtype.FLOAT32

    def payload_range(self, dims: Dims) -> tuple[int, int]:
        """Four bytes an element."""
        size = 4 * math.prod(dims)
        return size, size

    def encode(self, array: Array) -> Encoded:
        """A view of the array's own memory where it is contiguous."""
        flat = np.ascontiguousarray(array, dtype="<f4")
        return Encoded(self.dtype, array.shape, _bytes_of(flat))

    def decode(self, dims: Dims, payload: NDArray[np.uint8]) -> Array:
        """A view of `payload`."""
        return payload.view("<f4").reshape(dims)


class Fp16:
    """Half the bytes, about three decimal digits. Does not saturate: see `encode`."""

    name = "fp16"
    id = CodecId.FP16
    dtype = Dtype.FLOAT16
    largest = 65504.0

    def payload_range(self, dims: Dims) -> tuple[int, int]:
        """Two bytes an element."""
        size = 2 * math.prod(dims)
        return size, size

    def encode(self, array: Array) -> Encoded:
        """Raises ProtocolError beyond fp16's range: a clipped activation would train on silently."""
        top = float(max(array.max(initial=0.0), -array.min(initial=0.0)))
        if not top <= self.largest:
            raise ProtocolError(
                f"codec fp16 cannot carry a tensor whose largest magnitude is {top:.6g}: it ends at "
                f"{self.largest:.0f}; use codec=fp32"
            )
        half = np.ascontiguousarray(array).astype("<f2")
        return Encoded(self.dtype, array.shape, _bytes_of(half))

    def decode(self, dims: Dims, payload: NDArray[np.uint8]) -> Array:
        """A new float32 array."""
        return payload.view("<f2").astype(np.float32).reshape(dims)


_ALL: tuple[Codec, ...] = (Fp32(), Fp16())

CODECS: dict[str, Codec] = {codec.name: codec for codec in _ALL}


def find_codec(name: str) -> Codec:
    """The codec of that name. Raises ConfigError that lists the known ones."""
    codec = CODECS.get(name)
    if codec is None:
        raise ConfigError(f"codec {name!r} is unknown: one of {', '.join(CODECS)} is wanted")
    return codec


def check_range(array: Array, what: str) -> None:
    """Raise ProtocolError for a value that is NaN, infinite, or so large that a square of it overflows in a norm.

    Largest and smallest value tell all of it, without a copy: a NaN is passed on by both.
    """
    if array.size == 0 or max(array.max(), -array.min()) <= MAX_ABS:
        return
    bad = int(array.size - (np.abs(array) <= MAX_ABS).sum())
    raise ProtocolError(
        f"{what} holds {bad} of {array.size} values that are NaN, infinite or beyond {MAX_ABS:g}; nothing of it was used. "
        "Lower the learning rate or, with fp16, use codec=fp32"
    )


def encode_mask(mask_BT: Mask) -> Encoded:
    """A mask as it travels: a byte an element, 0 or 1, whatever the codec of the tensors."""
    flat = np.ascontiguousarray(mask_BT, dtype=np.bool_).reshape(-1)
    return Encoded(Dtype.BOOL, mask_BT.shape, flat.view(np.uint8).data)


def decode_mask(dims: Dims, payload: NDArray[np.uint8]) -> Mask:
    """The inverse of `encode_mask`, without a copy. Raises ProtocolError for bytes other than 0 and 1."""
    if payload.max(initial=0) > 1:
        raise ProtocolError("a mask holds bytes other than 0 and 1")
    return payload.view(np.bool_).reshape(dims)


def _bytes_of(array: NDArray[np.floating]) -> memoryview:
    # An array with a zero dimension cannot be cast to bytes; it has none.
    return array.reshape(-1).data.cast("B") if array.size else memoryview(b"")
