"""The shapes and sizes that a session's WELCOME allows; both ends check with these."""

from __future__ import annotations

from fedsplit.core.errors import ProtocolError, RefusedError
from fedsplit.transport.codec import Codec, CodecId, Dims, Dtype, Encoded, find_codec
from fedsplit.transport.frames import Header
from fedsplit.transport.messages import Welcome

ACK = Encoded(Dtype.UINT8, (1,), memoryview(b"\1"))
"""The body of an answer that only says: done."""
LOSSES = find_codec("fp32")


def check_h_dims(dims: Dims, welcome: Welcome) -> None:
    """Raise RefusedError beyond the grant's limits, ProtocolError for a shape that was not negotiated."""
    if len(dims) != 3 or min(dims) < 1 or dims[2] != welcome.width:
        raise ProtocolError(
            f"activations have shape {dims}: [batch, tokens, {welcome.width}] is wanted"
        )
    check_batch(dims[0], dims[1], welcome)


def check_batch(batch: int, tokens: int, welcome: Welcome) -> None:
    """Raise RefusedError for more samples or tokens than the grant allows."""
    if batch > welcome.max_batch or tokens > welcome.max_tokens:
        raise RefusedError(
            f"a step of {batch} samples and {tokens} tokens: the token allows {welcome.max_batch} samples "
            f"and {welcome.max_tokens} tokens; lower batch-size or max-length"
        )


def z_dims(h_dims: Dims, welcome: Welcome) -> Dims:
    """The shape of the encoder's output for activations of `h_dims`."""
    return (h_dims[0], welcome.pooled_width) if welcome.pooled else h_dims


def probed_dims(h_dims: Dims, welcome: Welcome) -> Dims:
    """The shape of what K perturbed encoders make of activations of `h_dims`."""
    return (welcome.probes, *z_dims(h_dims, welcome))


def check_probed_size(h_dims: Dims, welcome: Welcome, codec: Codec) -> None:
    """Raise ProtocolError for a probe whose answer would be larger than one message may be."""
    _, most = codec.payload_range(probed_dims(h_dims, welcome))
    if most > welcome.max_message_bytes:
        raise ProtocolError(
            f"the answer to a probe of shape {h_dims} with {welcome.probes} forwards has {most} payload bytes, "
            f"{welcome.max_message_bytes} are allowed: lower zo-queries or batch-size"
        )


def check_losses(header: Header, welcome: Welcome) -> None:
    """Raise ProtocolError unless it is one float32 a perturbed forward: losses travel as they are, whatever the codec."""
    if header.dims != (welcome.probes,):
        raise ProtocolError(
            f"{header.kind.name} has shape {header.dims}: ({welcome.probes},) is wanted"
        )
    check_payload(header, LOSSES, welcome.max_message_bytes)


def check_ack(header: Header) -> None:
    """Raise ProtocolError unless it is the one byte that says: done."""
    if (header.dtype, header.codec, header.dims) != (Dtype.UINT8, CodecId.RAW, (1,)):
        raise ProtocolError("ACK must be one UINT8, RAW")
    if header.total != 1:
        raise ProtocolError(f"ACK has {header.total} payload bytes: 1 is wanted")


def check_payload(header: Header, codec: Codec, max_bytes: int) -> None:
    """Raise ProtocolError unless dtype, codec and total of a tensor are what was negotiated."""
    if header.codec is not codec.id or header.dtype is not codec.dtype:
        raise ProtocolError(
            f"a tensor came as {header.codec.name}/{header.dtype.name}: {codec.id.name}/{codec.dtype.name} was agreed"
        )
    low, high = codec.payload_range(header.dims)
    if not low <= header.total <= high:
        raise ProtocolError(
            f"{header.kind.name} of shape {header.dims} has {header.total} payload bytes, {low} to {high} are wanted"
        )
    check_size(header.total, max_bytes)


def check_size(payload_bytes: int, max_bytes: int) -> None:
    """Raise ProtocolError for a tensor whose payload is larger than the encoder takes."""
    if payload_bytes > max_bytes:
        raise ProtocolError(
            f"a tensor has {payload_bytes} payload bytes, {max_bytes} are allowed: lower batch-size, or raise the "
            "encoder's max_message_bytes"
        )
