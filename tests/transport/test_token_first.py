"""Who has no token gets nothing done: no body is read, no place taken; who has one cannot take the sessions' places."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any

import grpc
import numpy as np
import pytest

from fedsplit.core.throttle import Throttle, ThrottledWarnings
from fedsplit.transport import encoder_pb2 as pb
from fedsplit.transport.admission import Limits
from fedsplit.transport.calls import capabilities, publish
from fedsplit.transport.requests import MAX_SMALL_BYTES
from fedsplit.transport.server import EncoderServer
from fedsplit.transport.tokens import sign, sign_publisher
from fedsplit.transport.wiring import CAPABILITIES, COLLECT, PUBLISH, STEPS
from tests.transport.conftest import KEY, FakeHost, connect, eventually, make_grant, make_h


def publisher() -> str:
    """Made when it is used: a suite may take longer than a token lives."""
    return sign_publisher("run", KEY, 600)


@contextmanager
def silent_calls(address: str, method: str, count: int, token: str = "") -> Iterator[list[Any]]:
    """So many calls on one connection that send their headers and never a body."""
    over = Event()

    def nothing() -> Iterator[bytes]:
        over.wait(60)
        yield from ()

    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(address) as channel:
        calls = [channel.stream_stream(method)(nothing(), metadata=metadata) for _ in range(count)]
        try:
            yield calls
        finally:
            over.set()
            for call in calls:
                call.cancel()


def code_of(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    return caught.value.code()  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", [CAPABILITIES, PUBLISH, COLLECT, STEPS])
def test_calls_without_a_token_are_refused_before_a_body_and_hold_no_place(
    server: EncoderServer, method: str, unharmed: None
) -> None:
    h_BTD = make_h()
    with connect(server.address) as stream, silent_calls(server.address, method, 45) as calls:
        # Each is answered though nothing of its body ever came.
        assert {code_of(call) for call in calls} == {grpc.StatusCode.UNAUTHENTICATED}
        np.testing.assert_array_equal(stream.encode(0, h_BTD), 2 * h_BTD + 1)
        with connect(server.address, make_grant(site="site-2")) as other:
            np.testing.assert_array_equal(other.encode(0, h_BTD), 2 * h_BTD + 1)


def test_silent_calls_with_a_token_leave_the_sessions_places_alone_and_end(host: FakeHost) -> None:
    limits = Limits(max_sessions=2, hello_timeout_s=3.0)
    with (
        EncoderServer(host, key=KEY, limits=limits) as server,
        silent_calls(server.address, CAPABILITIES, 30, publisher()) as calls,
    ):
        eventually(lambda: server.stats().refused.get("overloaded", 0) >= 1)
        for site in ("site-1", "site-2"):
            with connect(server.address, make_grant(site=site)) as stream:
                stream.encode(0, make_h())
        codes = [code_of(call) for call in calls]
        # Those that found a place were cancelled for their silence, the others were told to come back.
        assert set(codes) == {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED}
        assert capabilities(server.address, publisher()).backbone == "fake"


def test_silent_calls_of_a_site_do_not_keep_the_server_app_from_publishing(
    server: EncoderServer, host: FakeHost, unharmed: None
) -> None:
    site = sign(make_grant(), KEY, 60)
    with silent_calls(server.address, CAPABILITIES, 30, site):
        eventually(lambda: server.stats().refused.get("overloaded", 0) >= 20)
        publish(server.address, publisher(), "v9", b"tensors")
    assert "v9" in host.published


def test_a_small_request_is_small(server: EncoderServer, unharmed: None) -> None:
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary(COLLECT)
        metadata = (("authorization", f"Bearer {publisher()}"),)
        for body in (bytes(MAX_SMALL_BYTES + 1), b"\xff\xff\xff"):
            with pytest.raises(grpc.RpcError) as caught:
                call(body, metadata=metadata, timeout=20)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_nothing_is_unzipped(server: EncoderServer, host: FakeHost, unharmed: None) -> None:
    """A megabyte of zeros is a kilobyte as gzip: refused unread, with a token or without."""
    body = pb.PublishChunk(version="v9", total_bytes=1 << 20, data=bytes(1 << 20))
    for token in (publisher(), ""):
        metadata = (("authorization", f"Bearer {token}"),) if token else ()
        with grpc.insecure_channel(server.address, compression=grpc.Compression.Gzip) as channel:
            call = channel.stream_unary(PUBLISH)
            with pytest.raises(grpc.RpcError) as caught:
                call(iter([body.SerializeToString()]), metadata=metadata, timeout=20)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "v9" not in host.published


def test_a_flood_of_refusals_is_a_few_lines_of_printable_text(
    server: EncoderServer, caplog: pytest.LogCaptureFixture
) -> None:
    header = "eyJhbGciOiJcdTAwMWJbMko" + "A" * 100  # {"alg":"ESC[2J...
    with caplog.at_level(logging.WARNING), silent_calls(server.address, CAPABILITIES, 40, f"{header}.e30.x") as calls:  # fmt: skip
        assert {code_of(call) for call in calls} == {grpc.StatusCode.UNAUTHENTICATED}
    told = [r.getMessage() for r in caplog.records if "is refused" in r.getMessage()]
    assert 1 <= len(told) <= 10
    assert all(text.isprintable() and len(text) < 1200 for text in told)
    assert server.stats().refused["token"] == 40


def test_a_handler_lets_warnings_of_one_kind_through_so_often_and_all_errors() -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    clock = [0.0]
    handler.addFilter(ThrottledWarnings(Throttle(most=2, every_s=60.0, now=lambda: clock[0])))
    log = logging.Logger("alone")
    log.addHandler(handler)
    for i in range(5):
        log.warning("site %d ends", i)
        log.error("broken %d", i)
    assert [line for line in lines if "ends" in line] == ["site 0 ends", "site 1 ends"]
    assert sum("broken" in line for line in lines) == 5
    clock[0] = 61.0
    log.warning("site %d ends", 9)
    assert lines[-1] == "site 9 ends (3 more like this are not in this log)"


def test_what_a_throttle_left_out_is_counted_when_it_speaks_again() -> None:
    clock = [0.0]
    throttle = Throttle(most=2, every_s=60.0, now=lambda: clock[0])
    assert [throttle.left_out("a") for _ in range(5)] == [0, 0, None, None, None]
    assert throttle.left_out("b") == 0
    clock[0] = 61.0
    assert throttle.left_out("a") == 3
    assert throttle.left_out("a") == 0
