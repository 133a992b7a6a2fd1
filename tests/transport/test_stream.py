"""The happy path: an encoder behind the wire is that encoder."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fedsplit.core.encoder import Encoder
from fedsplit.core.errors import (
    ConfigError,
    EncoderError,
    OverloadedError,
    ProtocolError,
    RefusedError,
    UnreachableError,
)
from fedsplit.transport.client import StreamEncoder, capabilities, publish
from fedsplit.transport.server import EncoderServer, Limits
from fedsplit.transport.tokens import sign_publisher
from tests.transport.conftest import (
    KEY,
    POOLED,
    WIDTH,
    FakeHost,
    connect,
    eventually,
    make_grant,
    make_h,
    token_for,
)


def test_fp32_is_bit_exact_and_the_arrays_are_writable(server: EncoderServer) -> None:
    h_BTD, dz = make_h(), make_h(seed=1)
    with connect(server.address) as stream:
        encoder: Encoder = stream
        z = encoder.encode(5, h_BTD, want="gradient")
        dh = encoder.settle(5, dz)
    np.testing.assert_array_equal(z, 2 * h_BTD + 1)
    np.testing.assert_array_equal(dh, 3 * dz)
    assert z.flags.writeable
    assert z.dtype == np.float32
    stats = server.stats()
    assert (stats.encoded, stats.backpropped, stats.kept_steps, stats.refused) == (1, 1, 0, {})


def test_fp16_halves_the_bytes(server: EncoderServer) -> None:
    h_BTD = make_h()
    with connect(server.address, codec="fp16") as stream:
        z = stream.encode(0, h_BTD, want="gradient")
        dh = stream.settle(0, h_BTD)
        assert stream.payload_up == stream.payload_down == 2 * 2 * h_BTD.size
    np.testing.assert_allclose(z, 2 * h_BTD + 1, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(dh, 3 * h_BTD, rtol=2e-3, atol=2e-3)


def test_fp16_overflow_is_an_error_at_whichever_end_it_happens(
    server: EncoderServer, unharmed: None
) -> None:
    with connect(server.address, codec="fp16") as stream:
        with pytest.raises(ProtocolError, match="use codec=fp32"):
            stream.encode(0, np.full((1, 1, WIDTH), 70_000, np.float32))
        stream.encode(1, make_h())  # refused before it left: the session lives
        with pytest.raises(ProtocolError, match="use codec=fp32"):
            stream.encode(2, np.full((1, 1, WIDTH), 40_000, np.float32))


def test_mask(server: EncoderServer) -> None:
    h_BTD, mask_BT = make_h(), np.array([[True, True, False], [True, False, False]])
    with connect(server.address) as stream:
        z = stream.encode(0, h_BTD, mask_BT)
        np.testing.assert_array_equal(z, (2 * h_BTD + 1) * mask_BT[..., None])
        with pytest.raises(ProtocolError, match="mask"):
            stream.encode(1, h_BTD, mask_BT[:1])


def test_the_server_pools_when_the_cut_ends_at_the_last_block(server: EncoderServer) -> None:
    h_BTD = make_h()
    with connect(server.address, make_grant(b=12)) as stream:
        z_BP = stream.encode(0, h_BTD, want="gradient")
        assert z_BP.shape == (2, POOLED)
        assert stream.settle(0, np.ones_like(z_BP)).shape == h_BTD.shape


def test_tensors_of_many_chunks() -> None:
    host = FakeHost(width=1024)
    h_BTD = make_h(8, 300, 1024)  # 9.8 MB
    grant = make_grant(max_batch=8, max_tokens=300)
    with EncoderServer(host, key=KEY) as server, connect(server.address, grant) as stream:
        np.testing.assert_array_equal(stream.encode(0, h_BTD, want="gradient"), 2 * h_BTD + 1)
        np.testing.assert_array_equal(stream.settle(0, h_BTD), 3 * h_BTD)


def test_several_threads_have_steps_in_flight(server: EncoderServer) -> None:
    def train(step: int) -> None:
        h_BTD = make_h(seed=step)
        np.testing.assert_array_equal(stream.encode(step, h_BTD, want="gradient"), 2 * h_BTD + 1)
        np.testing.assert_array_equal(stream.settle(step, h_BTD), 3 * h_BTD)

    with connect(server.address, max_in_flight=4) as stream, ThreadPoolExecutor(4) as pool:
        list(pool.map(train, range(100)))
        assert stream.steps == 100
        assert stream.wait_s > 0


def test_many_sessions_at_once(server: EncoderServer) -> None:
    def work(number: int) -> None:
        with connect(server.address, make_grant(site=f"site-{number}")) as stream:
            for step in range(10):
                h_BTD = make_h(seed=100 * number + step)
                np.testing.assert_array_equal(stream.encode(step, h_BTD), 2 * h_BTD + 1)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))
    eventually(lambda: server.stats().live_sessions == 0)
    assert server.stats().encoded == 160


@pytest.mark.parametrize("limits", [Limits(max_sessions=2), Limits(max_sessions_per_site=2)])
def test_one_session_too_many_is_told_when_to_come_back(host: FakeHost, limits: Limits) -> None:
    with EncoderServer(host, key=KEY, limits=limits) as server:
        with connect(server.address), connect(server.address):
            with pytest.raises(OverloadedError, match="2 are allowed") as caught:
                connect(server.address)
            assert caught.value.retry_after_s == 2.0
            assert server.stats().refused == {"overloaded": 1}
        eventually(lambda: server.stats().live_sessions == 0)
        connect(server.address).close()


def test_a_flood_of_streams_fails_fast_and_hangs_nobody(host: FakeHost) -> None:
    def attempt(_: int) -> bool:
        try:
            with connect(server.address, connect_timeout_s=10) as stream:
                stream.encode(0, make_h())
                done.wait(10)
                return True
        except OverloadedError:
            if next(refusals) >= 28:
                done.set()
            return False

    done, refusals = threading.Event(), iter(range(1, 100))
    with (
        EncoderServer(host, key=KEY, limits=Limits(max_sessions=2)) as server,
        ThreadPoolExecutor(30) as pool,
    ):
        assert sum(pool.map(attempt, range(30))) == 2


def test_a_token_has_one_live_stream(server: EncoderServer) -> None:
    grant = make_grant()
    token = token_for(grant)
    with (
        StreamEncoder(server.address, token, grant),
        pytest.raises(OverloadedError, match="already has a live stream"),
    ):
        StreamEncoder(server.address, token, grant)
    eventually(lambda: server.stats().live_sessions == 0)
    StreamEncoder(server.address, token, grant).close()


def test_steps_are_counted_over_all_streams_of_a_token(
    server: EncoderServer, unharmed: None
) -> None:
    grant = make_grant(max_steps=3)
    token = token_for(grant)
    with StreamEncoder(server.address, token, grant) as stream:
        stream.encode(0, make_h())
        stream.encode(1, make_h())
    eventually(lambda: server.stats().live_sessions == 0)
    with StreamEncoder(server.address, token, grant) as stream:
        stream.encode(0, make_h())
        with pytest.raises(RefusedError, match="3 steps and all are used"):
            stream.encode(1, make_h())


def test_the_client_checks_before_it_sends(server: EncoderServer) -> None:
    with connect(server.address) as stream:
        with pytest.raises(ProtocolError, match="is wanted"):
            stream.encode(0, make_h(2, 3, WIDTH + 1))
        with pytest.raises(RefusedError, match="lower batch-size"):
            stream.encode(0, make_h(5, 3, WIDTH))
        with pytest.raises(ProtocolError, match="not kept"):
            stream.settle(7, make_h())
        for step in range(8):
            stream.encode(step, make_h(), want="gradient")
        with pytest.raises(RefusedError, match="settle them first"):
            stream.encode(8, make_h(), want="gradient")
        with pytest.raises(ProtocolError, match="is wanted"):
            stream.settle(0, make_h(1, 1, 1))
        for step in range(8):
            stream.settle(step, make_h())
    assert server.stats().refused == {}


def test_a_failing_host_says_little_and_logs_all(
    server: EncoderServer, host: FakeHost, unharmed: None, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(step: int) -> None:
        raise RuntimeError("a secret path: /srv/weights")

    host.before_encode = fail
    with connect(server.address) as stream:
        with pytest.raises(EncoderError, match="its log says why") as caught:
            stream.encode(0, make_h())
        assert "secret" not in str(caught.value)
        with pytest.raises(EncoderError, match="its log says why"):
            stream.encode(1, make_h())
    assert "/srv/weights" in caplog.text
    assert server.stats().refused == {"internal": 1}
    host.before_encode = lambda step: None


def test_a_version_that_is_not_published_is_refused(server: EncoderServer, unharmed: None) -> None:
    with pytest.raises(RefusedError, match="not published"):
        connect(server.address, make_grant(version="v9"))


def test_publish_and_capabilities(server: EncoderServer, host: FakeHost) -> None:
    publisher = sign_publisher("run", KEY, 60)
    tensors = make_h(3, 1000, 1000).tobytes()  # 12 MB: more than a gRPC message
    publish(server.address, publisher, "v1", tensors)
    assert host.published["v1"] == tensors
    offers = capabilities(server.address, publisher)
    assert offers == host.capabilities() == capabilities(server.address, token_for(make_grant()))
    with pytest.raises(ProtocolError, match="no safetensors"):
        publish(server.address, publisher, "v2", b"")
    with pytest.raises(RefusedError, match="publisher's token"):
        publish(server.address, token_for(make_grant()), "v2", tensors)
    with pytest.raises(RefusedError):
        publish(server.address, sign_publisher("run", KEY[::-1], 60), "v2", tensors)
    with pytest.raises(ConfigError, match="1 to 128"):
        publish(server.address, publisher, "", tensors)
    assert set(host.published) == {"v0", "v1"}


def test_a_version_beyond_the_limit_is_refused(host: FakeHost) -> None:
    with (
        EncoderServer(host, key=KEY, limits=Limits(max_publish_bytes=1000)) as server,
        pytest.raises(ProtocolError, match="at most 1000"),
    ):
        publish(server.address, sign_publisher("run", KEY, 60), "v1", bytes(1001))


def test_the_wire_adds_less_than_a_hundredth() -> None:
    host, h_BTD = FakeHost(width=192), make_h(16, 197, 192)
    grant = make_grant(max_batch=16, max_tokens=197)
    with EncoderServer(host, key=KEY) as server, connect(server.address, grant) as stream:
        stream.encode(0, h_BTD, want="gradient")
        stream.settle(0, h_BTD)
        t = stream.traffic()
    assert t.payload_up == t.payload_down == 2 * h_BTD.nbytes
    assert t.bytes_up / t.payload_up <= 1.01
    assert t.bytes_down / t.payload_down <= 1.01


def test_closing_twice_is_harmless_and_a_closed_stream_says_so(server: EncoderServer) -> None:
    stream = connect(server.address)
    stream.close()
    stream.close()
    with pytest.raises(UnreachableError, match="closed"):
        stream.encode(0, make_h())
