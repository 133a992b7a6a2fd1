"""A federation folder with a CA, as `fedsplit server init` makes it, without the rest."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from fedsplit.plant import pki
from fedsplit.plant.server.folder import FederationFolder

PROXY_SECRET = "p" * 64
CA = pki.make_ca("fedsplit test", days=3650)


@pytest.fixture
def folder(tmp_path: Path) -> FederationFolder:
    path = tmp_path / "plant? 検査 %41#1"
    (path / "ca").mkdir(parents=True)
    (path / "secrets").mkdir()
    (path / "federation.toml").write_text(
        'format = 1\n[server]\nhost = "fl.example"\nport = 8443\n'
    )
    found = FederationFolder.at(path)
    found.ca.write_bytes(CA.pem)
    found.ca_key.write_bytes(CA.key_pem)
    found.proxy_secret.write_text(PROXY_SECRET)
    found.encoder_secret.write_text("e" * 64)
    return found


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[httpx.Client]:
    """A client of the app, which a real server serves on loopback."""
    config = uvicorn.Config(app, port=0, log_level="critical", ws="none", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(10)
