"""Where the run's sites find the encoder: publishes module versions to it and signs the sites' tokens.

The host behind it may run in the ServerApp's own process or be a `fedsplit encoder serve` elsewhere; to the
strategy they look alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedsplit.core.config import RunConfig
from fedsplit.core.encoder import Grant
from fedsplit.core.errors import ConfigError
from fedsplit.federation.messages import Stream
from fedsplit.transport import tokens
from fedsplit.transport.client import publish
from fedsplit.transport.keys import read_key
from fedsplit.transport.wiring import ClientTls

Publish = Callable[[str, bytes], None]
# A round's token outlives its deadline by this, for sites that start late.
TOKEN_MARGIN_S = 300.0


@dataclass(frozen=True)
class Endpoint:
    """An encoder that sites can dial."""

    address: str
    key: bytes
    tls: bool
    ca_file: str
    publish: Publish
    """(version, packed module) -> installed at the host."""

    def stream_for(self, grant: Grant, *, deadline_s: float) -> Stream:
        """What a site needs to open its stream for one round."""
        token = tokens.sign(grant, self.key, deadline_s + TOKEN_MARGIN_S)
        return Stream(
            address=self.address, token=token, grant=grant, tls=self.tls, ca_file=self.ca_file
        )


def external(config: RunConfig) -> Endpoint:
    """The endpoint of a `fedsplit encoder serve` at `encoder-address`. Raises ConfigError."""
    if not config.encoder_secret_file:
        raise ConfigError(
            f"encoder-address={config.encoder_address} is an encoder of its own, so "
            f"encoder-secret-file is wanted: the file that it was started with"
        )
    key = read_key(Path(config.encoder_secret_file))
    use_tls = bool(config.encoder_tls_ca)
    tls = ClientTls(root_ca=Path(config.encoder_tls_ca)) if use_tls else None

    def send(version: str, packed: bytes) -> None:
        token = tokens.sign_publisher(config.task, key, TOKEN_MARGIN_S)
        publish(
            config.encoder_address, token, version, packed, tls,
            allow_insecure=config.encoder_insecure,
        )  # fmt: skip

    return Endpoint(config.encoder_address, key, use_tls, config.encoder_tls_ca, send)
