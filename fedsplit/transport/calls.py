"""The small calls: what the encoder offers, here is a module version, what was trained on it. For federation and the CLI."""

from __future__ import annotations

from collections.abc import Iterator

import grpc

from fedsplit.core.encoder import Capabilities
from fedsplit.core.errors import ConfigError
from fedsplit.transport import encoder_pb2 as pb
from fedsplit.transport.deltas import Deltas, Gatherer
from fedsplit.transport.frames import CHUNK_BYTES
from fedsplit.transport.status import translate
from fedsplit.transport.wiring import CAPABILITIES, COLLECT, PUBLISH, ClientTls, open_channel


def capabilities(
    address: str,
    token: str,
    tls: ClientTls | None = None,
    *,
    timeout_s: float = 20.0,
    allow_insecure: bool = False,
) -> Capabilities:
    """Ask what the encoder offers, with a site's or a publisher's token. Raises EncoderError."""
    with open_channel(address, tls, allow_insecure=allow_insecure) as channel:
        call = channel.unary_unary(
            CAPABILITIES,
            request_serializer=pb.CapabilitiesRequest.SerializeToString,
            response_deserializer=pb.CapabilitiesReply.FromString,
        )
        try:
            reply = call(pb.CapabilitiesRequest(), timeout=timeout_s, metadata=_metadata(token))
        except grpc.RpcError as error:
            raise translate(error, address, tls=tls is not None) from error
    names = Capabilities.model_fields
    return Capabilities.model_validate(
        {name: getattr(reply, name) for name in names} | {"versions": tuple(reply.versions)}
    )


def publish(
    address: str,
    token: str,
    version: str,
    tensors: bytes,
    tls: ClientTls | None = None,
    *,
    timeout_s: float = 120.0,
    allow_insecure: bool = False,
) -> None:
    """Install a module version (safetensors bytes) with a publisher's token. Raises EncoderError."""
    if not 1 <= len(version) <= 128:
        raise ConfigError(
            f"module version {version!r} has {len(version)} characters: 1 to 128 are wanted"
        )
    with open_channel(address, tls, allow_insecure=allow_insecure) as channel:
        call = channel.stream_unary(
            PUBLISH,
            request_serializer=pb.PublishChunk.SerializeToString,
            response_deserializer=pb.PublishReply.FromString,
        )
        try:
            call(_chunks(version, tensors), timeout=timeout_s, metadata=_metadata(token))
        except grpc.RpcError as error:
            raise translate(error, address, tls=tls is not None) from error


def collect(
    address: str,
    token: str,
    version: str,
    tls: ClientTls | None = None,
    *,
    timeout_s: float = 120.0,
    max_bytes: int = 1 << 32,
    allow_insecure: bool = False,
) -> Deltas:
    """What sites have trained at the encoder on a version, with a publisher's token: site -> name -> delta.

    Shared training has one delta, under "". The encoder forgets what it gave: a second call gives nothing. Whatever is not
    finite float32 safetensors, or more than `max_bytes` in all, is a ProtocolError. Raises EncoderError.
    """
    gatherer = Gatherer(max_bytes)
    with open_channel(address, tls, allow_insecure=allow_insecure) as channel:
        call = channel.unary_stream(
            COLLECT,
            request_serializer=pb.CollectRequest.SerializeToString,
            response_deserializer=pb.CollectChunk.FromString,
        )
        try:
            request = pb.CollectRequest(version=version)
            for chunk in call(request, timeout=timeout_s, metadata=_metadata(token)):
                gatherer.feed(chunk)
        except grpc.RpcError as error:
            raise translate(error, address, tls=tls is not None) from error
    return gatherer.finish()


def _chunks(version: str, tensors: bytes) -> Iterator[pb.PublishChunk]:
    yield pb.PublishChunk(version=version, total_bytes=len(tensors))
    for offset in range(0, len(tensors), CHUNK_BYTES):
        yield pb.PublishChunk(data=tensors[offset : offset + CHUNK_BYTES])


def _metadata(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)
