"""How a site reaches the encoder of a round: over gRPC, or, where an engine says so, in its own process."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Protocol

from fedsplit.core.config import RunConfig
from fedsplit.core.encoder import Encoder
from fedsplit.core.errors import OverloadedError
from fedsplit.core.orders import Stream
from fedsplit.training.site_settings import SiteSettings
from fedsplit.transport.client import StreamEncoder
from fedsplit.transport.wiring import ClientTls


class CountingEncoder(Encoder, Protocol):
    """An encoder that knows what it moved."""

    @property
    def bytes_up(self) -> int:
        """Bytes sent so far."""
        ...

    @property
    def bytes_down(self) -> int:
        """Bytes received so far."""
        ...

    @property
    def steps(self) -> int:
        """Steps sent so far."""
        ...


class Dial(Protocol):
    """Opens a round's encoder; it is closed at the end of the `with`."""

    def __call__(
        self, how: Stream, config: RunConfig, site: SiteSettings
    ) -> AbstractContextManager[CountingEncoder]:
        """Raises EncoderError and its kinds."""
        ...


def dial_stream(
    how: Stream, config: RunConfig, site: SiteSettings
) -> AbstractContextManager[CountingEncoder]:
    """Open the round's gRPC stream; where the encoder is full, come back when it says so."""
    tls = _tls(how, site)
    # Half the round must be left for the work itself.
    give_up = time.monotonic() + config.server.deadline_s / 2
    while True:
        try:
            return StreamEncoder(
                # A site may see another address than the run's settings name: a proxy, a tunnel.
                site.encoder_address or how.address,
                how.token,
                how.grant,
                codec=config.link.codec,
                tls=tls,
                max_in_flight=config.link.in_flight,
                # A site that asks for TLS has it, whatever the run's settings allow.
                allow_insecure=config.link.encoder_insecure and tls is None,
            )
        except OverloadedError as err:
            if time.monotonic() + err.retry_after_s > give_up:
                raise
            time.sleep(err.retry_after_s)


def _tls(how: Stream, site: SiteSettings) -> ClientTls | None:
    """What the site's own settings ask for; an order may ask for more than they do, never for less.

    The order's CA file is a path on the machine that simulates all sites. A deployed site has its own, or the system's.
    """
    told = how.ca_file if site.partition is not None else ""
    wanted = how.tls or bool(site.encoder_tls_cert)  # who has a certificate means to show it
    ca = site.encoder_tls_ca or (told or "system" if wanted else "")
    return ClientTls.of(ca, site.encoder_tls_cert, site.encoder_tls_key)
