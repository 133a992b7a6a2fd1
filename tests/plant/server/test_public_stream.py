"""Split steps through the real nginx: the same results as without, the right site or none, and errors of the same kinds."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from fedsplit.core.errors import EncoderError, OverloadedError, RefusedError, UnreachableError
from fedsplit.core.names import certificate_name
from fedsplit.core.proxied import bare_serial, reason_text
from fedsplit.plant import paths, pki
from fedsplit.transport.calls import capabilities, publish
from fedsplit.transport.client import ClientTls, StreamEncoder
from fedsplit.transport.server import EncoderServer, Limits
from fedsplit.transport.tokens import sign_publisher
from tests.plant.server.public_port import (
    SECRET,
    Certificate,
    PublicPort,
    certificate,
    free_port,
    make_folder,
    needs_nginx,
    public_port,
)
from tests.transport.conftest import (
    KEY,
    FakeHost,
    connect,
    eventually,
    make_grant,
    make_h,
    token_for,
)

pytestmark = needs_nginx


class Plant:
    """The public port and the encoder behind it."""

    def __init__(self, port: PublicPort, encoder: EncoderServer, host: FakeHost) -> None:
        self.port, self.encoder, self.host = port, encoder, host

    def tls(self, site: Certificate | None) -> ClientTls:
        ca = self.port.folder.ca
        return (
            ClientTls(root_ca=ca, cert=site.cert, key=site.key) if site else ClientTls(root_ca=ca)
        )

    def dial(self, site: Certificate | None, name: str = "line-1", **options: Any) -> StreamEncoder:
        return connect(self.port.address, make_grant(site=name), tls=self.tls(site), **options)

    def revoke(self, **what: list[str]) -> None:
        fresh = self.port.folder.revoked.with_suffix(".fresh")
        fresh.write_text(json.dumps({"names": [], "serials": []} | what))
        fresh.replace(self.port.folder.revoked)


@pytest.fixture(scope="module")
def _plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    folder = make_folder(tmp_path_factory.mktemp("federation") / "plant")
    folder.revoked.write_text("{}")
    host = FakeHost(width=50_000)
    with (
        EncoderServer(
            host, key=KEY, proxy_secret=SECRET.encode(), revoked_file=folder.revoked,
            limits=Limits(max_sessions_per_site=2),
        ) as encoder,
        public_port(folder, int(encoder.address.rpartition(":")[2])) as port,
    ):  # fmt: skip
        yield Plant(port, encoder, host)


@pytest.fixture
def plant(_plant: Plant) -> Iterator[Plant]:
    _plant.port.control.seen.clear()
    _plant.port.control.refuses.clear()
    yield _plant
    eventually(lambda: _plant.encoder.stats().live_sessions == 0)


@pytest.fixture(scope="module")
def member(_plant: Plant) -> Certificate:
    return certificate(_plant.port.folder, "line-1")


def test_steps_through_the_proxy_equal_steps_without(plant: Plant, member: Certificate) -> None:
    h_BTD, dz = make_h(4, 6, 50_000), make_h(4, 6, 50_000, seed=1)  # 4.8 MB, ten chunks
    with EncoderServer(plant.host, key=KEY) as bare, connect(bare.address) as direct:
        z, dh = direct.encode(0, h_BTD, want="gradient"), direct.settle(0, dz)
    with plant.dial(member) as stream:
        for step in range(3):
            np.testing.assert_array_equal(stream.encode(step, h_BTD, want="gradient"), z)
            np.testing.assert_array_equal(stream.settle(step, dz), dh)
    asked = [s for s in plant.port.control.seen if s[1] == paths.AUTHORISE]
    assert len(asked) == 1
    assert bare_serial(asked[0][2][paths.SERIAL_HEADER]) == member.serial
    token = token_for(make_grant(site="line-1"))
    assert capabilities(plant.port.address, token, plant.tls(member)).backbone == "fake"


def test_a_site_with_a_japanese_name(plant: Plant) -> None:
    name = "検査ライン・一"
    shown = certificate(plant.port.folder, certificate_name(name))
    with plant.dial(shown, name) as stream:
        assert stream.encode(0, make_h(1, 1, 50_000)).shape == (1, 1, 50_000)


def test_who_is_refused_and_why(
    plant: Plant, member: Certificate, caplog: pytest.LogCaptureFixture
) -> None:
    folder = plant.port.folder
    other_ca = pki.make_ca("another", days=10)
    cases = [
        (None, "line-1", "a client certificate is wanted and none came"),
        (certificate(folder, "line-1", ca=other_ca), "line-1", "not of this federation"),
        (
            certificate(folder, "line-1", days=-1 / 30),
            "line-1",
            "certificate has expired: join again",
        ),
        (member, "line-2", "token is for site 'line-2', the certificate for 'line-1'"),
    ]
    for shown, name, why in cases:
        with pytest.raises(RefusedError, match=why):
            plant.dial(shown, name, connect_timeout_s=10)
        with pytest.raises(RefusedError, match=why):
            capabilities(plant.port.address, token_for(make_grant(site=name)), plant.tls(shown))
    assert "token is for site 'line-2', the certificate for 'line-1'" in caplog.text
    for reason in ("the operator has revoked line-1", '検査ライン: 100 % "revoked" \\'):
        plant.port.control.refuses[member.serial] = reason_text(reason)
        with pytest.raises(RefusedError, match=re.escape(reason)):
            plant.dial(member)
    plant.port.control.refuses.clear()
    # The ServerApp's calls do not come this way, nor do Publish and Collect exist here.
    with pytest.raises(RefusedError, match="publisher's call came from outside"):
        capabilities(plant.port.address, sign_publisher("run", KEY, 60), plant.tls(member))
    with pytest.raises(EncoderError):
        publish(plant.port.address, sign_publisher("run", KEY, 60), "v7", b"x", plant.tls(member))
    assert "v7" not in plant.host.published


def test_headers_of_a_caller_have_no_effect(plant: Plant, member: Certificate) -> None:
    metadata = (
        ("authorization", f"Bearer {token_for(make_grant(site='line-2'))}"),
        (paths.PROXY_HEADER, SECRET),
        (paths.SITE_HEADER, "line-2"),
        (paths.SERIAL_HEADER, "42"),
    )
    with grpc.secure_channel(plant.port.address, plant.tls(member).credentials()) as channel:
        call = channel.unary_unary("/fedsplit.v1.Encoder/Capabilities")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", metadata=metadata, timeout=10)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "for site 'line-2', the certificate for 'line-1'" in caught.value.details()


def test_a_full_encoder_says_when_to_come_back(plant: Plant, member: Certificate) -> None:
    with plant.dial(member), plant.dial(member), pytest.raises(OverloadedError) as caught:
        plant.dial(member)
    assert caught.value.retry_after_s == 2.0


@pytest.mark.parametrize("by", ["names", "serials"])
def test_a_revoked_sites_stream_ends_within_two_seconds(
    plant: Plant, member: Certificate, by: str
) -> None:
    with plant.dial(member) as stream:
        stream.encode(0, make_h(1, 1, 50_000))
        plant.revoke(**{by: ["line-1" if by == "names" else member.serial]})
        eventually(lambda: plant.encoder.stats().live_sessions == 0, 2.0)
        with pytest.raises(RefusedError, match="this site's access was revoked"):
            stream.encode(1, make_h(1, 1, 50_000))
    plant.revoke()
    eventually(lambda: _lets_in(plant, member))


def _lets_in(plant: Plant, member: Certificate) -> bool:
    try:
        plant.dial(member).close()
    except RefusedError:
        return False
    return True


def test_a_reload_leaves_streams_alone(plant: Plant, member: Certificate) -> None:
    with plant.dial(member) as stream:
        stream.encode(0, make_h(1, 1, 50_000))
        before = workers(plant.port.process.pid)
        plant.port.process.send_signal(signal.SIGHUP)
        eventually(lambda: bool(workers(plant.port.process.pid) - before))
        np.testing.assert_array_equal(stream.encode(1, h := make_h(4, 6, 50_000)), 2 * h + 1)
        with plant.dial(member) as fresh:
            fresh.encode(0, make_h(1, 1, 50_000))


def workers(pid: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def _serve(port: Any, port_number: int) -> None:
    """An encoder in a process of its own, which hangs in its second step."""
    host = FakeHost()
    host.before_encode = lambda step: threading.Event().wait(60 if step else 0) and None  # type: ignore[func-returns-value]
    with EncoderServer(
        host, key=KEY, bind=f"127.0.0.1:{port_number}", proxy_secret=SECRET.encode()
    ):
        port.send(os.getpid())
        port.recv()


def test_an_encoder_that_dies_gives_the_same_error_as_without_a_proxy(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "plant")
    number = free_port()
    member = certificate(folder, "site-1")
    tls = ClientTls(root_ca=folder.ca, cert=member.cert, key=member.key)
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(there, number))
    process.start()
    with public_port(folder, number) as port:
        here.recv()
        with connect(port.address, tls=tls) as stream:
            stream.encode(0, make_h())
            threading.Timer(0.5, process.kill).start()
            with pytest.raises(
                UnreachableError, match=r"the connection to the encoder .* was lost"
            ):
                stream.encode(1, make_h())
        process.join()
        with pytest.raises(UnreachableError, match="service of the server does not answer"):
            connect(port.address, tls=tls)
        port.process.terminate()
        port.process.wait(10)
        with pytest.raises(UnreachableError, match="no encoder answers"):
            connect(port.address, tls=tls, connect_timeout_s=5)
