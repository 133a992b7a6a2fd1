"""gRPC's errors become fedsplit's: the same cause the same kind, whether a proxy stands between or not."""

from __future__ import annotations

import grpc
import pytest

from fedsplit.core.errors import (
    EncoderError,
    OverloadedError,
    ProtocolError,
    RefusedError,
    UnreachableError,
)
from fedsplit.transport.status import translate


class Ended(grpc.RpcError):  # type: ignore[misc]  # grpc has no types
    def __init__(self, code: str, details: str) -> None:
        self.how = grpc.StatusCode[code], details

    def code(self) -> grpc.StatusCode:
        return self.how[0]

    def details(self) -> str:
        return self.how[1]

    def trailing_metadata(self) -> tuple[()]:
        return ()


@pytest.mark.parametrize(
    ("code", "details", "kind", "says"),
    [
        # The encoder has died: without a proxy, behind nginx, behind another one.
        ("UNAVAILABLE", "Socket closed", UnreachableError, "was lost"),
        ("INTERNAL", "Stream removed (RST_STREAM (Received RST_STREAM with error code 2))", UnreachableError, "was lost"),
        ("UNAVAILABLE", "Received http2 header with status: 502", UnreachableError, "was lost"),
        ("UNAVAILABLE", "a service of the server does not answer; try again", UnreachableError, "no encoder answers behind"),
        # A proxy's own words.
        ("UNKNOWN", "Received http2 header with status: 413", ProtocolError, "client_max_body_size 0"),
        ("INTERNAL", "Received http2 header with status: 400", RefusedError, "certificate expired"),
        ("PERMISSION_DENIED", "Received http2 header with status: 403", RefusedError, "refused"),
        ("UNIMPLEMENTED", "Received http2 header with status: 404", ProtocolError, "not a fedsplit encoder"),
        ("RESOURCE_EXHAUSTED", "too many requests", OverloadedError, "try again in 2 s"),
        ("INTERNAL", "the encoder failed; its log says why", EncoderError, "INTERNAL"),
    ],
)  # fmt: skip
def test_what_each_end_of_a_call_means(
    code: str, details: str, kind: type[EncoderError], says: str
) -> None:
    error = translate(Ended(code, details), "plant:8443", tls=True)
    assert type(error) is kind
    assert says in str(error)
    assert "plant:8443" in str(error)
