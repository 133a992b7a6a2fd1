"""What the public port lets through, with the real nginx: exactly the listed paths, by their plain names, as who one is."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.supercore.routers.health import router as health
from flwr.supercore.routers.runtime import create_runtime_router
from flwr.supercore.routers.runtime.responses import router as responses
from flwr.superlink.routers.control.router import router as control
from flwr.superlink.routers.fleet.router import router as fleet

from fedsplit.core.proxied import bare_serial
from fedsplit.plant import paths, pki
from fedsplit.transport.wiring import COLLECT, PUBLISH
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

pytestmark = needs_nginx
DIGEST = "ab" * 32
FLEET = [f"{paths.FLEET}/{call}" for call in paths.FLEET_CALLS]
OPEN = {paths.HELLO: "GET", paths.JOIN: "POST"}
CERTIFIED = {
    paths.RENEW: "POST",
    paths.REPORT: "POST",
    paths.GRANT: "POST",
    paths.MANIFEST: "GET",
    f"{paths.FILES}/config.json": "GET",
    f"{paths.TENSORS}/{DIGEST}": "GET",
    f"{paths.MODULES}/{DIGEST}": "GET",
    f"{paths.MODULES}/{DIGEST}/files/fedsplit.json": "GET",
}
LISTED = dict.fromkeys(FLEET, "POST") | OPEN | CERTIFIED
METHODS = ("GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PublicPort]:
    folder = make_folder(tmp_path_factory.mktemp("federation") / "plant")
    with public_port(folder, free_port()) as running:
        yield running


@pytest.fixture(scope="module")
def member(port: PublicPort) -> Certificate:
    return certificate(port.folder, "line-1")


@pytest.fixture(autouse=True)
def _fresh(port: PublicPort) -> None:
    for service in (port.superlink, port.control):
        service.seen.clear()
        service.refuses.clear()


def message(answer: httpx.Response) -> str:
    """What the error in an answer's body says."""
    error = answer.json()["error"]
    assert error.keys() == {"kind", "message"}
    return str(error["message"])


def routes_of(router: Any) -> Iterator[str]:
    """The paths of a router of FastAPI, and of those that it includes."""
    for route in router.routes:
        inner = getattr(route, "original_router", None)
        yield from routes_of(inner) if inner is not None else [route.path]


def test_exactly_the_listed_paths_answer(port: PublicPort, member: Certificate) -> None:
    """All that Flower has on its one port, all that our own services have, and a few guesses."""
    routers = (fleet, control, create_runtime_router("SuperLink"), responses, health)
    flowers = {path for router in routers for path in routes_of(router)}
    assert {"/v1/control/start-run", "/v1/runtime/acquire-task"} < flowers
    assert set(FLEET) < flowers
    ours = {
        PUBLISH, COLLECT, "/", "/events", "/status.json", "/metrics", "/status/", paths.AUTHORISE,
        "/fedsplit-authorise", "/status/metrics", paths.FILES, f"{paths.FILES}/", f"{paths.TENSORS}/x",
        f"{paths.GRANT}/", f"{paths.GRANT}s", "/docs", "/openapi.json", paths.FLEET, f"{paths.FLEET}/", "/fedsplit/v1", "/fedsplit.v1.Encoder",
    }  # fmt: skip
    answered: dict[str, set[str]] = {}
    with port.client(member) as client:
        for path in sorted(flowers | ours | set(LISTED)):
            for method in METHODS:
                answer = client.request(method, path)
                if answer.status_code != 404:
                    answered.setdefault(path, set()).add(method)
                if answer.status_code not in (200, 404):
                    assert answer.status_code == 405, (method, path, answer)
                if answer.status_code != 200:
                    assert message(answer)
    assert answered.keys() == LISTED.keys()
    reached = {(m, p) for m, p, _, _ in port.superlink.asked + port.control.asked}
    assert reached == {(m, p) for p, m in LISTED.items()}


