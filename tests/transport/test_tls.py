"""Real TLS on loopback, with a CA that the fixture makes; and what happens without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsplit.core.errors import ConfigError, RefusedError, UnreachableError
from fedsplit.transport.client import ClientTls, capabilities
from fedsplit.transport.server import EncoderServer, ServerTls
from tests.transport.authority import Authority
from tests.transport.conftest import KEY, FakeHost, connect, make_grant, make_h, token_for


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"), "ca")


@pytest.fixture(scope="module")
def other_ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("other"), "other-ca")


@pytest.fixture
def tls_server(host: FakeHost, ca: Authority) -> Iterator[EncoderServer]:
    cert, key = ca.issue("localhost")
    with EncoderServer(host, key=KEY, tls=ServerTls(cert=cert, key=key)) as running:
        yield running


def test_the_right_ca_works(tls_server: EncoderServer, ca: Authority) -> None:
    tls = ClientTls(root_ca=ca.pem)
    with connect(tls_server.address, tls=tls) as stream:
        assert stream.encode(0, make_h()).shape == make_h().shape
    assert capabilities(tls_server.address, token_for(make_grant()), tls).blocks == 12


def test_the_wrong_ca(tls_server: EncoderServer, other_ca: Authority) -> None:
    with pytest.raises(UnreachableError, match=r"TLS handshake .* root CA must have signed"):
        connect(tls_server.address, tls=ClientTls(root_ca=other_ca.pem), connect_timeout_s=10)


def test_plaintext_against_tls(tls_server: EncoderServer) -> None:
    with pytest.raises(UnreachableError, match="if it speaks TLS, give its root CA"):
        connect(tls_server.address, connect_timeout_s=10)


def test_tls_against_plaintext(server: EncoderServer, ca: Authority) -> None:
    with pytest.raises(UnreachableError, match="does not speak TLS"):
        connect(server.address, tls=ClientTls(root_ca=ca.pem), connect_timeout_s=10)


def test_mutual_tls_binds_the_token_to_the_certificate(
    host: FakeHost, ca: Authority, other_ca: Authority
) -> None:
    cert, key = ca.issue("localhost")
    (one, one_key), (two, two_key) = ca.issue("site-1"), ca.issue("site-2")
    stranger, stranger_key = other_ca.issue("site-1")
    with EncoderServer(
        host, key=KEY, tls=ServerTls(cert=cert, key=key, client_ca=ca.pem)
    ) as server:
        connect(server.address, tls=ClientTls(root_ca=ca.pem, cert=one, key=one_key)).close()
        with pytest.raises(RefusedError, match="token is for site 'site-1'"):
            connect(server.address, tls=ClientTls(root_ca=ca.pem, cert=two, key=two_key))
        assert server.stats().refused == {"certificate": 1}
        for tls in (
            ClientTls(root_ca=ca.pem),
            ClientTls(root_ca=ca.pem, cert=stranger, key=stranger_key),
        ):
            with pytest.raises(UnreachableError):
                connect(server.address, tls=tls, connect_timeout_s=10)


def test_files_that_cannot_be_used(host: FakeHost, ca: Authority, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no certificate")
    cert, _ = ca.issue("localhost")
    for path, says in (
        (tmp_path / "gone", "cannot be read"),
        (tmp_path / "text", "not a PEM file"),
    ):
        with pytest.raises(ConfigError, match=says):
            EncoderServer(host, key=KEY, tls=ServerTls(cert=cert, key=path))
    with pytest.raises(ValueError, match="both"):
        ClientTls(cert=cert)


def test_plaintext_stays_on_this_machine(host: FakeHost) -> None:
    with pytest.raises(ConfigError, match="without TLS"):
        EncoderServer(host, key=KEY, bind="0.0.0.0:0")
    with EncoderServer(host, key=KEY, bind="0.0.0.0:0", allow_insecure=True) as server:
        connect("127.0.0.1:" + server.address.rpartition(":")[2]).close()
    with pytest.raises(ConfigError, match="no TLS is set"):
        connect("192.0.2.1:9443")
    for address in ("nonsense", ":1", "host:port", "host:99999"):
        with pytest.raises(ConfigError, match="HOST:PORT is wanted"):
            connect(address)
