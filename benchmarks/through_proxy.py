"""What the public port costs a step: streams through nginx against direct ones. `python -m benchmarks through-proxy`

The step stream of stream_echo.py (16 x 197 x 192 float32 up and down, two in flight) to an encoder in a process of its own:
directly in plain text, and through the nginx of a federation folder, with TLS and a site's certificate.
"""

from __future__ import annotations

import multiprocessing
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.paired import Progress, interleave, median, quiet, with_ratio
from benchmarks.stream_echo import KEY, IdentityHost, grant, stream_rate
from fedsplit.plant import pki
from fedsplit.plant.server import nginx
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.init import Wanted, make_folder
from fedsplit.plant.server.nginx_conf import Ports
from fedsplit.transport.client import ClientTls
from fedsplit.transport.keys import read_proxy_secret
from fedsplit.transport.server import EncoderServer


class _Authority(BaseHTTPRequestHandler):
    """In the control service's place: every certificate is in force."""

    def do_GET(self) -> None:
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def serve(pipe: Connection, secret: bytes) -> None:
    """Both encoders and the authority in one process, until the pipe says stop."""
    authority = ThreadingHTTPServer(("127.0.0.1", 0), _Authority)
    threading.Thread(target=authority.serve_forever, daemon=True).start()
    with (
        EncoderServer(IdentityHost(), key=KEY) as direct,
        EncoderServer(IdentityHost(), key=KEY, proxy_secret=secret) as behind,
    ):
        pipe.send((direct.address, _port_of(behind.address), authority.server_address[1]))
        pipe.recv()
    authority.shutdown()


@contextmanager
def addresses(folder: FederationFolder) -> Iterator[tuple[str, str]]:
    """The encoder's address, and the public port's in front of another one like it."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=serve, args=(there, read_proxy_secret(folder.proxy_secret)))
    process.start()
    try:
        direct, encoder, control = here.recv()
        # Nothing asks the SuperLink here.
        with subprocess.Popen(nginx.prepare(folder, Ports(1, encoder, control))) as proxy:
            try:
                yield direct, _ready(folder.settings.server.port)
            finally:
                proxy.terminate()
        here.send("stop")
    finally:
        here.close()
        process.join(20)
        process.kill()


def run(pairs: int = 9, steps: int = 60, *, progress: Progress = quiet) -> dict[str, Any]:
    """Interleaved pairs; `ratio` is the median of proxy/direct. Raises ConfigError without an nginx."""
    with tempfile.TemporaryDirectory() as place:
        wanted = Wanted(host="localhost", port=_free_port(), bind="127.0.0.1")
        folder = make_folder(Path(place) / "plant", wanted)
        tls = _member(folder)
        with addresses(folder) as (direct, public):
            rounds = interleave(
                {
                    "direct": lambda: stream_rate(direct, steps),
                    "proxy": lambda: stream_rate(public, steps, tls),
                },
                rounds=pairs,
                progress=progress,
            )
    kept = with_ratio(rounds, "proxy", "direct")
    return {
        "name": "through-proxy",
        "value": median(kept, "proxy"),
        "unit": "steps/s of 2.4 MB up and down",
        "compared_with": "the same steps directly to the encoder, in plain text",
        "ratio": median(kept, "ratio"),
        "pairs": kept,
        "nginx": ".".join(map(str, nginx.find().version)),
    }


def _member(folder: FederationFolder) -> ClientTls:
    """A certificate of the site that the grant is for."""
    ca, key = pki.Pair.read(folder.ca, folder.ca_key), pki.new_key()
    site = grant().site
    pem = pki.issue(ca, key.public_key(), common_name=site, days=1, client=True)
    (folder.path / "site.pem").write_bytes(pem)
    (folder.path / "site.key").write_bytes(pki.key_pem(key))
    return ClientTls(root_ca=folder.ca, cert=folder.path / "site.pem", key=folder.path / "site.key")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def _ready(port: int) -> str:
    """The public address, once something listens there."""
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return f"localhost:{port}"
