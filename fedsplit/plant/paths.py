"""The public port's paths: what nginx forwards, what the services answer, what a site asks for.

The headers by which the proxy tells who calls: core/proxied.py, which the encoder reads too.
"""

from __future__ import annotations

from fedsplit.core.proxied import PROXY_HEADER as PROXY_HEADER
from fedsplit.core.proxied import REASON_HEADER as REASON_HEADER
from fedsplit.core.proxied import SERIAL_HEADER as SERIAL_HEADER
from fedsplit.core.proxied import SITE_HEADER as SITE_HEADER

FLEET = "/v1/fleet"
FLEET_CALLS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "get-run",
    "get-fab",
    "pull-object",
    "push-object",
    "push-messages",
    "confirm-message-received",
)
"""What a SuperNode asks of a SuperLink, POST all of them; nothing else of Flower is public."""
ENCODER_CALLS = ("/fedsplit.v1.Encoder/Steps", "/fedsplit.v1.Encoder/Capabilities")
"""What a site asks of the encoder. Publishing and collecting are the ServerApp's, on loopback."""

HELLO = "/fedsplit/v1/hello"
JOIN = "/fedsplit/v1/join"
RENEW = "/fedsplit/v1/renew"
REPORT = "/fedsplit/v1/report"
GRANT = "/fedsplit/v1/grant"
BACKBONE = "/fedsplit/v1/backbone"
MANIFEST = f"{BACKBONE}/manifest"
FILES = f"{BACKBONE}/files"
TENSORS = f"{BACKBONE}/tensors"
MODULES = "/fedsplit/v1/modules"
"""MODULES/DIGEST lists the files of a version that is in use; MODULES/DIGEST/files/NAME is one of them."""

AUTHORISE = "/internal/authorise"
"""Of the control service, for the proxy alone: may the certificate with this serial in?"""
