"""Serves the encoder: inside the ServerApp's own process (`hosting`), or as a process of its own (`serve_encoder`)."""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from fedsplit.core.config import RunConfig
from fedsplit.core.whole_files import write_whole
from fedsplit.model.backbone import Backbone
from fedsplit.transport.keys import read_key, read_proxy_secret
from fedsplit.transport.server import EncoderServer
from fedsplit.transport.wiring import ServerTls
from fedsplit.trunk.host import BackboneHost
from fedsplit.trunk.registered import in_registry

STATS_EVERY_S = 2.0


@contextmanager
def hosting(
    config: RunConfig, key: bytes | None
) -> Iterator[tuple[EncoderServer, BackboneHost, bytes]]:
    """Serve the run's backbone from this process while inside. A key is made when none is given.

    Raises ConfigError when the port is taken, BackboneError when the model cannot be read.
    """
    host = BackboneHost(Backbone.find(config.placement.backbone))
    key = key or secrets.token_bytes(32)
    tls = None
    if config.link.encoder_tls_cert:
        tls = ServerTls(
            cert=Path(config.link.encoder_tls_cert), key=Path(config.link.encoder_tls_key)
        )
    bind = config.link.encoder_bind or "127.0.0.1:0"
    with EncoderServer(
        host, bind=bind, key=key, tls=tls, allow_insecure=config.link.encoder_insecure
    ) as server:
        yield server, host, key


def serve_encoder(
    *,
    backbone: str,
    bind: str,
    secret_file: Path,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    tls_client_ca: Path | None = None,
    allow_insecure: bool = False,
    proxy_secret_file: Path | None = None,
    revoked_file: Path | None = None,
    stats_file: Path | None = None,
    registry: Path | None = None,
    on_ready: Callable[[str], None],
) -> None:
    """Serve until SIGTERM or Ctrl-C. `on_ready` gets the address once sites may dial.

    `stats_file` is rewritten every few seconds with what the server counts, JSON. `registry` is the folder of the module
    versions that sites may predict with.
    """
    key = read_key(secret_file)
    proxy_secret = read_proxy_secret(proxy_secret_file) if proxy_secret_file else b""
    host = BackboneHost(
        Backbone.find(backbone), modules=in_registry(registry) if registry else None
    )
    tls = None
    if tls_cert is not None and tls_key is not None:
        tls = ServerTls(cert=tls_cert, key=tls_key, client_ca=tls_client_ca)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with EncoderServer(
        host, bind=bind, key=key, tls=tls, allow_insecure=allow_insecure, proxy_secret=proxy_secret,
        revoked_file=revoked_file,
    ) as server:  # fmt: skip
        on_ready(server.address)
        due = 0.0
        # A wait without a time-out cannot be interrupted on Windows.
        while not stop.wait(0.5):
            if stats_file is not None and time.monotonic() >= due:
                due = time.monotonic() + STATS_EVERY_S
                _write_stats(stats_file, server)


def _write_stats(path: Path, server: EncoderServer) -> None:
    """Counters for whoever watches. They must cost the service nothing, least of all its life where the disk is full."""
    numbers = server.stats().model_dump() | {"rss_bytes": psutil.Process().memory_info().rss}
    with contextlib.suppress(OSError):
        write_whole(path, json.dumps(numbers) + "\n")
