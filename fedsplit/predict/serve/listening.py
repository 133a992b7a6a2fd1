"""Where a service listens and who may ask. Without torch, so that a site's parent process can check its settings.

Beyond loopback it wants TLS and a token, always: what is asked and what is answered are the plant's own.
"""

from __future__ import annotations

import re
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from fedsplit.core.address import is_loopback
from fedsplit.core.errors import ConfigError, ServiceError

_MIN_TOKEN, _MAX_TOKEN = 24, 1024
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
