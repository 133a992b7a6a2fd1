"""The link between sites and encoder: its address, its keys, and how activations travel."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedsplit.core.config.section import ANEW, SERVERS_OWN, Check, Section


class LinkSection(Section):
    """The link between sites and encoder."""

    codec: Literal["fp32", "fp16"] = "fp32"
    """How activations and gradients become bytes: fp32 (exact) or fp16 (half the bytes)."""
    in_flight: int = Field(default=2, ge=1, le=8)
    """Steps on the wire at the same time, where the algorithm allows it: evaluation, frozen heads."""
    cache_activations: bool = False
    """Keep the encoder's answer for each sample in memory while its module stays the same."""
    encoder_address: Annotated[str, ANEW] = ""
    """HOST:PORT that sites connect to; empty: the app hosts the encoder on loopback."""
    encoder_bind: Annotated[str, ANEW, SERVERS_OWN] = ""
    """HOST:PORT on which the app's own encoder listens. Empty with an address: the encoder runs elsewhere."""
    encoder_secret_file: Annotated[str, ANEW, SERVERS_OWN] = ""
    """File with the key that signs the sites' tokens, shared with `fedsplit encoder serve`."""
    encoder_tls_cert: Annotated[str, ANEW, SERVERS_OWN] = ""
    """PEM file: certificate of the app's own encoder port."""
    encoder_tls_key: Annotated[str, ANEW, SERVERS_OWN] = ""
    """PEM file: its key. If the encoder runs elsewhere, the app shows both to it."""
    encoder_tls_ca: Annotated[str, ANEW] = ""
    """CA with which sites check the encoder: a PEM file, or "system". A site's node config overrides it."""
    encoder_insecure: Annotated[bool, ANEW] = False
    """Allow the encoder port without TLS beyond loopback."""

    def contradictions(self) -> list[Check]:
        """Settings of this section that cannot go together."""
        return [
            (
                bool(self.encoder_tls_cert) != bool(self.encoder_tls_key),
                "encoder-tls-cert and encoder-tls-key go together; set both or neither",
            ),
        ]
