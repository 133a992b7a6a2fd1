"""Addresses, HOST:PORT: what is dialled and listened on."""

from __future__ import annotations

import ipaddress

from fedsplit.core.errors import ConfigError


def host_of(address: str) -> str:
    """The host of "host:port" or "[v6]:port". Raises ConfigError for anything else."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise ConfigError(
            f"{address!r} is not an address to listen on or to dial: HOST:PORT is wanted, e.g. 127.0.0.1:9443"
        )
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ConfigError(
            f"{address!r} may be read in two ways; an address of IPv6 stands in brackets: [{host}]:{port}"
        )
    return host.removeprefix("[").removesuffix("]")


def is_loopback(address: str) -> bool:
    """True when "host:port" can only be reached from this machine."""
    host = host_of(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
