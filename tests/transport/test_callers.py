"""Token and certificate belong together, behind a proxy and without one; and who is revoked is out within two seconds."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedsplit.core.errors import ConfigError, RefusedError, UnreachableError
from fedsplit.core.names import certificate_name
from fedsplit.core.proxied import PROXY_HEADER, SERIAL_HEADER, SITE_HEADER
from fedsplit.transport.calls import capabilities, publish
from fedsplit.transport.client import ClientTls
from fedsplit.transport.keys import read_proxy_secret
from fedsplit.transport.server import EncoderServer, ServerTls
from fedsplit.transport.tokens import sign_publisher
from fedsplit.transport.wiring import CAPABILITIES, STEPS
from tests.transport.authority import Authority, serial_of
from tests.transport.conftest import (
    KEY,
    FakeHost,
    connect,
    eventually,
    make_grant,
    make_h,
    token_for,
)

SECRET = "a-secret-that-proxy-and-encoder-share"
Headers = Sequence[tuple[str, str]]


def through_proxy(site: str, *, secret: str = SECRET, serial: str = "") -> Headers:
    """What a proxy would say of a site."""
    name = certificate_name(site)
    return ((PROXY_HEADER, secret), (SITE_HEADER, name), (SERIAL_HEADER, serial))


def outcome(
    address: str, token: str, headers: Headers, method: str = CAPABILITIES
) -> tuple[Any, str]:
    """The status and the words with which a call ends whose body is empty."""
    metadata = (("authorization", f"Bearer {token}"), *headers)
    with grpc.insecure_channel(address) as channel:
        call = channel.stream_stream(method)(
            iter([b""] if method == CAPABILITIES else []), metadata=metadata
        )
        with suppress(grpc.RpcError):
            list(call)
        return call.code(), call.details()


@pytest.fixture
def proxied(host: FakeHost) -> Iterator[EncoderServer]:
    with EncoderServer(host, key=KEY, proxy_secret=SECRET.encode()) as running:
        yield running


def write(path: Path, *, names: Sequence[str] = (), serials: Sequence[str] = ()) -> None:
    fresh = path.with_suffix(".fresh")
    fresh.write_text(json.dumps({"names": list(names), "serials": list(serials)}))
    fresh.replace(path)


@pytest.mark.parametrize("method", [STEPS, CAPABILITIES])
def test_behind_a_proxy_the_proved_name_must_be_the_tokens(
    proxied: EncoderServer, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    def ask(site: str, headers: Headers) -> tuple[Any, str]:
        return outcome(proxied.address, token_for(make_grant(site=site)), headers, method)

    denied = grpc.StatusCode.PERMISSION_DENIED
    for site in ("line-1", "検査ライン"):
        assert ask(site, through_proxy(site))[0] is grpc.StatusCode.OK
        assert ask(site, ()) == (denied, f"the token of site {site!r} came past the proxy: sites dial the federation's public address")  # fmt: skip
    code, text = ask("line-1", through_proxy("line-2"))
    assert code is denied
    assert "token is for site 'line-1', the certificate for 'line-2'" in text
    assert "certificate for 'line-2'" in caplog.text
    digest = certificate_name("検査ライン")
    assert repr(digest) in ask("検査ライン", through_proxy("line-2"))[1]
    assert (
        "the certificate for nobody"
        in ask("line-1", ((PROXY_HEADER, SECRET), (SITE_HEADER, "")))[1]
    )
    for forged in (through_proxy("line-1", secret="x" * 32), through_proxy("line-1")[1:]):
        assert "does not hold the proxy's secret" in ask("line-1", forged)[1]
    assert "twice" in ask("line-1", (*through_proxy("line-2"), (SITE_HEADER, "line-1")))[1]


def test_a_publisher_comes_past_the_proxy_and_not_through_it(
    proxied: EncoderServer, host: FakeHost
) -> None:
    token = sign_publisher("run", KEY, 60)
    publish(proxied.address, token, "v9", b"tensors")
    assert capabilities(proxied.address, token).versions == ("v0", "v9")
    for headers in (through_proxy("line-1"), through_proxy("line-1", secret="x" * 32)):
        code, text = outcome(proxied.address, token, headers)
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert "publisher's call came from outside" in text or "proxy's secret" in text
    assert proxied.stats().refused == {"certificate": 2}


def test_a_revoked_sites_stream_ends_at_once_and_no_new_one_begins(
    host: FakeHost, tmp_path: Path
) -> None:
    file = tmp_path / "revoked.json"
    write(file)
    with (
        EncoderServer(host, key=KEY, revoked_file=file) as server,
        connect(server.address) as stream,
        connect(server.address, make_grant(site="site-2")) as other,
    ):
        stream.encode(0, make_h())
        write(file, names=["site-1"])
        began = time.monotonic()
        eventually(lambda: server.stats().live_sessions == 1, 2.0)
        with pytest.raises(RefusedError, match="this site's access was revoked"):
            stream.encode(1, make_h())
        assert time.monotonic() - began < 2.0
        with pytest.raises(RefusedError, match="this site's access was revoked"):
            connect(server.address)
        other.encode(0, make_h())
        write(file)
        eventually(lambda: _lets_in(server.address))


def test_a_revoked_site_whose_step_is_being_computed_is_cut(host: FakeHost, tmp_path: Path) -> None:
    file = tmp_path / "revoked.json"
    write(file)
    go_on = threading.Event()
    host.before_encode = lambda step: go_on.wait(20) and None  # type: ignore[func-returns-value]
    with (
        EncoderServer(host, key=KEY, revoked_file=file) as server,
        connect(server.address) as stream,
    ):
        caught: list[Exception] = []

        def step() -> None:
            try:
                stream.encode(0, make_h())
            except (RefusedError, UnreachableError) as error:
                caught.append(error)

        caller = threading.Thread(target=step)
        caller.start()
        eventually(lambda: bool(host.encoders))
        write(file, names=["site-1"])
        caller.join(3.0)
        go_on.set()
        assert caught


def test_revoked_serial_numbers_with_client_certificates_and_behind_a_proxy(
    host: FakeHost, tmp_path: Path
) -> None:
    ca = Authority(tmp_path, "ca")
    cert, key = ca.issue("localhost")
    one, one_key = ca.issue("site-1")
    file = tmp_path / "revoked.json"
    write(file)
    tls = ServerTls(cert=cert, key=key, client_ca=ca.pem)
    mine = ClientTls(root_ca=ca.pem, cert=one, key=one_key)
    with (
        EncoderServer(host, key=KEY, tls=tls, revoked_file=file) as server,
        connect(server.address, tls=mine) as stream,
    ):
        write(file, serials=["00" + serial_of(one).lower()])
        eventually(lambda: server.stats().live_sessions == 0, 2.0)
        with pytest.raises(RefusedError, match="revoked"):
            stream.encode(0, make_h())
        with pytest.raises(RefusedError, match="revoked"):
            capabilities(server.address, token_for(make_grant()), mine)
    with EncoderServer(host, key=KEY, proxy_secret=SECRET.encode(), revoked_file=file) as server:
        for serial, code in ((serial_of(one), "PERMISSION_DENIED"), ("ABCDEF", "OK")):
            headers = through_proxy("site-1", serial=serial)
            assert outcome(server.address, token_for(make_grant()), headers)[0].name == code


def test_with_client_certificates_capabilities_checks_the_name_too(
    host: FakeHost, tmp_path: Path
) -> None:
    ca = Authority(tmp_path, "ca")
    cert, key = ca.issue("localhost")
    two, two_key = ca.issue("site-2")
    tls = ServerTls(cert=cert, key=key, client_ca=ca.pem)
    with EncoderServer(host, key=KEY, tls=tls) as server:
        theirs = ClientTls(root_ca=ca.pem, cert=two, key=two_key)
        with pytest.raises(
            RefusedError, match=r"for site 'site-1', the certificate for .*'site-2'"
        ):
            capabilities(server.address, token_for(make_grant()), theirs)


@pytest.mark.parametrize(
    "damage", ["gone", '{"names": ["site', '{"name": ["site-1"]}', '{"names": "site-1"}', "[]"]
)
def test_a_damaged_list_changes_nothing_and_says_so_once(
    host: FakeHost, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "revoked.json"
    write(file, names=["site-1"])
    with EncoderServer(host, key=KEY, revoked_file=file) as server:
        if damage == "gone":
            file.unlink()
        else:
            file.write_text(damage)
        eventually(lambda: "1 names and 0 certificates are refused" in caplog.text)
        time.sleep(0.7)
        assert caplog.text.count("cannot be used") == 1
        with pytest.raises(RefusedError, match="revoked"):
            connect(server.address)
        write(file)
        eventually(lambda: _lets_in(server.address))


def test_what_the_encoder_does_not_start_with(host: FakeHost, tmp_path: Path) -> None:
    file = tmp_path / "revoked.json"
    with pytest.raises(ConfigError, match=r'cannot be used.*{"serials": \[\], "names": \[\]}'):
        EncoderServer(host, key=KEY, revoked_file=file)
    for text in ("short", "ab" * 16 + '";', ""):
        file.write_text(text)
        with pytest.raises(ConfigError, match="letters, digits"):
            read_proxy_secret(file)
    with pytest.raises(ConfigError, match=r"nowhere cannot be read .*token_hex"):
        read_proxy_secret(tmp_path / "nowhere")
    file.write_text(SECRET + "\n")
    assert read_proxy_secret(file) == SECRET.encode()


def _lets_in(address: str) -> bool:
    try:
        connect(address).close()
    except RefusedError:
        return False
    return True
