"""Peers that die, vanish, stall, sleep or come too early: who notices, how fast, and what is left behind."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from fedsplit.core.errors import ConfigError, UnreachableError
from fedsplit.core.programs import free_port
from fedsplit.transport.client import capabilities
from fedsplit.transport.codec import Dtype
from fedsplit.transport.frames import Flag, FrameKind
from fedsplit.transport.server import EncoderServer, Limits
from tests.transport.conftest import (
    KEY,
    FakeHost,
    RawClient,
    connect,
    eventually,
    make_grant,
    make_h,
    token_for,
)

SERVE = """
import sys, time
from tests.transport.conftest import KEY, FakeHost
from fedsplit.transport.server import EncoderServer
host = FakeHost()
host.before_encode = lambda step: time.sleep(60 if step else 0)
with EncoderServer(host, key=KEY) as server:
    print(server.address, flush=True)
    sys.stdin.read()
"""


def test_nobody_listens() -> None:
    started = time.monotonic()
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(
        UnreachableError, match=f"no encoder answers at {address} .*fedsplit encoder serve"
    ):
        connect(address, connect_timeout_s=5)
    with pytest.raises(UnreachableError, match="no encoder answers"):
        capabilities(address, token_for(make_grant()), timeout_s=5)
    assert time.monotonic() - started < 5


def test_something_listens_and_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        started = time.monotonic()
        with pytest.raises(UnreachableError, match="within 1 s"):
            connect(f"127.0.0.1:{mute.getsockname()[1]}", connect_timeout_s=1)
        assert time.monotonic() - started < 4


def test_the_server_is_killed_inside_a_step() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            with connect(address) as stream:
                stream.encode(0, make_h())
                threading.Timer(0.3, process.send_signal, [signal.SIGKILL]).start()
                started = time.monotonic()
                with pytest.raises(UnreachableError, match=address):
                    stream.encode(1, make_h())
                assert time.monotonic() - started < 5
                with pytest.raises(UnreachableError):
                    stream.encode(2, make_h())
        finally:
            process.kill()


def test_a_server_that_shuts_down_says_so(host: FakeHost) -> None:
    server = EncoderServer(host, key=KEY)
    with connect(server.address) as stream:
        stream.encode(0, make_h(), want="gradient")
        started = time.monotonic()
        server.close()
        server.close()
        assert time.monotonic() - started < 3
        with pytest.raises(UnreachableError, match="shutting down"):
            stream.encode(1, make_h())
    assert server.stats().live_sessions == server.stats().kept_steps == 0
    assert [encoder.closed for encoder in host.encoders] == [1]


def test_a_step_in_work_is_finished_before_the_server_stops(host: FakeHost) -> None:
    host.before_encode = lambda step: time.sleep(0.5)
    with EncoderServer(host, key=KEY) as server, connect(server.address) as stream:
        threading.Timer(0.2, server.close).start()
        assert stream.encode(0, make_h()).shape == make_h().shape


def test_a_client_that_vanishes_leaves_nothing(
    server: EncoderServer, host: FakeHost, unharmed: None
) -> None:
    raw = RawClient(server.address)
    raw.greet()
    raw.send(*raw.tensor(FrameKind.ENCODE, make_h(), 0, Flag.KEEP))
    raw.receive()
    assert server.stats().kept_steps == 1
    raw.__exit__()
    eventually(lambda: server.stats().kept_steps == 0)


def test_a_client_that_vanishes_while_the_host_computes(
    server: EncoderServer, host: FakeHost, unharmed: None
) -> None:
    host.before_encode = lambda step: time.sleep(0.3)
    with RawClient(server.address) as raw:
        raw.greet()
        raw.send(*raw.tensor(FrameKind.ENCODE, make_h(), 0, Flag.KEEP))
        eventually(lambda: server.stats().kept_steps == 1)
    eventually(lambda: server.stats().live_sessions == 0)


@pytest.mark.parametrize("polite", [True, False])
def test_idle_sessions_end(host: FakeHost, polite: bool) -> None:
    limits = Limits(idle_timeout_s=0.5, hello_timeout_s=0.3)
    with EncoderServer(host, key=KEY, limits=limits) as server, RawClient(server.address) as raw:
        if polite:
            raw.greet()
        else:
            raw.send()
        error = raw.error()
        assert error.code == "unavailable"
        assert ("0.5 s" if polite else "0.3 s") in error.message
        eventually(lambda: server.stats().live_sessions == 0)


def test_idle_is_not_dead_while_something_moves(host: FakeHost) -> None:
    host.before_encode = lambda step: time.sleep(0.8)  # the host's own time does not count
    with (
        EncoderServer(host, key=KEY, limits=Limits(idle_timeout_s=0.5)) as server,
        connect(server.address) as stream,
    ):
        for step in range(3):
            stream.encode(step, make_h())
            time.sleep(0.2)


def test_a_client_that_does_not_read_is_cancelled() -> None:
    host, limits = FakeHost(width=1024), Limits(idle_timeout_s=1.0)
    grant = make_grant(max_batch=64, max_tokens=64)
    with (
        EncoderServer(host, key=KEY, limits=limits) as server,
        RawClient(server.address, grant) as raw,
    ):
        raw.greet()
        for step in range(4):
            raw.send(*raw.tensor(FrameKind.ENCODE, make_h(64, 64, 1024), step))
        eventually(lambda: server.stats().refused == {"unavailable": 1}, within_s=10)
        eventually(lambda: server.stats().live_sessions == 0)
    assert [encoder.closed for encoder in host.encoders] == [1]


def test_the_step_timeout(server: EncoderServer, host: FakeHost) -> None:
    host.before_encode = lambda step: time.sleep(1.5)
    with connect(server.address, step_timeout_s=0.3) as stream:
        started = time.monotonic()
        with pytest.raises(UnreachableError, match=r"did not answer ENCODE step 0 within 0\.3 s"):
            stream.encode(0, make_h())
        assert time.monotonic() - started < 1.2


def test_closing_wakes_those_who_wait(server: EncoderServer, host: FakeHost) -> None:
    release = threading.Event()
    host.before_encode = lambda step: release.wait(10) and None
    stream = connect(server.address)
    errors: list[Exception] = []

    def call() -> None:
        try:
            stream.encode(0, make_h())
        except UnreachableError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.2)
    stream.close()
    thread.join(5)
    release.set()
    assert len(errors) == 1


def test_a_port_in_use(server: EncoderServer) -> None:
    with pytest.raises(ConfigError, match=f"cannot listen on {server.address}: the port is in use"):
        EncoderServer(FakeHost(), key=KEY, bind=server.address)


class Proxy:
    """A TCP proxy that can turn into a black hole: it stays connected and passes nothing on."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target, self.hole = (host, int(port)), threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = [self._listener]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        try:
            near, _ = self._listener.accept()
        except OSError:
            return
        far = socket.create_connection(self._target)
        self._sockets += [near, far]
        for pair in ((near, far), (far, near)):
            self._threads.append(threading.Thread(target=self._pump, args=pair))
            self._threads[-1].start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                if not self.hole.is_set():
                    sink.sendall(data)
        except OSError:
            return

    def close(self) -> None:
        for each in self._sockets:
            with each:
                try:
                    each.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue
        for thread in self._threads:
            thread.join()


