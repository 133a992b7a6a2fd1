"""Where the run's sites find the encoder: publishes module versions to it and signs the sites' tokens.

The host behind it may run in the ServerApp's own process or be a `fedsplit encoder serve` elsewhere; to the
strategy they look alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedsplit import __version__
from fedsplit.core.config import RunConfig
from fedsplit.core.encoder import Array, Capabilities, Grant
from fedsplit.core.errors import ConfigError, OverloadedError, UnreachableError
from fedsplit.core.orders import Stream
from fedsplit.model.backbone import Backbone
from fedsplit.transport import tokens
from fedsplit.transport.client import capabilities, collect, publish
from fedsplit.transport.keys import read_key
from fedsplit.transport.wiring import ClientTls

Publish = Callable[[str, bytes], None]
Collect = Callable[[str], dict[str, dict[str, Array]]]
# A round's token outlives its deadline by this, for sites that start late.
TOKEN_MARGIN_S = 300.0
# How often an encoder that does not answer is tried.
RETRY_S = 1.0
EVERYWHERE = ("0.0.0.0", "[::]")


@dataclass(frozen=True)
class Endpoint:
    """An encoder that sites can dial."""

    address: str
    key: bytes
    tls: bool
    ca_file: str
    publish: Publish
    """(version, packed module) -> installed at the host."""
    collect: Collect
    """version -> site -> deltas that the host trained on its behalf; under "" those of a shared copy."""

    def deliver(
        self, version: str, packed: bytes, *, wait_s: float, on_update: Callable[[str], None]
    ) -> None:
        """Publish; an encoder that does not answer, for it is being restarted, is waited for. Raises EncoderError."""
        end, said = time.monotonic() + wait_s, False
        while True:
            try:
                return self.publish(version, packed)
            except (UnreachableError, OverloadedError) as err:
                if time.monotonic() >= end:
                    raise
                if not said:
                    on_update(f"the encoder is waited for, up to {wait_s:g} s: {err}")
                said = True
                time.sleep(RETRY_S)

    def stream_for(self, grant: Grant, *, deadline_s: float) -> Stream:
        """What a site needs to open its stream for one round."""
        token = tokens.sign(grant, self.key, deadline_s + TOKEN_MARGIN_S)
        return Stream(
            address=self.address, token=token, grant=grant, tls=self.tls, ca_file=self.ca_file
        )


def hosted(
    config: RunConfig, *, address: str, key: bytes, publish: Publish, collect: Collect
) -> Endpoint:
    """The endpoint of the app's own encoder, which listens on `address`. Raises ConfigError."""
    dialled = config.link.encoder_address or address
    if dialled.rpartition(":")[0] in EVERYWHERE:
        raise ConfigError(
            f"encoder-bind={config.link.encoder_bind} listens on all of this machine's addresses, and sites cannot "
            f"dial that; set encoder-address to the HOST:PORT at which they reach it"
        )
    tls = bool(config.link.encoder_tls_cert)
    return Endpoint(dialled, key, tls, config.link.encoder_tls_ca, publish, collect)


def external(config: RunConfig) -> Endpoint:
    """The endpoint of a `fedsplit encoder serve` at `encoder-address`, which must answer and fit the run.

    Raises ConfigError and EncoderError: now, not after a roll call of minutes.
    """
    address = config.link.encoder_address
    if not config.link.encoder_secret_file:
        raise ConfigError(
            f"encoder-address={address} is an encoder of its own, so "
            f"encoder-secret-file is wanted: the file that it was started with"
        )
    key = read_key(Path(config.link.encoder_secret_file))
    # Beside an encoder elsewhere, certificate and key are what the app itself shows to it.
    tls = ClientTls.of(
        config.link.encoder_tls_ca, config.link.encoder_tls_cert, config.link.encoder_tls_key
    )

    def token() -> str:
        return tokens.sign_publisher(config.task.name, key, TOKEN_MARGIN_S)

    def send(version: str, packed: bytes) -> None:
        publish(address, token(), version, packed, tls, allow_insecure=config.link.encoder_insecure)

    def fetch(version: str) -> dict[str, dict[str, Array]]:
        return collect(address, token(), version, tls, allow_insecure=config.link.encoder_insecure)

    offered = capabilities(address, token(), tls, allow_insecure=config.link.encoder_insecure)
    _check_fits(config, offered)
    return Endpoint(address, key, tls is not None, config.link.encoder_tls_ca, send, fetch)


def _check_fits(config: RunConfig, offered: Capabilities) -> None:
    """Raise ConfigError unless the encoder runs the same fedsplit over the same model files."""
    if offered.fedsplit_version != __version__:
        raise ConfigError(
            f"the encoder at {config.link.encoder_address} runs fedsplit {offered.fedsplit_version}, the "
            f"ServerApp {__version__}; install the same version on both"
        )
    backbone = Backbone.find(config.placement.backbone)
    if offered.backbone_sha256 != backbone.sha256:
        raise ConfigError(
            f"the encoder at {config.link.encoder_address} hosts {offered.backbone!r} with digest "
            f"{offered.backbone_sha256[:12]}, backbone={config.placement.backbone} of the run has {backbone.sha256[:12]} "
            f"({backbone.differs(offered.backbone_sha256)}); "
            f"start the encoder with --backbone {backbone.path}, or set backbone to what it hosts"
        )
