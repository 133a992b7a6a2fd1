"""Which proxy variable would catch a connection: http_proxy and its kin, unless no_proxy names the host.

Flower's client (httpx) and gRPC obey them without a word, and a proxy of an office knows nothing of a plant's machines.
"""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping

_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")


def proxy_variable(address: str, env: Mapping[str, str]) -> str:
    """The name of the variable that catches HOST:PORT, empty where none does. Its value may hold a password."""
    host = address.rpartition(":")[0].strip("[]")
    unless = env.get("no_proxy") or env.get("NO_PROXY") or ""
    bypass = urllib.request.proxy_bypass_environment  # type: ignore[attr-defined]
    if not host or bypass(host, {"no": unless}):
        return ""
    both = (name for key in _VARIABLES for name in (key, key.upper()))
    return next((name for name in both if env.get(name)), "")
