"""What both ends of the gRPC connection agree on: method names, channel options, TLS, loopback.

The options' reasons and measurements: docs/protocol.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
from pydantic import BaseModel, ConfigDict, model_validator

from fedsplit.core.address import is_loopback
from fedsplit.core.errors import ConfigError
from fedsplit.transport.frames import MAX_GRPC_MESSAGE_BYTES

SERVICE = "fedsplit.v1.Encoder"
STEPS = f"/{SERVICE}/Steps"
CAPABILITIES = f"/{SERVICE}/Capabilities"
PUBLISH = f"/{SERVICE}/Publish"
COLLECT = f"/{SERVICE}/Collect"
RETRY_AFTER_KEY = "retry-after-s"

_BOTH: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MAX_GRPC_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_GRPC_MESSAGE_BYTES),
    # Only messages as they are: a few bytes of gzip can stand for megabytes, and tensors do not shrink.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    # A dead peer is noticed within 15 s, by both sides, also when the stream is idle.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # While gRPC measures the link with a ping of its own, keepalive waits for that ping, by default for 60 s. Not less
    # than 15 s: on a slow link the ping queues behind the tensors in the kernel's send buffer.
    ("grpc.http2.ping_timeout_ms", 15_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]


class ServerTls(BaseModel):
    """PEM files of the encoder's own TLS. With `client_ca` every client must show a certificate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cert: Path
    key: Path
    client_ca: Path | None = None

    def credentials(self) -> Any:
        """gRPC's server credentials. Raises ConfigError for an unreadable file."""
        return grpc.ssl_server_credentials(
            [(read_pem(self.key), read_pem(self.cert))],
            root_certificates=read_pem(self.client_ca) if self.client_ca else None,
            require_client_auth=self.client_ca is not None,
        )


class ClientTls(BaseModel):
    """PEM files of a client. Without `root_ca` the machine's own roots are trusted; it may also be the PEM text itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    root_ca: Path | bytes | None = None
    cert: Path | None = None
    key: Path | None = None

    @classmethod
    def of(cls, ca: str, cert: str = "", key: str = "") -> ClientTls | None:
        """TLS as settings spell it: `ca` empty for none, "system" for the machine's own roots, or a PEM file."""
        if not ca:
            return None
        paths = (Path(p) if p else None for p in (cert, key))
        return cls(
            root_ca=None if ca == "system" else Path(ca),
            **dict(zip(("cert", "key"), paths, strict=True)),
        )

    @model_validator(mode="after")
    def _both_or_none(self) -> ClientTls:
        if (self.cert is None) != (self.key is None):
            raise ValueError("a client certificate needs both `cert` and `key`")
        return self

    def credentials(self) -> Any:
        """gRPC's channel credentials. Raises ConfigError for an unreadable file."""
        return grpc.ssl_channel_credentials(
            root_certificates=self._roots(),
            private_key=read_pem(self.key) if self.key else None,
            certificate_chain=read_pem(self.cert) if self.cert else None,
        )

    def _roots(self) -> bytes | None:
        return read_pem(self.root_ca) if isinstance(self.root_ca, Path) else self.root_ca


def read_pem(path: Path) -> bytes:
    """A PEM file's bytes. Raises ConfigError that names it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"the PEM file {path} cannot be read: {error.strerror}") from error
    if b"-----BEGIN" not in data:
        raise ConfigError(f"{path} is not a PEM file: it has no -----BEGIN line")
    return data


def server_options() -> list[tuple[str, Any]]:
    """Options of the server's port."""
    return [
        *_BOTH,
        ("grpc.so_reuseport", 0),  # a port in use must be an error, not a lottery
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # allows the client's 10 s
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ]


def open_channel(address: str, tls: ClientTls | None, *, allow_insecure: bool) -> Any:
    """A channel of its own connection. Raises ConfigError for plaintext that would leave this machine."""
    loopback = is_loopback(address)
    options = [
        *_BOTH,
        (
            "grpc.use_local_subchannel_pool",
            1,
        ),  # sessions share neither a connection nor its back-off
        ("grpc.enable_http_proxy", 0 if loopback else 1),
    ]
    if tls is not None:
        return grpc.secure_channel(address, tls.credentials(), options=options)
    if not loopback and not allow_insecure:
        raise ConfigError(
            f"the encoder at {address} is on another machine and no TLS is set: token and activations would "
            "travel in the clear; give a root CA, or allow insecure connections explicitly"
        )
    return grpc.insecure_channel(address, options=options)