def test_another_spelling_of_a_path_is_another_path(port: PublicPort, member: Certificate) -> None:
    paths_of = [
        f"/{p}" for p in ("v1//fleet/pull-messages", "v1/fleet/./pull-messages", "v1/control/../fleet/pull-messages")
    ]  # fmt: skip
    tricks = [
        *paths_of,
        "//v1/fleet/pull-messages",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages/..",
        "/v1/fleet/pull-messages/../../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/..%2fcontrol/start-run",
        "/v1/fleet%2fpull-messages",
        "/v1/fleet/pull%2Dmessages",
        "/V1/Fleet/pull-messages",
        "/v1/fleet/pull-messages;x",
        "/v1/fleet/pull-messages%00",
        "/v1/fleet/pull-messages%20",
        "/fedsplit/v1/backbone/files/../../../internal/authorise",
        "/fedsplit/v1/backbone/files/%2e%2e",
        "/fedsplit/v1/backbone/files/..",
        "/fedsplit/v1/backbone/files/.hidden",
        "/fedsplit/v1/backbone/files/a/b",
        f"/fedsplit/v1/backbone/tensors/{DIGEST.upper()}",
        f"/fedsplit/v1/backbone/tensors/{DIGEST}0",
        "http://localhost/v1/control/start-run",
        "\\v1\\control\\start-run",
    ]
    for path in tricks:
        status = raw(port, f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        assert status in (404, 400), (path, status)
        assert raw(port, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n") in (404, 400)
    assert port.superlink.asked == port.control.asked == []
    # A query is no part of the path.
    with port.client() as client:
        assert client.post("/v1/fleet/get-run?x=/../%2e").status_code == 200
    assert [s[1].partition("?")[0] for s in port.superlink.asked] == ["/v1/fleet/get-run"]


def raw(port: PublicPort, text: str) -> int:
    """The status of a request whose bytes are these; 400 where the line is cut instead."""
    context = ssl.create_default_context(cafile=str(port.folder.ca))
    host, number = port.address.split(":")
    with (
        socket.create_connection((host, int(number)), 10) as line,
        context.wrap_socket(line, server_hostname=host) as tls,
    ):
        tls.sendall(text.encode())
        answer = tls.recv(64)
    return int(answer.split()[1]) if answer else 400


def test_what_needs_a_certificate_and_who_has_none(port: PublicPort, member: Certificate) -> None:
    other_ca = pki.make_ca("another", days=10)
    cases = [
        (None, "no-certificate", "a client certificate is wanted and none came"),
        (
            certificate(port.folder, "line-1", ca=other_ca),
            "certificate-foreign",
            "not of this federation",
        ),
        (
            certificate(port.folder, "line-1", days=-1 / 30),
            "certificate-expired",
            "certificate has expired: join again",
        ),
    ]
    for shown, kind, why in cases:
        with port.client(shown) as client:
            for path, method in CERTIFIED.items():
                answer = client.request(method, path)
                assert answer.status_code == 403
                assert answer.json()["error"]["kind"] == kind
                assert why in message(answer)
                assert "fedsplit site join" in message(answer)
            # Whoever shows a bad certificate is told so everywhere; without one the open paths are open.
            expected = 200 if shown is None else 403
            assert client.get(paths.HELLO).status_code == expected
            assert client.post(FLEET[0]).status_code == expected
    assert {s[1] for s in port.control.asked} == {paths.HELLO}
    with port.client(member) as client:
        for path, method in CERTIFIED.items():
            assert client.request(method, path).status_code == 200


def test_the_services_are_told_who_calls_and_not_what_the_caller_says(
    port: PublicPort, member: Certificate
) -> None:
    forged = {
        "X-Fedsplit-Proxy": SECRET,
        "X-Fedsplit-Site": "line-2",
        "X-Fedsplit-Serial": "42",
        "x_fedsplit_site": "line-2",
        "X-Real-IP": "10.0.0.1",
    }
    for shown, name, serial in ((None, "", ""), (member, "line-1", member.serial)):
        with port.client(shown, headers=forged) as client:
            client.get(paths.HELLO)
            client.post(FLEET[0])
            if shown:
                client.get(paths.MANIFEST)
        told = [s[2] for s in port.control.seen]
        assert len(told) == (2 if shown else 1)
        for headers in told:
            assert headers[paths.PROXY_HEADER] == SECRET
            assert headers.get(paths.SITE_HEADER, "") == name
            assert bare_serial(headers.get(paths.SERIAL_HEADER, "")) == serial
            assert headers["x-real-ip"] == "127.0.0.1"
            assert "line-2" not in headers.values()
        # Flower is told none of it, and least of all the secret.
        (_, _, fleet_headers, _) = port.superlink.asked[0]
        assert not [h for h in fleet_headers if "fedsplit" in h]
        port.control.seen.clear()
        port.superlink.seen.clear()


@pytest.mark.parametrize(
    ("subject", "name"),
    [
        ("line-1", "line-1"),
        ("site-0123456789abcdef", "site-0123456789abcdef"),
        ("a, CN=line-2", None),
        ("CN=line-2", None),
        ("検査", None),
        ("line-1\\", None),
        ("line 1", None),
    ],
)
def test_only_a_plain_common_name_is_a_name(
    port: PublicPort, subject: str, name: str | None
) -> None:
    """nginx hands on a subject in RFC 2253's form, with escapes."""
    folder = port.folder
    ca = pki.Pair.read(folder.ca, folder.ca_key)
    plain = certificate(folder, "placeholder")
    key = pki.read_key(plain.key.read_bytes())
    hosts = ["localhost"]
    pem = pki.issue(ca, key.public_key(), common_name=subject, hosts=hosts, days=1, client=True)
    plain.cert.write_bytes(pem)
    with port.client(plain) as client:
        answer = client.post(paths.REPORT)
    assert answer.status_code == (200 if name else 403)
    assert name or "names no site" in message(answer)
    told = [s[2][paths.SITE_HEADER] for s in port.control.asked]
    assert told == ([name] if name else [])


@pytest.mark.parametrize(
    ("path", "most"), [("push-object", 16 << 20), ("push-messages", 4 << 20), ("", 64 << 10)]
)
def test_a_large_body_is_refused_unread(port: PublicPort, path: str, most: int) -> None:
    where = f"{paths.FLEET}/{path}" if path else paths.JOIN
    # It is refused by its headers alone: not a byte of it is ever sent.
    assert (
        raw(port, f"POST {where} HTTP/1.1\r\nHost: x\r\nContent-Length: {64 << 20}\r\n\r\n") == 413
    )
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(64):
            sent += 1 << 20
            yield bytes(1 << 20)

    with port.client() as client:
        try:
            assert client.post(where, content=endless()).status_code == 413
        except httpx.TransportError:
            assert sent < 64 << 20
        assert client.post(where, content=bytes(most)).status_code == 200
    assert [s[3] for s in port.superlink.asked + port.control.asked] == [most]


def test_too_many_requests_are_told_to_come_back(port: PublicPort) -> None:
    with port.client() as client:
        answers = [client.post(paths.JOIN) for _ in range(40)]
    refused = [a for a in answers if a.status_code != 200]
    assert refused
    assert {a.status_code for a in refused} == {503}
    assert "too many requests" in message(refused[0])


def test_services_that_are_away(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "plant", public_page=True)
    with public_port(folder, free_port()) as port:
        shown = certificate(folder, "line-1")
        with port.client(shown) as client:
            # The page wants a login, and gives what it shows alone.
            assert client.get("/status/").status_code == 401
            for path, status in (
                ("", 200),
                ("events", 200),
                ("status.json", 200),
                ("metrics", 404),
            ):
                answer = client.get(f"/status/{path}", auth=("fedsplit", "a password"))
                assert answer.status_code == status
            assert client.get("/status/", auth=("fedsplit", "another")).status_code == 401
            assert [s[1] for s in port.control.asked] == ["/", "/events", "/status.json"]
        assert "nginx" not in json.dumps(dict(client_headers(port)))
    # The services are gone, nginx too; here it comes back alone.
    from fedsplit.plant.server.nginx_conf import Ports
    from tests.plant.server.public_port import running

    with (
        running(folder, Ports(free_port(), free_port(), free_port())),
        port.client(shown) as client,
    ):
        for path, method in ((FLEET[0], "POST"), (paths.HELLO, "GET"), (paths.REPORT, "POST")):
            answer = client.request(method, path)
            assert answer.status_code == 502
            assert "does not answer" in message(answer)


def client_headers(port: PublicPort) -> list[tuple[str, str]]:
    with port.client() as client:
        return [(k, v) for k, v in client.get("/nowhere").headers.items() if v != "nginx"]


def test_plain_http_is_told_what_the_port_speaks(port: PublicPort) -> None:
    answer = httpx.get(f"http://{port.address}/", trust_env=False)
    assert answer.status_code == 400