@contextmanager
def proxied(target: str) -> Iterator[Proxy]:
    proxy = Proxy(target)
    try:
        yield proxy
    finally:
        proxy.close()


@pytest.mark.slow
def test_both_sides_notice_a_dead_peer_within_20_s(server: EncoderServer, host: FakeHost) -> None:
    with proxied(server.address) as proxy, connect(proxy.address) as stream:
        stream.encode(0, make_h(), want="gradient")
        proxy.hole.set()
        started = time.monotonic()
        with pytest.raises(UnreachableError):
            stream.encode(1, make_h())
        eventually(lambda: server.stats().live_sessions == 0, within_s=20)
        assert time.monotonic() - started < 20
    assert server.stats().kept_steps == 0


@pytest.mark.slow
def test_an_idle_session_outlives_many_pings(server: EncoderServer) -> None:
    with connect(server.address) as stream:
        time.sleep(25)
        np.testing.assert_array_equal(stream.encode(0, make_h()), 2 * make_h() + 1)


def test_damage_on_the_way_is_seen(server: EncoderServer, unharmed: None) -> None:
    with RawClient(server.address) as raw:
        raw.greet()
        frame = bytearray(raw.tensor(FrameKind.ENCODE, make_h(), dtype=Dtype.FLOAT32)[0])
        frame[-1] ^= 0x10
        raw.send(bytes(frame))
        assert "damaged" in raw.error().message
