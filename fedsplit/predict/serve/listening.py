"""Where a service listens, and the service itself in a thread of its own: in a command, or beside training at a site.

Beyond loopback it wants TLS and a token, always: what is asked and what is answered are the plant's own.
"""

from __future__ import annotations

import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from fedsplit.core.address import is_loopback
from fedsplit.core.closing import Closing
from fedsplit.core.errors import ConfigError, ServiceError
from fedsplit.predict.serve.answering import Answering
from fedsplit.predict.serve.app import create_app
from fedsplit.predict.serve.counts import Counts
from fedsplit.predict.serve.gate import Access, Gate

log = logging.getLogger(__name__)

GRACE_S = 30.0
"""How long what was taken may still take at the end."""
_START_S = 20.0
_MIN_TOKEN, _MAX_TOKEN = 24, 1024
_CONNECTIONS = 1000
_MAKE = "python -c 'import secrets; print(secrets.token_hex(32))'"


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where, and who may ask."""

    host: str = "127.0.0.1"
    port: int = 0
    """0: any that is free."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    token_file: Path | None = None

    @property
    def loopback(self) -> bool:
        """Can only this machine ask?"""
        return is_loopback(self._shown(1))

    def address(self, port: int) -> str:
        """As a browser writes it."""
        return f"{'https' if self.tls_cert else 'http'}://{self._shown(port)}"

    def _shown(self, port: int) -> str:
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"

    def checked(self) -> bytes:
        """The token, empty where everybody may ask. Raises ConfigError with all that is wrong."""
        faults = []
        if (self.tls_cert is None) != (self.tls_key is None):
            faults.append("a certificate and its key go together; give both or neither")
        for what, file in (("certificate", self.tls_cert), ("key", self.tls_key)):
            if file is not None and not file.is_file():
                faults.append(f"the {what} {file} is no file; give the path of a PEM file")
        if not self.loopback:
            if self.tls_cert is None:
                faults.append(
                    f"{self.host} can be reached from other machines, so TLS is wanted; give a certificate and its key, or "
                    f"listen on 127.0.0.1"
                )
            if self.token_file is None:
                faults.append(
                    f"{self.host} can be reached from other machines, so a token is wanted; write one into a file "
                    f"({_MAKE}) and give it as token file"
                )
        token = b""
        if self.token_file is not None:
            try:
                token = read_token(self.token_file)
            except ConfigError as err:
                faults.append(str(err))
        if not faults and self.tls_cert and self.tls_key:
            faults += _tls_faults(self.tls_cert, self.tls_key)
        if faults:
            raise ConfigError(
                "the service's settings have faults:\n" + "\n".join(f"  - {f}" for f in faults)
            )
        return token

    def bound(self) -> socket.socket:
        """A socket of the place. Raises ServiceError where it cannot be had."""
        found = None
        try:
            family, kind, protocol, _, place = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            found = socket.socket(family, kind, protocol)
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(place)
        except OSError as err:
            if found is not None:
                found.close()
            raise ServiceError(
                f"{self._shown(self.port)} cannot be listened on ({err.strerror}); choose another port or host, or end what "
                f"listens there"
            ) from err
        return found


def read_token(path: Path) -> bytes:
    """The token in a file, white space around it dropped. Raises ConfigError where it is weak or no header can hold it."""
    try:
        token = path.expanduser().read_bytes()[: 4 * _MAX_TOKEN].strip()
    except OSError as err:
        raise ConfigError(
            f"the token file {path} cannot be read ({err.strerror}); make one: {_MAKE} > {path}"
        ) from err
    if not re.fullmatch(rb"[0-9A-Za-z_.~+/=-]{%d,%d}" % (_MIN_TOKEN, _MAX_TOKEN), token):
        raise ConfigError(
            f"the token file {path} holds {len(token)} bytes; {_MIN_TOKEN} to {_MAX_TOKEN} letters, digits and - _ . ~ + / = "
            f"are wanted: {_MAKE} > {path}"
        )
    return token


def _tls_faults(cert: Path, key: Path) -> list[str]:
    """Why a certificate and a key cannot be used, as uvicorn would find."""
    try:
        # A key with a password would have OpenSSL ask at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: "")
    except (ssl.SSLError, OSError) as err:
        return [
            f"certificate {cert} and key {key} cannot be used ({err.strerror or err}); give a PEM certificate and its own key "
            f"without a password"
        ]
    return []


class Serving(Closing):
    """A service that runs: `address` says where. Owns its socket, its thread, and what answers."""

    def __init__(
        self,
        answering: Answering,
        at: Listening,
        *,
        access: Access,
        fault: Callable[[], str] | None = None,
        grace_s: float = GRACE_S,
    ) -> None:
        """Listen. Raises ConfigError, ServiceError. `access` keeps a line a call; `fault`: see create_app."""
        token = at.checked()
        self.answering, self.counts = answering, Counts()
        app = create_app(answering, self.counts, fault=fault)
        gate = Gate(app, counts=self.counts, access=access, token=token, loopback=at.loopback)
        config = uvicorn.Config(
            gate,
            # It bounds a request's head; the faster one does not.
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=max(1, int(grace_s)),
            ssl_certfile=at.tls_cert,
            ssl_keyfile=at.tls_key,
        )
        self._grace_s = grace_s
        socket_ = at.bound()
        self.address = at.address(socket_.getsockname()[1])
        self._server = uvicorn.Server(config)
        self._failed: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, args=[socket_], name="serve", daemon=True)
        self._thread.start()
        end = time.monotonic() + _START_S
        while not self._server.started:
            if not self.up or time.monotonic() > end:
                self.close()
                raise ServiceError(
                    f"the service at {self.address} did not start ({self._failed or 'no answer'}); its log says why"
                )
            time.sleep(0.01)

    @property
    def up(self) -> bool:
        """Does it still listen?"""
        return self._thread.is_alive()

    def close(self) -> None:
        """Take nothing more, answer what was taken, end."""
        self._server.should_exit = True
        self._thread.join(self._grace_s + 5)
        self.answering.close()

    def _run(self, socket_: socket.socket) -> None:
        try:
            self._server.run([socket_])
        except BaseException as err:
            self._failed.append(err)
            log.exception("the service ended")
        finally:
            socket_.close()
