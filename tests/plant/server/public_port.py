"""A federation folder with the real nginx on loopback, and services behind it that write down what reaches them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedsplit.core.proxied import bare_serial
from fedsplit.plant import paths, pki
from fedsplit.plant.server import nginx
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.nginx_conf import Ports

needs_nginx = pytest.mark.skipif(
    shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin") is None,
    reason="there is no nginx here",
)
SECRET = "a-secret-that-proxy-and-services-share"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_folder(path: Path, *, public_page: bool = False) -> FederationFolder:
    """What `server init` makes, as far as the public port needs it."""
    for name in ("ca", "tls", "secrets", "run"):
        (path / name).mkdir(parents=True)
    page = f"[page]\npublic = {str(public_page).lower()}\n"
    (path / "federation.toml").write_text(
        f'format = 1\n[server]\nhost = "localhost"\nport = {free_port()}\nbind = "127.0.0.1"\n{page}'
    )
    folder = FederationFolder.at(path)
    ca = pki.make_ca("the federation's CA", days=10)
    folder.ca.write_bytes(ca.pem)
    folder.ca_key.write_bytes(ca.key_pem)
    key = pki.new_key()
    hosts = ["localhost", "127.0.0.1"]
    leaf = pki.issue(
        ca, key.public_key(), common_name="localhost", hosts=hosts, days=5, client=False
    )
    folder.loopback_certificate.write_bytes(leaf + ca.pem)
    folder.loopback_certificate_key.write_bytes(pki.key_pem(key))
    folder.proxy_secret.write_text(SECRET)
    folder.encoder_secret.write_text("e" * 64)
    folder.page_password.write_text("a password")
    return folder


@dataclass(frozen=True)
class Certificate:
    """A site's files."""

    cert: Path
    key: Path

    @property
    def serial(self) -> str:
        return pki.serial(pki.read_certificate(self.cert.read_bytes()))


def certificate(
    folder: FederationFolder, name: str, *, days: float = 1.0, ca: pki.Pair | None = None
) -> Certificate:
    """One of the federation's CA, or of another; over since an hour with negative `days`."""
    made = folder.path / "sites"
    made.mkdir(exist_ok=True)
    number = len(list(made.iterdir()))
    cert, key = made / f"{number}.pem", made / f"{number}.key"
    private = pki.new_key()
    ca = ca or pki.Pair.read(folder.ca, folder.ca_key)
    cert.write_bytes(pki.issue(ca, private.public_key(), common_name=name, days=days, client=True))
    key.write_bytes(pki.key_pem(private))
    return Certificate(cert, key)


@dataclass
class Service:
    """An HTTP service that answers 200 and keeps what it was asked. `refuses` are serial numbers."""

    port: int = 0
    seen: list[tuple[str, str, dict[str, str], int]] = field(default_factory=list)
    """Method, path as it came, headers in small letters, bytes of the body."""
    refuses: dict[str, str] = field(default_factory=dict)
    """Serial number -> the reason that is told."""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        size = int(request.headers.get("content-length", 0))
        body = request.rfile.read(size)
        headers = {k.lower(): v for k, v in request.headers.items()}
        self.seen.append((request.command, request.path, headers, len(body)))
        reason = self.refuses.get(bare_serial(headers.get(paths.SERIAL_HEADER, "")))
        refused = request.path == paths.AUTHORISE and reason is not None
        request.send_response(403 if refused else 200)
        if refused and reason:
            request.send_header(paths.REASON_HEADER, reason)
        request.send_header("content-length", "0")
        request.end_headers()

    @property
    def asked(self) -> list[tuple[str, str, dict[str, str], int]]:
        """Without the proxy's own questions."""
        return [s for s in self.seen if s[1] != paths.AUTHORISE]


@contextmanager
def service(tls: FederationFolder | None = None) -> Iterator[Service]:
    """A Service on a free port, with the federation's TLS where a folder is given."""
    told = Service()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def __getattr__(self, name: str) -> Any:
            if name.startswith("do_"):  # whatever the method
                return lambda: told.answer(self)
            raise AttributeError(name)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls.loopback_certificate, tls.loopback_certificate_key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    told.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield told
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def running(
    folder: FederationFolder, ports: Ports, **as_whom: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """nginx in front of these ports, ready; ended on the way out."""
    command = nginx.prepare(folder, ports)
    if as_whom:  # what root's check has made, that user would have made
        for path in nginx.home_of(folder.nginx_conf).rglob("*"):
            os.chown(path, as_whom["user"], as_whom["group"])
    with subprocess.Popen(command, stderr=subprocess.PIPE, **as_whom) as process:
        try:
            await_port(folder.settings.server.port)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=10)


def await_port(port: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            assert time.monotonic() < deadline, f"nothing listens at {port}"
            time.sleep(0.02)
        else:
            return


@dataclass
class PublicPort:
    """Everything of a test."""

    folder: FederationFolder
    superlink: Service
    control: Service
    encoder: int
    process: subprocess.Popen[bytes]

    @property
    def address(self) -> str:
        return f"localhost:{self.folder.settings.server.port}"

    def client(self, site: Certificate | None = None, **more: Any) -> httpx.Client:
        """An HTTP client of this port."""
        return client(self.folder, site, **more)


def client(folder: FederationFolder, site: Certificate | None = None, **more: Any) -> httpx.Client:
    """An HTTP client that trusts the federation's CA, with a site's certificate where one is given."""
    context = ssl.create_default_context(cafile=str(folder.ca))
    if site is not None:
        context.load_cert_chain(site.cert, site.key)
    url = f"https://localhost:{folder.settings.server.port}"
    return httpx.Client(base_url=url, verify=context, trust_env=False, timeout=20, **more)


@contextmanager
def public_port(folder: FederationFolder, encoder: int) -> Iterator[PublicPort]:
    """The public port in front of an encoder and of services that write down what reaches them."""
    with (
        service(folder) as superlink,
        service() as control,
        running(folder, Ports(superlink.port, encoder, control.port)) as process,
    ):
        yield PublicPort(folder, superlink, control, encoder, process)
