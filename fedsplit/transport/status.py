"""gRPC's errors to fedsplit's, once, at the client's edge. The full text goes to the log.

The same cause has other codes behind a reverse proxy, and gives the same error here.
"""

from __future__ import annotations

import logging
from typing import Any

import grpc

from fedsplit.core.address import is_loopback
from fedsplit.core.errors import (
    EncoderError,
    OverloadedError,
    ProtocolError,
    RefusedError,
    UnreachableError,
)
from fedsplit.core.foreign import printable
from fedsplit.transport.wiring import RETRY_AFTER_KEY

log = logging.getLogger(__name__)

DEFAULT_RETRY_S = 2.0
_TLS_WORDS = ("certificate", "handshake", "ssl", "tls")


def translate(error: Any, address: str, *, tls: bool) -> EncoderError:
    """The EncoderError for a grpc.RpcError; raise it `from` the original."""
    code, details = error.code(), printable(error.details() or "", limit=1000)
    log.debug("gRPC call to %s failed: %s: %s", address, code, details)
    status = grpc.StatusCode
    if (of_proxy := _of_proxy(code, details, address)) is not None:
        return of_proxy
    if code in (status.UNAUTHENTICATED, status.PERMISSION_DENIED):
        return RefusedError(f"the encoder at {address} refused: {details}")
    if code is status.RESOURCE_EXHAUSTED and "larger than max" in details:
        return ProtocolError(
            f"the encoder at {address} got a message beyond gRPC's limit: {details}"
        )
    if code is status.RESOURCE_EXHAUSTED:
        wait_s = _retry_after(error)
        return OverloadedError(
            f"the encoder at {address} is full: {details}; try again in {wait_s:g} s",
            retry_after_s=wait_s,
        )
    if code is status.INVALID_ARGUMENT:
        return ProtocolError(f"the encoder at {address} refused the bytes: {details}")
    if code is status.UNIMPLEMENTED:
        return ProtocolError(f"what answers at {address} is not a fedsplit encoder: {details}")
    if code is status.DEADLINE_EXCEEDED:
        return UnreachableError(
            f"the encoder at {address} did not answer in time; is its machine overloaded?"
        )
    if code in (status.UNAVAILABLE, status.CANCELLED, status.UNKNOWN):
        return UnreachableError(_why_unreachable(address, details, tls=tls))
    return EncoderError(f"the encoder at {address} failed: {code.name}: {details}")


def _of_proxy(code: Any, details: str, address: str) -> EncoderError | None:
    """What a proxy before the encoder says in its own way: HTTP statuses, and a stream that it takes away."""
    if "http2 header with status: 413" in details:
        return ProtocolError(
            f"a proxy at {address} limits the body of a stream: set its limit off (nginx: client_max_body_size 0)"
        )
    if "http2 header with status: 400" in details:
        return RefusedError(
            f"a proxy at {address} refused the call: has the site's certificate expired, or is it another CA's? Join again"
        )
    if code is grpc.StatusCode.INTERNAL and "RST_STREAM" in details:
        # The encoder behind it has died: without a proxy the connection itself ends.
        return UnreachableError(
            f"the connection to the encoder at {address} was lost ({details[:300]})"
        )
    return None


def _why_unreachable(address: str, details: str, *, tls: bool) -> str:
    low = details.lower()
    if tls and ("wrong_version_number" in low or "wrong version number" in low):
        return f"what answers at {address} does not speak TLS; take the CA (encoder-tls-ca) away or give the encoder a certificate"
    if tls and any(word in low for word in _TLS_WORDS):
        return (
            f"the TLS handshake with {address} failed: the root CA must have signed the encoder's certificate, the "
            f"certificate must name the host, and with mutual TLS the client needs one of its own ({details[:300]})"
        )
    if not tls and "socket closed" in low:
        return (
            f"what listens at {address} closed the connection ({details[:300]}); if it speaks TLS, give its root CA (encoder-tls-ca), else "
            "the encoder has just ended"
        )
    if "does not answer" in low or "did not answer" in low:
        return f"no encoder answers behind {address}: {details[:300]}"
    if "refused" in low or "failed to connect" in low or "dns" in low:
        hint = "is `fedsplit encoder serve` running there?"
        if is_loopback(address):
            hint += " If it is on another machine than this, set encoder-address"
        return f"no encoder answers at {address} ({details[:300]}); {hint}"
    return f"the connection to the encoder at {address} was lost ({details[:300]})"


def _retry_after(error: Any) -> float:
    for key, value in error.trailing_metadata() or ():
        if key == RETRY_AFTER_KEY:
            try:
                return min(max(float(value), 0.0), 3600.0)
            except ValueError:
                break
    return DEFAULT_RETRY_S
