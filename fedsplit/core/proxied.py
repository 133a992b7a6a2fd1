"""What a reverse proxy in front of a service says of a caller, and how the service knows that the proxy says it.

The proxy ends TLS, so it alone has seen the caller's certificate. It passes the name and the serial number on in headers,
beside a secret that it shares with the service, and clears whatever the caller sent under these names. Read by the
encoder's port and by the control service; docs/protocol.md specifies it.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import quote

PROXY_HEADER = "x-fedsplit-proxy"
"""The secret that proxy and services share. Without it the two below are anybody's words."""
SITE_HEADER = "x-fedsplit-site"
"""The verified certificate's common name; empty without a certificate."""
SERIAL_HEADER = "x-fedsplit-serial"
"""Its serial number, hexadecimal; empty without a certificate."""
REASON_HEADER = "x-fedsplit-reason"
"""What the control service answers the proxy beside a 403: why this caller may not in, as `reason_text`."""

_MAX_REASON = 300
_PLAIN = " !#$&'()*+,-./:;<=>?@[]^_`{|}~"


class Proxied(NamedTuple):
    """What the proxy has seen. Both are empty for a caller without a certificate."""

    site: str
    serial: str


def proxied(headers: Iterable[tuple[str, str]], secret: bytes) -> Proxied | None:
    """What the proxy says of a call with these headers; None where none of its headers is there.

    Raises ValueError where the secret is not the proxy's, or a header stands there twice: then nothing is believed.
    """
    found: dict[str, str] = {}
    for key, value in headers:
        name = key.lower()
        if name not in (PROXY_HEADER, SITE_HEADER, SERIAL_HEADER):
            continue
        if name in found:
            raise ValueError(
                f"the header {name} stands there twice: the proxy must replace what a caller sends"
            )
        found[name] = value
    if not found:
        return None
    shown = found.get(PROXY_HEADER, "").encode(errors="replace")
    if not hmac.compare_digest(shown, secret):
        raise ValueError(
            f"the header {PROXY_HEADER} does not hold the proxy's secret: give proxy and service the same secret file"
        )
    return Proxied(found.get(SITE_HEADER, ""), bare_serial(found.get(SERIAL_HEADER, "")))


def bare_serial(text: str) -> str:
    """A serial number in one form: capital hexadecimal digits without colons and leading zeros."""
    return text.replace(":", "").upper().lstrip("0")


def reason_text(text: str) -> str:
    """A text as gRPC's message header holds it: ASCII, with escapes that the client's gRPC undoes."""
    return quote(text[:_MAX_REASON], safe=_PLAIN)
